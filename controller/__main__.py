"""``python -m controller``: one controller process until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

import structlog
from pydantic import ValidationError

from controller.server import ControllerServer
from controller.settings import ControllerSettings, PlannerKind, Role
from kvpilot.bus import Bus, BusError
from kvpilot.log import configure_logging
from kvpilot.process import connect_bus, stop_on_signals
from kvpilot.tracing import configure_tracing

if TYPE_CHECKING:
    from controller.source import RegistrySource


async def serve(settings: ControllerSettings) -> None:
    """Serves until the process is asked to stop.

    A process with the generation role alone, which is nothing without it, waits for the job store before. Others steer
    without it, take up what it keeps for them when it comes, and answer generation calls with UNAVAILABLE meanwhile.

    Raises:
        BusError: the job store refuses us.
        RuntimeError: the address cannot be bound.
    """
    with stop_on_signals() as asked:
        bus: Bus | None = None
        if settings.roles == {Role.GENERATION}:
            bus = await connect_bus(settings.redis_url, asked)
            if bus is None:
                return
        elif settings.redis_url:
            bus = Bus.open(settings.redis_url)
        source = make_source(settings, bus)
        server = ControllerServer(settings, bus, bundles=source, calibrator=source)
        try:
            await server.start()
            await asked.wait()
        finally:
            await server.stop()
            if bus is not None:
                await bus.close()


def make_source(settings: ControllerSettings, bus: Bus | None) -> RegistrySource | None:
    """Where this process has its bundles from; None for one that needs none.

    Raises:
        ValueError: the store of the settings cannot be used.
    """
    if Role.STEERING not in settings.roles or settings.planner is PlannerKind.RULE:
        return None
    from controller.source import RegistrySource  # with scikit-learn, which takes a second
    from models.registry import Registry, RegistryError

    try:
        return RegistrySource(Registry(settings.bundle_store or None), bus)
    except RegistryError as error:
        raise ValueError(f"bundle_store: {error}") from error


def main() -> int:
    """Reads settings and serves; returns the exit code."""
    try:
        settings = ControllerSettings.from_command_line(sys.argv[1:], "python -m controller")
    except (ValidationError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    configure_logging(settings.log_level, settings.log_format, process=settings.name)
    end_tracing = configure_tracing("kvpilot-controller", settings.name)
    try:
        asyncio.run(serve(settings))
    except (BusError, OSError, RuntimeError, ValueError) as error:
        structlog.get_logger().error("cannot serve", error=str(error), address=settings.listen)
        return 1
    finally:
        end_tracing()
    return 0


if __name__ == "__main__":
    sys.exit(main())
