"""Collecting against a service that measures by rule: what ends in the folder, and what survives trouble."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from kvpilot.catalog import StageCatalog
from kvpilot.client import AsyncClient, Client, Settings
from kvpilot.errors import Cancelled, Unavailable
from models import dataset
from models.candidates import CandidatesError, check_candidates, read_candidates, recoverable
from models.collect.collecting import Collected, Collector, HopelessError, remaining
from models.collect.folder import Folder, FolderError
from models.collect.plan import Asked, Plan, Replay
from models.collect.rows import MeasureError
from models.features import NAMES, Family
from tests.engines import model
from tests.measuring import CANDIDATES, MODEL, CancelledJobError, Measurer, RefusalError, Served, divergence, serve

pytestmark = pytest.mark.anyio
CATALOG = StageCatalog(model().stages)
ASKED = Asked(MODEL, CANDIDATES, 32)
QUICK = Settings(retries=1)


@pytest.fixture
def served() -> Iterator[Served]:
    running = serve(Measurer())
    yield running
    running.server.stop(0)


class Told:
    """Progress, kept."""

    def __init__(self) -> None:
        self.places = 0
        self.documents: list[tuple[str, str]] = []

    def place(self) -> None:
        self.places += 1

    def document(self, plan: Plan, reason: str) -> None:
        self.documents.append((plan.document, reason))


def plan(name: str, *places: int, windows: int = 1, kind: str = "prose") -> Plan:
    places = places or (64, 200)
    replays = tuple(
        Replay(
            tuple(range(300)),
            tuple(place + window for place in places),
            ("full", "kivi(bits=4, shadow=true)")[: len(places)],
        )
        for window in range(windows)
    )
    return Plan(name, kind, replays)


async def collect(
    served: Served, plans: list[Plan], out: Path, told: Told | None = None, at_once: int = 2
) -> Collected:
    async with AsyncClient(served.target, QUICK) as client:
        folder = Folder(out, ASKED)
        left, _ = remaining(plans, folder)
        try:
            return await Collector(client, ASKED, CATALOG, folder, told or Told()).run(left, at_once)
        finally:
            folder.write_manifest({"seed": 0}, {})


async def test_every_place_and_pipeline_is_a_row(served: Served, tmp_path: Path) -> None:
    plans = [plan("a/b.txt", windows=2), plan("c.py", kind="code")]
    told = Told()
    collected = await collect(served, plans, tmp_path, told)
    assert sorted(collected.done) == ["a/b.txt", "c.py"]
    assert (told.places, sorted(told.documents)) == (6, [("a/b.txt", ""), ("c.py", "")])
    table = dataset.read(tmp_path)
    rows = table.to_pylist()
    assert len(rows) == 6 * len(CANDIDATES)
    for row in rows:
        assert row["divergence"] == pytest.approx(divergence(row["at_token"], row["pipeline"]))
        assert row["divergence_max"] == 2 * row["divergence"]
        assert row["kind"] == {"a/b.txt": "prose", "c.py": "code"}[row["document"]]
        assert row["measured_under"] == ("full" if row["at_token"] < 100 else "kivi(bits=4, shadow=true)")
        number = CANDIDATES.index(row["pipeline"])
        assert row["device_bytes"] == 1000 - number
        assert row["full_cache_bytes"] == 1000
        assert row[NAMES[5]] == pytest.approx(row["at_token"] + number + 5 / 64)
    families = {row["pipeline"]: row["family"] for row in rows}
    assert list(families.values()) == [
        Family.EXACT.value,
        Family.SCORED.value,
        Family.QUANTISE.value,
        Family.EXACT.value,
    ]
    assert sorted({row["at_token"] for row in rows if row["document"] == "a/b.txt"}) == [64, 65, 200, 201]
    assert np.isfinite(dataset.features(table)).all()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["model"] == MODEL
    assert manifest["candidates"] == list(CANDIDATES)
    split = dataset.split_of("c.py").value
    assert manifest["documents"]["code"] == {split: 1}
    assert manifest["rows"]["code"] == {split: 8}


async def test_what_is_there_is_not_measured_again(served: Served, tmp_path: Path) -> None:
    plans = [plan("a"), plan("b")]
    await collect(served, plans, tmp_path)
    calls = len(served.measurer.calls)
    files = sorted(tmp_path.glob("*.parquet"))
    assert (await collect(served, plans, tmp_path)).done == []
    assert len(served.measurer.calls) == calls
    changed = [plan("a", 80, 190), plan("b")]
    assert (await collect(served, changed, tmp_path)).done == ["a"]
    assert len(sorted(tmp_path.glob("*.parquet"))) == 2  # in place of the older one
    assert files != sorted(tmp_path.glob("*.parquet"))


async def test_a_failed_document_is_reported_and_tried_again_by_a_new_job(served: Served, tmp_path: Path) -> None:
    def refuse(request: Any, number: int) -> None:
        if request.replay.at_tokens[0] == 70 and number == 1:
            raise RefusalError(grpc.StatusCode.RESOURCE_EXHAUSTED, "can never fit")

    served.measurer.step = refuse
    plans = [plan("good"), plan("bad", 70, 150), plan("fine", 90, 150)]
    told = Told()
    collected = await collect(served, plans, tmp_path, told)
    assert collected.failed == {"bad": "can never fit"}
    assert sorted(collected.done) == ["fine", "good"]
    assert ("bad", "can never fit") in told.documents
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["failed"] == {"bad": {"reason": "can never fit", "attempts": 1}}
    served.measurer.step = lambda request, number: None
    before = set(served.measurer.calls)
    assert (await collect(served, plans, tmp_path)).done == ["bad"]
    assert not before & set(served.measurer.calls[-1:])
    assert json.loads((tmp_path / "manifest.json").read_text())["failed"] == {}


async def test_a_cancelled_job_is_a_failed_document(served: Served, tmp_path: Path) -> None:
    def cancel(request: Any, number: int) -> None:
        if number == 1:
            raise CancelledJobError

    served.measurer.step = cancel
    collected = await collect(served, [plan("a")], tmp_path)
    assert collected.failed == {"a": "the replay was cancelled"}
    assert list(tmp_path.glob("*.parquet")) == []


async def test_an_interruption_leaves_whole_files_and_the_next_run_attaches(served: Served, tmp_path: Path) -> None:
    reached, go = threading.Event(), threading.Event()

    def hold(request: Any, number: int) -> None:
        if request.replay.at_tokens[0] == 70 and number == 1:
            reached.set()
            go.wait(20)

    served.measurer.step = hold
    plans = [plan("first"), plan("held", 70, 150), plan("last", 90, 150)]
    running = asyncio.create_task(collect(served, plans, tmp_path, at_once=1))
    await asyncio.to_thread(reached.wait, 20)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    go.set()
    assert dataset.read(tmp_path)["document"].unique().to_pylist() == ["first"]
    (held,) = [key for key, request in served.measurer.jobs.items() if request.replay.at_tokens[0] == 70]
    collected = await collect(served, plans, tmp_path)
    assert sorted(collected.done) == ["held", "last"]
    assert served.measurer.calls.count(held) == 2  # the same job, not another
    assert not list(tmp_path.glob("*.part"))


async def test_several_are_in_flight_but_no_more_than_asked_for(served: Served, tmp_path: Path) -> None:
    together = threading.Barrier(3)
    served.measurer.step = lambda request, number: together.wait(20) and None
    await collect(served, [plan(str(number), 64) for number in range(6)], tmp_path, at_once=3)
    assert served.measurer.most_at_once == 3


async def test_runs_that_cannot_succeed_are_given_up(served: Served, tmp_path: Path) -> None:
    def refuse(request: Any, number: int) -> None:
        raise RefusalError(grpc.StatusCode.INVALID_ARGUMENT, "replays are not served here")

    served.measurer.step = refuse
    plans = [plan(str(number)) for number in range(50)]
    with pytest.raises(HopelessError, match=r"first 5 documents failed:\n.*replays are not served here"):
        await collect(served, plans, tmp_path, at_once=1)
    served.server.stop(0).wait()
    with pytest.raises(Unavailable):
        await collect(served, plans, tmp_path)


async def test_other_features_than_ours_are_refused(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.measuring.SCHEMA_HASH", "another")
    with pytest.raises(MeasureError, match="schema another"):
        await collect(served, [plan("a")], tmp_path)


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    Folder(tmp_path, ASKED).write_manifest({}, {})
    with pytest.raises(FolderError, match="model 'scripted', not 'other'"):
        Folder(tmp_path, Asked("other", CANDIDATES, 32))
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(FolderError, match="cannot be read"):
        Folder(tmp_path, ASKED)


def test_the_sync_client_replays(served: Served) -> None:
    options: dict[str, Any] = {"at_tokens": [64, 100], "pipelines": ["full", "host"]}
    with Client(served.target, QUICK) as client:
        places = list(client.replay(token_ids=range(200), horizon_tokens=8, model=MODEL, **options))
        assert [place.at_token for place in places] == [64, 100]
        assert [entry.pipeline for entry in places[0].pipelines] == ["full", "host"]
        (request,) = served.measurer.jobs.values()
        assert (request.replay.horizon_tokens, len(request.token_ids.ids), request.model) == (8, 200, MODEL)
        served.measurer.step = _cancel
        with pytest.raises(Cancelled, match="cancelled"):
            list(client.replay("text", **options))
        with pytest.raises(TypeError, match="exactly one of prompt and token_ids"):
            list(client.replay(**options))
        with pytest.raises(TypeError, match="unknown option 'horizon'; known: horizon_tokens"):
            list(client.replay("text", horizon=3, **options))  # type: ignore[call-arg]


def _cancel(request: Any, number: int) -> None:
    raise CancelledJobError


def test_candidates_are_checked(tmp_path: Path) -> None:
    assert check_candidates(("host", "snapkv(keep=0.5)", "full"), CATALOG) == ("full", "host", "snapkv(keep=0.5)")
    with pytest.raises(
        CandidatesError, match=r"'snapkv\(keep=2\)': .*\n  'snapkv' means the same as 'snapkv\(keep=0.5\)'"
    ):
        check_candidates(("snapkv(keep=2)", "snapkv(keep=0.5)", "snapkv"), CATALOG)
    with pytest.raises(CandidatesError, match="at most 64"):
        check_candidates([f"snapkv(keep=0.{number + 100})" for number in range(64)], CATALOG)
    assert recoverable(CANDIDATES, CATALOG) == ("kivi(bits=4, shadow=true)",)
    file = tmp_path / "candidates.txt"
    file.write_text("# ours\n\nhost\n kivi(bits=4) \n")
    assert read_candidates(file) == ("host", "kivi(bits=4)")
    file.write_text("# none\n")
    with pytest.raises(CandidatesError, match="no pipeline in it"):
        read_candidates(file)
