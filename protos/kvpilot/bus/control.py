"""What controllers do: find each other, keep what operators have ordered, and ask which of its jobs have ended."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Collection, Mapping

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from kvpilot.bus import keys
from kvpilot.bus.connection import STATES, Connection, milliseconds, translated_errors
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
                pipeline.publish(keys.ORDERS_CHANGED, "")
                await pipeline.execute()

    async def order_changes(self) -> AsyncIterator[None]:
        """Yields whenever orders may have changed. Messages get lost: read them now and then all the same.

        Ends with an exception when the connection does; call it again then.

        Raises:
            BusUnavailableError: Redis is out of reach.
        """
        async with contextlib.aclosing(self._messages(keys.ORDERS_CHANGED)) as messages:
            async for _ in messages:
                yield

    async def show_controller(self, card: job_pb2.ControllerCard, life_s: float) -> None:
        """Publishes a controller for ``life_s``; call it again before that is over.

        Raises:
            BusUnavailableError: Redis is out of reach.
        """
        with translated_errors():
            async with self._client.pipeline(transaction=True) as pipeline:
                pipeline.sadd(keys.CONTROLLERS, card.name)
                pipeline.set(keys.controller(card.name), card.SerializeToString(), px=milliseconds(life_s))
                await pipeline.execute()

    async def withdraw_controller(self, name: str) -> None:
        """Takes a controller that stops off the list.

        Raises:
            BusUnavailableError: Redis is out of reach; it leaves the list by itself.
        """
        with translated_errors():
            async with self._client.pipeline(transaction=True) as pipeline:
                pipeline.srem(keys.CONTROLLERS, name)
                pipeline.delete(keys.controller(name))
                await pipeline.execute()

    async def controllers(self) -> list[job_pb2.ControllerCard]:
        """Returns the cards of controllers that are there, by name.

        Raises:
            BusUnavailableError: Redis is out of reach.
        """
        with translated_errors():
            names = sorted(name.decode() for name in await self._client.smembers(keys.CONTROLLERS))
            cards = await self._client.mget([keys.controller(name) for name in names]) if names else []
            gone = [name for name, card in zip(names, cards, strict=True) if card is None]
            if gone:
                await self._client.srem(keys.CONTROLLERS, *gone)  # one that is back adds itself again
        return [job_pb2.ControllerCard.FromString(card) for card in cards if card is not None]

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
