"""What controllers do: keep what operators have ordered, and ask which of the jobs it is about have ended."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from kvpilot.bus import keys
from kvpilot.bus.connection import STATES, Connection, translated_errors
from kvpilot.bus.values import BusError, Orders
from kvpilot.v1 import generation_pb2, job_pb2, operator_pb2


class ControlRoom(Connection):
    """The controller's part of the bus."""

    async def orders(self) -> Orders:
        """Returns the mode and the overrides that are kept.

        Raises:
            BusError: an entry cannot be read; names it.
            BusUnavailableError: Redis is out of reach.
        """
        with translated_errors():
            async with self._client.pipeline(transaction=True) as pipeline:
                pipeline.get(keys.MODE)
                pipeline.hgetall(keys.OVERRIDES)
                mode, overrides = await pipeline.execute()
        return Orders(
            mode=_read_mode(mode) if mode is not None else None,
            overrides={name.decode(): _read_override(name.decode(), value) for name, value in overrides.items()},
        )

    async def keep_orders(
        self, mode: operator_pb2.Mode | None, overrides: Mapping[str, job_pb2.Override | None]
    ) -> None:
        """Writes a mode, unless it is None, and overrides by job id, None to remove one; all or nothing.

        May be repeated after a lost answer.

        Raises:
            BusUnavailableError: Redis is out of reach.
        """
        kept = {job_id: value.SerializeToString() for job_id, value in overrides.items() if value is not None}
        removed = [job_id for job_id, value in overrides.items() if value is None]
        with translated_errors():
            async with self._client.pipeline(transaction=True) as pipeline:
                if mode is not None:
                    pipeline.set(keys.MODE, operator_pb2.Mode.Name(mode))
                if kept:
                    pipeline.hset(keys.OVERRIDES, mapping=kept)
                if removed:
                    pipeline.hdel(keys.OVERRIDES, *removed)
                await pipeline.execute()

    async def overridden(self) -> set[str]:
        """Returns the ids of the jobs whose overrides are kept.

        Raises:
            BusUnavailableError: Redis is out of reach.
        """
        with translated_errors():
            return {name.decode() for name in await self._client.hkeys(keys.OVERRIDES)}

    async def ended(self, job_ids: Collection[str]) -> set[str]:
        """Returns those of the jobs that have finished, or that the store does not know (any more).

        Raises:
            BusUnavailableError: Redis is out of reach.
        """
        names = list(job_ids)
        with translated_errors():
            async with self._client.pipeline(transaction=False) as pipeline:
                for name in names:
                    pipeline.hget(keys.job(name), "state")
                states = await pipeline.execute()
        finished = generation_pb2.JOB_STATE_FINISHED
        return {name for name, state in zip(names, states, strict=True) if state is None or STATES[state] == finished}


def _read_mode(value: bytes) -> operator_pb2.Mode:
    try:
        mode: operator_pb2.Mode = operator_pb2.Mode.Value(value.decode())
        return mode
    except ValueError:
        raise BusError(f"{keys.MODE} holds {value!r}: expected one of {', '.join(operator_pb2.Mode.keys())}") from None


def _read_override(job_id: str, value: bytes) -> job_pb2.Override:
    try:
        override: job_pb2.Override = job_pb2.Override.FromString(value)
        return override
    except DecodeError as error:
        raise BusError(f"{keys.OVERRIDES} of job {job_id!r} holds no Override: {error}") from None
