"""Training finds the rule that made the data, the same one every time, and says what it cannot learn from."""

from __future__ import annotations

import math

import numpy as np
import pyarrow.compute as pc
import pytest

from models import dataset
from models.bundle import predict
from models.dataset import Split
from models.examples import STATE_FEATURES, Examples
from models.features import NAMES
from models.fitting import MONOTONE, Hyperparameters, TrainingError, fit_point, fit_upper, with_settings
from models.folds import folds_of
from models.metrics import coverage, ranking
from models.training import pinball, train, validate
from models.trees import Trees
from models.tuning import tune
from tests.models.fitted import SMALL, held_out, trained
from tests.models.synthetic import table, usual


def test_what_made_the_data_is_found_on_unseen_documents() -> None:
    examples = held_out()
    found = predict(trained().models, trained().calibration, examples.rows, examples.families)
    figures = ranking(examples, found.divergence)
    assert figures.spearman_pooled > 0.85
    assert figures.spearman_within > 0.6
    assert figures.auc_within > 0.8
    validated = trained().validation.ranking
    assert validated.spearman_within == pytest.approx(figures.spearman_within, abs=0.15)
    assert trained().validation.long_range_auc > 0.75


def test_bounds_hold_on_unseen_documents_as_often_as_promised() -> None:
    examples = held_out()
    found = predict(trained().models, trained().calibration, examples.rows, examples.families)
    covered = coverage(examples, found.bound)
    assert covered.overall == pytest.approx(0.9, abs=0.04)


def test_bounds_count_what_cross_validation_missed_beside_the_calibration_split() -> None:
    fitted = trained()
    learned = fitted.training.take(~fitted.training.exact)
    upper = np.empty(len(learned))
    for on, off in folds_of(learned, 2):
        upper[off] = fit_upper(learned.take(on), 0.1, SMALL).predict(learned.rows[off])
    missed = (learned.target - upper)[learned.lossy]
    kept = fitted.calibrating.take(fitted.calibrating.lossy)
    missed = np.sort(np.concatenate([missed, kept.target - fitted.models.answer(kept.rows).upper]))
    shift = fitted.calibration.pooled
    assert shift.windows == len(missed)
    assert shift.documents == len(set(learned.source) | set(kept.source))
    assert shift.bound == pytest.approx(missed[math.ceil(0.9 * (len(missed) + 1)) - 1])


def test_the_same_data_gives_the_same_models() -> None:
    again = train(usual(), SMALL, folds=2)
    rows = held_out().rows
    for part in ("point", "upper", "long_range"):
        np.testing.assert_array_equal(
            getattr(again.models.answer(rows), part), getattr(trained().models.answer(rows), part)
        )
    assert again.calibration == trained().calibration
    assert again.validation == trained().validation


def test_the_test_split_is_not_looked_at() -> None:
    without = pc.if_else(
        pc.is_in(usual()["document"], value_set=dataset.only(usual(), Split.TEST)["document"].unique()),
        1e3,
        usual()["divergence"],
    )
    spoilt = usual().set_column(usual().schema.get_field_index("divergence"), "divergence", without)
    again = train(spoilt, SMALL, folds=2)
    assert again.calibration == trained().calibration
    assert again.validation == trained().validation


def test_exact_rows_are_not_learned_from() -> None:
    divergence = pc.if_else(pc.equal(usual()["family"], "exact"), 9.0, usual()["divergence"])
    spoilt = usual().set_column(usual().schema.get_field_index("divergence"), "divergence", divergence)
    assert train(spoilt, SMALL, folds=2).validation == trained().validation


def test_folds_never_divide_a_document_and_cover_all_rows() -> None:
    examples = held_out()
    seen = np.zeros(len(examples), int)
    for fitted, tested in folds_of(examples, 3):
        assert not set(examples.document[fitted]) & set(examples.document[tested])
        assert len(fitted) + len(tested) == len(examples)
        seen[tested] += 1
    assert (seen == 1).all()


def test_constraints_hold_everywhere() -> None:
    examples = held_out().take(held_out().lossy)
    model = Trees.of(trained().models.point)
    for name, sign in MONOTONE.items():
        rows = np.repeat(examples.rows[::40], 9, axis=0)
        low, high = (0, 16) if name == "bits" else (0, 1)
        rows[:, NAMES.index(name)] = np.tile(np.linspace(low, high, 9), len(rows) // 9)
        steps = np.diff(model.answer(rows).reshape(-1, 9), axis=1)
        assert (sign * steps >= -1e-12).all(), name


def test_trees_answer_as_scikit_learn_does_with_and_without_values() -> None:
    random = np.random.default_rng(0)
    examples = held_out().take(held_out().lossy)
    rows = np.where(random.random(examples.rows.shape) < 0.3, np.nan, examples.rows)
    holed = Examples(**{**vars_of(examples), "rows": rows})
    model = fit_point(holed, with_settings(SMALL, monotone=False))
    others = fit_upper(examples, 0.1, SMALL)
    trees = Trees.of(model, others)
    assert (trees.looked_at >= len(NAMES)).any()  # missing values that go right
    for given in (rows, examples.rows, np.full((3, len(NAMES)), np.nan), rows[:1], rows[:257]):
        np.testing.assert_array_equal(trees.answer(given), [model.predict(given), others.predict(given)])
    with pytest.raises(ValueError, match=r"rows \(3, 4\)"):
        trees.answer(np.zeros((3, 4)))


def vars_of(examples: Examples) -> dict[str, object]:
    return {name: getattr(examples, name) for name in Examples.__dataclass_fields__}


def test_long_range_sees_requests_only_and_is_equal_for_all_candidates() -> None:
    examples = held_out()
    assert trained().models.long_range.n_features_in_ == STATE_FEATURES
    answer = trained().models.answer(examples.rows).long_range
    for window in range(examples.windows):
        assert len(set(answer[examples.window == window].tolist())) == 1
    shuffled = np.random.default_rng(0).permutation(len(examples))
    np.testing.assert_array_equal(trained().models.answer(examples.rows[shuffled]).long_range, answer[shuffled])


def test_pinball_is_the_quantile_loss() -> None:
    target, predicted = np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 1.0])
    assert pinball(target, predicted, 0.9) == pytest.approx((0.1 * 1 + 0 + 0.9 * 2) / 3)


def test_tuning_is_repeatable_and_never_worse_than_where_it_starts() -> None:
    examples = Examples.of(dataset.only(table(documents=30), Split.TRAIN))
    examples = examples.take(~examples.exact)
    start = with_settings(SMALL, trees=6, learning_rate=0.03, leaves=7, min_leaf_rows=150)
    told: list[str] = []
    chosen = tune(examples, start, 0.1, 4, 2, told.append)
    assert chosen == tune(examples, start, 0.1, 4, 2)
    assert [line.split(":")[0] for line in told] == [f"trial {number} of 4" for number in (1, 2, 3, 4)]
    assert (chosen.trees, chosen.depth) == (6, SMALL.depth)

    def score(given: Hyperparameters) -> float:
        found = validate(examples, given, 0.1, 2).ranking
        return (found.spearman_within + found.auc_within) / 2

    assert score(chosen) > score(start)


def test_what_cannot_be_learned_from_is_said() -> None:
    with pytest.raises(TrainingError, match="cross-validation with 5 folds takes at least 5"):
        train(table(documents=4), SMALL)
    no_windows = usual().filter(pc.invert(pc.equal(usual()["family"], "window")))
    with pytest.raises(TrainingError, match="0 places with a measured `window` pipeline"):
        train(no_windows, SMALL, folds=2)
    with pytest.raises(TrainingError, match="folds 1: expected 2 or more"):
        train(usual(), SMALL, folds=1)


@pytest.mark.parametrize(("name", "value"), [("leaves", 1), ("learning_rate", 0.0), ("feature_share", 1.5)])
def test_hyperparameters_are_checked(name: str, value: float) -> None:
    with pytest.raises(TrainingError, match=f"{name} {value}: expected"):
        with_settings(Hyperparameters(), **{name: value})
    with pytest.raises(TrainingError, match="unknown hyperparameter width"):
        with_settings(Hyperparameters(), width=3)
