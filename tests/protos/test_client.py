"""The Python clients against a real front door, worker and job store; each test runs with both clients."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest

import kvpilot
from controller.generation import Limits
from kvpilot.bus import Append
from kvpilot.request import SCENARIOS, make_request, parse_scenario
from kvpilot.v1 import common_pb2, generation_pb2
from tests.conftest import free_port
from tests.controller.serving import NO_CACHE, FrontDoor, front_door
from tests.engines import MODEL, ScriptedEngine, scripted_text, scripted_tokens
from tests.jobs_help import (
    TIMEOUT_S,
    connected,
    finished_event,
    next_claims,
    result_of,
    tokens_event,
    until,
    until_offset,
    working,
)

pytestmark = pytest.mark.anyio


@dataclass
class Either:
    """A client of one kind behind one way to call it: every answer is awaited, every stream is an async iterator."""

    client: Any
    sync: bool

    async def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        function: Callable[..., Any] = getattr(self.client, method)
        if self.sync:
            return await asyncio.to_thread(function, *arguments, **options)
        return await function(*arguments, **options)

    async def stream(self, method: str, *arguments: Any, **options: Any) -> AsyncIterator[kvpilot.Event]:
        events = getattr(self.client, method)(*arguments, **options)
        if not self.sync:
            async for event in events:
                yield event
            return
        while (event := await asyncio.to_thread(next, events, None)) is not None:
            yield event

    async def close(self) -> None:
        closing = self.client.close()
        if not self.sync:
            await closing


Connect = Callable[..., Either]


@pytest.fixture(params=["sync", "asyncio"])
async def connect(request: pytest.FixtureRequest) -> AsyncIterator[Connect]:
    """Makes clients of each kind."""
    made: list[Either] = []

    def make(target: str, **settings: Any) -> Either:
        kind = kvpilot.Client if request.param == "sync" else kvpilot.AsyncClient
        made.append(Either(kind(target, kvpilot.Settings(**settings)), request.param == "sync"))
        return made[-1]

    yield make
    for either in made:
        await either.close()


@pytest.fixture
async def door(redis_url: str) -> AsyncIterator[FrontDoor]:
    async with front_door(redis_url) as door:
        yield door


async def test_generate_and_complete(door: FrontDoor, connect: Connect) -> None:
    client = connect(door.target)
    async with working(door.bus, ScriptedEngine(), "w1"):
        events = [event async for event in client.stream("generate", "hello", max_tokens=4)]
        result = await client.call("complete", "hello", max_tokens=4, top_logprobs=1, pipeline="full")
    assert [event.kind for event in events][:2] == ["accepted", "started"]
    assert events[-1].kind == "finished"
    assert "".join(event.text for event in events) == result.text == scripted_text(scripted_tokens("hello", 4))
    assert [token for event in events for token in event.token_ids] == result.token_ids == scripted_tokens("hello", 4)
    assert result.finish_reason is kvpilot.FinishReason.LENGTH
    assert result.usage.generated_tokens == 4
    assert result.logprobs[0] == kvpilot.TokenLogprob(result.token_ids[0], -0.5, ((result.token_ids[0], -0.5),))
    assert result.pipeline == "full"


async def test_a_conversation(door: FrontDoor, connect: Connect) -> None:
    client = connect(door.target)
    async with working(door.bus, ScriptedEngine(), "w1"):
        pairs = await client.call("complete", messages=[("system", "be brief"), ("user", "hi")], max_tokens=3)
        dicts = await client.call(
            "complete",
            messages=[{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
            max_tokens=3,
        )
    assert pairs.token_ids == dicts.token_ids == scripted_tokens("system: be brief\nuser: hi", 3)


async def test_get_resume_cancel_and_models(door: FrontDoor, connect: Connect) -> None:
    client = connect(door.target)
    (model,) = await client.call("models")
    assert model.name == MODEL
    async with working(door.bus, ScriptedEngine(steps=2), "w1"):
        stream = client.stream("generate", "hello", max_tokens=50)
        job_id = (await anext(stream)).message.accepted.job_id
        await stream.aclose()
        await until_offset(door.bus, job_id, 4)
        view = await client.call("get", job_id)
        assert (view.state, view.token_ids) == (kvpilot.JobState.RUNNING, tuple(scripted_tokens("hello", 2)))
        assert view.finished is None
        assert await client.call("cancel", job_id) is kvpilot.JobState.RUNNING
        rest = [event async for event in client.stream("resume", job_id, view.next_offset)]
    assert [event.offset for event in rest] == [4]
    assert rest[0].message.finished.reason == generation_pb2.FINISH_REASON_CANCELLED
    assert (await client.call("get", job_id)).state is kvpilot.JobState.FINISHED


async def test_refusals_are_typed(redis_url: str, connect: Connect) -> None:
    async with front_door(redis_url, Limits(max_queued=0, queue_retry_ms=1234, refresh_s=0)) as door:
        client = connect(door.target)
        with pytest.raises(kvpilot.InvalidArgument) as bad:
            await client.call("complete", "", top_p=3.0, pipeline="snapkv(")
        assert set(bad.value.violations) == {"prompt", "sampling.top_p", "pipeline"}
        with pytest.raises(kvpilot.ResourceExhausted) as full:
            await client.call("complete", "hello")
        assert full.value.retry_after_ms == 1234
        with pytest.raises(kvpilot.NotFound):
            await client.call("get", "job-unknown")
        with pytest.raises(kvpilot.NotFound):
            await client.call("cancel", "job-unknown")
        with pytest.raises(kvpilot.NotFound):
            _ = [event async for event in client.stream("resume", "job-unknown")]


async def test_a_job_that_fails_after_tokens_raises_with_what_came(door: FrontDoor, connect: Connect) -> None:
    client = connect(door.target)
    completing = asyncio.create_task(client.call("complete", "hello"))
    (claim,) = await next_claims(door.bus, "w1")
    end = finished_event(generation_pb2.FINISH_REASON_FAILED)
    end.finished.problem.CopyFrom(common_pb2.Problem(code=8, message="the device is gone", retry_after_ms=250))
    await door.bus.append([Append(claim, [tokens_event(0, 5), end])])
    with pytest.raises(kvpilot.ResourceExhausted, match="the device is gone") as failed:
        await completing
    assert failed.value.result is not None
    assert failed.value.result.token_ids == [5]
    with pytest.raises(kvpilot.ResourceExhausted):  # the same from a resumed stream
        _ = [event async for event in client.stream("resume", claim.job.job_id)]


async def test_nothing_there_is_unavailable(connect: Connect) -> None:
    client = connect(f"127.0.0.1:{free_port()}", retries=1)
    with pytest.raises(kvpilot.Unavailable):
        await client.call("complete", "hello")
    with pytest.raises(kvpilot.Unavailable):
        await client.call("models")


@pytest.mark.parametrize("ending", ["killed", "drained"])
async def test_a_stream_goes_on_at_another_front_door(redis_url: str, connect: Connect, ending: str) -> None:
    """The front door goes away in the middle of a stream; another one on its address goes on with it."""
    engine = ScriptedEngine(steps=3)
    port = free_port()
    events: list[kvpilot.Event] = []

    async def follow(client: Either) -> None:
        async for event in client.stream("generate", "hello", max_tokens=30):
            events.append(event)

    async with connected(redis_url) as bus, working(bus, engine, "w1"):
        async with front_door(redis_url, NO_CACHE, port) as door:
            following = asyncio.create_task(follow(connect(door.target)))
            await until(lambda: len(events) == 5)
            if ending == "drained":
                door.service.drain()
        engine.allow(10)
        async with front_door(redis_url, NO_CACHE, port), asyncio.timeout(TIMEOUT_S):
            engine.allow(100)
            await following
        assert len(engine.submissions) == 1
    assert [event.offset for event in events] == list(range(33))
    assert [token for event in events for token in event.token_ids] == scripted_tokens("hello", 30)


async def test_a_front_door_that_comes_late_gets_one_job(redis_url: str, connect: Connect) -> None:
    port = free_port()
    completing = asyncio.create_task(connect(f"127.0.0.1:{port}").call("complete", "hello", max_tokens=2))
    await asyncio.sleep(0.3)  # it fails a few times
    async with front_door(redis_url, NO_CACHE, port) as door, working(door.bus, ScriptedEngine(), "w1") as runner:
        async with asyncio.timeout(TIMEOUT_S):
            result = await completing
        assert result.token_ids == scripted_tokens("hello", 2)
        assert runner.held_jobs() == []
        assert (await result_of(door.bus, result.job_id)).token_ids == result.token_ids
        assert len(await door.bus.outcomes()) == 1


def test_requests_from_python_values() -> None:
    request = make_request(
        "hello", model="m", max_tokens=3, temperature=0.5, stop="x", scenario="Long Context", max_divergence=0.1
    )
    assert request.prompt == "hello"
    assert (request.sampling.max_tokens, request.sampling.temperature, list(request.sampling.stop)) == (3, 0.5, ["x"])
    assert request.scenario == common_pb2.SCENARIO_LONG_CONTEXT
    assert request.objective.max_divergence == 0.1
    assert not request.objective.HasField("latency_weight")
    assert make_request(token_ids=[1, 2]).token_ids.ids == [1, 2]
    for name, scenario in SCENARIOS.items():
        assert parse_scenario(name) == scenario
    assert len(SCENARIOS) == len(common_pb2.Scenario.keys()) - 1


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: make_request(), TypeError, "exactly one of"),
        (lambda: make_request("a", token_ids=[1]), TypeError, "exactly one of"),
        (lambda: make_request("a", maxtokens=3), TypeError, "unknown option 'maxtokens'"),  # type: ignore[call-arg]
        (lambda: make_request("a", max_tokens="3"), TypeError, "."),  # type: ignore[arg-type]
        (
            lambda: make_request("a", priority="urgent"),
            ValueError,
            "unknown priority 'urgent'; known: high",
        ),
        (lambda: make_request("a", scenario="fast"), ValueError, "unknown scenario 'fast'; known: long-context"),
        (lambda: make_request(messages=[{"role": "user"}]), ValueError, "must have role and content"),
        (lambda: make_request("a", seed=-1), ValueError, "."),
    ],
)
def test_values_that_make_no_request(make: Callable[[], Awaitable[Any]], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_importing_the_package_is_light() -> None:
    script = (
        "import sys, kvpilot; assert set(kvpilot.__all__) <= set(dir(kvpilot));"
        "assert not {'grpc', 'torch', 'redis', 'transformers'} & set(sys.modules);"
        "kvpilot.Client, kvpilot.InvalidArgument, kvpilot.Result;"
        "assert not {'torch', 'redis', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_public_name_is_there() -> None:
    assert all(getattr(kvpilot, name) is not None for name in kvpilot.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = kvpilot.Nonsense
