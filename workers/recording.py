"""What a worker's metrics are made of: its jobs' events and the engine's reports, as they pass by on the event loop.

Nothing is recorded on the engine's thread, which stamps a step's events with its time and no more. Counts that the
engine keeps anyway are looked at when somebody scrapes, as its last report has them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from operator import attrgetter
from typing import TypeAlias

from kvpilot import metrics
from kvpilot.bus import Claim
from kvpilot.catalog import StageCatalog
from kvpilot.exposition import Instruments, Samples
from kvpilot.metrics import Metric
from kvpilot.pipeline import PipelineError
from kvpilot.v1 import common_pb2, generation_pb2, policy_pb2
from kvpilot.words import cause_word, loss_class_word, orderer_word, reason_word
from models.features import Family, family_of
from workers.engine.api import Event

_Look: TypeAlias = Callable[[policy_pb2.WorkerState], Samples]


def _one(name: str, scale: float = 1.0) -> _Look:
    """A number of the state; ``name`` may lead into its parts."""
    read = attrgetter(name)
    return lambda state: [((), read(state) * scale)]


def _found(state: policy_pb2.WorkerState) -> Samples:
    for tier in state.recalls.tiers:
        for found in ("there", "ahead", "waited", "in_place"):
            yield (tier.name, found), getattr(tier, f"{found}_blocks")


def _chosen(state: policy_pb2.WorkerState) -> Samples:
    return [(("read",), state.recalls.read_blocks), (("skipped",), state.recalls.skipped_blocks)]


def _session_bytes(state: policy_pb2.WorkerState) -> Samples:
    return [(("host",), state.sessions.host_bytes), (("disk",), state.sessions.disk_bytes)]


_SHOWN: dict[Metric, _Look] = {
    metrics.REQUESTS_RUNNING: _one("running"),
    metrics.REQUESTS_WAITING: _one("waiting"),
    metrics.DECODE_STEPS: _one("decode_steps"),
    metrics.DECODE_TIME: _one("decode_ms", 1e-3),
    metrics.SIGNAL_TIME: _one("signal_ms", 1e-3),
    metrics.PREEMPTIONS: _one("preemptions"),
    metrics.EVACUATIONS: _one("evacuations"),
    metrics.LENT_LAYERS: _one("lent_layers"),
    metrics.CACHE_BYTES: lambda state: [((use.tier, use.format), use.bytes) for use in state.formats],
    metrics.TIER_USED: lambda state: [((tier.name,), tier.used_bytes) for tier in state.tiers],
    metrics.TIER_BUDGET: lambda state: [((tier.name,), tier.budget_bytes) for tier in state.tiers],
    metrics.RECALL_BLOCKS: _found,
    metrics.SELECTED_BLOCKS: _chosen,
    metrics.MOVED_BYTES: lambda state: [((pair.from_tier, pair.to_tier), pair.bytes) for pair in state.recalls.moved],
    metrics.DISK_WRITTEN: _one("disk.written_bytes"),
    metrics.DISK_READ: _one("disk.read_bytes"),
    metrics.DISK_WRITE_TIME: _one("disk.write_ms", 1e-3),
    metrics.DISK_READ_TIME: _one("disk.read_ms", 1e-3),
    metrics.DISK_DAMAGED: _one("disk.damaged_blocks"),
    metrics.SESSIONS_PARKED: _one("sessions.parked"),
    metrics.SESSION_BYTES: _session_bytes,
    metrics.SESSION_TURNS: _one("sessions.restored_turns"),
    metrics.SESSION_TOKENS: _one("sessions.restored_tokens"),
    metrics.SESSION_DROPPED: _one("sessions.dropped_pieces"),
    metrics.SESSIONS_EXPIRED: _one("sessions.expired"),
    metrics.AUDITS: _one("audits"),
    metrics.AUDITS_SKIPPED: _one("audits_skipped"),
    metrics.AUDIT_TIME: _one("audit_ms", 1e-3),
}
"""What is found in a report's worker part: samples without the model's label."""


@dataclass
class _Job:
    """A job as far as its times go, seconds of the epoch.

    Attributes:
        accepted_s: when a front door took it.
        fresh: no worker began with it before.
        started_s: when the engine took it; 0: not yet.
        first_s, last_s: of tokens made here; 0: there is none.
    """

    accepted_s: float
    fresh: bool
    started_s: float = 0.0
    first_s: float = 0.0
    last_s: float = 0.0


@dataclass(frozen=True)
class _Live:
    """A live request as last reported."""

    family: str
    loss_class: str
    cache: common_pb2.CacheBytes = field(compare=False)


class Recorder:
    """Records one worker's metrics; an observer of its jobs (``workers.jobs.JobObserver``).

    Args:
        instruments: of the process.
        hello: what the worker is.
        audit_budget: most time that its audits may take, as a share of decoding.
    """

    def __init__(self, instruments: Instruments, hello: policy_pb2.Hello, audit_budget: float) -> None:
        self._model = model = hello.model.name
        self._catalog = StageCatalog(hello.model.stages)
        self._family = lru_cache(maxsize=1024)(self._find_family)
        self._jobs: dict[str, _Job] = {}
        self._live: dict[str, _Live] = {}
        self._seen: dict[tuple[str, str], None] = {}
        self._state = policy_pb2.WorkerState()
        for tier in hello.tiers:
            self._state.tiers.add(name=tier.name, budget_bytes=tier.budget_bytes)
        self._requests = instruments.counter(metrics.REQUESTS)
        self._prompt_tokens = instruments.counter(metrics.PROMPT_TOKENS).labels(model)
        self._reused_tokens = instruments.counter(metrics.REUSED_PROMPT_TOKENS).labels(model)
        self._tokens = instruments.counter(metrics.GENERATED_TOKENS).labels(model)
        self._first_token_s = instruments.histogram(metrics.TIME_TO_FIRST_TOKEN).labels(model)
        self._inter_token_s = instruments.histogram(metrics.INTER_TOKEN).labels(model)
        self._queue_s = instruments.histogram(metrics.REQUEST_QUEUE).labels(model)
        self._prefill_s = instruments.histogram(metrics.REQUEST_PREFILL).labels(model)
        self._decode_s = instruments.histogram(metrics.REQUEST_DECODE).labels(model)
        self._duration_s = instruments.histogram(metrics.REQUEST_DURATION).labels(model)
        self._claimed = instruments.counter(metrics.JOBS_CLAIMED)
        for reason in filter(None, generation_pb2.FinishReason.values()):  # from 0 on, or the first would be missed
            self._requests.labels(model, reason_word(reason))
        for kind in ("fresh", "again"):
            self._claimed.labels(model, kind)
        self._switches = instruments.counter(metrics.SWITCHES)
        self._stall_s = instruments.histogram(metrics.SWITCH_STALL).labels(model)
        self._switch_bytes = instruments.counter(metrics.SWITCH_BYTES)
        self._divergence = instruments.histogram(metrics.MEASURED_DIVERGENCE)
        instruments.gauge(metrics.WORKER_INFO).labels(model, hello.worker).set(1)
        instruments.gauge(metrics.AUDIT_BUDGET).labels(model).set(audit_budget)
        for metric, look in _SHOWN.items():
            instruments.show(metric, partial(self._look, look))
        instruments.show(metrics.JOBS_HELD, lambda: [((model,), len(self._jobs))])
        instruments.show(metrics.REQUESTS_BY_FAMILY, self._by_family)
        instruments.show(metrics.REQUEST_BYTES, self._request_bytes)
        instruments.show(metrics.SHADOW_BYTES, lambda: [((model,), self._sum("shadow_bytes"))])
        instruments.show(metrics.FULL_BYTES, lambda: [((model,), self._sum("full_cache_bytes"))])

    # -- jobs ----------------------------------------------------------------------------------------------------------

    def claimed(self, claim: Claim) -> None:
        """See JobObserver."""
        fresh = claim.epoch == 1  # attempts do not count claims that were handed back
        self._jobs[claim.job.job_id] = _Job(claim.job.create_time.ToNanoseconds() / 1e9, fresh)
        self._claimed.labels(self._model, "fresh" if fresh else "again").inc()

    def happened(self, at_s: float, events: Sequence[Event]) -> None:
        """See JobObserver."""
        for job_id, event in events:
            job = self._jobs.get(job_id)
            if job is None:
                continue
            match event.WhichOneof("event"):
                case "tokens":
                    self._take_tokens(job, at_s, len(event.tokens.tokens))
                case "started":
                    job.started_s = at_s
                    self._prompt_tokens.inc(event.started.prompt_tokens)
                    if job.fresh:
                        self._queue_s.observe(max(0.0, at_s - job.accepted_s))
                case "switch":
                    self._take_switch(event.switch)
                case "finished":
                    self._finish(self._jobs.pop(job_id), at_s, event.finished)

    def _take_tokens(self, job: _Job, at_s: float, count: int) -> None:
        if not count:
            return  # the last piece of text
        self._tokens.inc(count)
        if job.first_s:
            for _ in range(count):
                self._inter_token_s.observe(max(0.0, at_s - job.last_s) / count)
        else:
            job.first_s = at_s
            self._prefill_s.observe(max(0.0, at_s - job.started_s))
            if job.fresh:
                self._first_token_s.observe(max(0.0, at_s - job.accepted_s))
        job.last_s = at_s

    def _finish(self, job: _Job, at_s: float, finished: generation_pb2.Finished) -> None:
        self._requests.labels(self._model, reason_word(finished.reason)).inc()
        self._reused_tokens.inc(finished.usage.reused_prompt_tokens)
        self._duration_s.observe(max(0.0, at_s - job.accepted_s))
        if job.first_s:
            self._decode_s.observe(job.last_s - job.first_s)

    def let_go(self, job_id: str, reason: str) -> None:
        """See JobObserver."""
        self._jobs.pop(job_id, None)

    # -- switches ------------------------------------------------------------------------------------------------------

    def _take_switch(self, switch: common_pb2.Switch) -> None:
        self._count_switch(switch.ordered_by, switch.cause, "applied")
        self._stall_s.observe(switch.stall_ms / 1e3)
        change = switch.after.device_bytes - switch.before.device_bytes
        self._switch_bytes.labels(self._model, "took" if change > 0 else "freed").inc(abs(change))

    def answered(self, directive: policy_pb2.Directive, answer: policy_pb2.SteerRequest) -> None:
        """A directive was answered. What an Ack tells of has come as the request's event."""
        if answer.HasField("nack"):
            orderer = directive.ordered_by or common_pb2.ORDERER_CONTROLLER
            self._count_switch(orderer, directive.cause, "refused")

    def _count_switch(self, orderer: common_pb2.Orderer, cause: common_pb2.Cause, outcome: str) -> None:
        self._switches.labels(self._model, orderer_word(orderer), cause_word(cause), outcome).inc()

    # -- reports -------------------------------------------------------------------------------------------------------

    def reported(self, report: policy_pb2.Report) -> None:
        """See JobObserver."""
        self._state = report.worker
        for state in report.requests:
            family, loss_class = self._family(state.pipeline), loss_class_word(state.loss_class)
            self._live[state.request_id] = _Live(family, loss_class, state.cache)
            for audit in state.audits:
                self._divergence.labels(self._model, self._family(audit.pipeline)).observe(audit.divergence)
        for request_id in report.ended_request_ids:
            self._live.pop(request_id, None)

    def _find_family(self, pipeline: str) -> str:
        try:
            return family_of(self._catalog.key(pipeline)).value
        except PipelineError:
            return Family.OTHER.value

    # -- looks, from the thread that serves the page -------------------------------------------------------------------

    def _look(self, look: _Look) -> Samples:
        return [((self._model, *labels), value) for labels, value in look(self._state)]

    def _by_family(self) -> Samples:
        live = Counter((one.family, one.loss_class) for one in list(self._live.values()))
        self._seen.update(dict.fromkeys(live))  # what was there once goes on as 0
        return [((self._model, *labels), live[labels]) for labels in self._seen]

    def _request_bytes(self) -> Samples:
        return [((self._model, tier), self._sum(f"{tier}_bytes")) for tier in ("device", "host", "disk")]

    def _sum(self, name: str) -> int:
        return sum(getattr(one.cache, name) for one in list(self._live.values()))
