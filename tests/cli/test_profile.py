"""``kvpilot model profile`` on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from models import profiles
from tests.tiny import tiny_model, tiny_tokenizer
from workers.profile.profile import KINDS


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny model in a store of its own."""
    monkeypatch.setenv("KVPILOT_CACHE", str(tmp_path))
    folder = tmp_path / "models" / "tiny"
    tiny_model(attention="sdpa").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def run(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["model", *words], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == code, result.output
    return result.stdout if not code else result.output


def listed() -> dict[str, str]:
    return {line.split("\t")[0]: line.split("\t")[3] for line in run("list").splitlines()}


def test_a_profile_is_found_once_and_listed(folder: Path) -> None:
    assert listed() == {"smollm2-135m-instruct": "", "tiny": "no profile"}
    first = json.loads(run("profile", "tiny", "--tokens", "2048", "--json"))
    path = Path(first["file"])
    assert path == profiles.find_profile(folder)
    assert (first["model"], first["tokens"], first["schema"], first["was_there"]) == (
        "tiny",
        2048,
        profiles.SCHEMA_VERSION,
        False,
    )
    assert first["hash"] == profiles.hash_model(folder) == path.stem
    assert set(first["tensors"]) == set(KINDS)
    assert first["tensors"]["query_cov"] == [2, 4, 16, 16]
    assert len(first["retrieval"]) == 2
    assert 0 <= first["retrieving_share"] <= 1
    assert listed()["tiny"] == "profiled"
    written = path.stat().st_mtime_ns
    assert run("profile", "tiny").strip() == str(path)
    assert json.loads(run("profile", str(folder), "--json"))["was_there"]
    assert path.stat().st_mtime_ns == written
    again = json.loads(run("profile", "tiny", "--tokens", "1024", "--force", "--json"))
    assert (again["tokens"], again["was_there"]) == (1024, False)
    assert profiles.read_metadata(path)["tokens"] == "1024"


def test_a_profile_of_another_schema_is_found_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "SCHEMA_VERSION", 0)
    monkeypatch.setattr("workers.profile.files.SCHEMA_VERSION", 0)
    run("profile", "tiny", "--tokens", "1024")
    monkeypatch.undo()
    monkeypatch.setenv("KVPILOT_CACHE", str(folder.parent.parent))
    assert listed()["tiny"] == "no profile"
    assert not json.loads(run("profile", "tiny", "--tokens", "1024", "--json"))["was_there"]
    assert listed()["tiny"] == "profiled"


def test_a_damaged_profile_is_said_to_be_and_found_anew_by_force(folder: Path) -> None:
    path = Path(run("profile", "tiny", "--tokens", "1024").strip())
    path.write_bytes(path.read_bytes()[:-10])
    said = run("profile", "tiny", code=1)
    assert f"{path} cannot be used; --force finds the profile anew" in said
    run("profile", "tiny", "--tokens", "1024", "--force")
    assert run("profile", "tiny").strip() == str(path)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("no-such-model",), "kvpilot model list"),
        (("tiny", "--tokens", "10"), "--tokens"),
    ],
)
def test_bad_input_is_named(folder: Path, words: tuple[str, ...], named: str) -> None:
    assert named in run("profile", *words, code=2)


def test_a_model_that_profiles_do_not_describe_is_refused_by_name(folder: Path) -> None:
    tiny_model("gpt_neox", attention="sdpa").save_pretrained(folder)
    assert "model type 'gpt_neox' rotates 4 of 16 channels" in run("profile", "tiny", "--tokens", "1024", code=2)
    assert profiles.find_profile(folder) is None
