"""What the controller knows of its workers and their requests. Soft: rebuilt from Hello and the next reports, but for
the overrides, which ``ledger.py`` keeps.

Pure bookkeeping without clocks, tasks or sockets; times come in from outside (``now_s`` is monotonic, in seconds).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import Enum

from controller.planner import Forecast, RequestView, WorkerView
from kvpilot.catalog import StageCatalog
from kvpilot.v1 import common_pb2, policy_pb2
from kvpilot.v1.common_pb2 import Orderer

_NEVER_AGAIN = frozenset({3, 12})
"""google.rpc codes INVALID_ARGUMENT and UNIMPLEMENTED: the worker will not come to accept that pipeline."""


class Outcome(Enum):
    """What became of a decision; mirrors ``operator.proto``'s DecisionOutcome."""

    KEEP = "keep"
    ADVISED = "advised"
    SENT = "sent"
    APPLIED = "applied"
    REFUSED = "refused"


@dataclass(frozen=True)
class DecisionRecord:
    """The last decision on a request."""

    pipeline: str
    reason: str
    time: datetime
    outcome: Outcome
    refusal: str = ""
    forecast: Forecast | None = None


@dataclass(frozen=True)
class Sent:
    """A directive without an answer yet."""

    directive: policy_pb2.Directive
    from_pipeline: str
    sent_s: float


@dataclass(frozen=True)
class BackOff:
    """A pipeline that a worker refused for a request."""

    refusals: int
    until_s: float


@dataclass(frozen=True)
class BackOffPolicy:
    """How long a refused pipeline is left alone: ``first_s``, doubling with each refusal up to ``longest_s``."""

    first_s: float = 1.0
    longest_s: float = 30.0

    def next(self, previous: BackOff | None, code: int, now_s: float) -> BackOff:
        """The back-off after one more refusal with this google.rpc code."""
        refusals = (previous.refusals if previous else 0) + 1
        if code in _NEVER_AGAIN:
            return BackOff(refusals, math.inf)
        return BackOff(refusals, now_s + min(self.longest_s, self.first_s * 2.0 ** (refusals - 1)))


@dataclass
class LiveRequest:
    """A request that is alive on a worker."""

    state: policy_pb2.RequestState
    epoch: int
    """Largest epoch known to be in use: reported, in Hello, or sent."""
    sent: Sent | None = None
    decision: DecisionRecord | None = None
    back_offs: dict[str, BackOff] = field(default_factory=dict)
    """By pipeline text."""

    def may_try(self, pipeline: str, now_s: float) -> bool:
        """Whether no back-off stands against sending this pipeline."""
        back_off = self.back_offs.get(pipeline)
        return back_off is None or now_s >= back_off.until_s


@dataclass(frozen=True)
class Override:
    """An operator's pin on a request."""

    pipeline: str
    reason: str
    epoch: int = 0
    """Epoch of the directive that carries it; 0: none was sent yet."""
    restored: bool = False
    """From before this process, which may have sent it: whether it is obeyed, the request's last switch tells."""

    def obeyed_since(self, worker: AttachedWorker, live: LiveRequest) -> int:
        """The epoch under which the worker has carried it out for the previous controller; 0 if it has not."""
        last = live.state.last_switch
        by_operator = live.state.HasField("last_switch") and last.ordered_by == Orderer.ORDERER_OPERATOR
        return live.state.epoch if by_operator and worker.catalog.same(live.state.pipeline, self.pipeline) else 0


@dataclass(frozen=True)
class Answer:
    """A directive that a worker has answered."""

    sent: Sent
    live: LiveRequest
    ack: policy_pb2.Ack | None = None
    problem: common_pb2.Problem | None = None

    @property
    def by_operator(self) -> bool:
        """Whether the directive carried an override."""
        return self.sent.directive.ordered_by == Orderer.ORDERER_OPERATOR


class AttachedWorker:
    """A worker with a live stream."""

    def __init__(self, hello: policy_pb2.Hello, attach_time: datetime) -> None:
        self.hello = hello
        self.attach_time = attach_time
        self.report_time: datetime | None = None
        self.state = policy_pb2.WorkerState()
        self.catalog = StageCatalog(hello.model.stages)
        self.requests: dict[str, LiveRequest] = {}
        self._epochs = {entry.request_id: entry.epoch for entry in hello.epochs}

    @property
    def name(self) -> str:
        """The worker's unique name."""
        return self.hello.worker

    def take_report(self, report: policy_pb2.Report, time: datetime) -> list[str]:
        """Takes over a report; returns the requests it says have ended."""
        self.report_time = time
        if report.HasField("worker"):
            self.state = report.worker
        for incoming in report.requests:
            self._take_request(incoming)
        ended = list(report.ended_request_ids)
        for request_id in ended:
            self.requests.pop(request_id, None)
            self._epochs.pop(request_id, None)
        return ended

    def _take_request(self, incoming: policy_pb2.RequestState) -> None:
        live = self.requests.get(incoming.request_id)
        if live is None:
            epoch = max(incoming.epoch, self._epochs.pop(incoming.request_id, 0))
            self.requests[incoming.request_id] = LiveRequest(incoming, epoch)
            return
        if incoming.epoch < live.state.epoch:
            # Taken before the switch whose Ack has come already: news of everything but the pipeline.
            incoming.epoch, incoming.pipeline = live.state.epoch, live.state.pipeline
            incoming.loss_class = live.state.loss_class
            if live.state.HasField("last_switch"):
                incoming.last_switch.CopyFrom(live.state.last_switch)
        live.state = incoming
        live.epoch = max(live.epoch, incoming.epoch)

    def send(
        self, directive: policy_pb2.Directive, time: datetime, now_s: float, forecast: Forecast | None = None
    ) -> LiveRequest:
        """Notes that a directive goes out.

        Raises:
            ValueError: a second directive for a request that has one outstanding, or an epoch that does not rise.
        """
        live = self.requests[directive.request_id]
        if live.sent is not None:
            raise ValueError(f"request {directive.request_id}: directive {live.sent.directive.nonce} is outstanding")
        if directive.epoch <= live.epoch:
            raise ValueError(f"request {directive.request_id}: epoch {directive.epoch} is not above {live.epoch}")
        live.epoch = directive.epoch
        live.sent = Sent(directive, live.state.pipeline, now_s)
        live.decision = DecisionRecord(directive.pipeline, directive.reason, time, Outcome.SENT, forecast=forecast)
        return live

    def take_ack(self, ack: policy_pb2.Ack) -> Answer | None:
        """Takes over an Ack; None if it answers nothing that is outstanding."""
        live = self._outstanding(ack.request_id, ack.nonce)
        if live is None or live.sent is None or live.decision is None:
            return None
        sent, live.sent = live.sent, None
        live.epoch = max(live.epoch, ack.epoch)
        live.state.epoch = max(live.state.epoch, ack.epoch, sent.directive.epoch)
        live.state.pipeline = ack.applied.to_pipeline or sent.directive.pipeline
        if ack.HasField("applied"):
            live.state.last_switch.CopyFrom(ack.applied)
        live.back_offs.pop(sent.directive.pipeline, None)
        live.decision = replace(live.decision, outcome=Outcome.APPLIED)
        return Answer(sent, live, ack=ack)

    def take_nack(self, nack: policy_pb2.Nack, policy: BackOffPolicy, now_s: float) -> Answer | None:
        """Takes over a Nack; None if it answers nothing that is outstanding."""
        live = self._outstanding(nack.request_id, nack.nonce)
        return None if live is None else _refuse(live, nack.problem, policy, now_s)

    def give_up(self, policy: BackOffPolicy, now_s: float, after_s: float) -> list[Answer]:
        """Ends the wait for answers that are ``after_s`` overdue, as if they had been refused."""
        overdue = [live for live in self.requests.values() if live.sent and now_s - live.sent.sent_s > after_s]
        problem = common_pb2.Problem(code=4, message=f"no answer from the worker within {after_s:g} s")
        return [_refuse(live, problem, policy, now_s) for live in overdue]

    def _outstanding(self, request_id: str, nonce: str) -> LiveRequest | None:
        live = self.requests.get(request_id)
        return live if live and live.sent and live.sent.directive.nonce == nonce else None


def _refuse(live: LiveRequest, problem: common_pb2.Problem, policy: BackOffPolicy, now_s: float) -> Answer:
    assert live.sent is not None
    assert live.decision is not None
    sent, live.sent = live.sent, None
    pipeline = sent.directive.pipeline
    live.back_offs[pipeline] = policy.next(live.back_offs.get(pipeline), problem.code, now_s)
    live.decision = replace(live.decision, outcome=Outcome.REFUSED, refusal=problem.message)
    return Answer(sent, live, problem=problem)


class ControllerState:
    """All attached workers, and the overrides, which outlive streams and workers but not their request."""

    def __init__(self) -> None:
        self.workers: dict[str, AttachedWorker] = {}
        self.overrides: dict[str, Override] = {}

    def attach(self, hello: policy_pb2.Hello, time: datetime) -> AttachedWorker:
        """Takes a worker on; what was known from an older stream of the same name is dropped."""
        worker = AttachedWorker(hello, time)
        self.workers[worker.name] = worker
        return worker

    def detach(self, worker: AttachedWorker) -> None:
        """Forgets a worker, unless a newer stream has taken its name."""
        if self.workers.get(worker.name) is worker:
            del self.workers[worker.name]

    def report(self, worker: AttachedWorker, report: policy_pb2.Report, time: datetime) -> list[str]:
        """Takes over a report; returns the requests that left this worker and are live on no other.

        Their overrides stay: a worker that stops hands its requests over to others.
        """
        return [request_id for request_id in worker.take_report(report, time) if self.find(request_id) is None]

    def find(self, request_id: str) -> tuple[AttachedWorker, LiveRequest] | None:
        """Where a request is alive. If two workers claim it, the one that attached later."""
        found = [(worker, live) for worker, live in self.all_requests() if live.state.request_id == request_id]
        return max(found, key=lambda pair: pair[0].attach_time, default=None)

    def all_requests(self) -> Iterator[tuple[AttachedWorker, LiveRequest]]:
        """Every live request with its worker."""
        for worker in self.workers.values():
            for live in worker.requests.values():
                yield worker, live

    def override_due(self, worker: AttachedWorker, live: LiveRequest, now_s: float) -> Override | None:
        """The override that this request does not obey yet, e.g. because another worker has taken it over.

        A restored one that is obeyed counts as sent from then on.
        """
        override = self.overrides.get(live.state.request_id)
        if override is None or live.sent is not None or not live.may_try(override.pipeline, now_s):
            return None
        if override.restored and (epoch := override.obeyed_since(worker, live)):
            override = replace(override, epoch=epoch, restored=False)
            self.overrides[live.state.request_id] = override
        return override if override.epoch == 0 or live.state.epoch < override.epoch else None

    def view(self, worker: AttachedWorker, now_s: float) -> WorkerView:
        """The worker as the planner sees it."""
        return WorkerView(
            hello=worker.hello,
            state=worker.state,
            catalog=worker.catalog,
            requests=tuple(
                RequestView(
                    state=live.state,
                    outstanding=live.sent.directive.pipeline if live.sent else None,
                    overridden=request_id in self.overrides,
                    refused=frozenset(text for text in live.back_offs if not live.may_try(text, now_s)),
                )
                for request_id, live in worker.requests.items()
            ),
        )
