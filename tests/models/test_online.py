"""Bounds that follow audits, and alarms that ring when they should and not when they should not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from models.features import Family
from models.online import AdaptivePredictor, BoundAlarm, DriftDetector, OnlineCalibrator
from models.predictor import Prediction
from tests.models.fitted import held_out, trained

FAMILY = Family.WINDOW


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("factor", [0.2, 1.0, 5.0])
def test_after_a_shift_the_promised_share_exceeds_the_bound_again(alpha: float, factor: float) -> None:
    random = np.random.default_rng(3)
    calibrator = OnlineCalibrator(alpha, step=0.1)
    quantile = float(np.quantile(np.exp(random.standard_normal(100_000)), 1 - alpha))  # right before the shift
    exceeded = []
    for divergence in factor * np.exp(random.standard_normal(6000)):
        bound = quantile * math.exp(calibrator.offset(FAMILY))
        exceeded.append(calibrator.observe(FAMILY, bound, float(divergence)))
    # |share - alpha| <= (range of offsets + step) / (step * T), by telescoping; offsets stayed within +-2.5
    assert abs(np.mean(exceeded) - alpha) <= (2.5 + 0.1) / (0.1 * 6000)
    assert abs(calibrator.offset(FAMILY) - math.log(factor)) < 0.8
    assert calibrator.audits(FAMILY) == (6000, sum(exceeded))


def test_an_adversary_cannot_break_it_for_long() -> None:
    calibrator = OnlineCalibrator(0.1, step=0.1)
    exceeded = []
    for turn in range(5000):  # harmless until the bound is low, then just above it
        bound = 0.1 * math.exp(calibrator.offset(FAMILY))
        exceeded.append(calibrator.observe(FAMILY, bound, bound * 1.01 if turn % 3 == 0 and bound < 1.0 else 0.0))
    assert abs(np.mean(exceeded) - 0.1) < 0.02


def test_families_are_apart_and_steps_are_as_stated() -> None:
    calibrator = OnlineCalibrator(0.1, step=0.2)
    assert calibrator.observe(Family.SCORED, 0.1, 0.2)
    assert not calibrator.observe(Family.QUANTISE, 0.1, 0.1)
    assert calibrator.offset(Family.SCORED) == pytest.approx(0.2 * 0.9)
    assert calibrator.offset(Family.QUANTISE) == pytest.approx(-0.2 * 0.1)
    assert calibrator.offset(Family.WINDOW) == 0.0


def test_offsets_have_a_limit() -> None:
    calibrator = OnlineCalibrator(0.1, step=0.5, limit=1.0)
    for _ in range(10):
        calibrator.observe(FAMILY, 0.1, 1.0)
    assert calibrator.offset(FAMILY) == 1.0


def test_a_prediction_with_moved_bounds() -> None:
    calibrator = OnlineCalibrator(0.1, step=0.5)
    calibrator.observe(Family.SCORED, 0.1, 0.2)
    for _ in range(40):
        calibrator.observe(Family.WINDOW, 0.1, 0.0)
    given = Prediction(np.array([0.0, 0.1, 0.1]), np.array([0.0, 0.2, 0.2]), np.zeros(3))
    moved = calibrator.apply(given, [Family.EXACT, Family.SCORED, Family.WINDOW])
    np.testing.assert_allclose(moved.bound, [0.0, 0.2 * math.exp(0.45), 0.1])  # not below the prediction
    np.testing.assert_array_equal(moved.divergence, given.divergence)


def test_an_adaptive_predictor_covers_text_that_is_three_times_harder() -> None:
    class Fitted:
        version, schema_hash, alpha = "fitted", "hash", 0.1

        def predict(self, rows: np.ndarray, families: list[Family]) -> Prediction:
            from models.bundle import predict

            return predict(trained().models, trained().calibration, rows, families)

    examples = held_out().take(held_out().lossy)
    adaptive = AdaptivePredictor(Fitted(), OnlineCalibrator(0.1, step=0.3))
    assert (adaptive.version, adaptive.schema_hash, adaptive.alpha) == ("fitted", "hash", 0.1)
    prediction = adaptive.predict(examples.rows, examples.families)
    harder = 3 * examples.divergence
    assert (harder > prediction.bound).mean() > 0.2
    for row in np.random.default_rng(0).permutation(len(examples)):
        family = examples.families[row]
        bound = float(prediction.bound[row] * math.exp(adaptive.calibrator.offset(family)))
        adaptive.calibrator.observe(family, bound, float(harder[row]))
    after = adaptive.predict(examples.rows, examples.families)
    assert 0.04 < (harder > after.bound).mean() < 0.18


@pytest.mark.parametrize(("bound", "divergence"), [(math.nan, 0.1), (0.1, math.inf), (-0.1, 0.1), (0.1, -0.1)])
def test_what_is_no_audit_is_refused_and_changes_nothing(bound: float, divergence: float) -> None:
    calibrator = OnlineCalibrator(0.1)
    with pytest.raises(ValueError, match="expected finite nats"):
        calibrator.observe(FAMILY, bound, divergence)
    assert calibrator.audits(FAMILY) == (0, 0)


@pytest.mark.parametrize(("alpha", "step", "named"), [(0.0, 0.1, "alpha"), (0.1, 0.0, "step"), (0.1, 99.0, "step")])
def test_settings_are_checked(alpha: float, step: float, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        OnlineCalibrator(alpha, step)


def test_the_alarm_rings_soon_when_bounds_are_broken_and_rings_on() -> None:
    random = np.random.default_rng(0)
    alarm = BoundAlarm(0.1)
    rang = next(turn for turn in range(1000) if alarm.observe(bool(random.random() < 0.4)))
    assert 19 <= rang < 100
    assert all(alarm.observe(False) for _ in range(100))


def test_false_alarms_are_as_rare_as_promised() -> None:
    random = np.random.default_rng(1)
    rang = 0
    for _ in range(400):
        alarm = BoundAlarm(0.1, error=0.05)
        rang += any(alarm.observe(bool(value < 0.1)) for value in random.random(500))
    assert rang <= 0.05 * 400 + 3 * math.sqrt(0.05 * 0.95 * 400)


def test_drift_is_seen_and_steadiness_is_not() -> None:
    random = np.random.default_rng(2)
    detector = DriftDetector()
    assert not any(detector.observe(0.01, 0.01 * math.exp(random.normal(0, 0.5))) for _ in range(2000))
    assert detector.mean_residual == pytest.approx(0, abs=0.05)
    drifted = [detector.observe(0.01, 0.05 * math.exp(random.normal(0, 0.5))) for _ in range(200)]
    assert any(drifted)
    assert detector.mean_residual == pytest.approx(math.log(5), abs=0.3)
