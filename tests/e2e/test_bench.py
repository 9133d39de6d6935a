"""``kvpilot bench steer`` measures a stack of its own; here one with the tiny model, whose figures say nothing."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from bench import decode, latency, steer
from cli import bundles, tether
from cli.main import app

pytestmark = pytest.mark.skipif(not tether.SUPPORTED, reason="needs Linux")


def test_both_modes_are_measured_while_the_same_requests_decode(tiny_folder: Path) -> None:
    said = io.StringIO()
    report = steer.measure(str(tiny_folder), 3, Console(file=said), requests=2, window_tokens=4, prompt_tokens=8)
    assert len(report["rounds"]) == 3
    for figures in report["rounds"]:
        assert min(figures["off_tokens_per_s"], figures["advisory_tokens_per_s"]) > 0
        assert 0 <= figures["signal_share"] < 1
    assert report["steering_overhead"] == pytest.approx(report["planning_overhead"] + report["signal_share"], abs=2e-4)
    assert "round 3: off " in said.getvalue()


def test_tokens_are_timed_from_their_choice_to_the_client(tiny_folder: Path) -> None:
    report = latency.measure(str(tiny_folder), [1, 2], 24, 1, Console(file=io.StringIO()))
    assert [row["streams"] for row in report["rows"]] == [1, 2]
    for row in report["rows"]:
        assert row["kvpilot"]["count"] == row["floor"]["count"] == 24 * row["streams"]
        assert 0 < row["floor"]["p50_ms"] <= row["floor"]["p99_ms"]
        assert 0 < row["kvpilot"]["p50_ms"] <= row["kvpilot"]["p99_ms"] < 60_000  # by one clock, not an unset one
        assert row["tokens_per_s_per_stream"] > 0


def test_evaluate_measures_it_with_the_bundles_model_if_that_is_here(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[tuple[str, int]] = []

    def measure(model: str, rounds: int, console: Console) -> dict[str, float]:
        measured.append((model, rounds))
        return {"steering_overhead": 0.25}

    monkeypatch.setattr(bundles, "stored_models", lambda: [tiny_folder])
    monkeypatch.setattr(steer, "measure", measure)
    assert bundles._measure_steering(["elsewhere", "tiny"], 5) == 0.25
    assert measured == [("tiny", 5)]
    assert bundles._measure_steering(["elsewhere"], 5) is None
    assert "not measured: elsewhere not in the store" in capsys.readouterr().err


def test_decoding_and_live_switches_are_measured_in_one_process(tiny_folder: Path) -> None:
    said = io.StringIO()
    report = decode.measure(str(tiny_folder), ["full", "int8"], [96, 200], 4, 2, 1, 1, Console(file=said))
    assert [row["context_tokens"] for row in report["decode"]] == [96, 200]
    for row in report["decode"]:
        assert row["ratio"]["full"] == 1
        assert all(len(speeds) == 2 and min(speeds) > 0 for speeds in row["windows"].values())
    assert [stall["to_pipeline"] for stall in report["switches"]] == ["int8", "full"]
    for stall in report["switches"]:
        assert stall["step_ms"] > 0
        assert stall["pause_ms"] > 0
        assert stall["steps"] >= 0
    Console(file=said, width=200).print(decode.render(report), decode.render_switches(report))
    assert "Switching while decoding at 96 tokens" in said.getvalue()


def test_the_command_refuses_contexts_that_are_no_numbers(tiny_folder: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "decode", "--model", str(tiny_folder), "--contexts", "long"])
    assert result.exit_code == 2
    assert "--contexts: 'long'" in result.output
