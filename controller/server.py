"""One controller process: a gRPC server with any of the roles generation, steering and operator."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from controller.bundles import BundleHolder, BundleSource
from controller.choice import Limits as ChoiceLimits
from controller.generation import GenerationService, Limits
from controller.guard import Calibrator, Guard, GuardSettings
from controller.interceptor import CallRecorder
from controller.ladders import Thresholds
from controller.learned import LearnedPlanner
from controller.operator import OperatorService
from controller.peers import Peers, reachable
from controller.planner import Planner
from controller.recording import DoorRecorder, QueueWatch, SteeringRecorder
from controller.rule import RulePlanner
from controller.settings import ControllerSettings, PlannerKind, Role
from controller.steering import SteeringService
from kvpilot.bus import Bus
from kvpilot.exposition import Instruments
from kvpilot.levels import follow_log_levels
from kvpilot.metrics import Part
from kvpilot.process import Ready, cancelled, split_address, write_ready_file
from kvpilot.v1 import generation_pb2, operator_pb2, operator_pb2_grpc, policy_pb2, policy_pb2_grpc
from kvpilot.vitals import show_vitals

log = structlog.get_logger()

KEEPALIVE_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Clients may ping as often as every 5 s (workers do every 10 s); the default of 5 min would answer with GOAWAY.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.so_reuseport", 0),  # a taken port is an error, not a share of its connections
)

SERVICE_NAMES = {
    Role.GENERATION: generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
    Role.STEERING: policy_pb2.DESCRIPTOR.services_by_name["SteeringService"].full_name,
    Role.OPERATOR: operator_pb2.DESCRIPTOR.services_by_name["OperatorService"].full_name,
}
"""Names in reflection and in the health service, which also knows ``""`` for the whole process."""


class ControllerServer:
    """The server of one process.

    Args:
        bus: the job store. The generation role needs it; the steering and operator roles keep overrides and the mode in
            it, and without it forget them when the process ends.
        planner: decides for the steering role; by ``settings.planner`` unless given.
        bundles: where predictors come from; without it there is never an active one.
        calibrator: learns online from what audits measure.

    Raises:
        ValueError: the generation role without a bus, or ``planner = learned`` without bundles.
    """

    def __init__(
        self,
        settings: ControllerSettings,
        bus: Bus | None = None,
        planner: Planner | None = None,
        bundles: BundleSource | None = None,
        calibrator: Calibrator | None = None,
    ) -> None:
        if Role.GENERATION in settings.roles and bus is None:
            raise ValueError("role generation needs the job store")
        self.instruments = _instruments(settings)
        self._bus = bus
        self._open = contextlib.AsyncExitStack()
        self.settings = settings
        self.address = ""
        """``host:port`` once started, with the port that was taken where 0 was asked for."""
        self.metrics_address = ""
        """``host:port`` of the metrics, empty where they are not served."""
        self.steering: SteeringService | None = None
        self.bundles: BundleHolder | None = None
        if Role.STEERING in settings.roles:
            if bundles is not None and settings.planner is not PlannerKind.RULE:
                self.bundles = BundleHolder(bundles, settings.bundle_poll_s)
            planner = planner or make_planner(settings, self.bundles)
            guard = make_guard(settings, calibrator) if self.bundles is not None else None
            recorder = SteeringRecorder(self.instruments)
            self.steering = SteeringService(settings, planner, bus, self.bundles, guard, recorder)
        self.generation: GenerationService | None = None
        if bus is not None and Role.GENERATION in settings.roles:
            limits = Limits(max_queued=settings.max_queued)
            self.generation = GenerationService(bus, limits, DoorRecorder(self.instruments))
        self._peers = Peers(bus if Role.OPERATOR in settings.roles else None, settings.name)
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None

    async def start(self) -> str:
        """Takes up what operators ordered before, as far as the job store gives it, and serves; returns the address.

        Raises:
            RuntimeError: the address cannot be bound.
        """
        host, _ = split_address(self.settings.listen)
        if self._bus is not None and self.generation is not None:
            QueueWatch(self.instruments, self._bus)
        if self._bus is not None:
            following = follow_log_levels(self._bus, self.settings.name, self.settings.log_level)
            self._open.push_async_callback(cancelled, asyncio.create_task(following, name="log levels"))
        metrics_page = self.instruments.serving(self.settings.metrics_listen)
        self.metrics_address = await self._open.enter_async_context(metrics_page)
        self._server = server = grpc.aio.server(
            interceptors=(CallRecorder(self.instruments),),
            options=KEEPALIVE_OPTIONS,
            maximum_concurrent_rpcs=self.settings.max_concurrent_calls,
        )
        self._add_roles(server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = [SERVICE_NAMES[role] for role in Role if role in self.settings.roles]
        reflection.enable_server_reflection((*names, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        port = server.add_insecure_port(self.settings.listen)
        if self.steering is not None:
            if self.bundles is not None:
                await self.bundles.start()
            await self.steering.ledger.start()
            self.steering.start()
        await server.start()
        for name in ("", *names):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self.address = f"{host}:{port}"
        self._peers.start(reachable(self.settings.advertise, self.address))
        if self.settings.ready_file is not None:
            write_ready_file(self.settings.ready_file, Ready(self.address, self.metrics_address))
        mode = self.steering.mode if self.steering is not None else self.settings.mode
        log.info("serving", address=self.address, roles=sorted(self.settings.roles), mode=mode.value)
        return self.address

    def _add_roles(self, server: grpc.aio.Server) -> None:
        if self.generation is not None:
            self.generation.add_to(server)
        if self.steering is not None:
            policy_pb2_grpc.add_SteeringServiceServicer_to_server(self.steering, server)  # type: ignore[no-untyped-call]
            if Role.OPERATOR in self.settings.roles:
                override_s = self.settings.override_timeout_ms / 1e3
                operator = OperatorService(self.steering, self._peers, self.settings.name, override_s, self._bus)
                operator_pb2_grpc.add_OperatorServiceServicer_to_server(operator, server)  # type: ignore[no-untyped-call]

    async def stop(self, grace_s: float | None = None) -> None:
        """Reports NOT_SERVING, ends the open streams, and gives other calls ``grace_s`` to end by themselves."""
        if self._server is not None:
            await self._stop_serving(self._server, self.settings.grace_s if grace_s is None else grace_s)
        self._server = None
        await self._open.aclose()

    async def _stop_serving(self, server: grpc.aio.Server, grace_s: float) -> None:
        await self._health.enter_graceful_shutdown()
        if self.generation is not None:
            self.generation.drain()
        # At once: a job store that hangs keeps the one for many seconds, and the grace period runs meanwhile.
        await asyncio.gather(self._peers.stop(), self._end_calls(server, grace_s))
        if self.steering is not None:
            await self.steering.ledger.stop()  # after the last operator's call
        log.info("stopped", address=self.address)

    async def _end_calls(self, server: grpc.aio.Server, grace_s: float) -> None:
        if self.steering is not None:
            await self.steering.stop()
        if self.bundles is not None:
            await self.bundles.stop()
        await server.stop(grace_s)


def _instruments(settings: ControllerSettings) -> Instruments:
    """The metrics of a process with these roles."""
    parts = {Role.GENERATION: Part.GENERATION, Role.STEERING: Part.STEERING}
    instruments = Instruments(Part.PROCESS, Part.SERVER, *(parts[role] for role in parts if role in settings.roles))
    show_vitals(instruments, "controller", settings.name)
    return instruments


def make_planner(settings: ControllerSettings, bundles: BundleHolder | None) -> Planner:
    """The planner of the settings.

    Raises:
        ValueError: ``planner = learned`` without bundles.
    """
    rule = RulePlanner(Thresholds(dwell_tokens=settings.dwell_tokens))
    if settings.planner is PlannerKind.LEARNED and bundles is None:
        raise ValueError("planner learned needs a source of bundles, and this controller has none")
    if bundles is None or settings.planner is PlannerKind.RULE:
        return rule
    limits = ChoiceLimits(dwell_tokens=settings.dwell_tokens, margin=settings.switch_margin)
    return LearnedPlanner(bundles, limits, rule, insist=settings.planner is PlannerKind.LEARNED)


def make_guard(settings: ControllerSettings, calibrator: Calibrator | None = None) -> Guard:
    """The guard of the settings."""
    return Guard(GuardSettings(settings.guard_error, settings.guard_least_audits), calibrator)
