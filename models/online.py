"""Bounds that keep holding while serving: what audits measure moves them, and tells when they no longer fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from models.features import AUDIT_FLOOR, F64, Family
from models.predictor import Prediction, Predictor
from models.scale import log_divergence

STEP_NATS = 0.05
"""Log nats that a bound rises by for each audit above it, times (1 - alpha); it falls by alpha times that otherwise."""
MOST_NATS = math.log(100.0)
"""Log nats that a bound may be moved by."""


def exceeds(bound: float, divergence: float) -> bool:
    """Whether an audit is above its bound; one that is no number is, and none is below the floor of audits."""
    return not divergence <= max(bound, AUDIT_FLOOR)


class OnlineCalibrator:
    """Moves the bounds of each family so that a share ``alpha`` of audits exceeds them, whatever comes.

    After each audit ``offset += step * (exceeded - alpha)``: quantile tracking (Angelopoulos, Candes and Tibshirani
    2023, arXiv 2307.16895), in the line of adaptive conformal inference (Gibbs and Candes 2021, arXiv 2106.00170),
    acting on the bound itself. No matter how audits are distributed, after T of them the share above their bounds
    differs from alpha by at most (the range of offsets + step) / (step * T), as long as the limits are not reached.

    Audits come from the pipelines that a planner chose, so the share holds for these, not for those that it avoids.

    Args:
        alpha: share of audits that may exceed their bound.
        step: log nats; larger follows changes sooner and lets bounds waver more.
        limit: log nats that an offset does not pass in either direction.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, alpha: float, step: float = STEP_NATS, limit: float = MOST_NATS) -> None:
        if not 0 < alpha < 1:
            raise ValueError(f"alpha {alpha}: expected a share above 0 and below 1")
        if not 0 < step <= limit:
            raise ValueError(f"step {step}: expected log nats above 0 and up to limit {limit}")
        self.alpha = alpha
        self.step = step
        self.limit = limit
        self._offsets = dict.fromkeys(Family, 0.0)
        self._audits = dict.fromkeys(Family, 0)
        self._exceeded = dict.fromkeys(Family, 0)

    def observe(self, family: Family, bound: float, divergence: float) -> bool:
        """Takes an audit: the bound as it was when the pipeline was chosen, and what was measured under it.

        Returns whether the bound was exceeded. Not finite values are refused.

        Raises:
            ValueError: a bound or divergence that is negative or not finite.
        """
        for name, value in (("bound", bound), ("divergence", divergence)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} {value}: expected finite nats per token, 0 or more")
        exceeded = exceeds(bound, divergence)
        moved = self._offsets[family] + self.step * (exceeded - self.alpha)
        self._offsets[family] = min(self.limit, max(-self.limit, moved))
        self._audits[family] += 1
        self._exceeded[family] += exceeded
        return exceeded

    def offset(self, family: Family) -> float:
        """Log nats to add to a family's bounds now."""
        return self._offsets[family]

    def audits(self, family: Family) -> tuple[int, int]:
        """How many audits there were, and how many of them exceeded their bound."""
        return self._audits[family], self._exceeded[family]

    def apply(self, prediction: Prediction, families: Sequence[Family]) -> Prediction:
        """A prediction with its bounds moved; exact pipelines stay at 0, no bound falls below the prediction."""
        factors = np.exp(np.array([self._offsets[family] for family in families]))
        moved = np.maximum(prediction.bound * factors, prediction.divergence)
        return replace(prediction, bound=np.where(prediction.bound == 0, 0.0, moved))


@dataclass(frozen=True)
class AdaptivePredictor:
    """A predictor whose bounds follow the audits."""

    predictor: Predictor
    calibrator: OnlineCalibrator

    @property
    def version(self) -> str:
        """That of the predictor."""
        return self.predictor.version

    @property
    def schema_hash(self) -> str:
        """That of the predictor."""
        return self.predictor.schema_hash

    @property
    def alpha(self) -> float:
        """The calibrator's."""
        return self.calibrator.alpha

    def predict(self, rows: F64, families: Sequence[Family]) -> Prediction:
        """See :class:`models.predictor.Predictor`."""
        return self.calibrator.apply(self.predictor.predict(rows, families), families)


class BoundAlarm:
    """Tells when bounds are broken more often than alpha allows: a test that may be looked at after every audit.

    A bet on "exceeded" that breaks even at alpha and whose stake follows what was seen so far; its wealth reaches
    ``1 / error`` with probability ``error`` at most while bounds hold, ever (Ville's inequality; Waudby-Smith and
    Ramdas 2023, arXiv 2010.09686). One audit after the other, whatever their family.

    Args:
        alpha: share of audits that may exceed their bound.
        error: probability of a false alarm, over the whole time.
        least: audits before the first alarm.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, alpha: float, error: float = 1e-3, least: int = 20) -> None:
        if not 0 < alpha < 1:
            raise ValueError(f"alpha {alpha}: expected a share above 0 and below 1")
        if not 0 < error < 1:
            raise ValueError(f"error {error}: expected a probability above 0 and below 1")
        if least < 1:
            raise ValueError(f"least {least}: expected 1 audit or more")
        self.alpha = alpha
        self.error = error
        self.least = least
        self.audits = 0
        self.exceeded = 0
        self._log_wealth = 0.0

    def observe(self, exceeded: bool) -> bool:
        """Takes an audit; returns whether the alarm rings now. Once it rang it rings on."""
        seen = (self.exceeded + self.alpha) / (self.audits + 1)  # share so far, before this audit, one of alpha added
        stake = min(0.5, max(0.0, seen - self.alpha) / (1 - self.alpha)) / self.alpha
        if self._log_wealth < -math.log(self.error):
            self._log_wealth += math.log1p(stake * (exceeded - self.alpha))
        self.audits += 1
        self.exceeded += exceeded
        return self.ringing

    @property
    def ringing(self) -> bool:
        """Whether bounds were broken too often."""
        return self.audits >= self.least and self._log_wealth >= -math.log(self.error)


class DriftDetector:
    """Tells when predictions stop fitting what is measured: ADWIN (Bifet and Gavalda 2007) on log residuals.

    Args:
        confidence: ADWIN's delta; smaller needs more to ring.
    """

    def __init__(self, confidence: float = 0.002) -> None:
        from river.drift import ADWIN

        adwin: Any = ADWIN  # river has no annotations
        self._adwin = adwin(delta=confidence)

    def observe(self, predicted: float, divergence: float) -> bool:
        """Takes an audit: nats predicted and measured. Returns whether the mean residual has just changed."""
        residual = log_divergence(np.array([divergence, predicted]))
        self._adwin.update(float(residual[0] - residual[1]))
        return bool(self._adwin.drift_detected)

    @property
    def mean_residual(self) -> float:
        """Log nats measured above prediction, mean since the last change."""
        return float(self._adwin.estimation)
