"""From a dataset to a calibrated predictor: grouped cross-validation, tuning, the fit, and the calibration.

A fifth of the documents is kept from the fit to calibrate on. The documents of the fit help: what a model of the
cross-validation missed on those that it had not seen counts as well (cross-conformal prediction: Vovk 2015,
arXiv 1208.0806). Windows of one document resemble each other, so that a fifth of a few dozen documents alone would
leave bounds of a family to chance. Those models saw fewer documents than the final one, which errs on the safe side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from models import calibration as conformal
from models import dataset
from models.dataset import Split
from models.examples import Examples, LongRange
from models.features import F64
from models.fitting import Hyperparameters, TrainingError, fit, fit_head, fit_point, fit_upper
from models.folds import FOLDS, folds_of
from models.forest import Models
from models.metrics import Ranking, ranking


@dataclass(frozen=True)
class Validation:
    """Metrics of models on documents that they were not fitted on, from cross-validation over the training split."""

    ranking: Ranking
    pinball: float
    """Loss of the upper model, log nats."""
    long_range_auc: float
    """NaN where folds had one class only."""
    folds: int


@dataclass(frozen=True)
class Trained:
    """A fitted predictor and how it was made."""

    models: Models
    calibration: conformal.Calibration
    hyperparameters: Hyperparameters
    validation: Validation
    training: Examples
    calibrating: Examples
    """Kept from the fit; the calibration counts these and what cross-validation missed on ``training``."""


@dataclass(frozen=True)
class _HeldOut:
    """What models of a cross-validation say of rows that they were not fitted on, [N] log nats each."""

    point: F64
    upper: F64


def train(
    table: pa.Table,
    given: Hyperparameters | None = None,
    alpha: float = conformal.ALPHA,
    trials: int = 0,
    folds: int = FOLDS,
    progress: Callable[[str], None] = lambda line: None,
) -> Trained:
    """Fits on the training split, calibrates on the calibration split too; the test split is not looked at.

    Args:
        table: a dataset.
        given: hyperparameters; where ``trials`` > 0 tuning starts from them.
        alpha: share of windows that may exceed their bound.
        trials: hyperparameter sets that Optuna tries; the same number gives the same result.
        folds: of the cross-validation, over documents.
        progress: is told what is being done.

    Raises:
        TrainingError, CalibrationError: the dataset is too small or one-sided.
    """
    training, calibrating = (Examples.of(dataset.only(table, split)) for split in (Split.TRAIN, Split.CALIBRATE))
    lossy = training.take(~training.exact)
    chosen = given or Hyperparameters()
    if trials:
        from models.tuning import tune

        chosen = tune(lossy, chosen, alpha, trials, folds, progress)
    progress(f"cross-validation over {lossy.documents} documents, {len(lossy)} rows")
    validation, held_out = _cross_validate(lossy, chosen, alpha, folds)
    progress("fitting on all of them")
    models = fit(lossy, alpha, chosen)
    progress(f"calibrating on these and {calibrating.documents} other documents, {len(calibrating)} rows")
    answer = models.answer(calibrating.rows)
    return Trained(
        models=models,
        calibration=conformal.calibrate(
            Examples.joined(lossy, calibrating),
            np.concatenate([held_out.point, answer.point]),
            np.concatenate([held_out.upper, answer.upper]),
            alpha,
        ),
        hyperparameters=chosen,
        validation=validation,
        training=training,
        calibrating=calibrating,
    )


def calibrate(models: Models, examples: Examples, alpha: float) -> conformal.Calibration:
    """The corrections that make fitted models' bounds hold on these rows, which must not be those of the fit.

    Split conformal prediction on these rows alone.

    Raises:
        CalibrationError: there are too few.
    """
    if not examples.lossy.any():
        raise conformal.CalibrationError("no rows of lossy pipelines to calibrate on")
    answer = models.answer(examples.rows)
    return conformal.calibrate(examples, answer.point, answer.upper, alpha)


def validate(examples: Examples, given: Hyperparameters, alpha: float, folds: int = FOLDS) -> Validation:
    """Cross-validates on rows of lossy pipelines; documents are never divided.

    Raises:
        TrainingError: fewer documents than folds.
    """
    return _cross_validate(examples, given, alpha, folds)[0]


def _cross_validate(
    examples: Examples, given: Hyperparameters, alpha: float, folds: int
) -> tuple[Validation, _HeldOut]:
    point, upper = np.empty(len(examples)), np.empty(len(examples))
    head: list[F64] = []
    needed: list[F64] = []
    for fitted, held_out in folds_of(examples, folds):
        on, off = examples.take(fitted), examples.take(held_out)
        point[held_out] = fit_point(on, given).predict(off.rows)
        upper[held_out] = fit_upper(on, alpha, given).predict(off.rows)
        try:
            model = fit_head(on, given)
        except TrainingError:
            continue  # a fold of one kind; with all folds so, the figure is NaN, and the fit itself refuses
        windows = LongRange.of(off)
        head.append(model.predict_proba(windows.states)[:, 1])
        needed.append(windows.needed.astype(float))
    validation = Validation(
        ranking=ranking(examples, point),
        pinball=pinball(examples.target, upper, 1 - alpha),
        long_range_auc=_auc(head, needed),
        folds=folds,
    )
    return validation, _HeldOut(point, upper)


def pinball(target: F64, predicted: F64, quantile: float) -> float:
    """Mean quantile loss."""
    above = target - predicted
    return float(np.mean(np.maximum(quantile * above, (quantile - 1) * above)))


def _auc(scores: list[F64], needed: list[F64]) -> float:
    from sklearn.metrics import roc_auc_score

    if not needed or len(np.unique(np.concatenate(needed))) < 2:
        return math.nan
    return float(roc_auc_score(np.concatenate(needed), np.concatenate(scores)))
