"""How well divergence is predicted: ranks over all candidates and within one, alarms, and whether the bounds hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from models.examples import NEEDED_NATS, Examples, Mask, Text
from models.features import F64

MIN_ROWS = 10
"""A pipeline with fewer rows says nothing about ranks."""
MIN_OF_A_CLASS = 5
"""A pipeline with fewer rows above, or below, :data:`NEEDED_NATS` says nothing about alarms."""


@dataclass(frozen=True)
class Ranking:
    """How well predictions order what was measured. NaN where there was too little to tell."""

    spearman_pooled: float
    """Over the rows of all pipelines that lose something; flatters, since pipelines differ more than windows."""
    spearman_within: float
    """Mean of :attr:`spearman_by_pipeline`."""
    auc_within: float
    """Mean of :attr:`auc_by_pipeline`."""
    spearman_by_pipeline: dict[str, float]
    """Within each evicting pipeline, over the rows where it evicts."""
    auc_by_pipeline: dict[str, float]
    """Of telling rows over :data:`NEEDED_NATS` from the rest, in pipelines with enough of both."""


def ranking(examples: Examples, predicted: F64) -> Ranking:
    """Compares predictions [N], in any monotone unit, with what was measured."""
    counted = examples.lossy
    by_pipeline = {
        name: spearman(predicted[rows], examples.target[rows])
        for name, rows in _groups(examples.pipeline, examples.evicting).items()
        if rows.sum() >= MIN_ROWS
    }
    alarms = {}
    for name, rows in _groups(examples.pipeline, counted).items():
        over = examples.divergence[rows] > NEEDED_NATS
        if min(over.sum(), (~over).sum()) >= MIN_OF_A_CLASS:
            alarms[name] = float(roc_auc_score(over, predicted[rows]))
    return Ranking(
        spearman_pooled=spearman(predicted[counted], examples.target[counted]),
        spearman_within=_mean(by_pipeline),
        auc_within=_mean(alarms),
        spearman_by_pipeline=by_pipeline,
        auc_by_pipeline=alarms,
    )


def spearman(one: F64, other: F64) -> float:
    """Rank correlation; NaN where either is constant or there are fewer than two values."""
    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(spearmanr(one, other).statistic)


@dataclass(frozen=True)
class Coverage:
    """Share of rows whose divergence stays within its bound; rows that cannot lose anything are not counted."""

    overall: float
    low: float
    high: float
    """95 % interval of :attr:`overall`, by resampling documents: rows of a document are not independent."""
    by_family: dict[str, float]
    by_kind: dict[str, float]
    by_pipeline: dict[str, float]


def coverage(examples: Examples, bound: F64, resamples: int = 500, seed: int = 0) -> Coverage:
    """Counts how often a bound [N] held."""
    counted = examples.lossy
    held = examples.divergence <= bound
    low, high = _interval(examples.source[counted], held[counted], resamples, seed)

    def by(labels: Text) -> dict[str, float]:
        return {name: float(held[rows].mean()) for name, rows in _groups(labels, counted).items()}

    return Coverage(
        overall=float(held[counted].mean()) if counted.any() else float("nan"),
        low=low,
        high=high,
        by_family=by(examples.family),
        by_kind=by(examples.kind),
        by_pipeline=by(examples.pipeline),
    )


def _interval(document: Text, held: Mask, resamples: int, seed: int) -> tuple[float, float]:
    if not len(held):
        return float("nan"), float("nan")
    _, code = np.unique(document, return_inverse=True)
    rows, kept = np.bincount(code).astype(float), np.bincount(code, weights=held)
    drawn = np.random.default_rng(seed).integers(0, len(rows), (resamples, len(rows)))
    low, high = np.quantile(kept[drawn].sum(1) / rows[drawn].sum(1), (0.025, 0.975))
    return float(low), float(high)


def _groups(labels: Text, counted: Mask) -> dict[str, Mask]:
    return {str(name): counted & (labels == name) for name in np.unique(labels[counted])}


def _mean(values: dict[str, float]) -> float:
    known = [value for value in values.values() if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
