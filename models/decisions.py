"""The log of decisions put together again: what a predictor saw and said, what was done, and what was then measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from kvpilot.v1 import job_pb2, policy_pb2
from kvpilot.v1.operator_pb2 import DecisionOutcome
from models.features import NAMES, SCHEMA_HASH
from models.online import exceeds


@dataclass
class Decided:
    """A decision with all the log's entries of its id.

    Attributes:
        answered: the worker's answer; None while there is none, and for what was not sent.
        audits: what was measured while it was in force, by token.
    """

    decision_id: str
    request_id: str
    worker: str
    time: datetime
    decided: job_pb2.Decided
    answered: job_pb2.Answered | None = None
    audits: dict[int, policy_pb2.Audit] = field(default_factory=dict)

    @property
    def outcome(self) -> DecisionOutcome:
        """What became of it: what was answered, else what it was when it was made."""
        return self.answered.outcome if self.answered is not None else self.decided.outcome

    @property
    def measured(self) -> float | None:
        """Mean divergence of its audits, nats per token; None without any."""
        if not self.audits:
            return None
        return sum(audit.divergence for audit in self.audits.values()) / len(self.audits)

    def features(self) -> dict[str, float | None]:
        """The chosen pipeline's row by name, None where a value was not known; empty for the rule's decisions, and for
        those of another feature schema, whose names are not ours."""
        if not has_features(self.decided):
            return {}
        row = zip(NAMES, self.decided.features, strict=True)
        return {name: value if value == value else None for name, value in row}


def has_features(decided: job_pb2.Decided) -> bool:
    """Whether a decision was made by a row of this feature schema, and has it."""
    return decided.feature_schema_hash == SCHEMA_HASH and len(decided.features) == len(NAMES)


def join(events: Iterable[job_pb2.DecisionEvent]) -> list[Decided]:
    """Puts the entries of each decision together, oldest decision first.

    Entries may be there twice. What belongs to a decision that has been dropped from the log is left out.
    """
    found: dict[str, Decided] = {}
    for event in events:
        match event.WhichOneof("event"):
            case "decided":
                time = event.time.ToDatetime(UTC)
                made = Decided(event.decision_id, event.request_id, event.worker, time, event.decided)
                found.setdefault(event.decision_id, made)
            case "answered" if held := found.get(event.decision_id):
                held.answered = event.answered
            case "measured" if held := found.get(event.decision_id):
                held.audits[event.measured.audit.at_token] = event.measured.audit
    return list(found.values())


@dataclass
class Score:
    """How a bundle did on live requests, of what was audited. Means are over audits, nats per token."""

    decisions: int = 0
    audits: int = 0
    exceeded: int = 0
    predicted: float = 0.0
    bound: float = 0.0
    measured: float = 0.0

    def add(self, predicted: float, bound: float, audits: Mapping[int, policy_pb2.Audit]) -> None:
        """Takes a decision that it made or looked at."""
        self.decisions += 1
        for audit in audits.values():
            self.audits += 1
            self.exceeded += exceeds(bound, audit.divergence)
            self.predicted += (predicted - self.predicted) / self.audits
            self.bound += (bound - self.bound) / self.audits
            self.measured += (audit.divergence - self.measured) / self.audits


def scores(decisions: Iterable[Decided]) -> dict[tuple[str, str], Score]:
    """By role, ``active`` or ``shadow``, and version. A shadow is judged on what the active bundle chose."""
    found: dict[tuple[str, str], Score] = {}
    for one in decisions:
        decided = one.decided
        if decided.bundle:
            score = found.setdefault(("active", decided.bundle), Score())
            score.add(decided.predicted_divergence, decided.bound, one.audits)
        if decided.shadow_bundle:
            score = found.setdefault(("shadow", decided.shadow_bundle), Score())
            score.add(decided.shadow_divergence, decided.shadow_bound, one.audits)
    return found
