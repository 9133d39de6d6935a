"""From which level on processes log: what operators ordered, for every process that shares the job store."""

from __future__ import annotations

import time

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from redis.asyncio import Redis

from kvpilot.bus import keys
from kvpilot.bus.connection import Connection, translated_errors
from kvpilot.bus.values import BusError, BusSettings
from kvpilot.v1 import operator_pb2

EVERYBODY = "*"

_REMOVE = """
-- KEYS: the orders; ARGV: per order: process, the order as it was read
for at = 1, #ARGV, 2 do
  if redis.call('HGET', KEYS[1], ARGV[at]) == ARGV[at + 1] then redis.call('HDEL', KEYS[1], ARGV[at]) end
end
"""
"""Removes orders, but none that was set in their place meanwhile."""


class LevelBoard(Connection):
    """The log levels' part of the bus."""

    def __init__(self, client: Redis, settings: BusSettings) -> None:
        super().__init__(client, settings)
        self._remove_levels = self._client.register_script(_REMOVE)

    async def order_log_level(self, order: operator_pb2.LogLevelOrder) -> None:
        """Keeps an order in place of an earlier one for the same process; CONFIGURED removes that. May be repeated.

        Raises:
            BusUnavailableError: Redis is out of reach.
        """
        field = order.process or EVERYBODY
        with translated_errors():
            if order.level == operator_pb2.LOG_LEVEL_CONFIGURED:
                await self._client.hdel(keys.LOG_LEVELS, field)
            else:
                await self._client.hset(keys.LOG_LEVELS, field, order.SerializeToString())

    async def log_levels(self) -> dict[str, operator_pb2.LogLevelOrder]:
        """Returns the orders by process, ``""`` for all others; those whose time is over are removed.

        Raises:
            BusError: the key holds something else.
            BusUnavailableError: Redis is out of reach.
        """
        with translated_errors():
            found = await self._client.hgetall(keys.LOG_LEVELS)
        try:
            orders = {name: operator_pb2.LogLevelOrder.FromString(value) for name, value in found.items()}
        except DecodeError as error:
            raise BusError(f"{keys.LOG_LEVELS} holds no LogLevelOrder: {error}") from None
        over = {name for name, order in orders.items() if is_over(order)}
        if over:
            arguments = [part for name in over for part in (name, found[name])]
            with translated_errors():
                await self._remove_levels(keys=[keys.LOG_LEVELS], args=arguments)
        return {order.process: order for name, order in orders.items() if name not in over}


def is_over(order: operator_pb2.LogLevelOrder) -> bool:
    """Whether an order's time has passed, by this machine's clock."""
    return order.HasField("until") and bool(order.until.ToNanoseconds() <= time.time_ns())
