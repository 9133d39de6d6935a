"""``kvpilot models decisions`` from a real job store."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from kvpilot.bus import Bus
from kvpilot.v1 import job_pb2
from kvpilot.v1.operator_pb2 import DecisionOutcome
from tests.models.test_decisions import answered, decided, measured


@pytest.fixture
def said(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What the command prints of a log."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "220")
    monkeypatch.chdir(tmp_path)

    async def write(events: list[job_pb2.DecisionEvent]) -> None:
        bus = await Bus.connect(redis_url)
        await bus.log_decisions(events)
        await bus.close()

    def run(*words: str, events: list[job_pb2.DecisionEvent]) -> str:
        asyncio.run(write(events))
        result = CliRunner().invoke(app, ["models", "decisions", "--redis-url", redis_url, *words])
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


EVENTS = [
    decided("1", shadow="b", from_pipeline="full"),
    answered("1", DecisionOutcome.DECISION_OUTCOME_APPLIED),
    measured("1", 40, 0.03),
    decided("2", bundle=""),
]


def test_decisions_and_scores(said: Callable[..., str]) -> None:
    shown = said(events=EVENTS)
    for part in ("job-of-1", "full → int8", "applied", "0.02, 0.04", "0.03 (1)", "the rule", "active", "100%"):
        assert part in shown, part
    assert "job-of-2" not in said("--audited", events=[])
    assert "job-of-2" not in said("--bundle", "b", events=[])
    assert "1 older ones are not shown" in said("--limit", "1", events=[])


def test_json_lines_are_joined(said: Callable[..., str]) -> None:
    joined, ruled = (json.loads(line) for line in said("--json", events=EVENTS).splitlines())
    assert (joined["request_id"], joined["outcome"], joined["bundle"]) == ("job-of-1", "applied", "a")
    assert joined["shadow"] == {"bundle": "b", "predicted_divergence": 0.02, "bound": 0.04}
    assert len(joined["features"]) > 40
    assert [audit["divergence"] for audit in joined["audits"]] == [0.03]
    assert "bundle" not in ruled
    [only] = said("--json", "--request", "of-2", events=[]).splitlines()
    assert json.loads(only)["decision_id"] == "2"


def test_an_empty_log(said: Callable[..., str]) -> None:
    assert said("--json", events=[]) == ""
    assert "how bundles did" in said(events=[])


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        (("--redis-url", "redis://127.0.0.1:1/0"), 1, "out of reach"),
        (("--redis-url", "http://x"), 2, "redis_url"),
    ],
)
def test_no_store(words: tuple[str, ...], code: int, named: str) -> None:
    result = CliRunner().invoke(app, ["models", "decisions", *words])
    assert result.exit_code == code
    assert named in result.output
