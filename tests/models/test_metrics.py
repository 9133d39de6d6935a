"""Metrics against naive references, computed from their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from models.metrics import coverage, ranking, spearman
from tests.models.fitted import held_out, trained


def naive_ranks(values: list[float]) -> list[float]:
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2 for value in values
    ]


def naive_spearman(one: list[float], other: list[float]) -> float:
    a, b = naive_ranks(one), naive_ranks(other)
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    over = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    under = math.sqrt(sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b))
    return over / under


def naive_auc(positive: list[bool], score: list[float]) -> float:
    yes = [value for value, truth in zip(score, positive, strict=True) if truth]
    no = [value for value, truth in zip(score, positive, strict=True) if not truth]
    return sum((a > b) + 0.5 * (a == b) for a in yes for b in no) / (len(yes) * len(no))


@pytest.fixture(scope="module")
def predicted() -> np.ndarray:
    point = trained().models.answer(held_out().rows).point
    return np.round(point, 1)  # with ties


def test_ranking_is_what_it_says(predicted: np.ndarray) -> None:
    examples = held_out()
    found = ranking(examples, predicted)
    lossy = [row for row in range(len(examples)) if examples.lossy[row]]
    expected = naive_spearman([predicted[row] for row in lossy], [float(examples.target[row]) for row in lossy])
    assert found.spearman_pooled == pytest.approx(expected, abs=1e-12)
    within, alarms = {}, {}
    for pipeline in sorted(set(examples.pipeline.tolist())):
        rows = [row for row in lossy if examples.pipeline[row] == pipeline]
        if not rows:
            continue
        measured = [float(examples.divergence[row]) for row in rows]
        if examples.family[rows[0]] != "quantise":
            evicting = [row for row in rows if examples.evicting[row]]
            within[pipeline] = naive_spearman(
                [predicted[row] for row in evicting], [float(examples.divergence[row]) for row in evicting]
            )
        over = [value > 0.05 for value in measured]
        if min(sum(over), len(over) - sum(over)) >= 5:
            alarms[pipeline] = naive_auc(over, [predicted[row] for row in rows])
    assert found.spearman_by_pipeline == pytest.approx(within, abs=1e-12)
    assert found.auc_by_pipeline == pytest.approx(alarms, abs=1e-12)
    assert len(within) == 11
    assert len(alarms) >= 8
    assert found.spearman_within == pytest.approx(sum(within.values()) / len(within))
    assert found.auc_within == pytest.approx(sum(alarms.values()) / len(alarms))


def test_perfect_and_reversed_predictions() -> None:
    examples = held_out()
    assert ranking(examples, examples.target).spearman_within == pytest.approx(1)
    assert ranking(examples, examples.target).auc_within == 1
    assert ranking(examples, -examples.target).spearman_pooled == pytest.approx(-1)


def test_too_little_to_tell_is_nan() -> None:
    assert math.isnan(spearman(np.ones(5), np.arange(5.0)))
    assert math.isnan(spearman(np.ones(1), np.ones(1)))
    nothing = held_out().take(np.array([], np.intp))
    assert math.isnan(ranking(nothing, np.array([])).spearman_within)
    assert math.isnan(coverage(nothing, np.array([])).overall)


def test_coverage_counts_rows_that_can_lose_something() -> None:
    examples = held_out()
    bound = np.exp(trained().models.answer(examples.rows).upper)
    found = coverage(examples, bound)
    rows = [row for row in range(len(examples)) if examples.lossy[row]]
    held = [examples.divergence[row] <= bound[row] for row in rows]
    assert found.overall == pytest.approx(sum(held) / len(held))
    assert found.low < found.overall < found.high
    for shares, labels in ((found.by_family, examples.family), (found.by_kind, examples.kind)):
        assert set(shares) == {str(labels[row]) for row in rows}
        for name, share in shares.items():
            of = [ok for row, ok in zip(rows, held, strict=True) if labels[row] == name]
            assert share == pytest.approx(sum(of) / len(of))


def test_the_interval_is_wider_where_documents_agree_within() -> None:
    examples = held_out()
    documents = np.unique(examples.document)
    good = np.isin(examples.document, documents[: len(documents) // 2])
    by_document = coverage(examples, np.where(good, 1e3, 0.0))
    by_row = coverage(examples, np.where(np.arange(len(examples)) % 2 == 0, 1e3, 0.0))
    assert by_document.high - by_document.low > 2 * (by_row.high - by_row.low)
