"""How the benchmarks add up."""

from __future__ import annotations

from bench import steer
from bench.machine import describe_machine
from bench.serve import Figures, Round, make_report, render


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
