"""The guard: counts, when a bundle goes, and what drifts."""

from __future__ import annotations

import math
import random

import pytest
import structlog

from controller.guard import Guard, GuardSettings
from models.features import AUDIT_FLOOR, Family
from models.online import BoundAlarm


def feed(guard: Guard, measured: list[float], bundle: str = "v1", predicted: float = 0.02) -> list[str]:
    verdicts = [guard.observe(bundle, 0.1, Family.SCORED, predicted, 0.05, value) for value in measured]
    return [verdict for verdict in verdicts if verdict]


def test_a_kept_promise_is_kept() -> None:
    guard = Guard()
    assert feed(guard, [0.09, *[0.01] * 9] * 40) == []
    assert guard.audits["v1", Family.SCORED] == 400
    assert guard.exceeded["v1", Family.SCORED] == 40
    assert not guard.alarms


def test_a_broken_promise_is_told_once_enough_was_measured() -> None:
    guard = Guard()
    assert feed(guard, [0.09, 0.01] * 24 + [0.01]) == []  # 49
    (verdict,) = feed(guard, [0.01])
    assert "24 of 50 audits exceeded their bound, 48% where 10% are promised" in verdict
    assert guard.alarms["v1"] == 1


def test_it_looks_at_every_audit_from_then_on() -> None:
    guard = Guard(GuardSettings(error=0.01, least_audits=5))
    alarm = BoundAlarm(0.1, 0.01, 5)
    dice = random.Random(0)
    while not alarm.ringing:
        exceeded = dice.random() < 0.4
        rings = alarm.observe(exceeded)
        assert bool(feed(guard, [0.09 if exceeded else 0.01])) == rings
    assert 5 < alarm.audits < 100


def test_what_equals_its_bound_keeps_it_and_what_is_no_number_does_not() -> None:
    guard = Guard()
    feed(guard, [0.05, math.nan])
    assert guard.exceeded["v1", Family.SCORED] == 1


def test_what_is_below_the_floor_of_audits_exceeds_nothing() -> None:
    guard = Guard()
    for measured in (AUDIT_FLOOR, 2 * AUDIT_FLOOR):
        guard.observe("v1", 0.1, Family.QUANTISE, 0.0, AUDIT_FLOOR / 10, measured)
    assert guard.exceeded["v1", Family.QUANTISE] == 1


def test_another_bundle_starts_anew() -> None:
    guard = Guard(GuardSettings(least_audits=10))
    assert feed(guard, [0.09] * 9) == []
    assert feed(guard, [0.09] * 9, "v2") == []
    assert len(feed(guard, [0.09], "v2")) == 1
    assert feed(guard, [0.09] * 9, "v1") == []


def test_after_a_verdict_it_starts_anew() -> None:
    guard = Guard(GuardSettings(least_audits=10))
    assert len(feed(guard, [0.09] * 10)) == 1
    assert feed(guard, [0.09] * 9) == []
    assert len(feed(guard, [0.09])) == 1
    assert guard.alarms["v1"] == 2


@pytest.mark.parametrize("settings", [GuardSettings(error=1.0), GuardSettings(least_audits=0)])
def test_settings_out_of_range_are_refused(settings: GuardSettings) -> None:
    with pytest.raises(ValueError, match="expected"):
        feed(Guard(settings), [0.01])


def test_the_calibrator_sees_everything() -> None:
    seen: list[tuple[str, Family, float, float]] = []

    class Calibrator:
        def observe(self, bundle: str, family: Family, bound: float, measured: float) -> None:
            seen.append((bundle, family, bound, measured))

    feed(Guard(calibrator=Calibrator()), [0.01, 0.09])
    assert seen == [("v1", Family.SCORED, 0.05, 0.01), ("v1", Family.SCORED, 0.05, 0.09)]


def test_drift_is_counted_and_said_by_bundle_and_takes_nothing_back() -> None:
    guard, dice = Guard(), random.Random(1)

    def audits(count: int, predicted: float) -> list[float]:
        return [min(0.05, predicted * math.exp(dice.gauss(0, 0.3))) for _ in range(count)]

    assert guard.residual("v1") is None
    with structlog.testing.capture_logs() as logs:
        assert feed(guard, audits(500, 0.02), "v1") == []
        assert feed(guard, audits(500, 0.02), "v2") == []
        assert not logs
        assert guard.residual("v1") == pytest.approx(0, abs=0.1)
        assert feed(guard, audits(200, 0.005), "v1") == []  # half the losses and less: every bound is kept
    assert guard.drifts["v1"] == len(logs) >= 1
    assert guard.drifts["v2"] == 0
    assert guard.residual("v1") == pytest.approx(math.log(0.005 / 0.02), abs=0.2)
    assert {(line["bundle"], line["log_level"]) for line in logs} == {("v1", "warning")}


def test_what_is_no_number_moves_no_residual() -> None:
    guard = Guard()
    feed(guard, [0.02, math.inf, math.nan, 0.02])
    assert guard.residual("v1") == pytest.approx(0)
