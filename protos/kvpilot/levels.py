"""Has a process log as operators order while it runs.

Orders lie in the job store, which is what all processes share: so one call reaches front doors and the workers of
other controllers too, and holds for those that are started later. A process looks every other second; while the store
is away, what was ordered last holds, until its time is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import structlog

from kvpilot.bus import Bus, BusError
from kvpilot.bus.levels import is_over
from kvpilot.log import LogLevel, set_level
from kvpilot.v1 import operator_pb2

log = structlog.get_logger(__name__)

POLL_S = 2.0


async def follow_log_levels(bus: Bus, process: str, configured: LogLevel, poll_s: float = POLL_S) -> None:
    """Follows the orders until cancelled.

    Args:
        bus: the job store.
        process: name of this one.
        configured: its level while there is no order.
        poll_s: time between two looks.
    """
    orders: Mapping[str, operator_pb2.LogLevelOrder] = {}
    in_force = configured
    failed = False
    while True:
        try:
            orders, failed = await bus.log_levels(), False
        except Exception as error:  # whatever it is, later orders are to be heard
            if not failed:
                write = log.debug if isinstance(error, BusError) else log.exception
                write("log levels cannot be read", error=str(error))
            failed = True
        wanted = level_for(orders, process) or configured
        if wanted is not in_force:
            set_level(min(wanted, in_force, key=list(LogLevel).index))  # so that the line is seen where either shows it
            log.info("log level", before=in_force.value, now=wanted.value)
            in_force = wanted
            set_level(in_force)
        await asyncio.sleep(poll_s)


def level_for(orders: Mapping[str, operator_pb2.LogLevelOrder], process: str) -> LogLevel | None:
    """The level ordered for a process: by its own name, else for all; None: none is."""
    held = (orders.get(name) for name in (process, ""))
    order = next((order for order in held if order is not None and not is_over(order)), None)
    return log_level(order.level) if order is not None else None


def log_level(level: operator_pb2.LogLevel) -> LogLevel | None:
    """The API's level as this process knows it; None for a level that a newer version has, and for ``configured``."""
    word = str(operator_pb2.LogLevel.Name(level)) if level in operator_pb2.LogLevel.values() else ""
    word = word.removeprefix("LOG_LEVEL_").lower()
    return LogLevel(word) if word in list(LogLevel) else None
