"""The guard: counts, the binomial test against another way to compute it, and when a bundle goes."""

from __future__ import annotations

import math

import pytest

from controller.guard import Guard, GuardSettings, binomial_tail
from models.features import Family


def feed(guard: Guard, measured: list[float], bundle: str = "v1") -> list[str]:
    verdicts = [guard.observe(bundle, 0.1, Family.SCORED, 0.05, value) for value in measured]
    return [verdict for verdict in verdicts if verdict]


@pytest.mark.parametrize(("successes", "trials", "share"), [(0, 5, 0.1), (1, 5, 0.1), (5, 5, 0.3), (12, 50, 0.1)])
def test_the_tail_is_the_sum_of_its_terms(successes: int, trials: int, share: float) -> None:
    terms = (math.comb(trials, k) * share**k * (1 - share) ** (trials - k) for k in range(successes, trials + 1))
    assert binomial_tail(successes, trials, share) == pytest.approx(sum(terms))


def test_a_kept_promise_is_kept() -> None:
    guard = Guard()
    assert feed(guard, [0.09, *[0.01] * 9] * 40) == []
    assert guard.audits["v1", Family.SCORED] == 400
    assert guard.exceeded["v1", Family.SCORED] == 40
    assert not guard.rollbacks


def test_a_broken_promise_is_told_once_enough_was_measured() -> None:
    guard = Guard()
    assert feed(guard, [0.09, 0.01] * 24 + [0.01]) == []  # 49
    (verdict,) = feed(guard, [0.01])
    assert "24 of the last 50 audits exceeded their bound, 48% where 10% are promised" in verdict
    assert guard.rollbacks["v1"] == 1


def test_what_equals_its_bound_keeps_it_and_what_is_no_number_does_not() -> None:
    guard = Guard()
    feed(guard, [0.05, math.nan])
    assert guard.exceeded["v1", Family.SCORED] == 1


def test_another_bundle_starts_anew() -> None:
    guard = Guard(GuardSettings(min_audits=10))
    assert feed(guard, [0.09] * 9) == []
    assert feed(guard, [0.09] * 9, "v2") == []
    assert len(feed(guard, [0.09], "v2")) == 1


def test_it_forgets_what_lies_behind_its_window() -> None:
    guard = Guard(GuardSettings(min_audits=50, window=50))
    assert feed(guard, [0.01] * 1000) == []
    assert len(feed(guard, [0.09] * 50)) == 1


def test_the_calibrator_sees_everything() -> None:
    seen: list[tuple[str, Family, float, float]] = []

    class Calibrator:
        def observe(self, bundle: str, family: Family, bound: float, measured: float) -> None:
            seen.append((bundle, family, bound, measured))

    feed(Guard(calibrator=Calibrator()), [0.01, 0.09])
    assert seen == [("v1", Family.SCORED, 0.05, 0.01), ("v1", Family.SCORED, 0.05, 0.09)]
