"""The offline comparison, on places small enough to enumerate."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from models.candidates import CANDIDATES
from models.examples import Examples
from models.policies import (
    LEARNED,
    MASS_RULE,
    ORACLE,
    PRICED,
    RANDOM,
    STATIC,
    STATIC_BY_KIND,
    Front,
    Places,
    PolicyError,
    choose_within,
    compare,
    fronts,
)
from models.predictor import Prediction
from tests.models.fitted import held_out
from tests.models.synthetic import PIPELINES


def places(count: int = 5, seed: int = 0, bound_factor: float = 1.0) -> Places:
    """Three pipelines, denser and worse from left to right; predictions and bounds are the truth times a factor."""
    random = np.random.default_rng(seed)
    divergence = np.stack([np.zeros(count), random.exponential(0.02, count), random.exponential(0.2, count)], axis=1)
    return Places(
        pipelines=("full", "kivi", "window"),
        divergence=divergence,
        bytes_share=np.tile([1.0, 0.4, 0.1], (count, 1)),
        predicted=divergence,
        bound=bound_factor * divergence,
        far_mass=np.tile([0.0, 0.0, 0.3], (count, 1)),
        bits=np.tile([16.0, 4.0, 16.0], (count, 1)),
        kind=np.array(["prose", "code"] * count)[:count],
    )


def every_assignment(given: Places) -> Front:
    rows = np.arange(len(given))
    choices = [np.array(one) for one in itertools.product(range(3), repeat=len(given))]
    return Front.of(
        np.array([given.divergence[rows, choice].mean() for choice in choices]),
        np.array([given.bytes_share[rows, choice].mean() for choice in choices]),
    )


def test_a_front_keeps_what_nothing_beats() -> None:
    front = Front.of(np.array([0.2, 0.0, 0.1, 0.1, 0.3]), np.array([0.3, 1.0, 0.5, 0.4, 0.35]))
    np.testing.assert_array_equal(front.divergence, [0.0, 0.1, 0.2])
    np.testing.assert_array_equal(front.bytes_share, [1.0, 0.4, 0.3])
    assert front.at(0.05) == pytest.approx(0.7)
    assert front.at(9.0) == pytest.approx(0.3)
    assert front.within(0.15) == (0.1, 0.4)
    late = Front.of(np.array([0.1]), np.array([0.4]))
    assert np.isnan(late.at(0.05))
    assert np.isnan(late.within(0.05)[0])


def test_no_policy_beats_the_best_of_all_assignments_and_the_oracle_is_on_its_hull() -> None:
    given = places()
    best = every_assignment(given)
    found = fronts(given)
    for name, front in found.items():
        for divergence, share in zip(front.divergence, front.bytes_share, strict=True):
            if name != RANDOM:  # which is a mean of policies, not one
                assert share >= best.within(float(divergence) + 1e-12)[1] - 1e-12, name
    for divergence, share in zip(found[ORACLE].divergence, found[ORACLE].bytes_share, strict=True):
        assert share == pytest.approx(best.within(float(divergence) + 1e-12)[1])


def test_with_true_predictions_the_priced_policy_is_the_oracle() -> None:
    given = places()
    found = fronts(given)
    np.testing.assert_array_equal(found[PRICED].divergence, found[ORACLE].divergence)
    np.testing.assert_array_equal(found[PRICED].bytes_share, found[ORACLE].bytes_share)


def test_the_bound_is_kept_where_it_is_true() -> None:
    given = places(200)
    for limit in (0.0, 0.01, 0.1, 1.0):
        choice = choose_within(given, limit)
        rows = np.arange(len(given))
        assert (given.divergence[rows, choice] <= limit).all()
        for place in range(len(given)):
            allowed = [c for c in range(3) if given.bound[place, c] <= limit]
            assert given.bytes_share[place, choice[place]] == min(given.bytes_share[place, c] for c in allowed)


def test_static_random_and_rule_are_what_they_say() -> None:
    given = places(100)
    found, means = fronts(given), given.divergence.mean(0)
    np.testing.assert_allclose(found[STATIC].divergence, means)
    np.testing.assert_allclose(found[RANDOM].divergence, [0.0, means[:2].mean(), means.mean()])
    np.testing.assert_allclose(found[RANDOM].bytes_share, [1.0, 0.7, 0.5])
    # the rule knows no more here than which pipeline it is: full, kivi by fewer bits, window by more mass
    assert set(found[MASS_RULE].bytes_share.round(9).tolist()) <= {1.0, 0.4, 0.1}
    assert given.statics()["kivi"] == (pytest.approx(means[1]), pytest.approx(0.4))


def test_per_kind_beats_one_for_all_where_kinds_differ() -> None:
    given = places(100)
    hard = given.kind == "code"
    divergence = np.where(hard[:, None], [0.0, 0.01, 1.0], [0.0, 0.01, 0.02]) * np.ones((100, 3))
    given = replace(given, divergence=divergence)
    found = fronts(given)
    one = compare(given, found, 0.03)
    assert one is not None
    assert (one.pipeline, one.divergence) == ("kivi", pytest.approx(0.01))
    assert one.bytes_share[STATIC] == pytest.approx(0.4)
    assert one.bytes_share[STATIC_BY_KIND] < 0.4
    assert compare(given, {**found, STATIC: Front.of(np.array([0.5]), np.array([0.1]))}, 0.03) is None


def test_a_perfect_learned_policy_needs_less_than_the_static_one_and_a_blind_one_does_not() -> None:
    good, blind = places(400), places(400)
    blind = replace(blind, bound=np.tile(blind.divergence.mean(0), (400, 1)))
    shares = []
    for given in (good, blind):
        one = compare(given, fronts(given), 0.03)
        assert one is not None
        assert one.pipeline == "kivi"
        shares.append(one.ratio(LEARNED, STATIC))
    assert shares[0] < 0.9
    assert shares[1] == pytest.approx(1.0)


def test_only_complete_places_on_the_device_are_compared() -> None:
    examples = held_out()
    prediction = Prediction(examples.divergence, examples.divergence * 2, examples.divergence * 0)
    given = Places.of(examples, prediction)
    assert len(given) == examples.windows
    assert set(given.pipelines) == set(PIPELINES) - {"host(recent=256)"}
    for place in range(0, len(given), 9):
        for column, pipeline in enumerate(given.pipelines):
            row = np.flatnonzero((examples.window == place) & (examples.pipeline == pipeline))[0]
            assert given.divergence[place, column] == examples.divergence[row]
            assert given.bound[place, column] == 2 * examples.divergence[row]
            assert given.kind[place] == examples.kind[row]
    missing = np.ones(len(examples), bool)
    missing[np.flatnonzero((examples.window == 3) & (examples.pipeline == "int8"))] = False
    fewer = examples.take(missing)
    assert len(Places.of(fewer, Prediction(*[fewer.divergence] * 3))) == examples.windows - 1


def test_what_was_measured_together_is_compared_candidates_first() -> None:
    """Datasets of several runs may hold places of several lists of pipelines."""

    def compared(**lists: int) -> set[str]:
        texts = {"a": ("full", "int8", "window(recent=128)"), "b": ("full", "h2o(keep=0.5)")}
        wanted = np.zeros(len(examples), bool)
        first = 0
        for name, count in lists.items():
            here = (examples.window >= first) & (examples.window < first + count)
            wanted |= here & np.isin(examples.pipeline, texts[name])
            first += count
        chosen = examples.take(wanted)
        found = Places.of(chosen, Prediction(*[chosen.divergence] * 3))
        assert len(found) == lists["a" if len(found.pipelines) == 3 else "b"]
        return set(found.pipelines)

    examples = held_out()
    assert "int8" in CANDIDATES
    assert "h2o(keep=0.5)" not in CANDIDATES
    assert compared(a=2, b=9) == {"full", "int8", "window(recent=128)"}
    assert compared(a=0, b=9) == {"full", "h2o(keep=0.5)"}


def test_what_allows_no_comparison_is_said() -> None:
    def of(examples: Examples) -> Places:
        return Places.of(examples, Prediction(*[examples.divergence] * 3))

    examples = held_out()
    with pytest.raises(PolicyError, match="1 pipelines on the device"):
        of(examples.take(examples.pipeline == "int8"))
    early = examples.window < 5
    apart = np.where(early, examples.pipeline == "int8", examples.pipeline == "full")
    with pytest.raises(PolicyError, match="1 pipelines on the device at a place"):
        of(examples.take(apart))
