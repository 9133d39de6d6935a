"""What waits in the job store, as metrics tell it, and the orders of log levels there."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from kvpilot.bus import Bus, BusSettings, Claim, keys
from kvpilot.bus.queues import Waiting
from kvpilot.levels import level_for
from kvpilot.log import LogLevel
from kvpilot.v1 import operator_pb2
from tests.engines import MODEL
from tests.jobs_help import connected, make_card, make_job, next_claims

pytestmark = pytest.mark.anyio
NOTHING = Waiting(0, 0.0)


async def waiting(bus: Bus, priority: str = "normal") -> Waiting:
    [queue] = await bus.queues()
    assert queue.model == MODEL
    return queue.waiting[priority]


async def test_an_empty_store_has_no_queues(bus: Bus) -> None:
    assert await bus.queues() == []


async def test_jobs_wait_until_a_worker_takes_them_and_again_when_it_hands_them_back(bus: Bus) -> None:
    await bus.heartbeat(make_card("w1"), [])
    assert await waiting(bus) == NOTHING
    for number in range(3):
        await bus.submit(make_job(f"prompt {number}"))
    await asyncio.sleep(0.02)  # so that there is an age
    first = await waiting(bus)
    assert first.jobs == 3
    assert 0.02 <= first.oldest_s < 20
    claims = await next_claims(bus, "w1", count=2)
    assert (await waiting(bus)).jobs == 1
    await bus.release(claims)
    again = await waiting(bus)
    assert again.jobs == 3
    assert again.oldest_s > first.oldest_s  # counted from when the job came
    taken: list[object] = []
    while len(taken) < 3:
        taken += await next_claims(bus, "w1")
    assert await waiting(bus) == NOTHING
    [queue] = await bus.queues()
    assert queue.workers == 1
    assert queue.waiting["high"] == queue.waiting["low"] == NOTHING


async def test_jobs_of_a_lost_worker_wait(bus: Bus, redis_url: str) -> None:
    jobs = [make_job("a", session_id="talk"), make_job("b"), make_job("c", session_id="talk")]  # c: in w1's own queue
    async with connected(redis_url, BusSettings()) as steady:  # its leases outlast the test
        for name in ("w1", "w2"):
            await steady.heartbeat(make_card(name), [])
        for job, name in zip(jobs, ("w1", "w2", "w1"), strict=True):
            await steady.submit(job)
            await steady.claim(name, MODEL, 1)
        await asyncio.sleep(0.02)  # so that there is an age
        assert await waiting(bus) == NOTHING
        await bus._client.delete(keys.card("w1"))  # as when it has not renewed it
        lost = await waiting(bus)
        assert lost.jobs == 2
        assert 0.02 <= lost.oldest_s < 20
        await bus._client.delete(keys.card("w2"))
        [queue] = await bus.queues()
        assert (queue.workers, queue.waiting["normal"].jobs) == (0, 3)
        await steady.heartbeat(make_card("w3"), [])
        taken: list[Claim] = []
        while len(taken) < len(jobs):
            taken += await next_claims(bus, "w3")
        assert await waiting(bus) == NOTHING


async def test_turns_that_wait_for_their_worker_count(bus: Bus) -> None:
    await bus.heartbeat(make_card("w1"), [])
    await bus.submit(make_job("one", session_id="talk"))
    await next_claims(bus, "w1")
    await bus.submit(make_job("two", session_id="talk"))  # to the worker that had the turn before
    assert (await waiting(bus)).jobs == 1


async def test_orders_of_log_levels_are_kept_until_their_time_is_over(bus: Bus) -> None:
    debug, error = operator_pb2.LOG_LEVEL_DEBUG, operator_pb2.LOG_LEVEL_ERROR
    await bus.order_log_level(operator_pb2.LogLevelOrder(level=error))
    short = operator_pb2.LogLevelOrder(process="w1", level=debug)
    short.until.FromNanoseconds(time.time_ns() + 300_000_000)
    await bus.order_log_level(short)
    orders = await bus.log_levels()
    assert (level_for(orders, "w1"), level_for(orders, "w2")) == (LogLevel.DEBUG, LogLevel.ERROR)
    while level_for(orders, "w1") is LogLevel.DEBUG:  # of orders read before: its time ends without the store
        await asyncio.sleep(0.01)
    assert level_for(orders, "w1") is LogLevel.ERROR
    assert list(await bus.log_levels()) == [""]
    await bus.order_log_level(operator_pb2.LogLevelOrder(level=operator_pb2.LOG_LEVEL_CONFIGURED))
    assert level_for(await bus.log_levels(), "w1") is None


async def test_an_order_that_takes_the_place_of_one_that_is_over_stays(
    bus: Bus, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = operator_pb2.LogLevelOrder(process="w1", level=operator_pb2.LOG_LEVEL_DEBUG)
    over.until.FromNanoseconds(time.time_ns() - 1)
    new = operator_pb2.LogLevelOrder(process="w1", level=operator_pb2.LOG_LEVEL_ERROR)
    await bus.order_log_level(over)
    read = bus._client.hgetall

    async with connected(redis_url) as operator:

        async def read_and_be_late(name: str) -> Any:
            found = await read(name)
            await operator.order_log_level(new)  # between the reading and the removal
            return found

        monkeypatch.setattr(bus._client, "hgetall", read_and_be_late)
        assert await bus.log_levels() == {}
        assert await operator.log_levels() == {"w1": new}
