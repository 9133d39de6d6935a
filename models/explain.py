"""What a predictor looks at: over a dataset by permutation, at one row by ablation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from models.bundle import Bundle
from models.examples import Examples
from models.features import F64, FEATURES, NAMES
from models.metrics import ranking
from models.scale import log_divergence

SEED = 5


class ExplainError(ValueError):
    """There is nothing to explain; says what there is."""


@dataclass(frozen=True)
class Importance:
    """What is lost when one feature's values are dealt out anew among the rows."""

    feature: str
    meaning: str
    error: float
    """Rise of the mean absolute error, log nats."""
    spearman_within: float
    """Fall of the mean rank correlation within pipelines."""


@dataclass(frozen=True)
class Contribution:
    """What one feature's value does to one prediction."""

    feature: str
    meaning: str
    value: float
    usual: float
    """Median of the training rows, which the value is compared with."""
    log_nats: float
    """By how much the value raises the prediction."""


def importance(bundle: Bundle, examples: Examples, repeats: int = 3) -> list[Importance]:
    """Permutation importance of every feature that changes a prediction, the most important first.

    Features that move together share their importance between them: each may look needless while the other is there.

    Raises:
        ExplainError: no rows of lossy pipelines.
    """
    lossy = examples.take(examples.lossy)
    if not len(lossy):
        raise ExplainError("no rows of lossy pipelines to explain on")
    random = np.random.default_rng(SEED)
    base = bundle.predict(lossy.rows, lossy.families).divergence
    base_error, base_rank = _figures(lossy, base)
    found = []
    for place, feature in enumerate(FEATURES):
        figures = []
        for _ in range(repeats):
            rows = lossy.rows.copy()
            rows[:, place] = random.permutation(rows[:, place])
            predicted = bundle.predict(rows, lossy.families).divergence
            if not np.array_equal(predicted, base):
                figures.append(_figures(lossy, predicted))
        if figures:
            error, rank = np.mean(figures, axis=0)
            found.append(Importance(feature.name, feature.meaning, float(error - base_error), float(base_rank - rank)))
    return sorted(found, key=lambda one: -one.error)


def contributions(bundle: Bundle, row: F64, training: Examples) -> list[Contribution]:
    """How far each value of a row [features] moves its prediction from what the usual value would give, largest first.

    One value is replaced at a time, so contributions need not add up where features act together.

    Raises:
        ExplainError: no rows of lossy pipelines in the training rows.
    """
    usual_rows = training.rows[training.lossy]
    if not len(usual_rows):
        raise ExplainError("no rows of lossy pipelines to take the usual values from")
    known = ~np.isnan(usual_rows).all(0)
    usual = np.full(len(NAMES), np.nan)
    usual[known] = np.nanmedian(usual_rows[:, known], axis=0)
    ablated = np.tile(row, (len(NAMES) + 1, 1))
    ablated[np.arange(len(NAMES)) + 1, np.arange(len(NAMES))] = usual
    answer = bundle.models.answer(ablated).point
    moved = answer[0] - answer[1:]
    return [
        Contribution(FEATURES[at].name, FEATURES[at].meaning, float(row[at]), float(usual[at]), float(moved[at]))
        for at in np.argsort(-np.abs(moved), kind="stable")
        if moved[at]
    ]


def find_row(examples: Examples, document: str, at_token: int | None, pipeline: str) -> int:
    """The number of a row.

    Raises:
        ExplainError: there is none; names what there is instead.
    """
    rows = np.flatnonzero(examples.document == document)
    if not len(rows):
        some = ", ".join(np.unique(examples.document)[:3].tolist())
        raise ExplainError(f"document {document!r} is not in the dataset, which has {examples.documents}, e.g. {some}")
    tokens = np.unique(examples.at_token[rows])
    at_token = int(tokens[0]) if at_token is None else at_token
    if at_token not in tokens:
        raise ExplainError(f"at token {at_token} of {document!r} nothing was measured; at {_listed(tokens)} there was")
    rows = rows[examples.at_token[rows] == at_token]
    chosen = rows[examples.pipeline[rows] == pipeline]
    if not len(chosen):
        raise ExplainError(
            f"pipeline {pipeline!r} was not measured there; measured: {_listed(np.unique(examples.pipeline[rows]))}"
        )
    return int(chosen[0])


def _listed(values: object) -> str:
    return ", ".join(str(value) for value in np.asarray(values).tolist())


def _figures(lossy: Examples, predicted: F64) -> tuple[float, float]:
    error = float(np.abs(log_divergence(predicted) - lossy.target).mean())
    return error, ranking(lossy, predicted).spearman_within
