"""Fitting the three models of a predictor: their settings, constraints and seeds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

from models.examples import NEEDED_NATS, Examples, LongRange
from models.features import F64, NAMES
from models.forest import Models

SEED = 20
MONOTONE = {
    "mass_beyond": 1,
    "mass_beyond_max": 1,
    "mass_beyond_last": 1,
    "mass_beyond_deep": 1,
    "votes_dropped": 1,
    "votes_dropped_max": 1,
    "votes_missed": 1,
    "votes_missed_max": 1,
    "votes_missed_deep": 1,
    "kept_share": -1,
    "bits": -1,
}
"""More attention on what goes, fewer tokens or bits: never less divergence, all else equal."""


class TrainingError(ValueError):
    """The dataset cannot be learned from; says what it lacks."""


@dataclass(frozen=True)
class Hyperparameters:
    """Of gradient boosting over histograms; the defaults are starting points, which tuning moves on from.

    Prediction takes time in proportion to trees times depth, so :mod:`models.tuning` leaves these alone.
    """

    trees: int = 100
    upper_trees: int = 60
    long_range_trees: int = 40
    leaves: int = 31
    depth: int = 7
    learning_rate: float = 0.1
    min_leaf_rows: int = 40
    l2: float = 1.0
    feature_share: float = 0.5
    """Share of features looked at for each split."""
    monotone: bool = True
    """Whether :data:`MONOTONE` is enforced."""

    def __post_init__(self) -> None:
        for name, low, high in _LIMITS:
            value = getattr(self, name)
            if not low <= value <= high:
                raise TrainingError(f"{name} {value}: expected {low} to {high}")


_LIMITS: tuple[tuple[str, float, float], ...] = (
    ("trees", 1, 1000),
    ("upper_trees", 1, 1000),
    ("long_range_trees", 1, 1000),
    ("leaves", 2, 255),
    ("depth", 1, 16),
    ("learning_rate", 1e-3, 1.0),
    ("min_leaf_rows", 1, 100_000),
    ("l2", 0.0, 1000.0),
    ("feature_share", 0.01, 1.0),
)


def fit(examples: Examples, alpha: float, given: Hyperparameters) -> Models:
    """Fits all three.

    Raises:
        TrainingError: there is too little, or all of one kind.
    """
    examples = examples.take(~examples.exact)
    return Models(
        point=fit_point(examples, given), upper=fit_upper(examples, alpha, given), long_range=fit_head(examples, given)
    )


def fit_point(examples: Examples, given: Hyperparameters) -> HistGradientBoostingRegressor:
    """The model of the expected log divergence."""
    _check(examples)
    model = HistGradientBoostingRegressor(loss="squared_error", max_iter=given.trees, **_common(given, SEED))
    return model.fit(_binnable(examples.rows), examples.target)


def fit_upper(examples: Examples, alpha: float, given: Hyperparameters) -> HistGradientBoostingRegressor:
    """The model of the 1 - alpha quantile of log divergence."""
    _check(examples)
    model = HistGradientBoostingRegressor(
        loss="quantile", quantile=1 - alpha, max_iter=given.upper_trees, **_common(given, SEED + 1)
    )
    return model.fit(_binnable(examples.rows), examples.target)


def fit_head(examples: Examples, given: Hyperparameters) -> HistGradientBoostingClassifier:
    """The model of the probability that the local window is too short."""
    windows = LongRange.of(examples)
    if not (windows.needed.any() and (~windows.needed).any()):
        raise TrainingError(
            f"{len(windows.needed)} places with a measured `window` pipeline, {int(windows.needed.sum())} of which "
            f"lost more than {NEEDED_NATS} nats: the long-range model needs some of both"
        )
    settings = _common(given, SEED + 2) | {"monotonic_cst": None, "min_samples_leaf": min(given.min_leaf_rows, 20)}
    model = HistGradientBoostingClassifier(max_iter=given.long_range_trees, **settings)
    return model.fit(_binnable(windows.states), windows.needed)


def with_settings(given: Hyperparameters, **changed: Any) -> Hyperparameters:
    """Hyperparameters with some of them changed.

    Raises:
        TrainingError: one that does not exist, or a value out of range.
    """
    known = asdict(given)
    if unknown := set(changed) - set(known):
        raise TrainingError(f"unknown hyperparameter {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    return Hyperparameters(**(known | changed))


def _check(examples: Examples) -> None:
    if len(examples) < 2 or examples.exact.any():
        raise TrainingError(f"{len(examples)} rows of lossy pipelines to learn from; at least 2 are needed, none exact")


def _binnable(rows: F64) -> F64:
    """Columns that are nowhere known get a constant: neither can be split by, but only the latter can be binned."""
    return np.where(np.isnan(rows).all(0), 0.0, rows)


def _common(given: Hyperparameters, seed: int) -> dict[str, Any]:
    constraints = np.array([MONOTONE.get(name, 0) for name in NAMES]) if given.monotone else None
    return {
        "max_leaf_nodes": given.leaves,
        "max_depth": given.depth,
        "learning_rate": given.learning_rate,
        "min_samples_leaf": given.min_leaf_rows,
        "l2_regularization": given.l2,
        "max_features": given.feature_share,
        "monotonic_cst": constraints,
        "early_stopping": False,
        "random_state": seed,
    }
