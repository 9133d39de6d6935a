"""The worker's job runner on a real job store, with an engine that makes tokens by a rule."""

from __future__ import annotations

import asyncio

import pytest
import redis

from kvpilot.bus import Bus
from kvpilot.bus.connection import STORE_COUNTS
from kvpilot.result import FinishReason, Result
from kvpilot.v1 import generation_pb2
from tests.conftest import RedisProcess, free_port
from tests.engines import MODEL, REFUSED_PROMPT, ScriptedEngine, scripted_text, scripted_tokens
from tests.jobs_help import (
    FAST_JOBS,
    TIMEOUT_S,
    blocked_reads,
    connected,
    make_card,
    make_job,
    next_claims,
    result_of,
    until,
    until_offset,
    working,
)
from workers.errors import INTERNAL, INVALID_ARGUMENT
from workers.jobs import JobRunner, JobSettings

pytestmark = pytest.mark.anyio


async def test_a_job_is_run_and_its_outcome_kept(bus: Bus) -> None:
    job = make_job("hello", max_tokens=5)
    await bus.submit(job)
    async with working(bus, ScriptedEngine(), "w1"):
        result = await result_of(bus, job.job_id)
    assert result.token_ids == scripted_tokens("hello", 5)
    assert result.text == scripted_text(result.token_ids)
    assert result.finish_reason is FinishReason.LENGTH
    ((_, outcome),) = await bus.outcomes()
    assert (outcome.job_id, outcome.worker) == (job.job_id, "w1")
    assert outcome.finished == result.finished
    assert outcome.last_state.request_id == job.job_id
    assert [audit.at_token for audit in outcome.audits] == [0, 1, 2, 3, 4]  # one with each report
    assert (await bus.record(job.job_id)).state == generation_pb2.JOB_STATE_FINISHED


async def test_many_jobs_share_the_slots(bus: Bus) -> None:
    jobs = [make_job(f"prompt {number}", max_tokens=9) for number in range(20)]
    for job in jobs:
        await bus.submit(job)
    async with working(bus, ScriptedEngine(slots=3), "w1"), working(bus, ScriptedEngine(slots=2), "w2"):
        for job in jobs:
            result = await result_of(bus, job.job_id)
            assert result.token_ids == scripted_tokens(job.request.prompt, 9)


async def test_a_refusal_of_the_engine_ends_the_job(bus: Bus) -> None:
    job = make_job(REFUSED_PROMPT)
    await bus.submit(job)
    async with working(bus, ScriptedEngine(), "w1"):
        result = await result_of(bus, job.job_id)
    assert result.finish_reason is FinishReason.FAILED
    assert result.finished is not None
    assert result.finished.problem.code == INVALID_ARGUMENT
    assert result.finished.problem.violations[0].field == "prompt"


async def test_a_bug_of_the_engine_ends_the_job_and_not_the_worker(bus: Bus) -> None:
    broken, good = make_job("bug"), make_job("fine")
    await bus.submit(broken)
    await bus.submit(good)
    async with working(bus, ScriptedEngine(breaks_on="bug"), "w1"):
        failed = await result_of(bus, broken.job_id)
        assert (await result_of(bus, good.job_id)).finish_reason is FinishReason.LENGTH
    assert failed.finished is not None
    assert failed.finished.problem.code == INTERNAL
    assert "a bug in the engine" in failed.finished.problem.message


@pytest.mark.parametrize("delivered", [0, 1, 5])
async def test_another_worker_goes_on_without_gap_or_repeat(bus: Bus, delivered: int) -> None:
    job = make_job("hello", max_tokens=12)
    await bus.submit(job)
    async with working(bus, ScriptedEngine(steps=delivered), "w1"):
        await until_offset(bus, job.job_id, 2 + delivered)
    second = ScriptedEngine()
    async with working(bus, second, "w2"):
        result = await result_of(bus, job.job_id)
    assert result.token_ids == scripted_tokens("hello", 12)
    assert result.text == scripted_text(result.token_ids)
    assert second.submissions == [(job.job_id, tuple(scripted_tokens("hello", delivered)))]


async def test_heartbeats_keep_a_slow_job(bus: Bus) -> None:
    """A second worker claims for three lease times; the first one's job, which makes no progress, stays its own."""
    job = make_job("slow", max_tokens=3)
    await bus.submit(job)
    first = ScriptedEngine(slots=1, steps=0)
    loop = asyncio.get_running_loop()
    async with working(bus, first, "w1"):
        await until_offset(bus, job.job_id, 2)
        end = loop.time() + 3 * bus.settings.lease_s
        while loop.time() < end:
            assert await bus.claim("w2", MODEL, 8, block_ms=50) == []
        first.allow(3)
        result = await result_of(bus, job.job_id)
    assert (await bus.record(job.job_id)).attempts == 1
    assert result.token_ids == scripted_tokens("slow", 3)


async def test_a_worker_that_lost_its_lease_writes_nothing_more(bus: Bus) -> None:
    """The first worker stalls without heartbeats; when it wakes up, the second one's stream stays clean."""
    job = make_job("hello", max_tokens=10)
    await bus.submit(job)
    first, second = ScriptedEngine(steps=3), ScriptedEngine(steps=2)
    sleepy = JobSettings(heartbeat_s=3600.0, claim_block_s=0.1)
    async with working(bus, first, "w1", sleepy) as stalled:
        await until_offset(bus, job.job_id, 5)
        first.slots = 0  # it takes no job back
        async with working(bus, second, "w2"):
            await until_offset(bus, job.job_id, 8)
            first.allow(5)
            await until(lambda: not stalled.held_jobs() and not first.live_jobs())
            second.allow(100)
            result = await result_of(bus, job.job_id)
    assert result.token_ids == scripted_tokens("hello", 10)
    assert result.worker == "scripted"
    assert (await bus.record(job.job_id)).worker == "w2"
    assert len(await bus.outcomes()) == 1


async def test_a_worker_takes_back_its_own_job_after_its_lease_ended(bus: Bus) -> None:
    job = make_job("hello", max_tokens=6)
    await bus.submit(job)
    engine = ScriptedEngine(steps=2)
    sleepy = JobSettings(heartbeat_s=3600.0, claim_block_s=0.1)
    async with working(bus, engine, "w1", sleepy):
        await until(lambda: len(engine.submissions) == 2)
        engine.allow(100)
        result = await result_of(bus, job.job_id)
    assert result.token_ids == scripted_tokens("hello", 6)
    assert engine.submissions[1] == (job.job_id, tuple(scripted_tokens("hello", 2)))


async def test_cancel_reaches_a_running_job(bus: Bus) -> None:
    job = make_job("hello", max_tokens=100)
    await bus.submit(job)
    async with working(bus, ScriptedEngine(steps=2), "w1"):
        await until_offset(bus, job.job_id, 4)
        assert await bus.cancel(job.job_id) == generation_pb2.JOB_STATE_RUNNING
        result = await result_of(bus, job.job_id)
    assert result.finish_reason is FinishReason.CANCELLED
    assert result.token_ids == scripted_tokens("hello", 2)


async def test_a_job_cancelled_between_two_workers_is_not_run(bus: Bus) -> None:
    job = make_job()
    await bus.submit(job)
    await bus.heartbeat(make_card("gone"), [])
    await next_claims(bus, "gone")
    await bus.cancel(job.job_id)  # the worker looks alive, so it is told, but it never answers
    engine = ScriptedEngine()
    async with working(bus, engine, "w2"):
        result = await result_of(bus, job.job_id)
    assert result.finish_reason is FinishReason.CANCELLED
    assert engine.submissions == []


async def test_a_poison_job_fails_after_three_workers(bus: Bus) -> None:
    job = make_job("poison")
    await bus.submit(job)
    for attempt in range(3):
        (claim,) = await next_claims(bus, f"victim {attempt}")
        assert claim.attempts == attempt + 1
    engine = ScriptedEngine()
    async with working(bus, engine, "w4"):
        result = await result_of(bus, job.job_id)
    assert engine.submissions == []
    assert result.finished is not None
    assert result.finished.problem.code == INTERNAL
    assert "3 workers" in result.finished.problem.message


async def test_stopping_hands_jobs_back_at_once(bus: Bus) -> None:
    job = make_job("hello", max_tokens=8)
    await bus.submit(job)
    engine = ScriptedEngine(steps=3)
    runner = JobRunner(bus, engine, "w1", FAST_JOBS)
    engine.start(runner.on_events, runner.on_report, lambda error: None)
    task = asyncio.create_task(runner.run())
    await until_offset(bus, job.job_id, 5)
    await runner.stop()
    await task
    engine.stop(5.0)
    record = await bus.record(job.job_id)
    assert (record.state, record.worker, record.attempts) == (generation_pb2.JOB_STATE_QUEUED, "", 0)
    assert await bus.cards() == []
    (claim,) = await bus.claim("w2", MODEL, 1)
    assert claim.progress.token_ids == scripted_tokens("hello", 3)


async def test_stopping_lets_jobs_finish(bus: Bus) -> None:
    job = make_job("hello", max_tokens=8)
    await bus.submit(job)
    engine = ScriptedEngine(steps=3)
    runner = JobRunner(bus, engine, "w1", FAST_JOBS)
    engine.start(runner.on_events, runner.on_report, lambda error: None)
    task = asyncio.create_task(runner.run())
    await until_offset(bus, job.job_id, 5)
    stop = asyncio.create_task(runner.stop(drain_s=TIMEOUT_S))
    await until(lambda: runner._stopping.is_set())
    engine.allow(100)
    await stop
    await task
    engine.stop(5.0)
    assert (await result_of(bus, job.job_id)).token_ids == scripted_tokens("hello", 8)


async def test_what_does_not_finish_in_time_is_handed_over(bus: Bus) -> None:
    job = make_job("hello", max_tokens=8)
    await bus.submit(job)
    other = ScriptedEngine()
    async with working(bus, ScriptedEngine(steps=3), "w1") as leaving:
        await until_offset(bus, job.job_id, 5)
        async with working(bus, other, "w2"):
            await leaving.stop(drain_s=0.2)
            result = await result_of(bus, job.job_id)
    assert result.token_ids == scripted_tokens("hello", 8)
    assert other.submissions == [(job.job_id, tuple(scripted_tokens("hello", 3)))]


async def test_a_stopping_worker_takes_no_new_job_and_hurries_when_told(bus: Bus) -> None:
    held, late = make_job("held", max_tokens=8), make_job("late")
    await bus.submit(held)
    engine = ScriptedEngine(steps=3)
    async with working(bus, engine, "w1") as runner:
        await until_offset(bus, held.job_id, 5)
        hurry = asyncio.Event()
        stop = asyncio.create_task(runner.stop(drain_s=TIMEOUT_S, hurry=hurry))
        await until(lambda: runner._stopping.is_set())
        await bus.submit(late)
        other = ScriptedEngine()
        async with working(bus, other, "w2"):
            assert (await result_of(bus, late.job_id)).token_ids == scripted_tokens("late", 4)
            assert not stop.done()
            assert [job_id for job_id, _ in engine.submissions] == [held.job_id]
            hurry.set()
            await stop
            assert (await result_of(bus, held.job_id)).token_ids == scripted_tokens("held", 8)
            assert other.submissions[-1] == (held.job_id, tuple(scripted_tokens("held", 3)))


async def test_replays_are_handed_over_at_once(bus: Bus) -> None:
    replay, plain = make_job("replay", max_tokens=8), make_job("plain", max_tokens=8)
    replay.request.replay.at_tokens.append(64)
    for job in (replay, plain):
        await bus.submit(job)
    async with working(bus, ScriptedEngine(steps=3), "w1") as runner:
        await until(lambda: len(runner.held_jobs()) == 2)
        stop = asyncio.create_task(runner.stop(drain_s=TIMEOUT_S))
        await until(lambda: runner.held_jobs() == [plain.job_id])
        claims = await next_claims(bus, "w2")
        assert [claim.job.job_id for claim in claims] == [replay.job_id]
        assert not stop.done()
        stop.cancel()


async def test_without_redis_a_generation_goes_on_and_is_delivered_later(durable_redis: RedisProcess) -> None:
    async with connected(durable_redis.url) as bus:
        job = make_job("hello", max_tokens=40)
        await bus.submit(job)
        engine = ScriptedEngine(steps=4)
        async with working(bus, engine, "w1") as runner:
            events: list[generation_pb2.GenerationEvent] = []
            reader = asyncio.create_task(collect(bus, job.job_id, events))
            await until(lambda: len(events) == 6)
            durable_redis.kill()
            engine.allow(100)
            await until(lambda: not engine.live_jobs())  # finished without Redis
            assert runner.held_jobs() == [job.job_id]
            durable_redis.start()
            await reader
    assert Result.of(events).token_ids == scripted_tokens("hello", 40)
    assert engine.submissions == [(job.job_id, ())]


async def test_a_worker_outlives_a_failover(forgetful_redis: RedisProcess) -> None:
    async with connected(forgetful_redis.url) as bus:
        running, queued = make_job("hello", max_tokens=6), make_job("queued")
        engine = ScriptedEngine(steps=2)
        await bus.submit(running)
        async with working(bus, engine, "w1"):
            await until_offset(bus, running.job_id, 2)
            with redis.Redis.from_url(forgetful_redis.url) as client:
                await until(lambda: len(blocked_reads(client)) >= 2)  # for jobs and for notices
                client.replicaof("127.0.0.1", free_port())
                engine.allow(100)
                unavailable = STORE_COUNTS.unavailable
                await until(lambda: STORE_COUNTS.unavailable >= unavailable + 3)
                client.replicaof("no", "one")
            await bus.submit(queued)
            for job in (running, queued):
                result = await result_of(bus, job.job_id)
                assert result.token_ids == scripted_tokens(job.request.prompt, job.request.sampling.max_tokens)


async def test_a_worker_goes_on_after_its_blocked_reads_were_ended(bus: Bus, redis_url: str) -> None:
    async with working(bus, ScriptedEngine(), "w1"):
        with redis.Redis.from_url(redis_url) as client:
            await until(lambda: end_reads(client) > 0)
        job = make_job()
        await bus.submit(job)
        assert (await result_of(bus, job.job_id)).finish_reason is FinishReason.LENGTH


def end_reads(client: redis.Redis) -> int:
    """Ends blocked reads as a failover does; returns how many still were."""
    return sum(client.client_unblock(connection, error=True) for connection in blocked_reads(client))


async def test_jobs_are_not_taken_over_right_after_an_outage(durable_redis: RedisProcess) -> None:
    """Leases run on while Redis is away: nobody may take jobs over before their owners could renew them."""
    async with connected(durable_redis.url) as bus:
        job = make_job("hello", max_tokens=6)
        await bus.submit(job)
        first, second = ScriptedEngine(steps=2), ScriptedEngine()
        async with working(bus, first, "w1"):
            await until_offset(bus, job.job_id, 4)
            async with working(bus, second, "w2") as other:
                await until_workers(bus, 2)
                durable_redis.kill()
                await until(lambda: other._take_over_from > 0)
                await asyncio.sleep(bus.settings.lease_s)  # the outage: longer than a lease
                durable_redis.start()
                await until_workers(bus, 2)
                first.allow(100)
                result = await result_of(bus, job.job_id)
    assert result.token_ids == scripted_tokens("hello", 6)
    assert second.submissions == []


async def until_workers(bus: Bus, count: int) -> None:
    """Waits until so many workers have renewed themselves."""
    async with asyncio.timeout(TIMEOUT_S):
        while len(await bus.cards()) < count:
            await asyncio.sleep(0.01)


async def collect(bus: Bus, job_id: str, events: list[generation_pb2.GenerationEvent]) -> None:
    """Appends a job's events to a list as they come."""
    async with asyncio.timeout(TIMEOUT_S):
        async for event in bus.events(job_id):
            events.append(event)
