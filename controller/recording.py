"""What a controller's metrics are made of: the front door's, and the steering role's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from controller.bundles import BundleHolder
from controller.guard import Guard
from controller.journal import Journal
from controller.planner import Decision
from controller.state import Answer
from kvpilot import metrics
from kvpilot.bus import Bus, BusError
from kvpilot.bus.queues import ModelQueue
from kvpilot.exposition import Instruments, Samples
from kvpilot.metrics import Part
from kvpilot.v1 import common_pb2, generation_pb2, policy_pb2
from kvpilot.words import cause_word, orderer_word
from models.features import Family

QUEUES_TIMEOUT_S = 2.0
"""Longest that a scrape waits for the job store; its figures are then left out."""
_QUEUES_HOLD_S = 0.5
"""One scrape's metrics share a look at the queues."""
_NACKS = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.INTERNAL,
)
"""Codes with which workers refuse directives."""
_ANSWERS = (
    ("ack", grpc.StatusCode.OK),
    ("none", grpc.StatusCode.DEADLINE_EXCEEDED),
    *(("nack", code) for code in _NACKS),
)
_CODES = {code.value[0]: code.name for code in grpc.StatusCode}


class DoorRecorder:
    """Records what a front door does.

    Args:
        instruments: of the process.
    """

    def __init__(self, instruments: Instruments | None = None) -> None:
        instruments = instruments or Instruments(Part.GENERATION)
        self._accepted = instruments.counter(metrics.JOBS_ACCEPTED)
        self._tokens = instruments.counter(metrics.DELIVERED_TOKENS)
        self._first_token_s = instruments.histogram(metrics.FIRST_TOKEN_DELIVERY)
        self._streams = instruments.gauge(metrics.STREAMS_OPEN)

    def accepted(self, model: str, created: bool) -> None:
        """A request became a job, or was attached to one."""
        self._accepted.labels(model, "created" if created else "attached").inc()

    def began(self, model: str, called_s: float) -> None:
        """A stream's first token goes out; ``called_s`` is when it was called, by the monotonic clock."""
        self._first_token_s.labels(model).observe(time.monotonic() - called_s)

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """A stream is under way."""
        self._streams.inc()
        try:
            yield
        finally:
            self._streams.dec()

    def delivered(self, event: generation_pb2.GenerationEvent) -> None:
        """An event goes out."""
        if count := len(event.tokens.tokens):
            self._tokens.inc(count)


class QueueWatch:
    """Shows what waits in the job store, as it is at each scrape.

    Args:
        instruments: of the process.
        bus: the job store; used on the event loop that runs now.
    """

    def __init__(self, instruments: Instruments, bus: Bus) -> None:
        self._bus = bus
        self._loop = asyncio.get_running_loop()
        self._seen: list[ModelQueue] = []
        self._seen_at = -_QUEUES_HOLD_S
        instruments.show(metrics.QUEUE_JOBS, self._jobs)
        instruments.show(metrics.QUEUE_AGE, self._ages)
        instruments.show(metrics.WORKERS_LIVE, self._workers)

    def _look(self) -> list[ModelQueue]:
        """The queues, asked for on the event loop from the thread that serves the page; none if it fails."""
        if time.monotonic() - self._seen_at >= _QUEUES_HOLD_S:
            asked = asyncio.run_coroutine_threadsafe(self._bus.queues(), self._loop)
            try:
                self._seen = asked.result(QUEUES_TIMEOUT_S)
            except (BusError, TimeoutError):  # counted where it failed
                asked.cancel()
                self._seen = []
            self._seen_at = time.monotonic()
        return self._seen

    def _jobs(self) -> Samples:
        return [((q.model, priority), found.jobs) for q in self._look() for priority, found in q.waiting.items()]

    def _ages(self) -> Samples:
        return [((q.model, priority), found.oldest_s) for q in self._look() for priority, found in q.waiting.items()]

    def _workers(self) -> Samples:
        return [((q.model,), q.workers) for q in self._look()]


class SteeringRecorder:
    """Records what the steering role does.

    Args:
        instruments: of the process.
    """

    def __init__(self, instruments: Instruments | None = None) -> None:
        self.instruments = instruments = instruments or Instruments(Part.STEERING)
        self._plan_s = instruments.histogram(metrics.PLAN_TIME)
        self._planned = instruments.counter(metrics.PLANNED_REQUESTS)
        self._decisions = instruments.counter(metrics.DECISIONS)
        self._directives = instruments.counter(metrics.DIRECTIVES)
        self._answers = instruments.counter(metrics.ANSWERS)
        for answer, code in _ANSWERS:  # from 0 on, or the first burst would be missed
            self._answers.labels(answer, code.name)
        self._answer_s = instruments.histogram(metrics.ANSWER_TIME)
        self._predicted = instruments.histogram(metrics.PREDICTED_DIVERGENCE)

    @contextmanager
    def planning(self, requests: int) -> Iterator[None]:
        """A plan is made over so many live requests."""
        began = time.perf_counter()
        yield
        self._plan_s.observe(time.perf_counter() - began)
        self._planned.inc(requests)

    def decided(self, decision: Decision, outcome: str) -> None:
        """A decision was taken."""
        self._decisions.labels("bundle" if decision.forecast is not None else "rule", outcome).inc()

    def predicted(self, decision: Decision) -> None:
        """A decision on a report that had none before."""
        if (forecast := decision.forecast) is not None:
            self._predicted.labels(forecast.family.value).observe(forecast.divergence)

    def sent(self, directive: policy_pb2.Directive) -> None:
        """A directive goes out."""
        orderer = directive.ordered_by or common_pb2.ORDERER_CONTROLLER
        self._directives.labels(orderer_word(orderer), cause_word(directive.cause)).inc()

    def answered(self, answer: Answer, in_time: bool) -> None:
        """A directive was answered, or given up."""
        if not in_time:
            self._answers.labels("none", grpc.StatusCode.DEADLINE_EXCEEDED.name).inc()
            return
        problem = answer.problem
        code = "OK" if problem is None else _CODES.get(problem.code, grpc.StatusCode.UNKNOWN.name)
        self._answers.labels("ack" if problem is None else "nack", code).inc()
        self._answer_s.observe(time.monotonic() - answer.sent.sent_s)

    def show_journal(self, journal: Journal) -> None:
        """Shows how the decision log fares."""
        self.instruments.show(metrics.JOURNAL_PENDING, lambda: [((), journal.pending)])
        self.instruments.show(metrics.JOURNAL_DROPPED, lambda: [((), journal.dropped)])

    def show_bundles(self, bundles: BundleHolder | None, guard: Guard | None) -> None:
        """Shows what is in force, and what audits say of it; where there is neither, that there is nothing."""
        show = self.instruments.show
        show(metrics.BUNDLE_INFO, lambda: _places(bundles))
        show(metrics.BUNDLE_ALPHA, lambda: [((), bundles.active.alpha)] if bundles and bundles.active else [])
        show(metrics.BUNDLES_REFUSED, lambda: [((), len(bundles.refused) if bundles else 0)])
        show(metrics.BUNDLE_SWAPS, lambda: [((), bundles.swaps if bundles else 0)])
        show(metrics.GUARD_ROLLBACKS, lambda: [((), bundles.rollbacks if bundles else 0)])
        show(metrics.GUARD_ALARMS, lambda: [((), guard.alarms.total() if guard else 0)])
        show(metrics.GUARD_DRIFTS, lambda: [((), guard.drifts.total() if guard else 0)])
        show(metrics.BOUNDED_AUDITS, lambda: _by_family(guard.audits if guard else {}))
        show(metrics.BOUND_VIOLATIONS, lambda: _by_family(guard.exceeded if guard else {}))


def _places(bundles: BundleHolder | None) -> Samples:
    if bundles is None:
        return []
    held = (("active", bundles.active), ("shadow", bundles.shadow))
    return [((place, predictor.version), 1.0) for place, predictor in held if predictor is not None]


def _by_family(counts: dict[tuple[str, Family], int]) -> Samples:
    return [((bundle, family.value), count) for (bundle, family), count in list(counts.items())]
