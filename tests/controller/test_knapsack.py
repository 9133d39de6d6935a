"""The knapsack against all combinations of small instances."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.knapsack import Assignment, assign


@dataclass(frozen=True)
class Instance:
    cost: np.ndarray
    device: np.ndarray
    host: np.ndarray
    allowed: np.ndarray
    capacities: tuple[float, float]

    def solve(self) -> Assignment:
        current = np.full(len(self.cost), -1)
        return assign(self.cost, self.device, self.host, self.allowed, *self.capacities, current)

    def totals(self, choices: np.ndarray) -> tuple[np.ndarray, ...]:
        """Cost and bytes of choices [N, R], [N] each."""
        rows = np.arange(choices.shape[1])
        return tuple(values[rows, choices].sum(axis=1) for values in (self.cost, self.device, self.host))

    def optimum(self) -> float | None:
        """Smallest cost of what fits, by trying everything; None if nothing does."""
        columns = [np.flatnonzero(row) for row in self.allowed]
        cost, device, host = self.totals(np.array(list(itertools.product(*columns))))
        fitting = cost[(device <= self.capacities[0]) & (host <= self.capacities[1])]
        return float(fitting.min()) if len(fitting) else None


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    device = random.integers(0, 100, (rows, columns)).astype(float)
    host = random.integers(0, 100, (rows, columns)) * random.integers(0, 2, (rows, columns)).astype(float)
    cost = random.random((rows, columns)) + draw(st.sampled_from([0.0, 0.02])) * (100 - device)
    allowed = random.random((rows, columns)) < draw(st.sampled_from([0.4, 1.0]))
    allowed[np.arange(rows), random.integers(0, columns, rows)] = True
    room = draw(st.floats(0.1, 1.2)), draw(st.one_of(st.floats(0.1, 1.2), st.just(10.0)))
    return Instance(cost, device, host, allowed, (room[0] * 60 * rows, room[1] * 30 * rows))


@settings(max_examples=400)
@given(instances())
def test_it_fits_whenever_anything_does(instance: Instance) -> None:
    found, optimum = instance.solve(), instance.optimum()
    assert instance.allowed[np.arange(len(instance.cost)), found.choice].all()
    cost, device, host = (float(total[0]) for total in instance.totals(found.choice[None]))
    assert found.fits == (optimum is not None)
    if optimum is not None:
        assert device <= instance.capacities[0]
        assert host <= instance.capacities[1]
        assert cost >= optimum - 1e-9


def test_on_average_it_is_near_the_best() -> None:
    """Within 3 % of the span between the best and the costliest choice, mean over random instances that are tight."""
    random = np.random.default_rng(7)
    gaps = []
    for _ in range(300):
        rows, columns = 5, 5
        bytes_ = np.sort(random.random((rows, columns)))[:, ::-1] * 100
        cost = np.sort(random.random((rows, columns)))
        capacities = (float(random.uniform(0.3, 0.7) * bytes_[:, 0].sum()), float("inf"))
        instance = Instance(cost, bytes_, np.zeros_like(bytes_), np.ones_like(bytes_, bool), capacities)
        if (optimum := instance.optimum()) is not None:
            span = float(cost[:, -1].sum() - cost[:, 0].sum())
            gaps.append((float(instance.totals(instance.solve().choice[None])[0][0]) - optimum) / span)
    assert len(gaps) > 200
    assert 0 <= np.mean(gaps) <= 0.03


def test_plenty_of_memory_has_no_price() -> None:
    cost = np.array([[1.0, 0.5], [0.2, 0.4]])
    found = Instance(cost, np.ones((2, 2)), np.zeros((2, 2)), np.ones((2, 2), bool), (10.0, 0.0)).solve()
    assert found.choice.tolist() == [1, 0]
    assert (found.device_price, found.host_price, found.fits) == (0.0, 0.0, True)


def test_short_memory_has_a_price_between_those_who_give_way_and_those_who_stay() -> None:
    """Three requests save 10 bytes each, for 1, 2 and 3; room for two to stay: the cheapest gives way."""
    cost = np.array([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0]])
    device = np.array([[10.0, 0.0]] * 3)
    found = Instance(cost, device, np.zeros((3, 2)), np.ones((3, 2), bool), (20.0, 0.0)).solve()
    assert found.choice.tolist() == [1, 0, 0]
    assert 0.1 <= found.device_price <= 0.2


def test_both_tiers_short() -> None:
    """Rich on the device, or its bytes on the host, or small at a high cost; each tier has room for one."""
    cost = np.array([[0.0, 0.1, 1.0]] * 3)
    device = np.array([[10.0, 0.0, 1.0]] * 3)
    host = np.array([[0.0, 10.0, 0.0]] * 3)
    found = Instance(cost, device, host, np.ones((3, 3), bool), (11.0, 10.0)).solve()
    assert sorted(found.choice.tolist()) == [0, 1, 2]
    assert found.fits


def test_what_cannot_fit_is_as_small_as_can_be_and_says_so() -> None:
    device = np.array([[10.0, 4.0], [10.0, 6.0]])
    found = Instance(np.array([[0.0, 1.0]] * 2), device, np.zeros((2, 2)), np.ones((2, 2), bool), (5.0, 0.0)).solve()
    assert found.choice.tolist() == [1, 1]
    assert not found.fits


def test_a_tie_goes_to_what_is_in_force() -> None:
    same = np.zeros((2, 3))
    found = assign(same, same, same, np.ones((2, 3), bool), 1.0, 1.0, np.array([2, 1]))
    assert found.choice.tolist() == [2, 1]


def test_no_requests_and_nothing_allowed() -> None:
    none = np.zeros((0, 3))
    assert assign(none, none, none, none.astype(bool), 1.0, 1.0, np.empty(0, np.intp)).fits
    with pytest.raises(ValueError, match=r"rows \[1\]: nothing is allowed"):
        assign(np.zeros((2, 1)), *[np.zeros((2, 1))] * 2, np.array([[True], [False]]), 1.0, 1.0, np.array([0, 0]))
