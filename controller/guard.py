"""Watches whether the bounds hold: audits say what was really lost; a bundle that breaks its promise is rolled back.

A bundle promises that a share ``alpha`` of what is measured, at most, is above its bound. The guard looks at the last
audits of the bundle in force each time so many new ones have come, and asks how likely that many exceedances would be
if the promise held; where that is below the level, the bundle goes. Looks do not overlap in their new audits, so that a
bundle that just keeps its promise is rolled back by mistake in no more than about ``level`` of the looks.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import dataclass
from typing import Protocol

from models.features import Family


class Calibrator(Protocol):
    """Learns from what was measured, online."""

    def observe(self, bundle: str, family: Family, bound: float, measured: float) -> None:
        """A pipeline of ``family`` lost ``measured`` where ``bundle`` had said ``bound``; nats per token, both."""
        ...


@dataclass(frozen=True)
class GuardSettings:
    """When a bundle has broken its promise."""

    min_audits: int = 50
    """New audits between two looks; nothing is concluded from fewer."""
    window: int = 200
    """Audits that a look takes in, at most."""
    level: float = 0.01
    """Of the one-sided binomial test."""


class Guard:
    """Counts what audits say of the bundle in force.

    Attributes:
        audits: audits so far by bundle and family.
        exceeded: of these, those above their bound.
        rollbacks: verdicts so far by bundle.
    """

    def __init__(self, settings: GuardSettings | None = None, calibrator: Calibrator | None = None) -> None:
        self.settings = settings or GuardSettings()
        self.audits: Counter[tuple[str, Family]] = Counter()
        self.exceeded: Counter[tuple[str, Family]] = Counter()
        self.rollbacks: Counter[str] = Counter()
        self._calibrator = calibrator
        self._bundle = ""
        self._recent: deque[bool] = deque(maxlen=self.settings.window)
        self._new = 0

    def observe(self, bundle: str, alpha: float, family: Family, bound: float, measured: float) -> str | None:
        """Takes an audit of a decision by the bundle in force.

        Returns:
            Why the bundle must be rolled back; None if it need not.
        """
        exceeded = not measured <= bound
        self.audits[bundle, family] += 1
        self.exceeded[bundle, family] += exceeded
        if self._calibrator is not None:
            self._calibrator.observe(bundle, family, bound, measured)
        if bundle != self._bundle:
            self._bundle, self._new = bundle, 0
            self._recent.clear()
        self._recent.append(exceeded)
        self._new += 1
        if self._new < self.settings.min_audits:
            return None
        self._new = 0
        count, broken = len(self._recent), sum(self._recent)
        chance = binomial_tail(broken, count, alpha)
        if chance >= self.settings.level:
            return None
        self.rollbacks[bundle] += 1
        self._recent.clear()
        return (
            f"{broken} of the last {count} audits exceeded their bound, {broken / count:.0%} where {alpha:.0%} are"
            f" promised; the chance of that is {chance:.1g} < {self.settings.level:g}"
        )


def binomial_tail(successes: int, trials: int, share: float) -> float:
    """P(X >= successes) of a binomial distribution with 0 < share < 1."""
    if successes <= 0:
        return 1.0
    log_share, log_rest = math.log(share), math.log1p(-share)
    terms = (
        math.lgamma(trials + 1)
        - math.lgamma(k + 1)
        - math.lgamma(trials - k + 1)
        + k * log_share
        + (trials - k) * log_rest
        for k in range(successes, trials + 1)
    )
    return min(1.0, math.fsum(map(math.exp, terms)))
