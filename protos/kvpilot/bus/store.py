"""The job store's client."""

from __future__ import annotations

from kvpilot.bus import keys
from kvpilot.bus.connection import translated_errors
from kvpilot.bus.control import ControlRoom
from kvpilot.bus.decisions import DecisionLog
from kvpilot.bus.front import FrontDoor
from kvpilot.bus.levels import LevelBoard
from kvpilot.bus.pointers import PointerBoard
from kvpilot.bus.queues import QueueBoard
from kvpilot.bus.work import Workshop
from kvpilot.v1 import job_pb2


class Bus(FrontDoor, Workshop, ControlRoom, DecisionLog, PointerBoard, LevelBoard, QueueBoard):
    """Jobs, their events, the workers, outcomes, decisions, operators' orders, bundle pointers, log levels; in Redis.

    One instance serves any number of concurrent calls of one event loop. Calls are tried again for a moment after a
    connection failure and then raise :class:`BusUnavailableError`; none of them does its work twice.
    """

    async def outcomes(self, after: str = "0-0", count: int = 1000) -> list[tuple[str, job_pb2.Outcome]]:
        """Returns outcomes kept after the one named ``after``, oldest first, each with its name.

        Raises:
            BusUnavailableError: Redis is out of reach.
        """
        with translated_errors():
            found = await self._client.xrange(keys.OUTCOMES, min=f"({after}", count=count)
        return [(name.decode(), job_pb2.Outcome.FromString(fields[b"outcome"])) for name, fields in found]
