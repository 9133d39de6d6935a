"""How a client follows a job to its end over calls that may break: the decisions, without any input or output."""

from __future__ import annotations

import contextlib
import random
import uuid
from collections.abc import Iterator
from typing import Any, TypeAlias

from kvpilot.errors import KvpilotError, Unavailable, error_of_problem, error_of_rpc
from kvpilot.event import Event
from kvpilot.tracing import StreamSpan
from kvpilot.v1 import common_pb2, generation_pb2

Call: TypeAlias = tuple[str, Any]
"""Name of a GenerationService method and its request."""

_FIRST_DELAY_S = 0.1
_LAST_DELAY_S = 5.0
_CANCELLED = 1
_UNAVAILABLE = 14


class Retries:
    """Counts failures in a row and says how long to wait after each.

    Args:
        most: failures in a row that are borne; the next one is raised.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._failures = 0

    def succeeded(self) -> None:
        """Starts counting anew."""
        self._failures = 0

    def delay_s(self, error: KvpilotError) -> float:
        """Returns how long to wait before trying again.

        Raises:
            KvpilotError: ``error`` itself, where trying again does not help or was done often enough.
        """
        if not isinstance(error, Unavailable) or self._failures >= self._most:
            raise error
        delay: float = min(_FIRST_DELAY_S * 2**self._failures, _LAST_DELAY_S) * random.uniform(0.5, 1.0)
        self._failures += 1
        return max(delay, error.retry_after_ms / 1000)


class JobStream:
    """A job followed from submission, or from an offset, to its end.

    Use: make :meth:`call`, pass what comes to :meth:`take`; when the call fails, wait :meth:`broken` seconds and call
    again. A request without an idempotency key is given one, so that calling again cannot start a second job.
    """

    def __init__(
        self,
        request: generation_pb2.GenerateRequest | None = None,
        *,
        job_id: str = "",
        offset: int = 0,
        retries: int = 8,
    ) -> None:
        if request is not None and not request.idempotency_key:
            request.idempotency_key = uuid.uuid4().hex
        self._request = request
        self._job_id = job_id
        self._next_offset = offset
        self._retries = Retries(retries)
        self._failure: KvpilotError | None = None
        self._span: StreamSpan | None = None
        self.finished = False

    @contextlib.contextmanager
    def traced(self, target: str) -> Iterator[None]:
        """Has a span over the job, for as long as the context lasts; calls carry it in :attr:`metadata`."""
        self._span = span = StreamSpan(self._request, target)
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
            raise
        finally:
            span.end(failure)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What calls are to carry of the trace."""
        return self._span.metadata if self._span else ()

    def call(self) -> Call:
        """Returns the call that brings the next event."""
        if self._job_id:
            return "Resume", generation_pb2.ResumeRequest(job_id=self._job_id, offset=self._next_offset)
        return "Generate", self._request

    def take(self, event: generation_pb2.GenerationEvent) -> Event:
        """Takes the next event in."""
        self._retries.succeeded()
        self._next_offset = event.offset + 1
        if self._span:
            self._span.take(event)
        if event.HasField("accepted"):
            self._job_id = event.accepted.job_id
        if event.HasField("finished"):
            self.finished = True
            if event.finished.reason == generation_pb2.FINISH_REASON_FAILED:
                self._failure = error_of_problem(event.finished.problem)
        return Event(event)

    def close(self) -> None:
        """Raises what a job that failed after its first token failed with."""
        if self._failure is not None:
            raise self._failure

    def broken(self, error: Any = None) -> float:
        """Returns how long to wait before calling again after an ``RpcError``, or after a stream that just ended.

        Raises:
            KvpilotError: calling again does not help, or was done often enough.
        """
        if error is not None:
            return self._retries.delay_s(error_of_rpc(error))
        ended = common_pb2.Problem(code=_UNAVAILABLE, message="the stream ended before the job did")
        return self._retries.delay_s(error_of_problem(ended))


def replayed_of(event: Event) -> generation_pb2.Replayed | None:
    """What an event of a replay says of a place; None for events that say nothing of one.

    Raises:
        Cancelled: it says that the job was cancelled, so that there are places missing.
    """
    finished = event.message.finished
    if event.kind == "finished" and finished.reason == generation_pb2.FINISH_REASON_CANCELLED:
        raise error_of_problem(common_pb2.Problem(code=_CANCELLED, message="the replay was cancelled"))
    return event.message.replayed if event.kind == "replayed" else None
