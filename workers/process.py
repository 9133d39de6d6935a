"""The worker process: engine, job runner, steering client and health service under one event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from kvpilot import metrics
from kvpilot.bus import Bus, BusSettings
from kvpilot.exposition import Instruments
from kvpilot.levels import follow_log_levels
from kvpilot.metrics import Part
from kvpilot.process import Ready, cancelled, connect_bus, split_address, stop_on_signals, write_ready_file
from kvpilot.tracing import is_exporting
from kvpilot.v1 import policy_pb2
from kvpilot.vitals import show_vitals
from workers.engine.api import EngineApi
from workers.jobs import JobObserver, JobRunner, JobSettings
from workers.recording import Recorder
from workers.settings import WorkerSettings
from workers.steering import SteeringClient, SteeringSettings
from workers.tracing import JobTracer

log = structlog.get_logger(__name__)

HEALTH_SERVICE = "kvpilot.v1.Worker"
"""Name for readiness in the health service; ``""`` is liveness."""


class EngineDiedError(Exception):
    """The step loop ended by an exception, which is this one's cause. The process must exit."""


def build_engine(settings: WorkerSettings) -> EngineApi:
    """The real engine; loads the model, which takes seconds."""
    from workers.engine.engine import Engine  # torch and the model code: only when a model is really loaded

    return Engine(settings)


async def run_worker(
    settings: WorkerSettings, make_engine: Callable[[WorkerSettings], EngineApi] = build_engine
) -> None:
    """Runs a worker until SIGTERM or SIGINT, lets its jobs finish, and hands back what takes too long.

    From the signal on it takes no jobs and is not ready; a second one ends the wait for its jobs.

    Raises:
        EngineDiedError: the step loop failed.
        Exception: the model cannot be loaded, the job store refuses us, or the job runner failed.
    """
    instruments = Instruments(Part.WORKER, Part.PROCESS)
    show_vitals(instruments, "worker", settings.name)
    hurry = asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        asked = stack.enter_context(stop_on_signals(hurry))
        metrics_address = await stack.enter_async_context(instruments.serving(settings.metrics_listen))
        health_service = health.aio.HealthServicer()
        await health_service.set(HEALTH_SERVICE, health_pb2.HealthCheckResponse.NOT_SERVING)
        server, address = await _serve_health(settings.health_listen, health_service)
        ready = Ready(address, metrics_address)
        bus: Bus | None = None
        try:
            bus = await connect_bus(settings.redis_url, asked, BusSettings(lease_s=settings.lease_s))
            if bus is None:
                return
            levels = asyncio.create_task(follow_log_levels(bus, settings.name, settings.log_level), name="log levels")
            stack.push_async_callback(cancelled, levels)
            log.info("loading the model", model=str(settings.model))
            engine = await asyncio.to_thread(make_engine, settings)
            try:
                await _work(settings, bus, engine, asked, hurry, health_service, ready, instruments)
            finally:
                await health_service.enter_graceful_shutdown()
                await asyncio.to_thread(engine.stop, settings.stop_timeout_s)
        finally:
            if bus is not None:
                await bus.close()
            await server.stop(0)


async def _work(
    settings: WorkerSettings,
    bus: Bus,
    engine: EngineApi,
    asked: asyncio.Event,
    hurry: asyncio.Event,
    health_service: health.aio.HealthServicer,
    ready: Ready,
    instruments: Instruments,
) -> None:
    """Serves jobs with a started engine until asked to stop or something fails."""
    loop = asyncio.get_running_loop()
    hello = engine.hello()
    recorder = Recorder(instruments, hello, settings.audit_budget)
    observers: list[JobObserver] = [recorder]
    if is_exporting():
        observers.append(JobTracer(settings.name))
    runner = JobRunner(bus, engine, settings.name, JobSettings(heartbeat_s=settings.lease_s / 5), observers)
    client: SteeringClient | None = None
    if settings.controllers:
        client = SteeringClient(
            engine,
            settings.controllers,
            SteeringSettings(
                reconnect_min_ms=settings.reconnect_min_ms,
                reconnect_max_ms=settings.reconnect_max_ms,
                connect_timeout_ms=settings.connect_timeout_ms,
                welcome_timeout_ms=settings.welcome_timeout_ms,
                balance_s=settings.balance_s,
            ),
            recorder.answered,
        )
    model = (hello.model.name,)
    instruments.show(metrics.STEERED, lambda: [(model, client is not None and client.attached)])
    instruments.show(metrics.UNDELIVERED_EVENTS, lambda: [(model, runner.undelivered)])
    died: asyncio.Future[None] = loop.create_future()

    def on_report(report: policy_pb2.Report) -> None:
        runner.on_report(report)
        if client is not None:
            client.on_report(report)

    def note_death(error: BaseException) -> None:
        if not died.done():
            died.set_exception(error)

    engine.start(runner.on_events, on_report, lambda error: _hand_over(loop, note_death, error))
    working = asyncio.create_task(runner.run(), name="jobs")
    steering = asyncio.create_task(client.run(), name="steering") if client is not None else None
    stopping = asyncio.create_task(asked.wait(), name="signals")
    await health_service.set(HEALTH_SERVICE, health_pb2.HealthCheckResponse.SERVING)
    if settings.ready_file is not None:
        write_ready_file(settings.ready_file, ready)
    log.info("serving", model=hello.model.name, health=ready.address, metrics=ready.metrics)
    watched: set[asyncio.Future[object]] = {died, working, stopping}  # type: ignore[arg-type]  # Future is invariant
    if steering is not None:
        watched.add(steering)  # type: ignore[arg-type]
    leaving: asyncio.Task[None] | None = None
    try:
        await _until_any(watched, died)
        await health_service.set(HEALTH_SERVICE, health_pb2.HealthCheckResponse.NOT_SERVING)
        log.info("stopping", jobs=len(runner.held_jobs()), drain_timeout_s=settings.drain_timeout_s)
        leaving = asyncio.create_task(runner.stop(settings.drain_timeout_s, hurry), name="leaving")
        await _until_any({died, leaving}, died)  # type: ignore[arg-type]
        if working.done():
            working.result()
    finally:
        tasks = (steering, stopping, working, leaving)
        unfinished = [task for task in tasks if task is not None and not task.done()]
        for other in unfinished:
            other.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)
        died.cancel()


async def _until_any(watched: set[asyncio.Future[object]], died: asyncio.Future[None]) -> None:
    """Waits until one of the tasks is done.

    Raises:
        EngineDiedError: it is that of the engine's death.
        Exception: what the task raised.
    """
    done, _ = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
    if died in done:
        raise EngineDiedError(f"the engine died: {died.exception()!r}") from died.exception()
    for task in done:
        task.result()


def _hand_over(loop: asyncio.AbstractEventLoop, take: Callable[[BaseException], None], error: BaseException) -> None:
    """Calls ``take`` on the loop; from any thread."""
    try:
        loop.call_soon_threadsafe(take, error)
    except RuntimeError:  # the loop is closed: the process is ending anyway
        return


async def _serve_health(listen: str, service: health.aio.HealthServicer) -> tuple[grpc.aio.Server, str]:
    """Serves health alone, in plain text, so that an orchestrator's probes reach it; gives the address.

    Raises:
        RuntimeError: the address cannot be bound.
    """
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    health_pb2_grpc.add_HealthServicer_to_server(service, server)
    host, _ = split_address(listen)
    port = server.add_insecure_port(listen)
    await server.start()
    return server, f"{host}:{port}"
