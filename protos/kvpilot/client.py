"""Clients of GenerationService, sync and asyncio. Their streams survive lost connections and restarted front doors."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from kvpilot.errors import KvpilotError, error_of_rpc
from kvpilot.event import Event
from kvpilot.request import Options, ReplayOptions, Turn, make_replay_request, make_request
from kvpilot.result import JobState, Result
from kvpilot.stream import Call, JobStream, Retries, replayed_of
from kvpilot.v1 import generation_pb2, generation_pb2_grpc

CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)
"""A silent network is noticed within 40 s. The server must allow a ping every 30 s."""


@dataclass(frozen=True)
class Settings:
    """How a client calls.

    Attributes:
        credentials: for TLS; None calls in plain text.
        metadata: sent with every call, e.g. ``(("authorization", "Bearer ..."),)``.
        timeout_s: longest wait for the answer of get, cancel and models. Streams have no limit.
        retries: failures in a row, with growing waits between, after which an unreachable service is an error.
    """

    credentials: grpc.ChannelCredentials | None = None
    metadata: tuple[tuple[str, str], ...] = ()
    timeout_s: float = 30.0
    retries: int = 8


@dataclass(frozen=True)
class JobView:
    """A job as it is now; see GetResponse in generation.proto."""

    job_id: str
    state: JobState
    create_time: datetime
    text: str
    token_ids: tuple[int, ...]
    next_offset: int
    finished: generation_pb2.Finished | None


def _view(response: generation_pb2.GetResponse) -> JobView:
    return JobView(
        job_id=response.job_id,
        state=JobState.of(response.state),
        create_time=response.create_time.ToDatetime(UTC),
        text=response.text,
        token_ids=tuple(response.token_ids),
        next_offset=response.next_offset,
        finished=response.finished if response.HasField("finished") else None,
    )


class Client:
    """Calls GenerationService and waits for the answers.

    >>> with Client("localhost:7450") as client:  # doctest: +SKIP
    ...     for event in client.generate("Hello", max_tokens=32):
    ...         print(event.text, end="")
    """

    def __init__(self, target: str, settings: Settings | None = None) -> None:
        self._target = target
        self._settings = settings = settings or Settings()
        if settings.credentials is None:
            self._channel = grpc.insecure_channel(target, CHANNEL_OPTIONS)
        else:
            self._channel = grpc.secure_channel(target, settings.credentials, CHANNEL_OPTIONS)
        self._stub: Any = generation_pb2_grpc.GenerationServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; jobs go on."""
        self._channel.close()

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Turn] | None = None,
        token_ids: Sequence[int] | None = None,
        **options: Unpack[Options],
    ) -> Iterator[Event]:
        """Submits a job and yields its events, the last of which is Finished. Leaving early does not end the job.

        Raises:
            KvpilotError: the job was refused, or failed, or the service stayed out of reach.
            TypeError, ValueError: see make_request.
        """
        request = make_request(prompt, messages=messages, token_ids=token_ids, **options)
        return self._follow(JobStream(request, retries=self._settings.retries))

    def complete(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Turn] | None = None,
        token_ids: Sequence[int] | None = None,
        **options: Unpack[Options],
    ) -> Result:
        """Submits a job and returns its answer once it has finished.

        Raises:
            KvpilotError: as :meth:`generate`; ``error.result`` holds what had come before.
        """
        result = Result()
        try:
            for event in self.generate(prompt, messages=messages, token_ids=token_ids, **options):
                result.add(event.message)
        except KvpilotError as error:
            error.result = result
            raise
        return result

    def replay(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        at_tokens: Sequence[int],
        pipelines: Sequence[str],
        **options: Unpack[ReplayOptions],
    ) -> Iterator[generation_pb2.Replayed]:
        """Measures what pipelines would do to a text whose continuation is known; yields P results for P places.

        At each place the next-token distributions over the ``horizon_tokens`` tokens of the text that follow, under
        each pipeline, are compared with those under the full cache. Nothing is generated. Survives lost connections
        like :meth:`generate`; a place is never given twice.

        Args:
            prompt: the text; or
            token_ids: its tokens [T], used as they are.
            at_tokens: [P] tokens before each place; rising, at least 64, at most T - ``horizon_tokens``.
            pipelines: [C] in text form, at most 64; each result has C entries, in this order.
            **options: ``horizon_tokens`` (1 to 256, default 32); ``measured_under`` ([P] pipelines in force while the
                signals before each place are measured, default ``full``); ``model``; ``idempotency_key`` (the same
                call again attaches to the first job).

        Raises:
            KvpilotError: as :meth:`generate`; ``Cancelled`` where somebody cancelled the job.
            TypeError, ValueError: see make_replay_request.

        >>> with Client("localhost:7450") as client:  # doctest: +SKIP
        ...     for place in client.replay(text, at_tokens=[512], pipelines=["full", "kivi(bits=4)"]):
        ...         print(place.at_token, [measured.divergence for measured in place.pipelines])  # nats per token
        """
        request = make_replay_request(prompt, token_ids=token_ids, at_tokens=at_tokens, pipelines=pipelines, **options)
        for event in self._follow(JobStream(request, retries=self._settings.retries)):
            if (place := replayed_of(event)) is not None:
                yield place

    def resume(self, job_id: str, offset: int = 0) -> Iterator[Event]:
        """Yields a job's events from ``offset`` on: the last offset seen plus 1, or 0 for all.

        Raises:
            KvpilotError: NotFound, OutOfRange, or as :meth:`generate`.
        """
        return self._follow(JobStream(job_id=job_id, offset=offset, retries=self._settings.retries))

    def get(self, job_id: str) -> JobView:
        """Returns a job as it is now.

        Raises:
            KvpilotError: NotFound, or the service stayed out of reach.
        """
        return _view(self._call("Get", generation_pb2.GetRequest(job_id=job_id)))

    def cancel(self, job_id: str) -> JobState:
        """Asks for a job to stop; returns its state when the call was made.

        Raises:
            KvpilotError: NotFound, or the service stayed out of reach.
        """
        return JobState.of(self._call("Cancel", generation_pb2.CancelRequest(job_id=job_id)).state)

    def models(self) -> list[generation_pb2.Model]:
        """Returns the models that live workers serve, with their limits and stages.

        Raises:
            KvpilotError: the service stayed out of reach.
        """
        return list(self._call("ListModels", generation_pb2.ListModelsRequest()).models)

    def _call(self, method: str, request: Any) -> Any:
        retries = Retries(self._settings.retries)
        while True:
            try:
                return getattr(self._stub, method)(
                    request, timeout=self._settings.timeout_s, metadata=self._settings.metadata
                )
            except grpc.RpcError as error:
                time.sleep(retries.delay_s(error_of_rpc(error)))

    def _follow(self, stream: JobStream) -> Iterator[Event]:
        with stream.traced(self._target):
            while not stream.finished:
                try:
                    yield from self._events(stream, stream.call())
                    if not stream.finished:
                        time.sleep(stream.broken())
                except grpc.RpcError as error:
                    time.sleep(stream.broken(error))
            stream.close()

    def _events(self, stream: JobStream, call: Call) -> Iterator[Event]:
        method, request = call
        responses = getattr(self._stub, method)(request, metadata=self._settings.metadata + stream.metadata)
        try:
            for response in responses:
                yield stream.take(response.event)
        except grpc.RpcError:  # how the call of a finished job ends says nothing new
            if not stream.finished:
                raise
        finally:
            responses.cancel()


class AsyncClient:
    """Calls GenerationService from an event loop; method by method like :class:`Client`.

    >>> async with AsyncClient("localhost:7450") as client:  # doctest: +SKIP
    ...     async for event in client.generate("Hello", max_tokens=32):
    ...         print(event.text, end="")
    """

    def __init__(self, target: str, settings: Settings | None = None) -> None:
        self._target = target
        self._settings = settings = settings or Settings()
        if settings.credentials is None:
            self._channel = grpc.aio.insecure_channel(target, CHANNEL_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(target, settings.credentials, CHANNEL_OPTIONS)
        self._stub: Any = generation_pb2_grpc.GenerationServiceStub(self._channel)  # type: ignore[no-untyped-call]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connection; jobs go on."""
        await self._channel.close()

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Turn] | None = None,
        token_ids: Sequence[int] | None = None,
        **options: Unpack[Options],
    ) -> AsyncGenerator[Event, None]:
        """See :meth:`Client.generate`."""
        request = make_request(prompt, messages=messages, token_ids=token_ids, **options)
        return self._follow(JobStream(request, retries=self._settings.retries))

    async def complete(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Turn] | None = None,
        token_ids: Sequence[int] | None = None,
        **options: Unpack[Options],
    ) -> Result:
        """See :meth:`Client.complete`."""
        result = Result()
        try:
            events = self.generate(prompt, messages=messages, token_ids=token_ids, **options)
            async with contextlib.aclosing(events):
                async for event in events:
                    result.add(event.message)
        except KvpilotError as error:
            error.result = result
            raise
        return result

    async def replay(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        at_tokens: Sequence[int],
        pipelines: Sequence[str],
        **options: Unpack[ReplayOptions],
    ) -> AsyncGenerator[generation_pb2.Replayed, None]:
        """See :meth:`Client.replay`."""
        request = make_replay_request(prompt, token_ids=token_ids, at_tokens=at_tokens, pipelines=pipelines, **options)
        events = self._follow(JobStream(request, retries=self._settings.retries))
        async with contextlib.aclosing(events):
            async for event in events:
                if (place := replayed_of(event)) is not None:
                    yield place

    def resume(self, job_id: str, offset: int = 0) -> AsyncGenerator[Event, None]:
        """See :meth:`Client.resume`."""
        return self._follow(JobStream(job_id=job_id, offset=offset, retries=self._settings.retries))

    async def get(self, job_id: str) -> JobView:
        """See :meth:`Client.get`."""
        return _view(await self._call("Get", generation_pb2.GetRequest(job_id=job_id)))

    async def cancel(self, job_id: str) -> JobState:
        """See :meth:`Client.cancel`."""
        return JobState.of((await self._call("Cancel", generation_pb2.CancelRequest(job_id=job_id))).state)

    async def models(self) -> list[generation_pb2.Model]:
        """See :meth:`Client.models`."""
        return list((await self._call("ListModels", generation_pb2.ListModelsRequest())).models)

    async def _call(self, method: str, request: Any) -> Any:
        retries = Retries(self._settings.retries)
        while True:
            try:
                return await getattr(self._stub, method)(
                    request, timeout=self._settings.timeout_s, metadata=self._settings.metadata
                )
            except grpc.RpcError as error:
                await asyncio.sleep(retries.delay_s(error_of_rpc(error)))

    async def _follow(self, stream: JobStream) -> AsyncGenerator[Event, None]:
        with stream.traced(self._target):
            while not stream.finished:
                try:
                    async with contextlib.aclosing(self._events(stream, stream.call())) as events:
                        async for event in events:
                            yield event
                    if not stream.finished:
                        await asyncio.sleep(stream.broken())
                except grpc.RpcError as error:
                    await asyncio.sleep(stream.broken(error))
            stream.close()

    async def _events(self, stream: JobStream, call: Call) -> AsyncGenerator[Event, None]:
        method, request = call
        responses = getattr(self._stub, method)(request, metadata=self._settings.metadata + stream.metadata)
        try:
            async for response in responses:
                yield stream.take(response.event)
        except grpc.RpcError:  # how the call of a finished job ends says nothing new
            if not stream.finished:
                raise
        finally:
            responses.cancel()
