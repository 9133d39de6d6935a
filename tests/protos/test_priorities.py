"""Priorities of waiting jobs: their order, their shares, their limits, and workers and front doors without any."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from kvpilot.bus import Bus, QueueFullError, keys
from kvpilot.v1 import generation_pb2, job_pb2
from tests.engines import MODEL
from tests.jobs_help import make_card, make_job, next_claims
from tests.protos import older_scripts

pytestmark = pytest.mark.anyio

HIGH, NORMAL, LOW = generation_pb2.PRIORITY_HIGH, generation_pb2.PRIORITY_NORMAL, generation_pb2.PRIORITY_LOW


def job_of(priority: generation_pb2.Priority, **request: Any) -> job_pb2.Job:
    """A job with a priority."""
    job = make_job(**request)
    job.request.priority = priority
    return job


async def submit(bus: Bus, *priorities: generation_pb2.Priority) -> None:
    for priority in priorities:
        await bus.submit(job_of(priority))


async def claimed(bus: Bus, count: int, worker: str = "w") -> list[generation_pb2.Priority]:
    return [claim.job.request.priority for claim in await bus.claim(worker, MODEL, count)]


class OlderSide:
    """What a worker and a front door did before there were priorities."""

    def __init__(self, bus: Bus, worker: str = "older") -> None:
        client: Any = bus._client
        self.worker = worker
        self._bus = bus
        self._claim = client.register_script(older_scripts.CLAIM)
        self._heartbeat = client.register_script(older_scripts.HEARTBEAT)
        self._submit = client.register_script(older_scripts.SUBMIT)

    async def beat(self) -> None:
        card = make_card(self.worker)
        model = card.hello.model
        await self._heartbeat(args=[self.worker, MODEL, card.SerializeToString(), model.SerializeToString(), 10_000])

    async def claim(self, count: int) -> list[job_pb2.Job]:
        found, _, _ = await self._claim(args=[self.worker, MODEL, count, 10_000, 1, 100, 10_000])
        return [job_pb2.Job.FromString(job) for job, *_ in found]

    async def submit(self, job: job_pb2.Job) -> None:
        stored = [job.job_id, job.SerializeToString(), b"", MODEL, 1024, "", "", 1000, "", 0]
        assert await self._submit(args=stored) == [b"created", job.job_id.encode()]


# ---- order and shares


async def test_the_higher_priority_is_taken_first_and_each_in_order(bus: Bus) -> None:
    jobs = [job_of(priority) for priority in (LOW, NORMAL, HIGH, NORMAL, HIGH)]
    for job in jobs:
        await bus.submit(job)
    found = [claim.job.job_id for claim in await bus.claim("w", MODEL, 3)]
    assert found == [jobs[2].job_id, jobs[4].job_id, jobs[1].job_id]


async def test_no_priority_waits_for_ever(bus: Bus) -> None:
    await submit(bus, *[HIGH] * 64, *[NORMAL] * 20, *[LOW] * 20)
    for _ in range(3):
        assert Counter(await claimed(bus, 16)) == {HIGH: 12, NORMAL: 3, LOW: 1}
    one_by_one = [(await claimed(bus, 1))[0] for _ in range(16)]  # a full worker asks for one at a time
    assert Counter(one_by_one) == {HIGH: 12, NORMAL: 3, LOW: 1}


async def test_shares_are_of_what_waits(bus: Bus) -> None:
    await submit(bus, *[NORMAL] * 15, *[LOW] * 15)
    assert Counter(await claimed(bus, 16)) == {NORMAL: 15, LOW: 1}
    assert await claimed(bus, 16) == [LOW] * 14


async def test_replays_and_requests_that_say_nothing(bus: Bus) -> None:
    replay, plain, high = make_job(), make_job(), job_of(HIGH)
    replay.request.replay.at_tokens.append(64)
    for job in (replay, plain, high):
        await bus.submit(job)
    found = [claim.job.job_id for claim in await bus.claim("w", MODEL, 8)]
    assert found == [high.job_id, plain.job_id, replay.job_id]


@pytest.mark.parametrize("priority", [HIGH, NORMAL, LOW])
async def test_a_waiting_claim_wakes_up_for_every_priority(bus: Bus, priority: generation_pb2.Priority) -> None:
    waiting = asyncio.create_task(bus.claim("w", MODEL, 1, block_ms=10_000))
    await asyncio.sleep(0.05)  # it may be waiting by now; the claim must come either way
    await submit(bus, priority)
    async with asyncio.timeout(5):
        (claim,) = await waiting
    assert claim.job.request.priority == priority


# ---- limits


async def test_a_queue_full_of_low_jobs_takes_higher_ones(bus: Bus) -> None:
    for _ in range(2):
        await bus.submit(job_of(LOW), max_queued=2)
    with pytest.raises(QueueFullError) as refused:
        await bus.submit(job_of(LOW), max_queued=2)
    assert refused.value.waiting == 2
    await bus.submit(job_of(NORMAL), max_queued=2)
    await bus.submit(job_of(HIGH), max_queued=2)
    with pytest.raises(QueueFullError):  # a high and a normal one are ahead of it
        await bus.submit(job_of(NORMAL), max_queued=2)
    await bus.submit(job_of(HIGH), max_queued=2)
    with pytest.raises(QueueFullError):
        await bus.submit(job_of(HIGH), max_queued=2)


async def test_turns_of_sessions_keep_worker_and_priority(bus: Bus) -> None:
    for name in ("w1", "w2"):
        await bus.heartbeat(make_card(name), [])
    await bus.submit(make_job(session_id="s"))
    await next_claims(bus, "w2", 1)
    normal, high = make_job(), job_of(HIGH, session_id="s")
    await bus.submit(normal)
    await bus.submit(high)
    assert [claim.job.job_id for claim in await bus.claim("w1", MODEL, 8)] == [normal.job_id]
    assert [claim.job.job_id for claim in await bus.claim("w2", MODEL, 8)] == [high.job_id]


# ---- leaving


async def test_a_leaving_worker_is_sent_no_turns_and_gives_up_those_it_has(bus: Bus) -> None:
    card = make_card("w2")
    for name in ("w1", "w2"):
        await bus.heartbeat(make_card(name), [])
    await bus.submit(make_job(session_id="s"))
    claims = await next_claims(bus, "w2", 1)
    waiting = make_job(session_id="s")
    await bus.submit(waiting)
    other = asyncio.create_task(bus.claim("w1", MODEL, 1, block_ms=10_000))
    await bus.heartbeat(card, claims, leaving=True)
    async with asyncio.timeout(5):
        assert [claim.job.job_id for claim in await other] == [waiting.job_id]
    later = make_job(session_id="s")
    await bus.submit(later)
    assert [claim.job.job_id for claim in await bus.claim("w1", MODEL, 1)] == [later.job_id]
    await bus.heartbeat(card, claims)  # started again under its name
    await bus.submit(make_job(session_id="s"))  # the session is w1's by now
    assert len(await bus.claim("w1", MODEL, 1)) == 1


async def test_a_claim_that_is_told_to_stop_takes_no_job(bus: Bus) -> None:
    stop = asyncio.Event()
    waiting = asyncio.create_task(bus.claim("w", MODEL, 1, block_ms=10_000, stop=stop))
    await asyncio.sleep(0.05)
    stop.set()
    async with asyncio.timeout(5):
        assert await waiting == []
    await submit(bus, NORMAL)
    assert await bus.claim("w", MODEL, 1, stop=stop) == []
    assert len(await bus.claim("other", MODEL, 1)) == 1


async def test_released_jobs_wake_waiting_claims(bus: Bus) -> None:
    await submit(bus, LOW)
    claims = await bus.claim("w1", MODEL, 1)
    waiting = asyncio.create_task(bus.claim("w2", MODEL, 1, block_ms=10_000))
    await asyncio.sleep(0.05)
    await bus.release(claims)
    async with asyncio.timeout(5):
        assert [claim.epoch for claim in await waiting] == [3]


# ---- the release before


async def test_older_workers_are_given_all_priorities_in_the_queue_they_read(bus: Bus) -> None:
    older = OlderSide(bus)
    await older.beat()
    for priority in (LOW, NORMAL, HIGH):
        await bus.submit(job_of(priority))
    assert [job.request.priority for job in await older.claim(8)] == [LOW, NORMAL, HIGH]


async def test_older_and_newer_workers_share_the_jobs(bus: Bus) -> None:
    older = OlderSide(bus)
    await older.beat()
    await bus.heartbeat(make_card("newer"), [])
    await submit(bus, LOW, NORMAL, HIGH)
    assert [job.request.priority for job in await older.claim(8)] == [NORMAL]
    assert await claimed(bus, 8, "newer") == [HIGH, LOW]


async def test_an_older_front_doors_jobs_are_normal_ones(bus: Bus) -> None:
    older = OlderSide(bus)
    await bus.heartbeat(make_card("newer"), [])
    await older.submit(job_of(HIGH))  # it keeps the field without knowing it
    await submit(bus, HIGH, LOW)
    found = await bus.claim("newer", MODEL, 8)
    assert [claim.job.request.priority for claim in found] == [HIGH, HIGH, LOW]


async def test_what_waits_for_a_gone_worker_is_found_though_an_older_one_forgot_it(bus: Bus) -> None:
    await bus.heartbeat(make_card("gone"), [])
    await bus.submit(make_job(session_id="s"))
    (claim,) = await next_claims(bus, "gone", 1)
    turn = job_of(HIGH, session_id="s")
    await bus.submit(turn)
    await bus.release([claim])
    await bus.retire("gone")
    older = OlderSide(bus)
    await older.beat()
    assert len(await older.claim(8)) == 1
    assert await older.claim(8) == []  # forgets the gone worker
    assert [claim.job.job_id for claim in await next_claims(bus, "newer", 8)] == [turn.job_id]


def test_normal_jobs_are_in_the_queue_that_all_workers_read() -> None:
    assert keys.queue(MODEL) == f"kvpilot:jobs:{MODEL}"
    assert keys.queue(MODEL, keys.Priority.HIGH) == f"kvpilot:jobs:{MODEL}:high"
