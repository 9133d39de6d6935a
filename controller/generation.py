"""The front door: moves jobs and their events between clients and the job store. It keeps nothing of its own."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import grpc
import structlog
from opentelemetry import trace

from controller.recording import DoorRecorder
from controller.refusals import RefusedError, bad_fields, refusal, refusing_call, refusing_stream
from controller.served import ModelDirectory
from controller.validation import Violations, check_generate, check_job_id, expand_recipes
from controller.wire import add_service
from kvpilot.bus import Bus, QueueFullError
from kvpilot.bus.front import digest_of, new_job_id
from kvpilot.result import Result
from kvpilot.tracing import request_attributes, traceparent_of, tracer
from kvpilot.v1 import generation_pb2, generation_pb2_grpc, job_pb2

log = structlog.get_logger(__name__)

SEED_BITS = 53
"""Seeds are drawn so that JSON numbers hold them."""


@dataclass(frozen=True)
class Limits:
    """What a front door accepts.

    Attributes:
        max_queued: jobs of one model that may wait for a worker; beyond that new ones are refused.
        queue_retry_ms: when a client refused by a full queue is told to come back.
        refresh_s: how old its knowledge of models and workers may be.
    """

    max_queued: int = 1024
    queue_retry_ms: int = 2000
    refresh_s: float = 1.0


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Serves GenerationService. Add it to a server with :meth:`add_to`, which also refuses unreadable requests."""

    def __init__(self, bus: Bus, limits: Limits | None = None, recorder: DoorRecorder | None = None) -> None:
        self._recorder = recorder or DoorRecorder()
        self.limits = limits or Limits()
        self._bus = bus
        self._directory = ModelDirectory(bus, self.limits.refresh_s)
        self._streams: set[asyncio.Task[Any]] = set()
        self._draining = False

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serves the methods on ``server``."""
        add_service(self, generation_pb2.DESCRIPTOR.services_by_name["GenerationService"], server)

    def drain(self) -> None:
        """Ends the open streams with UNAVAILABLE, and later ones at once: clients resume at another front door."""
        self._draining = True
        for task in self._streams:
            task.cancel()

    @refusing_stream
    async def Generate(  # noqa: N802
        self, request: generation_pb2.GenerateRequest, context: Any
    ) -> AsyncGenerator[generation_pb2.GenerateResponse, None]:
        """See generation.proto."""
        called_s = time.monotonic()
        model = check_generate(request, await self._directory.models())
        job_id, created = await self._submit(request, model)
        log.info("job accepted" if created else "job attached", request=job_id, model=model.name)
        self._recorder.accepted(model.name, created)
        begun = False
        async with contextlib.aclosing(self._events(job_id, 0)) as events:
            async for event in events:
                if created and not begun and event.tokens.tokens:
                    self._recorder.began(model.name, called_s)
                begun = begun or bool(event.tokens.tokens) or event.HasField("replayed")
                failed = event.finished.reason == generation_pb2.FINISH_REASON_FAILED
                if not failed or begun:
                    yield generation_pb2.GenerateResponse(event=event)
                if failed:
                    raise RefusedError(event.finished.problem)

    @refusing_stream
    async def Resume(  # noqa: N802
        self, request: generation_pb2.ResumeRequest, context: Any
    ) -> AsyncGenerator[generation_pb2.ResumeResponse, None]:
        """See generation.proto."""
        bad = Violations()
        check_job_id(request.job_id, bad)
        if request.offset < 0:
            bad.add("offset", request.offset, "0 or more: the last offset seen, plus 1")
        if bad:
            raise bad_fields(bad)
        async with contextlib.aclosing(self._events(request.job_id, request.offset)) as events:
            async for event in events:
                yield generation_pb2.ResumeResponse(event=event)

    @refusing_call
    async def Get(self, request: generation_pb2.GetRequest, context: Any) -> generation_pb2.GetResponse:  # noqa: N802
        """See generation.proto."""
        record = await self._bus.record(_checked_job_id(request.job_id))
        result = Result.of(await self._bus.history(request.job_id))
        response = generation_pb2.GetResponse(
            job_id=request.job_id,
            state=generation_pb2.JOB_STATE_FINISHED if result.finished else record.state,
            text=result.text,
            token_ids=result.token_ids,
            next_offset=result.next_offset,
            finished=result.finished,
        )
        response.create_time.FromDatetime(record.create_time)
        return response

    @refusing_call
    async def Cancel(  # noqa: N802
        self, request: generation_pb2.CancelRequest, context: Any
    ) -> generation_pb2.CancelResponse:
        """See generation.proto."""
        return generation_pb2.CancelResponse(state=await self._bus.cancel(_checked_job_id(request.job_id)))

    @refusing_call
    async def ListModels(  # noqa: N802
        self, request: generation_pb2.ListModelsRequest, context: Any
    ) -> generation_pb2.ListModelsResponse:
        """See generation.proto."""
        models = await self._directory.models(fresh=True)
        return generation_pb2.ListModelsResponse(models=[models.live[name] for name in sorted(models.live)])

    async def _submit(self, request: generation_pb2.GenerateRequest, model: generation_pb2.Model) -> tuple[str, bool]:
        """Stores the job; what a client left open that must not change later is settled here: model, seed and what
        the name of a recipe stands for."""
        digest = digest_of(request) if request.idempotency_key else ""
        job = job_pb2.Job(job_id=new_job_id(), request=request)
        job.request.model = model.name
        expand_recipes(job.request, model)
        if not job.request.sampling.HasField("seed"):
            job.request.sampling.seed = secrets.randbits(SEED_BITS)
        job.create_time.GetCurrentTime()
        call = trace.get_current_span()
        call.set_attributes(request_attributes(job.request))
        job.traceparent = traceparent_of(call)
        try:
            with tracer().start_as_current_span("submit") as span:
                job_id, created = await self._bus.submit(
                    job,
                    idempotency_key=request.idempotency_key,
                    request_digest=digest,
                    max_queued=self.limits.max_queued,
                )
                span.set_attribute("kvpilot.attached", not created)
            call.set_attribute("gen_ai.response.id", job_id)
            return job_id, created
        except QueueFullError as error:
            raise refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED, str(error), retry_after_ms=self.limits.queue_retry_ms
            ) from error

    async def _events(self, job_id: str, offset: int) -> AsyncGenerator[generation_pb2.GenerationEvent, None]:
        """A job's events, until it ends or this front door is drained."""
        going_away = refusal(grpc.StatusCode.UNAVAILABLE, "this front door is going away; resume at another")
        if self._draining:
            raise going_away
        task = asyncio.current_task()
        assert task is not None
        self._streams.add(task)
        try:
            async with contextlib.aclosing(self._bus.events(job_id, offset)) as events:
                with self._recorder.streaming():
                    async for event in events:
                        self._recorder.delivered(event)
                        yield event
        except asyncio.CancelledError:
            if not self._draining:
                raise
            task.uncancel()
            raise going_away from None
        finally:
            self._streams.discard(task)


def _checked_job_id(job_id: str) -> str:
    bad = Violations()
    check_job_id(job_id, bad)
    if bad:
        raise bad_fields(bad)
    return job_id
