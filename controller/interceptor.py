"""Counts gRPC calls and times them, and makes each call's span, for all services of a server."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from inspect import isasyncgenfunction
from typing import Any

import grpc
from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.trace import SpanKind

from kvpilot import metrics
from kvpilot.exposition import Instruments
from kvpilot.tracing import context_of, fail, traceparent_in, tracer

_TRACED = ("kvpilot.v1.GenerationService", "kvpilot.v1.OperatorService")
"""Services whose calls have spans: a worker's stream lasts for days, health and reflection say nothing of a request."""


class CallRecorder(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Add it to a server's interceptors.

    Calls of methods that the server does not have are not counted: their names are whatever the caller made up.
    """

    def __init__(self, instruments: Instruments) -> None:
        self._calls = instruments.counter(metrics.CALLS)
        self._call_s = instruments.histogram(metrics.CALL_TIME)
        self._open = instruments.gauge(metrics.CALLS_OPEN)

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[grpc.RpcMethodHandler]], details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler:
        """See grpc.aio.ServerInterceptor."""
        handler = await continuation(details)
        if handler is None:
            return handler
        _, service, method = details.method.split("/")
        kinds = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
        kind = next(kind for kind in kinds if getattr(handler, kind))
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(
            self._recorded(getattr(handler, kind), service, method),
            handler.request_deserializer,
            handler.response_serializer,
        )

    def _recorded(self, serve: Callable[[Any, Any], Any], service: str, method: str) -> Callable[[Any, Any], Any]:
        async def call(request: Any, context: Any) -> Any:
            with self._under_way(service, method, context):
                return await serve(request, context)

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            with self._under_way(service, method, context):
                async with contextlib.aclosing(serve(request, context)) as responses:
                    async for response in responses:
                        yield response

        return stream if isasyncgenfunction(serve) else call

    @contextlib.contextmanager
    def _under_way(self, service: str, method: str, context: Any) -> Iterator[None]:
        began, code = time.monotonic(), grpc.StatusCode.OK
        self._open.labels(service, method).inc()
        with _span(service, method, context) as span:
            try:
                yield
            except (asyncio.CancelledError, GeneratorExit):
                code = grpc.StatusCode.CANCELLED
                raise
            except BaseException:
                code = grpc.StatusCode.UNKNOWN
                raise
            finally:
                code = _code_of(context) or code
                span.set_attribute("rpc.grpc.status_code", code.value[0])
                if code not in (grpc.StatusCode.OK, grpc.StatusCode.CANCELLED):
                    fail(span, context.details() or code.name)
                self._open.labels(service, method).dec()
                self._calls.labels(service, method, code.name).inc()
                self._call_s.labels(service, method).observe(time.monotonic() - began)


def _code_of(context: Any) -> grpc.StatusCode | None:
    """The status that a call was given; None: none was."""
    code = context.code()
    if isinstance(code, grpc.StatusCode):
        return code
    return next((known for known in grpc.StatusCode if known.value[0] == code), None) if code else None


@contextlib.contextmanager
def _span(service: str, method: str, context: Any) -> Iterator[trace.Span]:
    """The call's span, which is the current one meanwhile; a child of the caller's, wherever that is."""
    if service not in _TRACED:
        yield trace.INVALID_SPAN
        return
    attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}
    parent = context_of(traceparent_in(context.invocation_metadata()))
    span = tracer().start_span(f"{service}/{method}", parent, SpanKind.SERVER, attributes)
    token = contexts.attach(trace.set_span_in_context(span))
    try:
        yield span
    finally:
        contexts.detach(token)
        span.end()
