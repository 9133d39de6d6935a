"""A front door on loopback over a real job store, for tests."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc

from controller.generation import GenerationService, Limits
from kvpilot.bus import Bus
from kvpilot.v1 import generation_pb2, generation_pb2_grpc
from tests.jobs_help import FAST_BUS, connected, make_card

NO_CACHE = Limits(refresh_s=0.0)


class FrontDoor:
    """A running front door: its address, its service, its job store and a stub that calls it."""

    def __init__(self, bus: Bus, limits: Limits, port: int = 0) -> None:
        self.bus = bus
        self.service = GenerationService(bus, limits)
        self.server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        self.service.add_to(self.server)
        self.port = self.server.add_insecure_port(f"127.0.0.1:{port}")
        self.target = f"127.0.0.1:{self.port}"
        self.channel = grpc.aio.insecure_channel(self.target)
        self.stub: Any = generation_pb2_grpc.GenerationServiceStub(self.channel)

    async def generate(self, request: generation_pb2.GenerateRequest) -> list[generation_pb2.GenerationEvent]:
        """All events of a job."""
        return [response.event async for response in self.stub.Generate(request, timeout=20)]

    async def accept(self, request: generation_pb2.GenerateRequest) -> str:
        """Submits a job and leaves; returns its id."""
        call = self.stub.Generate(request, timeout=20)
        first = await call.read()
        call.cancel()
        return str(first.event.accepted.job_id)


async def rest_of(call: Any) -> list[generation_pb2.GenerationEvent]:
    """The events of a stream from the next one on."""
    events = []
    while (response := await call.read()) is not grpc.aio.EOF:
        events.append(response.event)
    return events


@contextlib.asynccontextmanager
async def front_door(
    redis_url: str, limits: Limits = NO_CACHE, port: int = 0, worker: str = "card"
) -> AsyncIterator[FrontDoor]:
    """Serves a front door; ``worker`` is the name of a card put into the store, empty for none."""
    async with connected(redis_url, FAST_BUS) as bus:
        if worker:
            await bus.heartbeat(make_card(worker), [])
        door = FrontDoor(bus, limits, port)
        await door.server.start()
        try:
            yield door
        finally:
            await door.channel.close()
            await door.server.stop(0)
