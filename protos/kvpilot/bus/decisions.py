"""The log of decisions: what was predicted, done and measured, for training and for audit."""

from __future__ import annotations

from collections.abc import Sequence

from kvpilot.bus import keys
from kvpilot.bus.connection import Connection, translated_errors
from kvpilot.v1 import job_pb2


class DecisionLog(Connection):
    """The part of the bus that controllers append decisions to and training reads."""

    async def log_decisions(self, events: Sequence[job_pb2.DecisionEvent]) -> None:
        """Appends entries, all or none, and drops the oldest beyond about ``settings.decisions``.

        Repeated after a lost answer, entries may be there twice: readers join them by id.

        Raises:
            BusUnavailableError: Redis is out of reach.
        """
        if not events:
            return
        with translated_errors():
            async with self._client.pipeline(transaction=True) as pipeline:
                for event in events:
                    fields = {"event": event.SerializeToString()}
                    pipeline.xadd(keys.DECISIONS, fields, maxlen=self.settings.decisions, approximate=True)
                await pipeline.execute()

    async def decisions(self, after: str = "0-0", count: int = 1000) -> list[tuple[str, job_pb2.DecisionEvent]]:
        """Returns entries after the one named ``after``, oldest first, each with its name.

        Raises:
            BusUnavailableError: Redis is out of reach.
        """
        with translated_errors():
            found = await self._client.xrange(keys.DECISIONS, min=f"({after}", count=count)
        return [(name.decode(), job_pb2.DecisionEvent.FromString(fields[b"event"])) for name, fields in found]

    async def all_decisions(self) -> list[job_pb2.DecisionEvent]:
        """Returns every entry, oldest first.

        Raises:
            BusUnavailableError: Redis is out of reach.
        """
        events: list[job_pb2.DecisionEvent] = []
        after = "0-0"
        while page := await self.decisions(after):
            after = page[-1][0]
            events += [event for _, event in page]
        return events

    async def decisions_before(self, before: str = "+", count: int = 1000) -> list[tuple[str, job_pb2.DecisionEvent]]:
        """Returns entries before the one named ``before``, newest first, each with its name; by default the newest.

        Raises:
            BusUnavailableError: Redis is out of reach.
        """
        newest = before if before == "+" else f"({before}"
        with translated_errors():
            found = await self._client.xrevrange(keys.DECISIONS, max=newest, count=count)
        return [(name.decode(), job_pb2.DecisionEvent.FromString(fields[b"event"])) for name, fields in found]
