"""Split conformal bounds, against other people's implementations and against what they promise."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from crepes import ConformalRegressor
from mapie.regression import SplitConformalRegressor
from sklearn.dummy import DummyRegressor

from models.calibration import CalibrationError, calibrate, conformal_quantile
from models.examples import Examples
from models.features import Family
from models.scale import FLOOR
from tests.models.fitted import held_out, trained
from tests.models.synthetic import table


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.37])
@pytest.mark.parametrize("count", [20, 98, 100, 1000])
def test_quantile_is_that_of_mapie_and_crepes(count: int, alpha: float) -> None:
    scores = np.abs(np.random.default_rng(count).standard_normal(count))
    ours = conformal_quantile(scores, alpha)
    rank = math.ceil((count + 1) * (1 - alpha))
    assert (scores <= ours).sum() == rank

    zeros = np.zeros((count, 1))
    model = DummyRegressor(strategy="constant", constant=0.0).fit(zeros, scores)
    mapie = SplitConformalRegressor(estimator=model, confidence_level=1 - alpha, prefit=True)
    _, intervals = mapie.conformalize(zeros, scores).predict_interval(np.zeros((1, 1)))
    assert intervals[0, 1, 0] == pytest.approx(ours, rel=1e-12)

    crepes = ConformalRegressor().fit(residuals=scores)
    assert crepes.predict_int(np.zeros(1), confidence=1 - alpha)[0, 1] == pytest.approx(ours, rel=1e-12)


def test_the_rank_does_not_hang_on_a_last_bit() -> None:
    for count in range(9, 2000, 10):
        assert conformal_quantile(np.arange(count, dtype=float), 0.1) == (count + 1) // 10 * 9 - 1


@pytest.mark.parametrize(("count", "alpha", "least"), [(8, 0.1, 9), (18, 0.05, 19)])
def test_too_few_scores_are_refused(count: int, alpha: float, least: int) -> None:
    with pytest.raises(CalibrationError, match=f"{count} windows: alpha {alpha} takes at least {least}"):
        conformal_quantile(np.zeros(count), alpha)
    assert conformal_quantile(np.zeros(least), alpha) == 0.0


def test_exchangeable_scores_exceed_it_as_often_as_promised() -> None:
    random = np.random.default_rng(1)
    exceeded = [drawn[-1] > conformal_quantile(drawn[:-1], 0.1) for drawn in random.standard_normal((4000, 50))]
    assert np.mean(exceeded) == pytest.approx(1 - 46 / 51, abs=3 * math.sqrt(0.1 * 0.9 / 4000))


def test_each_family_is_covered_and_the_point_is_its_median() -> None:
    examples, models, calibration = held_out(), trained().models, trained().calibration
    answer = models.answer(examples.rows)
    bound, point = calibration.shifts(examples.families)
    rows_of = {family: examples.lossy & (examples.family == family.value) for family in calibration.families}
    seen = [family for family, rows in rows_of.items() if rows.sum() > 60]
    assert {Family.QUANTISE, Family.WINDOW, Family.SCORED} <= set(seen)
    for family in seen:
        rows = rows_of[family]
        exceeded = (examples.target > np.maximum(answer.upper + bound, FLOOR))[rows].mean()
        assert 0.02 < exceeded < 0.2
        assert 0.35 < (examples.target > answer.point + point)[rows].mean() < 0.65


def test_a_shift_is_the_conformal_quantile_of_its_family() -> None:
    examples, models = trained().calibrating, trained().models
    answer = models.answer(examples.rows)
    rows = examples.lossy & (examples.family == "scored")
    naive = sorted((examples.target - answer.upper)[rows].tolist())
    shift = calibrate(examples, answer.point, answer.upper).families[Family.SCORED]
    assert shift.bound == naive[math.ceil((len(naive) + 1) * 0.9) - 1]
    assert shift.windows == len(naive)
    assert shift.documents == len(set(examples.document[rows].tolist()))


def test_small_families_take_the_pooled_correction() -> None:
    examples, models = trained().calibrating, trained().models
    few = examples.take(~(examples.family == "scored") | (np.cumsum(examples.family == "scored") <= 50))
    answer = models.answer(few.rows)
    calibration = calibrate(few, answer.point, answer.upper)
    assert Family.SCORED not in calibration.families
    assert calibration.shift(Family.SCORED) == calibration.pooled
    assert calibration.shift(Family.WINDOW) != calibration.pooled


def test_families_of_few_documents_take_the_pooled_correction() -> None:
    one_document = Examples.of(table(documents=3, windows=60))
    zeros = np.zeros(len(one_document))
    assert not calibrate(one_document, zeros, zeros).families


def test_rows_that_lose_nothing_are_not_calibrated_on() -> None:
    examples, models = trained().calibrating, trained().models
    answer = models.answer(examples.rows)
    lost = np.where(examples.lossy, examples.divergence, 5.0)  # if they counted, bounds would explode
    assert not examples.lossy.all()
    expected = calibrate(examples, answer.point, answer.upper)
    assert calibrate(replace(examples, divergence=lost), answer.point, answer.upper) == expected


def test_divergence_at_the_floor_is_within_every_bound() -> None:
    examples = held_out().take(held_out().lossy)
    nothing = replace(examples, divergence=np.zeros(len(examples)))
    upper = np.full(len(examples), 3.0)
    shift = calibrate(nothing, upper, upper).pooled
    assert 3.0 + shift.bound == pytest.approx(FLOOR)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1])
def test_alpha_is_a_share(alpha: float) -> None:
    with pytest.raises(CalibrationError, match="alpha"):
        calibrate(held_out(), held_out().target, held_out().target, alpha)
