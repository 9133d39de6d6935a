"""The front door over real gRPC and a real job store, with a worker whose engine makes tokens by a rule."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from controller.generation import Limits
from kvpilot.bus import Append
from kvpilot.errors import (
    AlreadyExists,
    Internal,
    InvalidArgument,
    KvpilotError,
    NotFound,
    OutOfRange,
    ResourceExhausted,
    Unavailable,
    error_of_rpc,
)
from kvpilot.request import make_request
from kvpilot.result import FinishReason, Result
from kvpilot.v1 import common_pb2, generation_pb2
from tests.conftest import RedisProcess
from tests.controller.serving import NO_CACHE, FrontDoor, front_door, rest_of
from tests.engines import MODEL, REFUSED_PROMPT, ScriptedEngine, scripted_text, scripted_tokens
from tests.jobs_help import finished_event, next_claims, tokens_event, until_offset, working
from workers.errors import INTERNAL

pytestmark = pytest.mark.anyio


@pytest.fixture
async def door(redis_url: str) -> AsyncIterator[FrontDoor]:
    async with front_door(redis_url) as door:
        yield door


async def error_of(call: object) -> KvpilotError:
    """The error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call  # type: ignore[misc]
    return error_of_rpc(caught.value)


async def test_generate_streams_a_job_to_its_end(door: FrontDoor) -> None:
    async with working(door.bus, ScriptedEngine(), "w1"):
        events = await door.generate(make_request("hello", max_tokens=5, top_logprobs=1))
    result = Result.of(events)
    assert [event.WhichOneof("event") for event in events][:2] == ["accepted", "started"]
    assert result.token_ids == scripted_tokens("hello", 5)
    assert result.text == scripted_text(result.token_ids)
    assert [entry.token_id for entry in result.logprobs] == result.token_ids
    assert result.finish_reason is FinishReason.LENGTH


async def test_a_recipe_is_stored_as_its_pipeline(door: FrontDoor) -> None:
    """Whichever worker takes the job, it need not know the name; an attached client may use it again."""
    asked = make_request("hello", pipeline="snapkv-int4", idempotency_key="once")
    job_id = await door.accept(asked)
    assert (await door.bus.record(job_id)).job.request.pipeline == "snapkv(keep=0.5) | kivi(bits=4)"
    assert await door.accept(asked) == job_id
    replay = generation_pb2.Replay(at_tokens=[64], pipelines=["full", "kivi-2bit"], measured_under=["snapkv-int4"])
    record = await door.bus.record(await door.accept(generation_pb2.GenerateRequest(prompt="hello", replay=replay)))
    assert list(record.job.request.replay.pipelines) == ["full", "kivi(bits=2)"]
    assert list(record.job.request.replay.measured_under) == ["snapkv(keep=0.5) | kivi(bits=4)"]


async def test_the_seed_is_kept_or_drawn(door: FrontDoor) -> None:
    job_id = await door.accept(make_request("hello", seed=0))
    assert (await door.bus.record(job_id)).job.request.sampling.seed == 0
    seeds = set()
    for _ in range(3):
        record = await door.bus.record(await door.accept(make_request("hello")))
        seeds.add(record.job.request.sampling.seed)
        assert record.job.request.model == MODEL
    assert len(seeds) == 3
    assert all(0 <= seed < 2**53 for seed in seeds)


async def test_job_ids_sort_by_time(door: FrontDoor) -> None:
    ids = []
    for _ in range(3):
        ids.append(await door.accept(make_request("hello")))
        await asyncio.sleep(0.002)  # ids are drawn by the millisecond
    assert ids == sorted(ids)
    assert all(len(job_id) == len("job-") + 26 for job_id in ids)


@pytest.mark.parametrize("offset", range(8))
async def test_resume_goes_on_from_any_offset(door: FrontDoor, offset: int) -> None:
    async with working(door.bus, ScriptedEngine(), "w1"):
        events = await door.generate(make_request("hello", max_tokens=5))
    assert len(events) == 8
    request = generation_pb2.ResumeRequest(job_id=events[0].accepted.job_id, offset=offset)
    assert [response.event async for response in door.stub.Resume(request, timeout=20)] == events[offset:]


async def test_resume_of_a_running_job_goes_live(door: FrontDoor) -> None:
    engine = ScriptedEngine(steps=2)
    async with working(door.bus, engine, "w1"):
        job_id = await door.accept(make_request("hello", max_tokens=6))
        await until_offset(door.bus, job_id, 4)
        calls = [door.stub.Resume(generation_pb2.ResumeRequest(job_id=job_id, offset=o), timeout=20) for o in (0, 3, 6)]
        first = [await call.read() for call in calls[:2]]
        engine.allow(100)
        rest = [await rest_of(call) for call in calls]
    assert [first[0].event.offset, *(event.offset for event in rest[0])] == list(range(9))
    assert [first[1].event.offset, *(event.offset for event in rest[1])] == list(range(3, 9))
    assert [event.offset for event in rest[2]] == [6, 7, 8]


async def test_resume_refuses_what_is_not_there(door: FrontDoor) -> None:
    job_id = await door.accept(make_request("hello"))
    await door.stub.Cancel(generation_pb2.CancelRequest(job_id=job_id))

    async def resume(job_id: str, offset: int) -> KvpilotError:
        return await error_of(door.stub.Resume(generation_pb2.ResumeRequest(job_id=job_id, offset=offset)).read())

    assert isinstance(await resume(job_id, 2), OutOfRange)
    assert isinstance(await resume("job-unknown", 0), NotFound)
    bad = await resume("", -1)
    assert isinstance(bad, InvalidArgument)
    assert set(bad.violations) == {"job_id", "offset"}


async def test_an_offset_past_the_end_of_a_job_that_then_ends(door: FrontDoor) -> None:
    job_id = await door.accept(make_request("hello"))
    call = door.stub.Resume(generation_pb2.ResumeRequest(job_id=job_id, offset=50), timeout=20)
    read = asyncio.create_task(call.read())
    await door.stub.Cancel(generation_pb2.CancelRequest(job_id=job_id))
    assert isinstance(await error_of(read), OutOfRange)


async def test_get_shows_a_job_in_every_state(door: FrontDoor) -> None:
    job_id = await door.accept(make_request("hello", max_tokens=4))
    get = generation_pb2.GetRequest(job_id=job_id)
    queued = await door.stub.Get(get)
    assert (queued.state, queued.next_offset, queued.text) == (generation_pb2.JOB_STATE_QUEUED, 1, "")
    engine = ScriptedEngine(steps=2)
    async with working(door.bus, engine, "w1"):
        await until_offset(door.bus, job_id, 4)
        running = await door.stub.Get(get)
        assert (running.state, running.next_offset) == (generation_pb2.JOB_STATE_RUNNING, 4)
        assert list(running.token_ids) == scripted_tokens("hello", 2)
        engine.allow(100)
        await until_offset(door.bus, job_id, 7)
    finished = await door.stub.Get(get)
    assert finished.state == generation_pb2.JOB_STATE_FINISHED
    assert finished.text == scripted_text(scripted_tokens("hello", 4))
    assert finished.finished.usage.generated_tokens == 4
    assert finished.create_time == queued.create_time
    assert isinstance(await error_of(door.stub.Get(generation_pb2.GetRequest(job_id="job-none"))), NotFound)
    assert isinstance(await error_of(door.stub.Get(generation_pb2.GetRequest(job_id="no job"))), InvalidArgument)


async def test_cancel_of_a_queued_running_and_finished_job(door: FrontDoor) -> None:
    queued = await door.accept(make_request("queued"))
    answer = await door.stub.Cancel(generation_pb2.CancelRequest(job_id=queued))
    assert answer.state == generation_pb2.JOB_STATE_QUEUED
    assert (await door.stub.Get(generation_pb2.GetRequest(job_id=queued))).state == generation_pb2.JOB_STATE_FINISHED
    async with working(door.bus, ScriptedEngine(steps=1), "w1"):
        call = door.stub.Generate(make_request("hello", max_tokens=50), timeout=20)
        job_id = (await call.read()).event.accepted.job_id
        await until_offset(door.bus, job_id, 3)
        cancel = generation_pb2.CancelRequest(job_id=job_id)
        assert (await door.stub.Cancel(cancel)).state == generation_pb2.JOB_STATE_RUNNING
        events = await rest_of(call)
        assert events[-1].finished.reason == generation_pb2.FINISH_REASON_CANCELLED
        assert (await door.stub.Cancel(cancel)).state == generation_pb2.JOB_STATE_FINISHED
    assert isinstance(await error_of(door.stub.Cancel(generation_pb2.CancelRequest(job_id="job-none"))), NotFound)


async def test_an_idempotency_key_attaches_to_the_first_job(door: FrontDoor) -> None:
    request = make_request("hello", max_tokens=3, idempotency_key="once")
    first = await door.accept(request)
    async with working(door.bus, ScriptedEngine(), "w1"):
        events = await door.generate(request)
    assert events[0].accepted.job_id == first
    assert events[-1].HasField("finished")
    assert await door.generate(request) == events
    other = make_request("something else", max_tokens=3, idempotency_key="once")
    refused = await error_of(door.stub.Generate(other).read())
    assert isinstance(refused, AlreadyExists)
    assert first in str(refused)


async def test_a_full_queue_refuses_with_a_time_to_come_back(redis_url: str) -> None:
    async with front_door(redis_url, Limits(max_queued=2, queue_retry_ms=1500, refresh_s=0)) as door:
        await door.accept(make_request("one"))
        await door.accept(make_request("two"))
        refused = await error_of(door.stub.Generate(make_request("three")).read())
        assert isinstance(refused, ResourceExhausted)
        assert refused.retry_after_ms == 1500
        await next_claims(door.bus, "w1", 1)  # a job that runs does not wait any more
        await door.accept(make_request("three"))


async def test_a_known_model_without_a_live_worker_queues(door: FrontDoor) -> None:
    await door.bus.retire("card")
    assert not (await door.stub.ListModels(generation_pb2.ListModelsRequest())).models
    job_id = await door.accept(make_request("hello", max_tokens=2))
    async with working(door.bus, ScriptedEngine(), "late"):
        await until_offset(door.bus, job_id, 5)


async def test_no_worker_ever_is_unavailable(redis_url: str) -> None:
    async with front_door(redis_url, worker="") as door:
        refused = await error_of(door.stub.Generate(make_request("hello")).read())
    assert isinstance(refused, Unavailable)
    assert "no worker has registered" in str(refused)
    assert refused.retry_after_ms > 0


async def test_list_models_counts_live_workers(door: FrontDoor) -> None:
    async with working(door.bus, ScriptedEngine(), "w1") as runner:
        await until_registered(door, 2)
        (model,) = (await door.stub.ListModels(generation_pb2.ListModelsRequest())).models
        assert (model.name, model.workers) == (MODEL, 2)
        assert {stage.name for stage in model.stages} == {"full", "snapkv", "kivi", "host"}
        assert runner.held_jobs() == []


async def until_registered(door: FrontDoor, count: int) -> None:
    async with asyncio.timeout(20):
        while len(await door.bus.cards()) < count:
            await asyncio.sleep(0.01)


async def test_a_failure_before_the_first_token_is_the_calls_status(door: FrontDoor) -> None:
    async with working(door.bus, ScriptedEngine(), "w1"):
        call = door.stub.Generate(make_request(REFUSED_PROMPT), timeout=20)
        assert (await call.read()).event.HasField("accepted")
        refused = await error_of(call.read())
    assert isinstance(refused, InvalidArgument)
    assert refused.violations == {"prompt": "not this one"}


async def test_a_failure_after_tokens_is_an_event_and_then_the_status(door: FrontDoor) -> None:
    call = door.stub.Generate(make_request("hello"), timeout=20)
    assert (await call.read()).event.HasField("accepted")
    (claim,) = await next_claims(door.bus, "w1")
    end = finished_event(generation_pb2.FINISH_REASON_FAILED)
    end.finished.problem.CopyFrom(common_pb2.Problem(code=INTERNAL, message="the device is gone", retry_after_ms=250))
    await door.bus.append([Append(claim, [tokens_event(0, 5), end])])
    assert (await call.read()).event.tokens.tokens[0].id == 5
    assert (await call.read()).event.finished.problem.message == "the device is gone"
    failed = await error_of(call.read())
    assert isinstance(failed, Internal)
    assert failed.retry_after_ms == 250


async def test_a_client_that_leaves_leaves_the_job_running(door: FrontDoor) -> None:
    engine = ScriptedEngine(steps=1)
    async with working(door.bus, engine, "w1"):
        job_id = await door.accept(make_request("hello", max_tokens=4))
        await until_offset(door.bus, job_id, 3)
        engine.allow(100)
        await until_offset(door.bus, job_id, 7)
    assert (await door.bus.record(job_id)).state == generation_pb2.JOB_STATE_FINISHED


async def test_draining_ends_streams_as_unavailable(door: FrontDoor) -> None:
    call = door.stub.Generate(make_request("hello"), timeout=20)
    job_id = (await call.read()).event.accepted.job_id
    read = asyncio.create_task(call.read())
    await asyncio.sleep(0)
    door.service.drain()
    assert isinstance(await error_of(read), Unavailable)
    later = await error_of(door.stub.Resume(generation_pb2.ResumeRequest(job_id=job_id)).read())
    assert isinstance(later, Unavailable)


async def test_redis_lost_is_unavailable_and_streams_wait_for_it(durable_redis: RedisProcess) -> None:
    async with front_door(durable_redis.url, NO_CACHE) as door:
        engine = ScriptedEngine(steps=2)
        async with working(door.bus, engine, "w1"):
            call = door.stub.Generate(make_request("hello", max_tokens=20), timeout=40)
            events = [(await call.read()).event for _ in range(4)]
            durable_redis.kill()
            engine.allow(5)
            refused = await error_of(door.stub.Generate(make_request("other")).read())
            assert isinstance(refused, Unavailable)
            assert refused.retry_after_ms > 0
            durable_redis.start()
            engine.allow(100)
            events += await rest_of(call)
    assert Result.of(events).token_ids == scripted_tokens("hello", 20)
