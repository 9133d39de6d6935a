"""A service that answers replays with numbers made up by rule, for tests of what asks for them."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc

from kvpilot.v1 import generation_pb2, generation_pb2_grpc
from models.features import NAMES, SCHEMA_HASH
from tests.engines import MODEL, model

CANDIDATES = ("full", "snapkv(keep=0.5)", "kivi(bits=4, shadow=true)", "host")


def divergence(at_token: int, pipeline: str) -> float:
    """The made-up result; ``full`` has none."""
    return 0.0 if pipeline == "full" else zlib.crc32(f"{at_token}/{pipeline}".encode()) % 1000 / 1000


def replayed(at_token: int, pipelines: list[str], under: str) -> generation_pb2.Replayed:
    """The made-up measurement of a place."""
    place = generation_pb2.Replayed(at_token=at_token, feature_schema_hash=SCHEMA_HASH, measured_under=under)
    for number, pipeline in enumerate(pipelines):
        entry = place.pipelines.add(
            pipeline=pipeline,
            features=[at_token + number + index / 64 for index in range(len(NAMES))],
            divergence=divergence(at_token, pipeline),
            divergence_max=2 * divergence(at_token, pipeline),
            top1_agreement=0.5,
            conversion_ms=3.0,
            step_ms=20.0,
            loss=2.5,
            full_loss=2.0,
        )
        entry.cache.device_bytes = 1000 - number
        entry.cache.full_cache_bytes = 1000
    return place


Step = Callable[[generation_pb2.GenerateRequest, int], None]
"""Called before the event of each place with its number; may wait, or raise what the job fails with."""


@dataclass
class Measurer(generation_pb2_grpc.GenerationServiceServicer):
    """The service.

    Attributes:
        step: see ``Step``.
        jobs: requests by idempotency key.
        calls: keys of all Generate calls.
    """

    step: Step = lambda request, number: None
    jobs: dict[str, generation_pb2.GenerateRequest] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    described: generation_pb2.Model = field(default_factory=model)
    most_at_once: int = 0
    _running: int = 0
    _lock: Any = field(default_factory=threading.Lock)

    def ListModels(self, request: Any, context: grpc.ServicerContext) -> generation_pb2.ListModelsResponse:  # noqa: N802
        self.described.workers = 1
        return generation_pb2.ListModelsResponse(models=[self.described])

    def Generate(self, request: Any, context: Any) -> Iterator[generation_pb2.GenerateResponse]:  # noqa: N802
        with self._lock:
            self.calls.append(request.idempotency_key)
            known = self.jobs.setdefault(request.idempotency_key, request)
            self._running += 1
            self.most_at_once = max(self.most_at_once, self._running)
        try:
            assert known == request
            for event in self._events(request, context):
                yield generation_pb2.GenerateResponse(event=event)
        finally:
            with self._lock:
                self._running -= 1

    def Resume(self, request: Any, context: Any) -> Iterator[generation_pb2.ResumeResponse]:  # noqa: N802
        for event in self._events(self.jobs[request.job_id], context):
            if event.offset >= request.offset:
                yield generation_pb2.ResumeResponse(event=event)

    def _events(self, request: Any, context: Any) -> Iterator[generation_pb2.GenerationEvent]:
        yield generation_pb2.GenerationEvent(offset=0, accepted=generation_pb2.Accepted(job_id=request.idempotency_key))
        replay = request.replay
        under = list(replay.measured_under) or ["full"] * len(replay.at_tokens)
        for number, place in enumerate(replay.at_tokens):
            try:
                self.step(request, number)
            except RefusalError as error:
                context.abort(error.code, str(error))
            except CancelledJobError:
                finished = generation_pb2.Finished(reason=generation_pb2.FINISH_REASON_CANCELLED)
                yield generation_pb2.GenerationEvent(offset=number + 1, finished=finished)
                return
            measured = replayed(place, list(replay.pipelines), under[number])
            yield generation_pb2.GenerationEvent(offset=number + 1, replayed=measured)
        finished = generation_pb2.Finished(reason=generation_pb2.FINISH_REASON_LENGTH)
        yield generation_pb2.GenerationEvent(offset=len(replay.at_tokens) + 1, finished=finished)


class RefusalError(Exception):
    """The call ends with this status."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class CancelledJobError(Exception):
    """Somebody has cancelled the job."""


@dataclass
class Served:
    """A running service and its address."""

    measurer: Measurer
    target: str
    server: grpc.Server


def serve(measurer: Measurer) -> Served:
    """Serves on a free loopback port."""
    server = grpc.server(ThreadPoolExecutor(8))
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(measurer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    return Served(measurer, f"127.0.0.1:{port}", server)


__all__ = ["CANDIDATES", "MODEL", "CancelledJobError", "Measurer", "RefusalError", "Served", "divergence", "serve"]
