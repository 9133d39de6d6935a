"""What the bounds of a bundle had learnt before, learnt again from the log of decisions."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from kvpilot.v1 import job_pb2
from models.decisions import has_features
from models.features import Family
from models.online import OnlineCalibrator
from models.predictor import Predictor


@dataclass(frozen=True)
class LoggedAudit:
    """An audit of a decision that a bundle made."""

    family: Family
    features: Sequence[float]
    """[features] of the pipeline, as the predictor saw them."""
    divergence: float
    """Measured, nats per token."""


def audits_of(bundle: str, events: Iterable[job_pb2.DecisionEvent]) -> list[LoggedAudit]:
    """Audits of a bundle's decisions in the order of the log, each once, whoever made the decision.

    Left out are those whose decision is not among ``events`` before them, or was made by rows of another schema.
    """
    families = {family.value: family for family in Family}
    decided: dict[str, job_pb2.Decided] = {}
    audits: dict[tuple[str, int], LoggedAudit] = {}
    for event in events:
        match event.WhichOneof("event"):
            case "decided" if event.decided.bundle == bundle:
                decided.setdefault(event.decision_id, event.decided)
            case "measured" if made := decided.get(event.decision_id):
                family, audit = families.get(made.family), event.measured.audit
                if family is not None and has_features(made):
                    found = LoggedAudit(family, made.features, audit.divergence)
                    audits.setdefault((event.decision_id, audit.at_token), found)
    return list(audits.values())


def measured_nats(divergence: float) -> float:
    """An audit as a calibrator takes it: one that is no number, where a token was ruled out, is above every bound."""
    return max(0.0, divergence) if math.isfinite(divergence) else sys.float_info.max


def relearn(calibrator: OnlineCalibrator, predictor: Predictor, audits: Sequence[LoggedAudit]) -> None:
    """Teaches a calibrator logged audits, as if the audits before each had moved the bound it was decided under.

    The bounds are predicted anew. Those in the log had been moved already: what exceeded them would only tell how the
    offset changed from where the log begins, and of several controllers the sum of what each had learnt by itself.
    """
    if not audits:
        return
    rows = np.array([audit.features for audit in audits], dtype=np.float64)
    found = predictor.predict(rows, [audit.family for audit in audits])
    for audit, divergence, bound in zip(audits, found.divergence.tolist(), found.bound.tolist(), strict=True):
        moved = max(bound * math.exp(calibrator.offset(audit.family)), divergence) if bound else 0.0
        calibrator.observe(audit.family, moved, measured_nats(audit.divergence))
