"""The journal of decisions: what was predicted, done and measured, joined by the decision's id, into the job store.

Noting is bookkeeping in memory. A task of its own has the shadow predictor look at the same rows and appends the
entries (``DecisionEvent``) to the bus; while the store is away the newest are kept, up to a limit.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import structlog

from controller.planner import Decision, Forecast
from controller.state import Answer, AttachedWorker, LiveRequest, Outcome
from kvpilot.bus import Bus
from kvpilot.v1 import job_pb2, policy_pb2
from kvpilot.v1.operator_pb2 import DecisionOutcome
from models.features import SCHEMA_HASH
from models.predictor import Predictor

log = structlog.get_logger()

OUTCOMES = {
    Outcome.KEEP: DecisionOutcome.DECISION_OUTCOME_KEEP,
    Outcome.ADVISED: DecisionOutcome.DECISION_OUTCOME_ADVISED,
    Outcome.SENT: DecisionOutcome.DECISION_OUTCOME_SENT,
    Outcome.APPLIED: DecisionOutcome.DECISION_OUTCOME_APPLIED,
    Outcome.REFUSED: DecisionOutcome.DECISION_OUTCOME_REFUSED,
}
PENDING_ENTRIES = 20_000
"""Entries that wait for the store; beyond these the oldest are dropped."""
BATCH_ENTRIES = 512
REMEMBERED_DECISIONS = 16
"""Per request: audits come with the next report or the one after it."""
_FIRST_BACKOFF_S = 0.1
_LAST_BACKOFF_S = 5.0


@dataclass(frozen=True)
class InForce:
    """A decision that its request was under from a token on."""

    decision_id: str
    from_token: int
    pipeline: str
    forecast: Forecast | None


@dataclass(frozen=True)
class JoinedAudit:
    """An audit and the decision in force when it was taken."""

    decision: InForce
    audit: policy_pb2.Audit


@dataclass
class _Followed:
    """What the journal knows of a live request."""

    in_force: deque[InForce] = field(default_factory=lambda: deque(maxlen=REMEMBERED_DECISIONS))
    sent: InForce | None = None
    noted: policy_pb2.RequestState | None = None
    """The report for which a decision that changes nothing was last noted."""


@dataclass(frozen=True)
class _Entry:
    event: job_pb2.DecisionEvent
    forecast: Forecast | None = None


class Journal:
    """Notes decisions, answers and audits.

    Args:
        bus: where entries go; None: nowhere, audits are joined all the same.
        shadow: gives the shadow predictor of the moment.

    Attributes:
        dropped: entries lost because the store was away for too long.
    """

    def __init__(self, bus: Bus | None, shadow: Callable[[], Predictor | None]) -> None:
        self.dropped = 0
        self._bus = bus
        self._shadow = shadow
        self._followed: dict[tuple[str, str], _Followed] = {}
        self._pending: deque[_Entry] = deque()
        self._news = asyncio.Event()
        self._written = asyncio.Event()
        self._written.set()
        self._shadow_failed = ""
        self._task: asyncio.Task[None] | None = None

    @property
    def pending(self) -> int:
        """Entries that the store does not have yet."""
        return len(self._pending)

    # --- noting -------------------------------------------------------------------------------------------------------

    def due(self, worker: AttachedWorker, live: LiveRequest) -> bool:
        """Whether a decision that changes nothing is to be noted: once per report."""
        return self._of(worker, live.state.request_id).noted is not live.state

    def decided(
        self, decision_id: str, worker: AttachedWorker, live: LiveRequest, decision: Decision, outcome: Outcome
    ) -> None:
        """Notes a decision: KEEP, ADVISED or SENT."""
        state, forecast = live.state, decision.forecast
        if forecast is not None:  # the row is a view of a whole plan's; that must not live as long as this entry
            forecast = replace(forecast, row=forecast.row.copy())
        followed = self._of(worker, state.request_id)
        held = InForce(decision_id, state.generated_tokens, decision.pipeline, forecast)
        followed.noted = state
        if outcome is Outcome.SENT:
            followed.sent = held
        elif outcome is Outcome.KEEP:
            followed.in_force.append(held)
        decided = job_pb2.Decided(
            at_token=state.generated_tokens,
            from_pipeline=state.pipeline,
            pipeline=decision.pipeline,
            reason=decision.reason,
            outcome=OUTCOMES[outcome],
        )
        if forecast is not None:
            decided.bundle, decided.runner_up = forecast.bundle, forecast.runner_up
            decided.feature_schema_hash, decided.family = SCHEMA_HASH, forecast.family.value
            decided.predicted_divergence, decided.bound = forecast.divergence, forecast.bound
        self._put(worker, state.request_id, decision_id, job_pb2.DecisionEvent(decided=decided), forecast)

    def answered(self, worker: AttachedWorker, answer: Answer) -> None:
        """Notes the worker's answer to a planner's directive; from an Ack on, the decision is in force."""
        directive = answer.sent.directive
        if answer.by_operator:
            return
        followed = self._of(worker, directive.request_id)
        sent, followed.sent = followed.sent, None
        if answer.ack is not None:
            if sent is not None and sent.decision_id == directive.nonce:
                at_token = answer.ack.applied.at_token
                followed.in_force.append(InForce(sent.decision_id, at_token, sent.pipeline, sent.forecast))
            done = job_pb2.Answered(outcome=OUTCOMES[Outcome.APPLIED], applied=answer.ack.applied)
        else:
            refusal = answer.problem.message if answer.problem is not None else ""
            done = job_pb2.Answered(outcome=OUTCOMES[Outcome.REFUSED], refusal=refusal)
        self._put(worker, directive.request_id, directive.nonce, job_pb2.DecisionEvent(answered=done))

    def measured(self, worker: AttachedWorker, states: Iterable[policy_pb2.RequestState]) -> list[JoinedAudit]:
        """Joins the audits of a report to the decisions under which they were taken, and notes them."""
        joined = []
        for state in states:
            if not state.audits:
                continue
            in_force = self._of(worker, state.request_id).in_force
            for audit in state.audits:
                held = next((one for one in reversed(in_force) if one.from_token <= audit.at_token), None)
                if held is None or not worker.catalog.same(held.pipeline, audit.pipeline):
                    continue  # from before this controller, or of a pipeline that it did not choose
                joined.append(JoinedAudit(held, audit))
                bound = held.forecast.bound if held.forecast is not None else None
                entry = job_pb2.Measured(audit=audit, bound=bound)
                self._put(worker, state.request_id, held.decision_id, job_pb2.DecisionEvent(measured=entry))
        return joined

    def ended(self, worker: AttachedWorker, request_ids: Iterable[str]) -> None:
        """Forgets requests that have left a worker."""
        for request_id in request_ids:
            self._followed.pop((worker.name, request_id), None)

    def detached(self, worker: AttachedWorker) -> None:
        """Forgets all requests of a worker."""
        for key in [key for key in self._followed if key[0] == worker.name]:
            del self._followed[key]

    def _of(self, worker: AttachedWorker, request_id: str) -> _Followed:
        return self._followed.setdefault((worker.name, request_id), _Followed())

    def _put(
        self,
        worker: AttachedWorker,
        request_id: str,
        decision_id: str,
        event: job_pb2.DecisionEvent,
        forecast: Forecast | None = None,
    ) -> None:
        if self._bus is None:
            return
        event.decision_id, event.request_id, event.worker = decision_id, request_id, worker.name
        event.time.GetCurrentTime()
        self._pending.append(_Entry(event, forecast))
        while len(self._pending) > PENDING_ENTRIES:
            self._pending.popleft()
            self.dropped += 1
        self._written.clear()
        self._news.set()

    # --- writing ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts writing; needs a running event loop."""
        if self._bus is not None:
            self._task = asyncio.create_task(self._run(self._bus), name="journal")

    async def stop(self, patience_s: float = 1.0) -> None:
        """Stops, after a last moment for what is not written yet."""
        if self._task is None:
            return
        try:
            async with asyncio.timeout(patience_s):
                await self._written.wait()
        except TimeoutError:
            log.warning("decisions not logged", entries=len(self._pending))
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def settle(self) -> None:
        """Waits until what was noted is written."""
        await self._written.wait()

    async def _run(self, bus: Bus) -> None:
        backoff_s = _FIRST_BACKOFF_S
        while True:
            await self._news.wait()
            self._news.clear()
            while self._pending:
                batch = [self._pending.popleft() for _ in range(min(len(self._pending), BATCH_ENTRIES))]
                await self._score(batch)
                try:
                    await bus.log_decisions([entry.event for entry in batch])
                except Exception as error:  # whatever it is, the log goes on when it is over
                    log.warning("decision log waits for the job store", error=str(error), entries=len(self._pending))
                    self._pending.extendleft(reversed(batch))
                    await asyncio.sleep(backoff_s)
                    backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)
                else:
                    backoff_s = _FIRST_BACKOFF_S
            self._written.set()

    async def _score(self, batch: Sequence[_Entry]) -> None:
        """Writes the rows, and the shadow's predictions of them, into the entries."""
        rated = [entry for entry in batch if entry.forecast is not None and not entry.event.decided.features]
        if not rated:
            return
        rows = np.array([entry.forecast.row for entry in rated if entry.forecast is not None])
        for entry, row in zip(rated, rows, strict=True):
            entry.event.decided.features.extend(row.tolist())
        shadow = self._shadow()
        if shadow is None:
            return
        families = [entry.forecast.family for entry in rated if entry.forecast is not None]
        try:
            found = await asyncio.to_thread(shadow.predict, rows, families)
            pairs = list(zip(rated, found.divergence.tolist(), found.bound.tolist(), strict=True))
        except Exception as error:
            if self._shadow_failed != shadow.version:
                self._shadow_failed = shadow.version
                log.error("shadow bundle failed", bundle=shadow.version, error=str(error))
            return
        for entry, divergence, bound in pairs:
            decided = entry.event.decided
            decided.shadow_bundle, decided.shadow_divergence, decided.shadow_bound = shadow.version, divergence, bound
