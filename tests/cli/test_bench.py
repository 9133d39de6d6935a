"""How the benchmarks add up."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from bench import kernel_cache, kernels, latency, steer
from bench.kernel_cache import Case
from bench.kernel_report import COPY, READ, make_row, make_switch
from bench.kernel_timing import WARM_UP_ROUNDS, Contestant, time_in_turn
from bench.machine import describe_machine
from bench.serve import Figures, Round, make_report, render
from cli.errors import FailedError
from cli.main import app
from kernels.api import Backend, TokenSource
from kernels.layout import CacheShape, Format
from kernels.reference import ReferenceBackend
from tests.tiny import tiny_model, tiny_tokenizer


def test_report_gives_medians_and_the_median_ratio() -> None:
    rounds = [
        Round(Figures(10.0, 8.0, [[1], [2]]), Figures(30.0, 16.0, [[1], [2]])),
        Round(Figures(20.0, 8.0, [[1], [2]]), Figures(40.0, 16.0, [[1], [3]])),
        Round(Figures(12.0, 8.0, [[1], [2]]), Figures(33.0, 16.0, [[1], [2]])),
    ]
    report = make_report(rounds, describe_machine(2), "tiny", 2, 1, 4)
    assert report["decode_tokens_per_s"]["transformers"] == 12.0
    assert report["decode_tokens_per_s"]["kvpilot"] == 33.0
    assert report["decode_tokens_per_s"]["ratio"] == 2.75  # of 3, 2 and 2.75
    assert report["end_to_end_tokens_per_s"]["ratio"] == 2.0
    assert report["requests_with_equal_tokens"] == 5
    assert report["requests_compared"] == 6
    assert render(report).row_count == 2


def test_machine_is_described() -> None:
    machine = describe_machine(2)
    assert machine["threads_used"] == 2
    assert machine["cpu"]
    assert str(machine["torch"]).startswith("2.")


def test_steering_costs_planning_and_signals() -> None:
    rounds = [
        steer.Round(off=steer.Run(100.0, 0.02), advisory=steer.Run(99.0, 0.03), signal_share=0.005),
        steer.Round(off=steer.Run(50.0, 0.01), advisory=steer.Run(49.0, 0.04), signal_share=0.003),
        steer.Round(off=steer.Run(80.0, 0.03), advisory=steer.Run(84.0, 0.05), signal_share=0.004),
    ]
    report = steer.make_report(rounds, describe_machine(2), "tiny", 2, 1, 4)
    assert report["off_tokens_per_s"] == 80.0
    assert report["planning_overhead"] == 0.01  # of 0.01, 0.02 and -0.05
    assert report["signal_share"] == 0.004
    assert report["steering_overhead"] == 0.014
    assert (report["planning_overhead_low"], report["planning_overhead_high"]) == (-0.05, 0.02)
    assert (report["controller_share_off"], report["controller_share_advisory"]) == (0.02, 0.04)
    assert steer.render(report).row_count == 1


def test_latency_gives_percentiles_beside_the_floors() -> None:
    row = latency.make_row(2, 50.04, [float(ms) for ms in range(1, 102)], [0.5] * 10)
    assert row["kvpilot"] == {"count": 101, "p50_ms": 51.0, "p90_ms": 91.0, "p99_ms": 100.0}
    assert row["floor"] == {"count": 10, "p50_ms": 0.5, "p90_ms": 0.5, "p99_ms": 0.5}
    assert (row["ratio"], row["tokens_per_s_per_stream"]) == (102.0, 50.0)
    quick = latency.make_row(1, 10.0, [5.0] * 4, [1.0] * 4)
    machine = describe_machine(1)
    assert not latency.make_report(machine, "tiny", 4, [quick, row])["within_bound"]
    report = latency.make_report(machine, "tiny", 4, [quick])
    assert report["within_bound"]
    assert latency.render(report).row_count == 1
    result = CliRunner().invoke(app, ["bench", "latency", "--streams", "1,none"])
    assert result.exit_code == 2
    assert "--streams: '1,none'; numbers of streams" in result.output


def test_kernels_are_measured_in_every_format(tmp_path: Path) -> None:
    found, table, picture = tmp_path / "found.json", tmp_path / "found.md", tmp_path / "found.png"
    words = ["--backend", "cpu", "--context", "64", "--batch", "2", "--repeats", "1", "--walk-mib", "1"]
    files = ["--json", str(found), "--markdown", str(table), "--plot", str(picture)]
    result = CliRunner().invoke(app, ["bench", "kernels", "--switch-tokens", "64", *words, *files])
    assert result.exit_code == 0, result.output
    report = json.loads(found.read_text())
    assert report["machine"]["cpu"]
    assert report["settings"]["walk_bytes"] == 2**20
    assert report["skipped"] == []
    rows = {row["format"]: row for row in report["rows"]}
    assert list(rows) == [fmt.name.lower() for fmt in Format]
    for row in rows.values():
        assert (row["backend"], row["context"], row["batch"]) == ("cpu", 64, 2)
        for figure in ("ms", "plan_ms", "gb_per_s", "copy_gb_per_s", "read_gb_per_s", "sdpa_ms", "speedup_vs_sdpa"):
            assert row[figure] > 0
        assert row["sdpa_ms"] == min(row["sdpa_packed_ms"], row["sdpa_gqa_ms"])
    assert rows["raw"]["difference_vs_sdpa"] < 1e-5 < rows["int8"]["difference_vs_sdpa"]
    others = [name for name in rows if name != "raw"]
    pairs = [pair for name in others for pair in (("raw", name), (name, "raw"))]
    assert [(one["from"], one["to"]) for one in report["switches"]] == pairs
    assert all(one[figure] > 0 for one in report["switches"] for figure in ("tokens", "ms", "gb_per_s"))
    assert len([line for line in table.read_text().splitlines() if line.startswith("| cpu")]) == len(rows) + len(pairs)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_markdown_alone_is_printed_on_stdout() -> None:
    words = ["--backend", "reference", "--formats", "raw", "--context", "64", "--batch", "1", "--walk-mib", "1"]
    result = CliRunner().invoke(
        app, ["bench", "kernels", *words, "--repeats", "1", "--switch-tokens", "0", "--markdown", "-"]
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("**Decode attention**, batch 1,")
    assert "Format switches" not in result.stdout


def test_kernels_are_compared_with_the_faster_form_round_by_round() -> None:
    case = Case(CacheShape(2, 1, 3, 64, torch.float32), rows=4, context_tokens=80, device=torch.device("cpu"))
    assert case.raw_bytes == 4 * 80 * 2 * 64 * 4
    assert case.block_bytes(Format.RAW) == case.raw_bytes
    int8 = 32 * 2 * 64 + 2 * 2 * 64 + 2 * 2 * 32 * 2  # codes, scales and zeros of keys, of values
    assert case.block_bytes(Format.INT8) == 4 * (2 * int8 + 16 * 2 * 64 * 4)
    runs = {
        "INT8": [0.002, 0.004, 0.002],
        "packed": [0.006, 0.006, 0.010],
        "gqa": [0.020, 0.020, 0.001],
        COPY: [0.5, 0.25, 0.125],
        READ: [0.5, 0.25, 0.125],
    }
    plans = {"INT8": [0.001, 0.003, 0.002]}
    row = make_row(case, "cpu", Format.INT8, runs, plans, {COPY: 10**9, READ: 5 * 10**8}, 0.01)
    assert (row.sdpa_form, row.sdpa_ms, row.sdpa_gqa_ms) == ("packed", 3.0, 10.0)  # by median, of two layers
    assert (row.ms, row.plan_ms) == (1.0, 2.0)
    assert (row.speedup_vs_sdpa, row.speedup_low, row.speedup_high) == (3.0, 1.5, 5.0)
    assert (row.copy_gb_per_s, row.read_gb_per_s) == (4.0, 2.0)
    assert row.gb_per_s == pytest.approx(case.block_bytes(Format.INT8) / 1e6, rel=1e-3)


def test_a_switch_is_counted_in_decode_steps() -> None:
    case = Case(CacheShape(30, 3, 9, 64, torch.float32), rows=1, context_tokens=96, device=torch.device("cpu"))
    switch = make_switch(case, "cpu", Format.RAW, Format.INT8, [0.03, 0.01, 0.02], [0.004, 0.004, 0.009])
    assert (switch.ms, switch.decode_step_ms, switch.decode_steps) == (20.0, 4.0, 5.0)
    assert switch.gb_per_s == pytest.approx(30 * 3 * 2 * (16384 + 4608) / 0.02 / 1e9, rel=1e-3)


def test_contestants_take_turns_and_warm_up_is_not_counted() -> None:
    order: list[str] = []
    contestants = {name: Contestant(partial(order.append, name)) for name in "abc"}
    runs, preparations = time_in_turn(contestants, 3, torch.device("cpu"))
    assert "".join(order[3 * WARM_UP_ROUNDS :]) == "abcbcacab"
    assert {len(times) for times in runs.values()} == {3}
    assert set(preparations["a"]) == {0.0}


def test_a_refused_format_is_reported_and_a_wrong_kernel_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Strange(ReferenceBackend):
        def encode(self, source: TokenSource, fmt: Format) -> torch.Tensor:
            if fmt is Format.INT8:
                raise ValueError("int8: not here")
            return super().encode(source, fmt)

    class Wrong(ReferenceBackend):
        def decode(self, *args: Any) -> torch.Tensor:
            return 2 * super().decode(*args)

    def make(name: str, *args: Any) -> Backend:
        return {"strange": Strange, "wrong": Wrong}[name](*args)

    for module in (kernels, kernel_cache):
        monkeypatch.setattr(module, "make_backend", make)
    chosen = kernels.Settings(
        ("strange",), (Format.RAW, Format.INT8), (64,), batch=1, repeats=1, switch_tokens=0, walk_bytes=1
    )
    report = kernels.measure(chosen, Console(quiet=True))
    assert [row.format for row in report.rows] == ["raw"]
    assert [(one.format, one.why) for one in report.skipped] == [("int8", "int8: not here")]
    assert "strange does not do int8: int8: not here" in kernels.markdown(report)
    with pytest.raises(FailedError, match="backend wrong: attention over raw blocks"):
        kernels.measure(replace(chosen, backends=("wrong",)), Console(quiet=True))


def test_a_sessions_next_turn_is_measured(tmp_path: Path) -> None:
    folder, found = tmp_path / "tiny", tmp_path / "found.json"
    tiny_model(attention="sdpa").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    sizes = ["--prompt-tokens", "200", "--question-tokens", "8", "--rounds", "1"]
    result = CliRunner().invoke(app, ["bench", "sessions", "--model", f"{folder}/", *sizes, "--json", str(found)])
    assert result.exit_code == 0, result.output
    report = json.loads(found.read_text())
    assert report["resumed_tokens"] == 192  # of 216, in whole rows
    assert report["session_bytes"] == 6 * 2 * 2 * 2 * 32 * 16 * 4
    assert set(report["first_token_s"]) == {"host", "disk", "cold"}
    assert report["times_sooner"]["cold"] == 1.0
    assert "resumed from" in result.output
