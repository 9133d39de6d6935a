"""Watches whether a bundle still fits: audits say what was really lost; one that breaks its promise is rolled back.

A bundle promises that a share ``alpha`` of what is measured, at most, is above its bound. The alarm looks at every
audit and rings, while the promise is kept, with a small probability over the bundle's whole time in force. Beside it a
drift detector tells when what is measured has moved away from what is predicted: that takes nothing back, since bounds
follow the audits, but says that it may be time to train again.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Protocol

import structlog

from models.features import Family
from models.online import BoundAlarm, DriftDetector, exceeds

log = structlog.get_logger()


class Calibrator(Protocol):
    """Learns from what was measured, online."""

    def observe(self, bundle: str, family: Family, bound: float, measured: float) -> None:
        """A pipeline of ``family`` lost ``measured`` where ``bundle`` had said ``bound``; nats per token, both."""
        ...


@dataclass(frozen=True)
class GuardSettings:
    """When a bundle has broken its promise."""

    error: float = 1e-3
    """Probability that one which keeps it is said to have broken it, over its whole time in force."""
    least_audits: int = 50
    """Nothing is concluded from fewer: audits of one request resemble each other, which the probability leaves out."""


class Guard:
    """Counts what audits say of the bundle in force.

    Attributes:
        audits: audits so far by bundle and family.
        exceeded: of these, those above their bound.
        alarms: verdicts so far by bundle.
        drifts: changes of the mean residual so far by bundle.
    """

    def __init__(self, settings: GuardSettings | None = None, calibrator: Calibrator | None = None) -> None:
        # ADWIN's package takes half a second to import: now, and not when the first audit comes in the event loop.
        import river.drift  # noqa: F401

        self.settings = settings or GuardSettings()
        self.audits: Counter[tuple[str, Family]] = Counter()
        self.exceeded: Counter[tuple[str, Family]] = Counter()
        self.alarms: Counter[str] = Counter()
        self.drifts: Counter[str] = Counter()
        self._calibrator = calibrator
        self._bundle = ""
        self._alarm: BoundAlarm | None = None
        self._detectors: defaultdict[str, DriftDetector] = defaultdict(DriftDetector)

    def observe(
        self, bundle: str, alpha: float, family: Family, predicted: float, bound: float, measured: float
    ) -> str | None:
        """Takes an audit of a decision by the bundle in force; nats per token.

        Returns:
            Why the bundle must be rolled back; None if it need not.
        """
        exceeded = exceeds(bound, measured)
        self.audits[bundle, family] += 1
        self.exceeded[bundle, family] += exceeded
        if self._calibrator is not None:
            self._calibrator.observe(bundle, family, bound, measured)
        self._watch_residual(bundle, predicted, measured)
        if bundle != self._bundle or self._alarm is None:
            self._bundle, self._alarm = bundle, BoundAlarm(alpha, self.settings.error, self.settings.least_audits)
        alarm = self._alarm
        if not alarm.observe(exceeded):
            return None
        self._alarm = None
        self.alarms[bundle] += 1
        return (
            f"{alarm.exceeded} of {alarm.audits} audits exceeded their bound, {alarm.exceeded / alarm.audits:.0%} where"
            f" {alpha:.0%} are promised; the chance of such an alarm is {self.settings.error:g} at most"
        )

    def residual(self, bundle: str) -> float | None:
        """Log nats measured above prediction, mean since the last drift; None before the first audit."""
        detector = self._detectors.get(bundle)
        return detector.mean_residual if detector is not None else None

    def _watch_residual(self, bundle: str, predicted: float, measured: float) -> None:
        if not (math.isfinite(predicted) and math.isfinite(measured)):
            return  # its logarithm would outweigh all others
        before = self.residual(bundle)
        if self._detectors[bundle].observe(predicted, measured):
            self.drifts[bundle] += 1
            log.warning(
                "predictions no longer fit as they did; if that lasts, train a bundle on such text",
                bundle=bundle,
                mean_log_residual=self.residual(bundle),
                before=before,
            )
