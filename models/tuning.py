"""The search for hyperparameters: Optuna's TPE sampler with a fixed seed, scored by grouped cross-validation."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import numpy as np
import optuna

from models.examples import Examples
from models.fitting import Hyperparameters, fit_point, with_settings
from models.folds import folds_of
from models.metrics import ranking

SEED = 7
_TUNED = ("leaves", "learning_rate", "min_leaf_rows", "l2", "feature_share", "monotone")


def tune(
    examples: Examples,
    start: Hyperparameters,
    alpha: float,
    trials: int,
    folds: int,
    progress: Callable[[str], None] = lambda line: None,
) -> Hyperparameters:
    """The best of ``trials`` sets, the first of which is ``start``; rows of lossy pipelines only.

    What is maximised is the ordering within pipelines (mean of Spearman and AUC), which is what a planner lives on. The
    numbers of trees and their depth are the caller's: they set what a prediction costs.
    """

    def score(trial: optuna.Trial) -> float:
        given = with_settings(
            start,
            leaves=trial.suggest_int("leaves", 7, 63, log=True),
            learning_rate=trial.suggest_float("learning_rate", 0.03, 0.3, log=True),
            min_leaf_rows=trial.suggest_int("min_leaf_rows", 5, 200, log=True),
            l2=trial.suggest_float("l2", 0.01, 100.0, log=True),
            feature_share=trial.suggest_float("feature_share", 0.1, 1.0),
            monotone=trial.suggest_categorical("monotone", [True, False]),
        )
        predicted = np.empty(len(examples))
        for fitted, held_out in folds_of(examples, folds):
            predicted[held_out] = fit_point(examples.take(fitted), given).predict(examples.rows[held_out])
        found = ranking(examples, predicted)
        figures = [value for value in (found.spearman_within, found.auc_within) if not math.isnan(value)]
        value = float(np.mean(figures)) if figures else found.spearman_pooled
        progress(f"trial {trial.number + 1} of {trials}: {value:.4f}")
        return value

    optuna.logging.set_verbosity(logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=SEED))
    study.enqueue_trial({name: getattr(start, name) for name in _TUNED})
    study.optimize(score, n_trials=trials)
    return with_settings(start, **study.best_params)
