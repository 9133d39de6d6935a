"""Multiple-choice knapsack: one candidate per request, cheapest in sum, within the bytes of two tiers.

Lagrangian relaxation: with a price per byte of each tier every request chooses for itself, all at once; the prices are
found by bisection. What the relaxed choice leaves open, a greedy repair closes. No loop goes over requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from models.features import F64

Mask: TypeAlias = npt.NDArray[np.bool_]
Columns: TypeAlias = npt.NDArray[np.intp]

_BISECTIONS = 12
_ROUNDS = 2
"""Of prices, device then host; the second sees the host's price of the first."""
_REPAIRS = 12
_WEIGHTS = (0.5, 0.0, 1.0, 0.25, 0.75)
"""Of the device against the host, when what is wanted is that it fits at all."""
_FEW = 1 << 14
"""Combinations that are all tried where nothing else was found to fit."""
_TIE = 1e-12


@dataclass(frozen=True)
class Assignment:
    """A choice for each request."""

    choice: Columns
    """[R] column."""
    device_price: float
    """Cost of a byte at which the relaxed choice fits; 0 where memory is plentiful."""
    host_price: float
    fits: bool
    """False: nothing that fits was found, and the choice is the smallest."""


class _Problem:
    """The arrays, with what is not allowed at infinite cost."""

    def __init__(self, cost: F64, device: F64, host: F64, allowed: Mask, capacities: tuple[float, float]) -> None:
        self.cost = np.where(allowed, cost, np.inf)
        self.device, self.host = device, host
        self.allowed = allowed
        self.capacities = capacities
        self.rows = np.arange(len(cost))
        self._start = self.rows * cost.shape[1]

    def of(self, values: F64, choice: Columns) -> F64:
        """``values`` [R, C] at the choice, [R]."""
        return np.asarray(values.ravel()[self._start + choice])

    def use(self, choice: Columns) -> tuple[float, float]:
        """Bytes of both tiers."""
        return float(self.of(self.device, choice).sum()), float(self.of(self.host, choice).sum())

    def over(self, choice: Columns) -> tuple[float, float]:
        """Bytes beyond the capacities; negative is room."""
        device, host = self.use(choice)
        return device - self.capacities[0], host - self.capacities[1]

    def fits(self, choice: Columns) -> bool:
        return max(self.over(choice)) <= 0

    def relaxed(self, device_price: float, host_price: float) -> Columns:
        priced = self.cost
        if device_price:
            priced = priced + device_price * self.device
        if host_price:
            priced = priced + host_price * self.host
        return np.asarray(priced.argmin(axis=1))


def assign(
    cost: F64,
    device_bytes: F64,
    host_bytes: F64,
    allowed: Mask,
    device_capacity: float,
    host_capacity: float,
    current: Columns,
) -> Assignment:
    """Chooses one allowed column for each row.

    Args:
        cost: [R, C], what the sum is to be smallest of.
        device_bytes: [R, C].
        host_bytes: [R, C].
        allowed: [R, C], at least one in each row.
        device_capacity: most bytes in sum.
        host_capacity: most bytes in sum.
        current: [R] column in force: wins where costs tie. -1: none.

    Raises:
        ValueError: a row without an allowed column.
    """
    if not len(cost):
        return Assignment(np.empty(0, np.intp), 0.0, 0.0, fits=device_capacity >= 0 and host_capacity >= 0)
    if not allowed.any(axis=1).all():
        raise ValueError(f"rows {np.flatnonzero(~allowed.any(axis=1)).tolist()}: nothing is allowed")
    problem = _Problem(cost, device_bytes, host_bytes, allowed, (device_capacity, host_capacity))
    stay = problem.rows[current >= 0]
    problem.cost[stay, current[stay]] -= _TIE
    choice = problem.relaxed(0.0, 0.0)
    if problem.fits(choice):
        return Assignment(choice, 0.0, 0.0, fits=True)
    device_price, host_price = _prices(problem)
    choice = _repair(problem, problem.relaxed(device_price, host_price))
    if not problem.fits(choice):
        choice = _squeeze(problem, choice)
    if problem.fits(choice):
        return Assignment(_fill(problem, choice), device_price, host_price, fits=True)
    return Assignment(choice, device_price, host_price, fits=False)


# --- prices -----------------------------------------------------------------------------------------------------------


def _prices(problem: _Problem) -> tuple[float, float]:
    """The smallest prices at which the relaxed choice fits, or nearly: device first, then host, then once more."""
    device_price = host_price = 0.0
    for _ in range(_ROUNDS):
        device_price = _bisect(problem, 0, host_price)
        choice = problem.relaxed(device_price, host_price)
        if problem.over(choice)[1] <= 0:
            break
        host_price = _bisect(problem, 1, device_price)
        if problem.fits(problem.relaxed(device_price, host_price)):
            break
    return device_price, host_price


def _bisect(problem: _Problem, tier: int, other_price: float) -> float:
    """The smallest price of a tier at which it is not over its capacity, the other tier's price given."""

    def over(price: float) -> float:
        prices = (price, other_price) if tier == 0 else (other_price, price)
        return problem.over(problem.relaxed(*prices))[tier]

    if over(0.0) <= 0:
        return 0.0
    finite = problem.cost[problem.allowed]
    bytes_ = (problem.device, problem.host)[tier][problem.allowed]
    low = max(1e-18, 1e-6 * float(np.ptp(finite) + 1e-9) / max(1.0, float(bytes_.max())))
    high = low
    most = 1e15 * low
    while over(high) > 0:
        if high > most:
            return high  # even the smallest is too much
        low, high = high, 64 * high
    for _ in range(_BISECTIONS):
        middle = (low * high) ** 0.5
        if over(middle) > 0:
            low = middle
        else:
            high = middle
    return high


# --- repair -----------------------------------------------------------------------------------------------------------


def _repair(problem: _Problem, choice: Columns) -> Columns:
    """Moves those that save most bytes for their cost until both tiers fit, as far as that can be done."""
    for _ in range(_REPAIRS):
        over = problem.over(choice)
        if max(over) <= 0:
            break
        tier = 0 if over[0] > 0 else 1
        moved = _save(problem, choice, tier, need=over[tier], other_room=max(0.0, -over[1 - tier]))
        if moved is None and min(over) > 0:
            moved = _save(problem, choice, 1 - tier, need=over[1 - tier], other_room=0.0)
        if moved is None:
            break
        choice = moved
    return choice


def _save(problem: _Problem, choice: Columns, tier: int, need: float, other_room: float) -> Columns | None:
    """One move each, best saving for its cost first, no more than needed; None if there is none."""
    saved, more = _changes(problem, choice, tier)
    price = problem.cost - problem.of(problem.cost, choice)[:, None]
    possible = problem.allowed & (saved > 0) & (more <= other_room)
    with np.errstate(divide="ignore", invalid="ignore"):
        worth = np.where(possible, saved / np.maximum(price, 1e-15), -np.inf)
    best = worth.argmax(axis=1)
    order = np.argsort(-problem.of(worth, best), kind="stable")
    order = order[np.isfinite(problem.of(worth, best)[order])]
    order = order[np.cumsum(np.maximum(0.0, problem.of(more, best)[order])) <= other_room]
    if not len(order):
        return None
    enough = int(np.searchsorted(np.cumsum(problem.of(saved, best)[order]), need)) + 1
    # The last move may save more than is needed: a smaller one of the same request is found again by _fill.
    moved = choice.copy()
    moved[order[:enough]] = best[order[:enough]]
    return moved


def _changes(problem: _Problem, choice: Columns, tier: int) -> tuple[F64, F64]:
    """Bytes saved on a tier and taken on the other, [R, C], against the choice."""
    first, second = (problem.device, problem.host) if tier == 0 else (problem.host, problem.device)
    return problem.of(first, choice)[:, None] - first, second - problem.of(second, choice)[:, None]


def _squeeze(problem: _Problem, choice: Columns) -> Columns:
    """A choice that fits, whatever it costs; else the one that is least over, on the device first."""
    scale = [max(1.0, abs(capacity)) for capacity in problem.capacities]
    tried = [choice]
    for weight in _WEIGHTS:
        size = weight * problem.device / scale[0] + (1 - weight) * problem.host / scale[1]
        smallest = np.where(problem.allowed, size + 1e-9 * problem.device / scale[0], np.inf).argmin(axis=1)
        tried.append(_repair(problem, smallest))
        if problem.fits(tried[-1]):
            return tried[-1]
    if (all_of_them := _enumerate(problem)) is not None:
        return all_of_them
    return min(
        tried, key=lambda one: tuple(max(0.0, over / size) for over, size in zip(problem.over(one), scale, strict=True))
    )


def _enumerate(problem: _Problem) -> Columns | None:
    """The cheapest of all combinations that fits, where there are few; None if none does or there are many."""
    columns = [np.flatnonzero(row) for row in problem.allowed]
    count = 1
    for each in columns:
        count *= len(each)
        if count > _FEW:
            return None
    every = np.stack(np.meshgrid(*columns, indexing="ij"), axis=-1).reshape(count, len(columns))  # [count, R]
    device, host, cost = (
        values[problem.rows, every].sum(axis=1) for values in (problem.device, problem.host, problem.cost)
    )
    good = (device <= problem.capacities[0]) & (host <= problem.capacities[1])
    return every[np.where(good, cost, np.inf).argmin()] if good.any() else None


def _fill(problem: _Problem, choice: Columns) -> Columns:
    """Spends room that is left on the moves that gain most for their bytes."""
    scale = [max(1.0, abs(capacity)) for capacity in problem.capacities]
    for _ in range(_REPAIRS):
        room = [-over for over in problem.over(choice)]
        gain = problem.of(problem.cost, choice)[:, None] - problem.cost
        more = [values - problem.of(values, choice)[:, None] for values in (problem.device, problem.host)]
        possible = problem.allowed & (gain > _TIE) & (more[0] <= room[0]) & (more[1] <= room[1])
        size = sum(np.maximum(0.0, extra) / whole for extra, whole in zip(more, scale, strict=True))
        worth = np.where(possible, gain / (size + 1e-12), -np.inf)
        best = worth.argmax(axis=1)
        value = problem.of(worth, best)
        order = np.argsort(-value, kind="stable")
        order = order[np.isfinite(value[order])]
        for extra, left in zip(more, room, strict=True):
            order = order[np.cumsum(np.maximum(0.0, problem.of(extra, best)[order])) <= left]
        if not len(order):
            break
        choice = choice.copy()
        choice[order] = best[order]
    return choice
