"""Traces: spans of a request in client, front door and worker that belong together.

Only OpenTelemetry's API is imported: without its SDK every span here is a shell that records nothing and passes on
what came in. ``configure_tracing`` sets the SDK up, if it is there (the extra ``otel``) and the environment names a
collector (``OTEL_EXPORTER_OTLP_ENDPOINT``, e.g. ``http://localhost:4317``); the SDK heeds its other variables, such as
``OTEL_TRACES_SAMPLER`` and ``OTEL_RESOURCE_ATTRIBUTES``. A program that uses the client sets it up its own way.

A trace's identity travels as the ``traceparent`` of W3C Trace Context: in the metadata of calls, then in the job.
Attributes have the names of OpenTelemetry's conventions for generative AI (``gen_ai.*``) where these have one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TypeAlias

import structlog
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from kvpilot.v1 import common_pb2, generation_pb2
from kvpilot.words import reason_word

log = structlog.get_logger(__name__)

TRACEPARENT = "traceparent"
ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PROPAGATOR = TraceContextTextMapPropagator()
Attributes: TypeAlias = dict[str, str | int | float | list[str]]


def configure_tracing(service: str, process: str) -> Callable[[], None]:
    """Has this process's spans exported where the environment says so; else nothing changes.

    Args:
        service: what the process is, e.g. ``kvpilot-worker``; ``OTEL_SERVICE_NAME`` wins.
        process: its name.

    Returns:
        What sends the last spans, to be called at the end.
    """
    if not any(os.environ.get(name) for name in ENDPOINTS) or os.environ.get("OTEL_SDK_DISABLED", "") == "true":
        return lambda: None
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        log.error("traces are not exported: install kvpilot[otel]", error=str(error))
        return lambda: None
    named = {"service.instance.id": process} | (
        {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": service}
    )
    provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return provider.shutdown


def is_exporting() -> bool:
    """Whether spans made now are kept by anybody."""
    return not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider | trace.NoOpTracerProvider)


def tracer() -> trace.Tracer:
    """Makes kvpilot's spans."""
    return trace.get_tracer("kvpilot")


def traceparent_of(span: Span) -> str:
    """How a span is named to those that go on with its trace; empty if it belongs to none."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, trace.set_span_in_context(span))
    return carrier.get(TRACEPARENT, "")


def context_of(traceparent: str) -> Context:
    """The context in which the next span goes on with that trace; of one that does not parse, a new trace begins."""
    return _PROPAGATOR.extract({TRACEPARENT: traceparent}, Context())


def trace_id_of(traceparent: str) -> str:
    """The trace's id, 32 hexadecimal digits; empty where there is none."""
    found = trace.get_current_span(context_of(traceparent)).get_span_context() if traceparent else None
    return trace.format_trace_id(found.trace_id) if found and found.is_valid else ""


def traceparent_in(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """What a call's metadata says of its trace; empty: nothing."""
    return next((str(value) for name, value in metadata or () if name == TRACEPARENT), "")


def request_attributes(request: generation_pb2.GenerateRequest) -> Attributes:
    """What a request asks for."""
    asked = request.sampling
    chat = request.WhichOneof("input") == "chat"
    found: Attributes = {
        "gen_ai.operation.name": "chat" if chat else "text_completion",
        "gen_ai.provider.name": "kvpilot",
    }
    if request.model:
        found["gen_ai.request.model"] = request.model
    if request.session_id:
        found["gen_ai.conversation.id"] = request.session_id
    if request.pipeline:
        found["kvpilot.request.pipeline"] = request.pipeline
    if request.scenario:
        found["kvpilot.request.scenario"] = common_pb2.Scenario.Name(request.scenario)
    for name in ("max_tokens", "temperature", "top_p", "top_k", "seed"):
        described = asked.DESCRIPTOR.fields_by_name[name]
        if asked.HasField(name) if described.has_presence else getattr(asked, name):
            found[f"gen_ai.request.{name}"] = getattr(asked, name)
    return found


def finish_attributes(finished: generation_pb2.Finished) -> Attributes:
    """How a request ended and what it took."""
    usage = finished.usage
    return {
        "gen_ai.response.finish_reasons": [reason_word(finished.reason)],
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.generated_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.reused_prompt_tokens,
        "kvpilot.preemptions": usage.preemptions,
        "kvpilot.pipeline": finished.pipeline,
    }


def fail(span: Span, message: str) -> None:
    """Marks a span as that of something that failed."""
    span.set_status(Status(StatusCode.ERROR, message))


class StreamSpan:
    """A client's span over one job, from the first call to the last event, over calls that broke.

    Args:
        request: what is asked for; None where a job is resumed.
        target: the service's address.
    """

    def __init__(self, request: generation_pb2.GenerateRequest | None, target: str) -> None:
        attributes = request_attributes(request) if request is not None else {"gen_ai.provider.name": "kvpilot"}
        attributes["server.address"] = target
        model = f" {request.model}" if request is not None and request.model else ""
        name = f"{attributes.get('gen_ai.operation.name', 'resume')}{model}"
        self._span = tracer().start_span(name, kind=SpanKind.CLIENT, attributes=attributes)
        self._named = traceparent_of(self._span)
        self._begun = False

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What calls are to carry."""
        return ((TRACEPARENT, self._named),) if self._named else ()

    def take(self, event: generation_pb2.GenerationEvent) -> None:
        """Notes an event of the job."""
        if not self._span.is_recording():
            return
        if event.HasField("accepted"):
            self._span.set_attribute("gen_ai.response.id", event.accepted.job_id)
        elif event.HasField("finished"):
            self._span.set_attributes(finish_attributes(event.finished))
            if event.finished.reason == generation_pb2.FINISH_REASON_FAILED:
                fail(self._span, event.finished.problem.message)
        elif event.HasField("tokens") and not self._begun:
            self._begun = True
            self._span.add_event("first token")

    def end(self, error: BaseException | None = None) -> None:
        """It is over."""
        if error is not None:
            self._span.record_exception(error)
            fail(self._span, str(error))
        self._span.end()
