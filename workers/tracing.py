"""A worker's spans: how long a request waited, was prefilled and decoded, and what happened to it meanwhile.

Made of the events and reports that pass by on the event loop anyway. Used only where spans are exported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind

from kvpilot.bus import Claim
from kvpilot.tracing import context_of, fail, finish_attributes, request_attributes, tracer
from kvpilot.v1 import common_pb2, generation_pb2, policy_pb2
from kvpilot.words import cause_word, orderer_word
from workers.engine.api import Event


@dataclass
class _Traced:
    """A job's spans: all of its time here, and the part of it that is under way."""

    whole: Span
    part: Span
    name: str = "queue"
    """The part's."""


class JobTracer:
    """Makes spans; an observer of jobs (``workers.jobs.JobObserver``).

    A job's span is a child of the front door's, whatever process that was; its parts follow each other: ``queue`` (from
    the front door's taking it), ``prefill`` and ``decode``. Switches and preemptions are events of the part.
    """

    def __init__(self, worker: str) -> None:
        self._worker = worker
        self._jobs: dict[str, _Traced] = {}

    def claimed(self, claim: Claim) -> None:
        """See JobObserver."""
        job = claim.job
        began_ns = job.create_time.ToNanoseconds()
        attributes = request_attributes(job.request) | {
            "gen_ai.response.id": job.job_id,
            "kvpilot.worker": self._worker,
            "kvpilot.attempts": claim.attempts,
        }
        whole = tracer().start_span(
            "worker", context_of(job.traceparent), SpanKind.CONSUMER, attributes, start_time=began_ns
        )
        self._jobs[job.job_id] = _Traced(whole, self._part(whole, "queue", began_ns))

    def _part(self, whole: Span, name: str, began_ns: int) -> Span:
        return tracer().start_span(name, trace.set_span_in_context(whole), start_time=began_ns)

    def happened(self, at_s: float, events: Sequence[Event]) -> None:
        """See JobObserver."""
        at_ns = int(at_s * 1e9)
        for job_id, event in events:
            traced = self._jobs.get(job_id)
            if traced is None:
                continue
            match event.WhichOneof("event"):
                case "started":
                    traced.whole.set_attribute("gen_ai.usage.input_tokens", event.started.prompt_tokens)
                    self._next(traced, "prefill", at_ns)
                case "tokens" if traced.name == "prefill":
                    self._next(traced, "decode", at_ns)
                case "switch":
                    traced.part.add_event("switch", _told(event.switch), at_ns)
                case "finished":
                    self._end(job_id, at_ns, event.finished)

    def _next(self, traced: _Traced, name: str, at_ns: int) -> None:
        traced.part.end(at_ns)
        traced.part, traced.name = self._part(traced.whole, name, at_ns), name

    def _end(self, job_id: str, at_ns: int, finished: generation_pb2.Finished) -> None:
        traced = self._jobs.pop(job_id)
        traced.part.end(at_ns)
        traced.whole.set_attributes(finish_attributes(finished))
        if finished.reason == generation_pb2.FINISH_REASON_FAILED:
            fail(traced.whole, finished.problem.message)
        traced.whole.end(at_ns)

    def reported(self, report: policy_pb2.Report) -> None:
        """See JobObserver."""
        for request_id in report.preempted_request_ids:
            if traced := self._jobs.get(request_id):
                traced.part.add_event("preempted", timestamp=report.time.ToNanoseconds())

    def let_go(self, job_id: str, reason: str) -> None:
        """See JobObserver."""
        if traced := self._jobs.pop(job_id, None):
            traced.part.end()
            traced.whole.add_event("handed over", {"kvpilot.reason": reason})
            traced.whole.end()


def _told(switch: common_pb2.Switch) -> dict[str, str | int | float]:
    return {
        "kvpilot.from_pipeline": switch.from_pipeline,
        "kvpilot.to_pipeline": switch.to_pipeline,
        "kvpilot.reason": switch.reason,
        "kvpilot.ordered_by": orderer_word(switch.ordered_by),
        "kvpilot.cause": cause_word(switch.cause),
        "kvpilot.at_token": switch.at_token,
        "kvpilot.stall_ms": switch.stall_ms,
        "kvpilot.device_bytes_before": switch.before.device_bytes,
        "kvpilot.device_bytes_after": switch.after.device_bytes,
    }
