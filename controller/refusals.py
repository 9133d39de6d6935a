"""How a call is refused: a Problem, told to the client as a gRPC status with google.rpc details."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, NoReturn, TypeVar

import grpc
import structlog
from google.protobuf import any_pb2, duration_pb2  # type: ignore[import-untyped]
from google.rpc import error_details_pb2, status_pb2

from kvpilot.bus import (
    BusError,
    BusUnavailableError,
    IdempotencyConflictError,
    JobNotFoundError,
    OffsetOutOfRangeError,
    QueueFullError,
)
from kvpilot.v1 import common_pb2

log = structlog.get_logger(__name__)

DETAILS_KEY = "grpc-status-details-bin"
"""Trailing metadata that carries a serialised google.rpc.Status."""
MAX_DETAIL_BYTES = 4096
"""Most bytes of violations in one status: clients accept 8 KiB of metadata altogether."""
RETRY_MS = 1000
"""When a client is told to come back where nothing better is known."""

_CODES = {code.value[0]: code for code in grpc.StatusCode}

Response = TypeVar("Response")


class RefusedError(Exception):
    """A call is refused; ``problem`` is what the client is told."""

    def __init__(self, problem: common_pb2.Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def refusal(
    code: grpc.StatusCode, message: str, violations: Mapping[str, str] | None = None, retry_after_ms: int = 0
) -> RefusedError:
    """Makes a refusal; ``violations`` are field paths and what is wrong with them."""
    problem = common_pb2.Problem(code=code.value[0], message=message, retry_after_ms=retry_after_ms)
    for field, description in (violations or {}).items():
        problem.violations.add(field=field, description=description)
    return RefusedError(problem)


def bad_fields(violations: Mapping[str, str]) -> RefusedError:
    """Makes the refusal of a request with bad fields."""
    listed = "; ".join(f"{field}: {description}" for field, description in list(violations.items())[:3])
    more = f"; and {len(violations) - 3} more" if len(violations) > 3 else ""
    return refusal(grpc.StatusCode.INVALID_ARGUMENT, f"the request was refused: {listed}{more}", violations)


def status_of(problem: common_pb2.Problem) -> status_pb2.Status:
    """Spells a problem as google.rpc.Status with BadRequest and RetryInfo details."""
    status = status_pb2.Status(code=problem.code, message=problem.message)
    if problem.violations:
        bad = error_details_pb2.BadRequest()
        room = MAX_DETAIL_BYTES
        for place, violation in enumerate(problem.violations):
            room -= violation.ByteSize()
            if room < 0:
                left_out = f"{len(problem.violations) - place} more bad fields are not listed"
                bad.field_violations.add(field="", description=left_out)
                break
            bad.field_violations.add(field=violation.field, description=violation.description)
        _add_detail(status, bad)
    if problem.retry_after_ms:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(problem.retry_after_ms)
        _add_detail(status, error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def _add_detail(status: status_pb2.Status, detail: Any) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)


def problem_of(error: Exception) -> common_pb2.Problem:
    """Says what the client is told of an error. One that nobody foresaw is logged and not shown."""
    message, retry_after_ms = str(error), 0
    match error:
        case RefusedError():
            return error.problem
        case QueueFullError():
            code, retry_after_ms = grpc.StatusCode.RESOURCE_EXHAUSTED, RETRY_MS
        case IdempotencyConflictError():
            code = grpc.StatusCode.ALREADY_EXISTS
        case JobNotFoundError():
            code = grpc.StatusCode.NOT_FOUND
        case OffsetOutOfRangeError():
            code = grpc.StatusCode.OUT_OF_RANGE
        case BusUnavailableError():
            log.warning("job store out of reach", error=message)
            code, message, retry_after_ms = grpc.StatusCode.UNAVAILABLE, "the job store is out of reach", RETRY_MS
        case BusError():
            log.error("job store failed", exc_info=error)
            code, message = grpc.StatusCode.INTERNAL, "the job store failed; see the server's log"
        case _:
            log.error("call failed", exc_info=error)
            code, message = grpc.StatusCode.INTERNAL, "an error of the server; see its log"
    return common_pb2.Problem(code=code.value[0], message=message, retry_after_ms=retry_after_ms)


async def abort(context: Any, problem: common_pb2.Problem) -> NoReturn:
    """Ends a call with a problem as its status."""
    status = status_of(problem)
    code = _CODES.get(problem.code, grpc.StatusCode.UNKNOWN)
    status.code = code.value[0]
    await context.abort(code, status.message, ((DETAILS_KEY, status.SerializeToString()),))
    raise AssertionError("context.abort returned")


def refusing_call(
    method: Callable[[Any, Any, Any], Awaitable[Response]],
) -> Callable[[Any, Any, Any], Awaitable[Response]]:
    """Makes a unary method end with a status where it raises."""

    @functools.wraps(method)
    async def call(self: Any, request: Any, context: Any) -> Response:
        try:
            return await method(self, request, context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await abort(context, problem_of(error))

    return call


def refusing_stream(
    method: Callable[[Any, Any, Any], AsyncGenerator[Response, None]],
) -> Callable[[Any, Any, Any], AsyncGenerator[Response, None]]:
    """Makes a server-streaming method end with a status where it raises."""

    @functools.wraps(method)
    async def call(self: Any, request: Any, context: Any) -> AsyncGenerator[Response, None]:
        try:
            async with contextlib.aclosing(method(self, request, context)) as responses:
                async for response in responses:
                    yield response
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await abort(context, problem_of(error))

    return call
