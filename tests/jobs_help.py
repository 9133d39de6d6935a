"""Jobs and workers for tests of everything that moves jobs."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import redis

from kvpilot.bus import Bus, BusSettings, Claim
from kvpilot.bus.front import new_job_id
from kvpilot.result import Result
from kvpilot.v1 import generation_pb2, job_pb2, policy_pb2
from tests.engines import MODEL, ScriptedEngine, model
from workers.jobs import JobRunner, JobSettings

TIMEOUT_S = 20.0
FAST_BUS = BusSettings(lease_s=1.0, block_s=0.1, affinity_s=0.1, retries=1, timeout_s=2.0)
FAST_JOBS = JobSettings(heartbeat_s=0.1, claim_block_s=0.1, full_poll_s=0.05)


def make_job(prompt: str = "hello", max_tokens: int = 4, session_id: str = "", model_name: str = MODEL) -> job_pb2.Job:
    """A job as a front door would submit it."""
    request = generation_pb2.GenerateRequest(prompt=prompt, model=model_name, session_id=session_id)
    request.sampling.max_tokens = max_tokens
    request.sampling.seed = 7
    job = job_pb2.Job(job_id=new_job_id(), request=request)
    job.create_time.GetCurrentTime()
    return job


def make_card(worker: str) -> job_pb2.WorkerCard:
    """A worker's card."""
    return job_pb2.WorkerCard(hello=policy_pb2.Hello(worker=worker, model=model()))


def tokens_event(first_index: int, *token_ids: int) -> generation_pb2.GenerationEvent:
    """An event with tokens and a word of text for each."""
    tokens = generation_pb2.Tokens(first_index=first_index, text="".join(f" w{token_id}" for token_id in token_ids))
    for token_id in token_ids:
        tokens.tokens.add(id=token_id)
    return generation_pb2.GenerationEvent(tokens=tokens)


def finished_event(
    reason: generation_pb2.FinishReason = generation_pb2.FINISH_REASON_LENGTH,
) -> generation_pb2.GenerationEvent:
    """An event that ends a job."""
    return generation_pb2.GenerationEvent(finished=generation_pb2.Finished(reason=reason))


@contextlib.asynccontextmanager
async def connected(url: str, settings: BusSettings = FAST_BUS) -> AsyncIterator[Bus]:
    """A bus for the time of a test."""
    bus = await Bus.connect(url, settings)
    try:
        yield bus
    finally:
        await bus.close()


@contextlib.asynccontextmanager
async def working(
    bus: Bus, engine: ScriptedEngine, name: str, settings: JobSettings = FAST_JOBS
) -> AsyncIterator[JobRunner]:
    """A worker around an engine; killed, not stopped, at the end: its jobs stay claimed."""
    runner = JobRunner(bus, engine, name, settings)
    engine.start(runner.on_events, runner.on_report, lambda error: None)
    task = asyncio.create_task(runner.run())
    try:
        yield runner
    finally:
        engine.stop(5.0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def read_all(bus: Bus, job_id: str, offset: int = 0) -> list[generation_pb2.GenerationEvent]:
    """Every event of a job from an offset on, until it has finished."""
    async with asyncio.timeout(TIMEOUT_S):
        return [event async for event in bus.events(job_id, offset)]


async def result_of(bus: Bus, job_id: str) -> Result:
    """The answer of a job once it has finished; fails on any gap or repeat of offsets."""
    return Result.of(await read_all(bus, job_id))


async def next_claims(bus: Bus, worker: str, count: int = 8) -> list[Claim]:
    """The next jobs that a worker is given, waited for."""
    async with asyncio.timeout(TIMEOUT_S):
        while not (claims := await bus.claim(worker, MODEL, count, block_ms=200)):
            pass
        return claims


async def until(condition: Callable[[], bool]) -> None:
    """Waits for a condition of another thread or task that gives no sign."""
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0.005)


async def until_offset(bus: Bus, job_id: str, next_offset: int) -> None:
    """Waits until a job has ``next_offset`` events."""
    async with asyncio.timeout(TIMEOUT_S):
        async for event in bus.events(job_id):
            if event.offset + 1 >= next_offset:
                return


def blocked_reads(client: redis.Redis) -> list[int]:
    """Ids of the connections that wait for entries of streams."""
    return [int(entry["id"]) for entry in client.client_list() if entry["cmd"] == "xread" and "b" in entry["flags"]]
