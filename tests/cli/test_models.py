"""``kvpilot models`` from a dataset to a bundle in charge, and how it refuses."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner, Result

from cli.main import app
from kvpilot.v1 import operator_pb2, operator_pb2_grpc
from models import registry
from models.manifest import MANIFEST, PREDICTOR
from models.registry import Registry
from tests.models.fitted import made
from tests.models.synthetic import PIPELINES, table, write


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache and state folder of the test's own."""
    monkeypatch.setenv("KVPILOT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(registry, "SHIPPED", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def store(home: Path) -> Registry:
    store = Registry()
    for version in ("a", "b"):
        store.put(made(version))
    return store


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data"), table(documents=60, windows=2, seed=3))


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["models", *map(str, words)])


def said(result: Result, code: int = 0) -> str:
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.slow
def test_train_show_list_evaluate(home: Path, data: Path) -> None:
    trained = run("train", "--data", data, "--folds", "2", "--version", "mine", "--note", "a first try")
    said(trained)
    assert trained.stdout.strip() == "mine"
    assert "spearman_within" in trained.stderr
    manifest = json.loads(said(run("show", "mine", "--json")))
    assert manifest["provenance"]["models"] == ["made-up"]
    assert manifest["provenance"]["splits"]["train"]["documents"] > 25
    assert len(manifest["provenance"]["files"]["replays.parquet"]) == 64
    assert manifest["metrics"]["spearman_within"] > 0.3
    shown = said(run("show", "mine"))
    for expected in ("a first try", "calibration, alpha 0.1", "window", "others", "spearman_within"):
        assert expected in shown
    assert said(run("list")).split("\t")[:2] == ["mine", "-"]

    evaluated = said(run("evaluate", "--report", home / "report", "--data", data, "--steering-overhead", "0.01"))
    for expected in ("spearman_pooled", "at least 0.9", "tick_ms_256", "bundle mine"):
        assert expected in evaluated
    figures = json.loads((home / "report" / "report.json").read_text())
    assert figures["steering_overhead"] == 0.01
    assert figures["tick_ms_256"] > 0
    assert (home / "report" / "report.html").is_file()


def test_evaluate_all_documents_of_other_data(store: Registry, home: Path, data: Path) -> None:
    said(
        run(
            *("evaluate", "--bundle", "a", "--report", home / "r", "--data", data),
            *("--all-documents", "--no-tick", "--steering-rounds", 0),
        )
    )
    figures = json.loads((home / "r" / "report.json").read_text())
    assert (figures["bundle"], figures["documents"], figures["tick_ms_256"]) == ("a", 60, None)


def test_calibrate_makes_a_new_bundle_with_the_same_models(store: Registry, data: Path) -> None:
    made_one = run("calibrate", "a", "--data", data, "--all-documents", "--alpha", "0.2", "--version", "a-recalibrated")
    assert said(made_one).strip() == "a-recalibrated"
    old, new = store.load("a"), store.load("a-recalibrated")
    assert (old.alpha, new.alpha) == (0.1, 0.2)
    assert new.calibration.pooled.bound < old.calibration.pooled.bound
    rows = json.loads((store.get("a") / "selftest.json").read_text())["rows"]
    assert new.manifest.provenance == old.manifest.provenance
    assert new.manifest.note == "a, calibrated on 60 documents"
    assert len(rows) > 10


def test_explain_a_dataset_and_a_window(store: Registry, data: Path) -> None:
    over_all = said(run("explain", "b", "--data", data, "--top", "4"))
    assert "mass_beyond" in over_all or "votes_dropped" in over_all or "bits" in over_all
    one = said(run("explain", "b", "--data", data, "--document", "doc-3-0000", "--pipeline", PIPELINES[5]))
    assert "of doc-3-0000: predicted" in one


def test_promote_list_shadow_rollback(store: Registry, redis_url: str) -> None:
    redis = ("--redis-url", redis_url)
    assert said(run("promote", "a", *redis)) == "active: a (before: none)\n"
    assert said(run("promote", "b", "--reason", "better", *redis)) == "active: b (before: a)\n"
    assert said(run("shadow", *redis)) == "shadow: none\n"
    assert said(run("shadow", "a", *redis)) == "shadow: a\n"
    lines = {line.split("\t")[0]: line.split("\t")[1] for line in said(run("list", *redis)).splitlines()}
    assert lines == {"a": "shadow", "b": "active"}
    assert said(run("rollback", *redis)) == "active: a (left: b)\n"
    assert said(run("shadow", "--none", *redis)) == "shadow: none\n"
    assert "nothing to go back to" in said(run("rollback", *redis), code=2)


def test_history_says_what_was_in_charge_and_why(store: Registry, redis_url: str) -> None:
    redis = ("--redis-url", redis_url)
    assert said(run("history", *redis)) == ""
    said(run("promote", "a", *redis))
    said(run("promote", "b", "--reason", "better", *redis))
    said(run("rollback", "--reason", "worse", *redis))
    lines = [line.split("\t") for line in said(run("history", *redis)).splitlines()]
    assert [(pointer, version, why) for pointer, _, version, why in lines] == [
        ("active", "a", "worse"),
        ("active", "b", "better; rolled back: worse"),
        ("active", "a", "promoted by an operator; left: better"),
    ]


def test_show_says_what_a_controllers_audits_say(store: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    class Operator(operator_pb2_grpc.OperatorServiceServicer):
        def ListBundles(self, request: object, context: object) -> operator_pb2.ListBundlesResponse:  # noqa: N802
            seen = operator_pb2.Bundle(version="a", active=True, alpha=0.1, audits=50, exceeded=6, drifts=1)
            return operator_pb2.ListBundlesResponse(bundles=[seen, operator_pb2.Bundle(version="b", shadow=True)])

    server = grpc.server(ThreadPoolExecutor(1))
    operator_pb2_grpc.add_OperatorServiceServicer_to_server(Operator(), server)
    endpoint = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    monkeypatch.setenv("KVPILOT_ENDPOINT", endpoint)
    server.start()
    try:
        shown = run("show", "a").stdout
        assert f"at {endpoint}: bundle a (active): 50 audits, 6 above their bound (12%, 10% promised), 1 drift" in shown
        assert "bundle b (shadow)" not in shown
    finally:
        server.stop(None).wait()
    alone = run("show", "a")
    said(alone)
    assert f"no controller answers at {endpoint}" in alone.stderr


def test_a_bundle_that_does_not_load_is_not_promoted(store: Registry, redis_url: str) -> None:
    redis = ("--redis-url", redis_url)
    said(run("promote", "a", *redis))
    manifest = Path(store.url) / "b" / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"schema_hash": "0" * 16}))
    assert "kvpilot: bundle b: feature schema 0000000000000000" in said(run("promote", "b", *redis), code=1)
    marks = {line.split("\t")[0]: line.split("\t")[1] for line in said(run("list", *redis)).splitlines()}
    assert marks == {"a": "active", "b": "-"}


def test_the_controllers_store_is_read_from_the_file(
    store: Registry, home: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, other = Registry(home / "own"), Registry(home / "other")
    own.put(made("of-the-file"))
    other.put(made("of-the-environment"))
    (home / "kvpilot.toml").write_text(f'[controller]\nbundle_store = "{home / "own"}"\n')
    assert said(run("list")).startswith("of-the-file\t")
    assert "bundle of-the-file" in said(run("show", "of-the-file"))
    assert said(run("promote", "of-the-file", "--redis-url", redis_url)).startswith("active: of-the-file ")
    assert "no bundle 'a' in" in said(run("promote", "a", "--redis-url", redis_url), code=2)
    monkeypatch.setenv("KVPILOT_CONTROLLER_BUNDLE_STORE", other.url)
    assert said(run("list")).startswith("of-the-environment\t")
    assert said(run("list", "--store", store.url)).splitlines()[0].split("\t")[0] in ("a", "b")


def test_a_table_that_the_controller_would_refuse_is_named(store: Registry, home: Path) -> None:
    (home / "kvpilot.toml").write_text("[controller]\nbundle_store = 3\nguard_eror = 0.1\n")
    refused = said(run("list"), code=2)
    assert "bundle_store: Input should be a valid string, not 3" in refused
    assert "guard_eror: Extra inputs are not permitted" in refused


def test_going_back_says_what_it_passes_over(store: Registry, redis_url: str) -> None:
    redis = ("--redis-url", redis_url)
    store.put(made("c"))
    for version in ("a", "b", "c"):
        said(run("promote", version, *redis))
    (Path(store.url) / "b" / PREDICTOR).write_bytes(b"")
    went = run("rollback", *redis)
    assert went.stdout == "active: a (left: c)\n"
    assert "passed over b, which does not load: bundle b: predictor.skops does not have the checksum" in went.stderr


def test_the_store_that_up_started_is_found(store: Registry, home: Path, redis_url: str) -> None:
    port = redis_url.split(":")[2].split("/")[0]
    folder = home / "state" / "kvpilot" / "redis"
    folder.mkdir(parents=True)
    (folder / "server.conf").write_text(f'bind 127.0.0.1\nport {port}\nrequirepass wrong\nsave ""\n')
    failed = said(run("promote", "a"), code=1)  # the tests' server wants no password: it was found, and refused one
    assert "job store" in failed
    assert "wrong" not in failed.replace("wrong number", "")


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (("train", "--data", "nowhere"), 2, "nowhere: no dataset there; `kvpilot models collect` makes one"),
        (("train", "--trials", "-1"), 2, "--trials"),
        (("evaluate",), 2, "--report"),
        (("evaluate", "--report", "r", "--bundle", "c"), 2, "no bundle 'c' in"),
        (("show", "../a"), 2, "bundle '../a': expected at most 64 letters"),
        (("explain", "--document", "x"), 2, "--document and --pipeline: one prediction takes both"),
        (("explain", "--at-token", "4"), 2, "--at-token"),
        (("promote", "a"), 2, "no job store is known"),
        (("promote", "a", "--redis-url", "http://x"), 2, "redis_url"),
        (("promote", "a", "--redis-url", "redis://127.0.0.1:1/0"), 1, "the job store is out of reach"),
        (("shadow", "a", "--none"), 2, "--none: not together with a version, here 'a'"),
        (("list", "--store", "nope://x"), 2, "bundle store 'nope://x'"),
    ],
)
def test_bad_command_lines_name_what_is_wrong(store: Registry, words: tuple[str, ...], code: int, named: str) -> None:
    assert named in said(run(*words), code)


def test_bad_data_is_named(store: Registry, home: Path, data: Path) -> None:
    (home / "text.parquet").write_text("not Parquet")
    assert "text.parquet: not a Parquet file" in said(run("train", "--data", "text.parquet"), 2)
    assert "alpha 1.5: expected a share" in said(run("calibrate", "a", "--data", data, "--alpha", "1.5"), 2)
    assert "folds takes at least 50" in said(run("train", "--data", data, "--folds", "50"), 2)
    assert "bundle a is there already" in said(run("calibrate", "a", "--data", data, "--version", "a"), 2)
    (Path(store.url) / "a" / PREDICTOR).write_bytes(b"")
    assert "bundle a: predictor.skops does not have the checksum" in said(run("show", "a"), 1)
