"""A cluster of real processes on one machine: a job store, any number of controllers, any number of workers."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cli.child import Child
from kvpilot.process import read_ready_file
from kvpilot.v1 import operator_pb2, operator_pb2_grpc
from tests.conftest import free_port
from tests.e2e.serving import DEVICE_BYTES, HOST_BYTES, READY_S, TIMEOUT_S
from workers.process import HEALTH_SERVICE

BALANCE_S = 0.5


class Cluster:
    """Processes by name. Controllers have their addresses before they start: workers know them all."""

    def __init__(self, redis_url: str, model: Path, folder: Path, controllers: tuple[str, ...]) -> None:
        self.children: dict[str, Child] = {}
        self.addresses = {name: f"127.0.0.1:{free_port()}" for name in controllers}
        self._redis_url = redis_url
        self._model = model
        self._folder = folder

    @property
    def endpoint(self) -> str:
        """All front doors, as a client in a cluster finds them by one name."""
        return f"ipv4:{','.join(self.addresses.values())}"

    async def start_controller(self, name: str) -> None:
        await self._start("controller", name, {"listen": self.addresses[name], "planner": "rule"})

    async def start_worker(self, name: str, **settings: Any) -> None:
        """Starts a worker and waits until it is ready."""
        defaults = {
            "model": self._model,
            "model_name": "tiny",
            "controllers": ",".join(self.addresses.values()),
            "device_budget_bytes": 4 * DEVICE_BYTES,
            "host_budget_bytes": 4 * HOST_BYTES,
            "disk_budget_bytes": 0,
            "threads": 1,
            "lease_s": 3,
            "balance_s": BALANCE_S,
        }
        await self._start("worker", name, defaults | settings)

    async def _start(self, kind: str, name: str, settings: dict[str, Any]) -> None:
        ready = self._folder / f"{name}.ready"
        common = {"name": name, "redis_url": self._redis_url, "ready_file": ready}
        environment = {
            f"KVPILOT_{kind.upper()}_{key.upper()}": str(value) for key, value in (common | settings).items()
        }
        module = "controller" if kind == "controller" else "workers"
        command = (sys.executable, "-P", "-m", module)
        child = self.children[name] = Child(name, command, self._folder / f"{name}.log", environment, ready)
        await child.start()
        await child.ready(READY_S)

    def signal(self, name: str, number: signal.Signals) -> None:
        pid = self.children[name].pid
        assert pid is not None
        os.kill(pid, number)

    async def ended(self, name: str) -> int:
        """Waits for a process' end; its exit code."""
        async with asyncio.timeout(TIMEOUT_S):
            return await self.children[name].wait()

    async def stop(self) -> None:
        for child in self.children.values():
            if child.pid is not None:
                await child.stop(0)  # what is left is of no interest

    async def ready(self, name: str) -> bool:
        """What a readiness probe of a worker hears; a process that is gone is not ready."""
        told = read_ready_file(self._folder / f"{name}.ready")
        assert told is not None
        async with grpc.aio.insecure_channel(told.address) as channel:
            check = health_pb2.HealthCheckRequest(service=HEALTH_SERVICE)
            try:
                answer = await health_pb2_grpc.HealthStub(channel).Check(check)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def attached(self, controller: str) -> set[str]:
        """Names of a controller's workers; none if it does not answer."""
        options = (("grpc.use_local_subchannel_pool", 1),)
        async with grpc.aio.insecure_channel(self.addresses[controller], options) as channel:
            stub: Any = operator_pb2_grpc.OperatorServiceStub(channel)
            request = operator_pb2.ListWorkersRequest(only_here=True)
            try:
                listed = await stub.ListWorkers(request, timeout=TIMEOUT_S)
            except grpc.aio.AioRpcError:
                return set()
        return {worker.hello.worker for worker in listed.workers}

    async def until_attached(self, holds: Callable[[dict[str, set[str]]], bool], timeout_s: float = TIMEOUT_S) -> float:
        """Waits until what the controllers' workers are satisfies a condition; seconds that took."""
        begun = time.monotonic()
        async with asyncio.timeout(timeout_s):
            while not holds({name: await self.attached(name) for name in self.addresses}):
                await asyncio.sleep(0.02)
        return time.monotonic() - begun


@asynccontextmanager
async def cluster(
    redis_url: str, model: Path, folder: Path, controllers: tuple[str, ...], workers: tuple[str, ...], **settings: Any
) -> AsyncIterator[Cluster]:
    """A cluster whose processes are ready."""
    made = Cluster(redis_url, model, folder, controllers)
    try:
        await asyncio.gather(*(made.start_controller(name) for name in controllers))
        await asyncio.gather(*(made.start_worker(name, **settings) for name in workers))
        yield made
    finally:
        await made.stop()
