"""Bad input and overload, through the real stack: every bad field is named, and what helps is said."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cli.child import Child
from kvpilot import AsyncClient, FinishReason, InvalidArgument, KvpilotError, ResourceExhausted
from kvpilot.errors import error_of_rpc
from tests.e2e.serving import CONTEXT, ENDLESS, READY_S, RUNNING, TIMEOUT_S, Following, Operator, Running

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(2 * TIMEOUT_S)]
GENERATE = "/kvpilot.v1.GenerationService/Generate"


async def _raw(running: Running, data: bytes) -> KvpilotError:
    """What Generate answers to these bytes."""
    async with grpc.aio.insecure_channel(running.endpoint) as channel:
        call = channel.unary_stream(GENERATE, request_serializer=None, response_deserializer=None)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(data, timeout=TIMEOUT_S).read()
    return error_of_rpc(caught.value)


@pytest.mark.parametrize(
    ("request_fields", "field", "said"),
    [
        ({"prompt": ""}, "prompt", "not empty"),
        ({"token_ids": []}, "token_ids.ids", "at least one"),
        ({"messages": []}, "chat.messages", "at least one"),
        ({"prompt": "x" * (CONTEXT + 1)}, "prompt", str(CONTEXT)),
        ({"token_ids": [1] * CONTEXT}, "token_ids", str(CONTEXT)),
        ({"token_ids": [1, 258]}, "token_ids.ids[1]", "257"),
        ({"prompt": "x", "max_tokens": CONTEXT}, "sampling.max_tokens", str(CONTEXT - 1)),
        ({"prompt": "x" * 9, "max_tokens": CONTEXT - 8}, "sampling.max_tokens", str(CONTEXT - 9)),
        ({"prompt": "x", "pipeline": "shrink"}, "pipeline", "'shrink'"),
        ({"prompt": "x", "pipeline": "window(size=64)"}, "pipeline", "'size'"),
        ({"prompt": "x", "pipeline": "window(recent=-1)"}, "pipeline", "-1"),
        ({"prompt": "x", "pipeline": "window(recent=64, recent=64)"}, "pipeline", "recent"),
        ({"prompt": "x", "pipeline": "kivi(bits=3)"}, "pipeline", "4 or 8"),
        ({"prompt": "x", "pipeline": "kivi(bits=4"}, "pipeline", ""),
        ({"prompt": "x", "pipeline": "host | kivi"}, "pipeline", "order"),
        ({"prompt": "x", "model": "gpt"}, "model", "tiny"),
        ({"prompt": "x", "session_id": "a b"}, "session_id", "'a b'"),
    ],
)
async def test_a_bad_field_is_named(client: AsyncClient, request_fields: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await client.complete(**request_fields)
    assert set(caught.value.violations) == {field}
    assert said in caught.value.violations[field]
    assert field in str(caught.value)


async def test_absurd_sampling_is_named_field_by_field(client: AsyncClient) -> None:
    nan, infinity = float("nan"), float("inf")
    with pytest.raises(InvalidArgument) as caught:
        await client.complete(
            "",
            max_tokens=0,
            temperature=-1.0,
            top_p=1.5,
            top_k=-3,
            min_p=nan,
            repetition_penalty=infinity,
            stop=["", "end"],
            stop_token_ids=[7, -7],
            top_logprobs=1000,
            max_divergence=-0.5,
            latency_weight=nan,
            memory_weight=infinity,
            pipeline="window(recent=-1)",
        )
    sampling = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop[0]")
    assert set(caught.value.violations) == {
        "prompt",
        *(f"sampling.{field}" for field in sampling),
        "sampling.stop_token_ids[1]",
        "top_logprobs",
        "objective.max_divergence",
        "objective.latency_weight",
        "objective.memory_weight",
        "pipeline",
    }
    assert "-1" in caught.value.violations["sampling.temperature"]
    assert all("accepted" in text for field, text in caught.value.violations.items() if field != "pipeline")


async def test_bytes_that_are_no_text_or_no_message(shared: Running) -> None:
    field = b"\x0a\x05ab\xff\xfec"  # field 1, prompt: 5 bytes, of which two are not UTF-8
    error = await _raw(shared, field)
    assert isinstance(error, InvalidArgument)
    assert set(error.violations) == {"prompt"}
    assert "0xff at byte offset 2" in error.violations["prompt"]

    turn = b"\x0a\x04user\x12\x01\xc3"  # role, content: half a character
    chat = b"\x0a" + bytes([len(turn)]) + turn
    error = await _raw(shared, b"\x12" + bytes([len(chat)]) + chat)
    assert set(error.violations) == {"chat.messages[0].content"}

    for data in (b"\x0a\xff\xff\xff\xff\x0f", b"\xff" * 40):
        error = await _raw(shared, data)
        assert isinstance(error, InvalidArgument)
    assert set((await _raw(shared, b"")).violations) == {"input"}


async def test_an_override_that_makes_no_sense(client: AsyncClient, operator: Operator) -> None:
    job = Following(client.generate("x" * 300, max_tokens=ENDLESS, ignore_eos=True, pipeline="full"))
    await job.until(lambda: job.tokens >= 20)
    while await operator.find(job.job_id) is None:
        await job.more(1)
    for pipeline, said in (("shrink", "shrink"), ("window(recent=-1)", "-1"), ("kivi(bits=4", "pipeline")):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await operator.override(job.job_id, pipeline)
        error = error_of_rpc(caught.value)
        assert isinstance(error, InvalidArgument), pipeline
        assert set(error.violations) == {"pipeline"}
        assert said in str(error)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await operator.override("job-of-nobody", "full")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    live = await operator.find(job.job_id)
    assert live is not None
    assert not live.overridden
    result = await job.cancel(client)
    assert (result.pipeline, result.switches) == ("full", [])


async def test_a_job_that_can_never_fit(client: AsyncClient) -> None:
    model = (await client.models())[0]
    most = model.capacity_bytes // model.raw_bytes_per_token
    assert most < CONTEXT - 100
    with pytest.raises(ResourceExhausted) as caught:
        await client.complete("x" * 100, max_tokens=most - 99)
    assert f"enough for {most} tokens" in str(caught.value)
    assert caught.value.retry_after_ms == 0  # waiting does not help
    with pytest.raises(ResourceExhausted):
        await client.complete("x" * (most + 1), max_tokens=1)
    assert len((await client.complete("x", max_tokens=4, ignore_eos=True)).token_ids) == 4


@pytest.fixture
async def narrow_door(shared: Running, tmp_path: Path) -> AsyncIterator[str]:
    """A second front door to the shared stack, which lets two jobs wait."""
    environment = {
        "KVPILOT_CONTROLLER_NAME": "narrow",
        "KVPILOT_CONTROLLER_LISTEN": "127.0.0.1:0",
        "KVPILOT_CONTROLLER_ROLES": "generation",
        "KVPILOT_CONTROLLER_MAX_QUEUED": "2",
        "KVPILOT_CONTROLLER_REDIS_URL": shared.redis_url,
        "KVPILOT_CONTROLLER_READY_FILE": str(tmp_path / "ready"),
    }
    command = (sys.executable, "-P", "-m", "controller")
    door = Child("front door", command, tmp_path / "log", environment, tmp_path / "ready")
    await door.start()
    yield await door.ready(READY_S)
    await door.stop(TIMEOUT_S)


async def test_a_full_queue_says_when_to_come_back(client: AsyncClient, narrow_door: str) -> None:
    async with AsyncClient(narrow_door) as narrow:

        def job(name: str) -> Following:
            return Following(narrow.generate(f"{name}: ", max_tokens=1500, ignore_eos=True))

        running = [job(f"running {number}") for number in range(RUNNING)]
        for taken in running:
            await taken.until(lambda taken=taken: bool(taken.workers))
        waiting = [job(f"waiting {number}") for number in range(2)]
        for accepted in waiting:
            await accepted.next()
        with pytest.raises(ResourceExhausted) as caught:
            await narrow.complete("one too many")
        assert caught.value.retry_after_ms == 2000
        assert "at most 2 may" in str(caught.value)
        # another front door sees the same jobs, and has a longer queue
        results = await asyncio.gather(*(each.cancel(client) for each in (*waiting, *running)))
    assert {result.finish_reason for result in results} == {FinishReason.CANCELLED}
