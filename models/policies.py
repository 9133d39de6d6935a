"""Policies compared offline: at each measured place every policy picks one of the measured pipelines.

A policy has a knob for quality; turning it gives a front of mean device bytes (as a share of a full cache's) against
mean divergence, both really measured for what was picked. Policies are compared where their mean divergence is equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.candidates import CANDIDATES
from models.examples import Examples, Mask
from models.features import F64, NAMES
from models.predictor import Prediction

LEVELS_NATS = (0.01, 0.02, 0.03, 0.05, 0.1)
"""Mean divergences at which policies are compared; 0.03 is the bound of the mixed scenario."""
HEADLINE_NATS = 0.03
KNOBS = 200
LEARNED, PRICED, STATIC, STATIC_BY_KIND = "learned", "learned_price", "best_static", "best_static_by_kind"
MASS_RULE, RANDOM, ORACLE = "attention_mass_rule", "random", "oracle"
_MASS, _BITS = NAMES.index("mass_beyond"), NAMES.index("bits")


class PolicyError(ValueError):
    """The measured places do not allow a comparison; says why."""


@dataclass(frozen=True)
class Places:
    """W places at which the same C pipelines were measured; [W, C] each unless stated otherwise."""

    pipelines: tuple[str, ...]
    """[C]"""
    divergence: F64
    bytes_share: F64
    predicted: F64
    bound: F64
    far_mass: F64
    """Attention beyond what is surely kept."""
    bits: F64
    kind: npt.NDArray[np.str_]
    """[W]"""

    @classmethod
    def of(cls, examples: Examples, prediction: Prediction) -> Places:
        """Places where the same pipelines were measured: those most often measured together, the planner's candidates
        among them if there is a place for all of these.

        Pipelines that move blocks to the host are left out: their price is time, not divergence, and a comparison of
        device bytes alone would have nothing else win.

        Raises:
            PolicyError: only one pipeline was measured at a place.
        """
        usable = np.flatnonzero(examples.on_device)
        names, column = np.unique(examples.pipeline[usable], return_inverse=True)
        cell = np.full((examples.windows, len(names)), -1, np.intp)
        cell[examples.window[usable], column] = usable
        chosen = _measured_together(cell >= 0, np.isin(names, CANDIDATES))
        if chosen.sum() < 2:
            raise PolicyError(f"{chosen.sum()} pipelines on the device at a place: a choice takes at least two")
        cell = cell[:, chosen]
        cell = cell[(cell >= 0).all(1)]
        return cls(
            pipelines=tuple(str(name) for name in names[chosen]),
            divergence=examples.divergence[cell],
            bytes_share=examples.bytes_share[cell],
            predicted=prediction.divergence[cell],
            bound=prediction.bound[cell],
            far_mass=np.nan_to_num(examples.rows[cell, _MASS], nan=1.0),
            bits=np.nan_to_num(examples.rows[cell, _BITS], nan=0.0),
            kind=examples.kind[cell[:, 0]],
        )

    def __len__(self) -> int:
        return len(self.divergence)

    def statics(self) -> dict[str, tuple[float, float]]:
        """Mean divergence and bytes share of each pipeline, used at all places."""
        means = self.divergence.mean(0).tolist(), self.bytes_share.mean(0).tolist()
        return dict(zip(self.pipelines, zip(*means, strict=True), strict=True))


@dataclass(frozen=True)
class Front:
    """What a policy reaches: points with rising divergence and falling bytes, each better than all others in one."""

    divergence: F64
    """[P] mean nats per token."""
    bytes_share: F64
    """[P] mean device bytes over a full cache's."""

    @classmethod
    def of(cls, divergence: F64, bytes_share: F64) -> Front:
        """Of all points that a policy was seen to reach."""
        order = np.lexsort((bytes_share, divergence))
        divergence, bytes_share = divergence[order], bytes_share[order]
        best = np.minimum.accumulate(bytes_share)
        better = np.r_[True, bytes_share[1:] < best[:-1]]
        return cls(divergence[better], bytes_share[better])

    def at(self, divergence: float) -> float:
        """Bytes at this mean divergence, between the points linearly; NaN below the front's first point."""
        if divergence < self.divergence[0]:
            return float("nan")
        return float(np.interp(divergence, self.divergence, self.bytes_share))

    def within(self, divergence: float) -> tuple[float, float]:
        """The densest point of at most this mean divergence: its divergence and bytes; NaN if there is none."""
        place = int(np.searchsorted(self.divergence, divergence, side="right")) - 1
        if place < 0:
            return float("nan"), float("nan")
        return float(self.divergence[place]), float(self.bytes_share[place])


def fronts(places: Places) -> dict[str, Front]:
    """The front of each policy.

    - ``learned``: the densest pipeline whose predicted upper bound is within the quality bound, which is the knob.
    - ``learned_price``: least bytes plus price times predicted divergence; the price is the knob. No guarantee.
    - ``best_static``: one pipeline for all.
    - ``best_static_by_kind``: one for each kind of text.
    - ``attention_mass_rule``: the densest pipeline beyond whose window little attention goes and whose numbers have
      enough bits; both limits are knobs.
    - ``random``: one of the k richest, with equal probability; k is the knob.
    - ``oracle``: as ``learned_price``, with the divergence that will be measured.

    The static ones, the rule and random are given their best knob in hindsight, on the places they are judged on.
    """
    rows = np.arange(len(places))

    def reached(choices: list[npt.NDArray[np.intp]]) -> Front:
        divergence = [float(places.divergence[rows, choice].mean()) for choice in choices]
        shares = [float(places.bytes_share[rows, choice].mean()) for choice in choices]
        return Front.of(np.array(divergence), np.array(shares))

    prices = np.geomspace(1e-3, 1e4, KNOBS)
    means = places.divergence.mean(0), places.bytes_share.mean(0)
    rich_first = np.argsort(-means[1], kind="stable")
    ranks = np.arange(1, len(rich_first) + 1)
    by_kind = [np.argmin(_by(places.kind, places.bytes_share + price * places.divergence), 1) for price in prices]
    return {
        LEARNED: reached([choose_within(places, limit) for limit in np.geomspace(1e-5, 20.0, KNOBS)]),
        PRICED: reached([np.argmin(places.bytes_share + price * places.predicted, axis=1) for price in prices]),
        STATIC: Front.of(*means),
        STATIC_BY_KIND: reached(by_kind),
        MASS_RULE: reached(
            [
                _densest(places, (places.far_mass <= most) & (places.bits >= bits))
                for most in (-1.0, *np.linspace(0, 1, 51))
                for bits in np.unique(places.bits)
            ]
        ),
        RANDOM: Front.of(np.cumsum(means[0][rich_first]) / ranks, np.cumsum(means[1][rich_first]) / ranks),
        ORACLE: reached([np.argmin(places.bytes_share + price * places.divergence, axis=1) for price in prices]),
    }


def choose_within(places: Places, limit: float) -> npt.NDArray[np.intp]:
    """The learned choice [W]: fewest bytes of the pipelines whose bound is within the limit, else the least bound."""
    return _densest(places, places.bound <= limit, otherwise=places.bound)


def _densest(places: Places, allowed: npt.NDArray[np.bool_], otherwise: F64 | None = None) -> npt.NDArray[np.intp]:
    price = np.where(allowed, places.bytes_share, np.inf)
    fallback = -places.bytes_share if otherwise is None else otherwise + 1e-12 * places.bytes_share
    choice = np.where(allowed.any(1), np.argmin(price, axis=1), np.argmin(fallback, axis=1))
    return np.asarray(choice, np.intp)


def _measured_together(measured: Mask, candidates: Mask) -> Mask:
    """Which pipelines [N] to compare, given where each was measured [W, N] and which of them are candidates [N]."""
    sets, counts = np.unique(measured, axis=0, return_counts=True)
    complete = sets[:, candidates].all(1)
    counts[~complete & complete.any()] = 0
    return np.asarray(sets[np.argmax(np.where(sets.sum(1) >= 2, counts, 0))])


def _by(kind: npt.NDArray[np.str_], cost: F64) -> F64:
    """Mean costs of each place's kind, [W, C]."""
    _, code = np.unique(kind, return_inverse=True)
    sums = np.zeros((int(code.max()) + 1, cost.shape[1]))
    np.add.at(sums, code, cost)
    means: F64 = (sums / np.bincount(code)[:, None])[code]
    return means


@dataclass(frozen=True)
class Comparison:
    """Policies at one mean divergence: that of the best static pipeline within the level."""

    level: float
    """Nats per token that the static pipeline may lose in the mean."""
    divergence: float
    """Nats per token that it loses; where all are compared."""
    pipeline: str
    """Which it is."""
    bytes_share: dict[str, float]
    """Mean bytes of each policy there, over a full cache's."""

    def ratio(self, policy: str, to: str) -> float:
        """Bytes of one policy over another's."""
        return self.bytes_share[policy] / self.bytes_share[to]


def compare(places: Places, found: dict[str, Front], level: float) -> Comparison | None:
    """Compares at a level; None where no static pipeline is within it."""
    divergence, shares = found[STATIC].within(level)
    if np.isnan(divergence):
        return None
    means = places.divergence.mean(0), places.bytes_share.mean(0)
    which = int(np.flatnonzero((means[0] == divergence) & (means[1] == shares))[0])
    return Comparison(
        level=level,
        divergence=divergence,
        pipeline=places.pipelines[which],
        bytes_share={name: front.at(divergence) for name, front in found.items()} | {STATIC: shares},
    )
