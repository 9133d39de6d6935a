"""Errors of kvpilot's services as Python exceptions."""

from __future__ import annotations

from typing import Any

from google.rpc import error_details_pb2, status_pb2

from kvpilot.result import Result
from kvpilot.v1 import common_pb2

_DETAILS_KEY = "grpc-status-details-bin"


class KvpilotError(Exception):
    """A call was refused or a job failed.

    Attributes:
        code: google.rpc.Code number.
        violations: bad fields, path in the request -> the value and what is accepted.
        retry_after_ms: how long to wait before trying again; 0 where waiting does not help.
        result: what the job had delivered before it failed; None where it never began.
    """

    def __init__(self, problem: common_pb2.Problem) -> None:
        super().__init__(problem.message)
        self.code = problem.code
        self.violations = {violation.field: violation.description for violation in problem.violations}
        self.retry_after_ms = problem.retry_after_ms
        self.result: Result | None = None


class Cancelled(KvpilotError):  # noqa: N818 - named like the gRPC status, as the others below
    """The call was cancelled."""


class InvalidArgument(KvpilotError):  # noqa: N818
    """The request has bad fields; ``violations`` names them all."""


class DeadlineExceeded(KvpilotError):  # noqa: N818
    """The call took longer than allowed."""


class NotFound(KvpilotError):  # noqa: N818
    """No such job, or it has expired."""


class AlreadyExists(KvpilotError):  # noqa: N818
    """The idempotency key was used with a different request."""


class PermissionDenied(KvpilotError):  # noqa: N818
    """The caller may not do this."""


class ResourceExhausted(KvpilotError):  # noqa: N818
    """The queue is full (``retry_after_ms`` says when to come back), or the job can never fit."""


class FailedPrecondition(KvpilotError):  # noqa: N818
    """The call does not suit the state of things."""


class OutOfRange(KvpilotError):  # noqa: N818
    """The offset is past the end of a finished job."""


class Internal(KvpilotError):  # noqa: N818
    """An error of the service."""


class Unavailable(KvpilotError):  # noqa: N818
    """The service is out of reach; trying again later may help."""


class Unauthenticated(KvpilotError):  # noqa: N818
    """The caller did not prove who it is."""


_BY_CODE: dict[int, type[KvpilotError]] = {
    1: Cancelled,
    3: InvalidArgument,
    4: DeadlineExceeded,
    5: NotFound,
    6: AlreadyExists,
    7: PermissionDenied,
    8: ResourceExhausted,
    9: FailedPrecondition,
    11: OutOfRange,
    13: Internal,
    14: Unavailable,
    16: Unauthenticated,
}


def error_of_problem(problem: common_pb2.Problem) -> KvpilotError:
    """Makes the exception for a problem."""
    return _BY_CODE.get(problem.code, KvpilotError)(problem)


def error_of_rpc(error: Any) -> KvpilotError:
    """Makes the exception for an ``RpcError`` of either gRPC client, sync or aio."""
    problem = common_pb2.Problem(code=error.code().value[0], message=error.details() or error.code().name)
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY:
            for detail in status_pb2.Status.FromString(value).details:
                bad, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
                if detail.Unpack(bad):
                    for violation in bad.field_violations:
                        problem.violations.add(field=violation.field, description=violation.description)
                elif detail.Unpack(retry):
                    problem.retry_after_ms = retry.retry_delay.ToMilliseconds()
    return error_of_problem(problem)
