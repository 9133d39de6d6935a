"""Every bad field of a request is named, with its value and what is accepted, over real gRPC."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hypothesis import given
from hypothesis import strategies as st

from controller.refusals import MAX_DETAIL_BYTES, RefusedError, bad_fields, status_of
from controller.served import ServedModels, merge
from controller.validation import check_generate
from controller.wire import Unreadable, find_bad_fields, read
from kvpilot.errors import InvalidArgument, error_of_rpc
from kvpilot.request import make_request
from kvpilot.v1 import generation_pb2, generation_pb2_grpc
from tests.controller.serving import FrontDoor, front_door
from tests.engines import CONTEXT_TOKENS, MODEL, VOCABULARY_SIZE, model
from tests.jobs_help import make_card

pytestmark = pytest.mark.anyio

SERVED = ServedModels(live={MODEL: model()}, known={MODEL: model()})


def violations_of(request: generation_pb2.GenerateRequest, models: ServedModels = SERVED) -> dict[str, str]:
    """Bad fields that the validator finds."""
    try:
        check_generate(request, models)
    except RefusedError as error:
        return {violation.field: violation.description for violation in error.problem.violations}
    return {}


GOOD: list[dict[str, Any]] = [
    {},
    {"max_tokens": 1},
    {"max_tokens": CONTEXT_TOKENS - 1},
    {"temperature": 0.0},
    {"temperature": 10.0},
    {"top_p": 1.0, "top_k": 0, "min_p": 0.0},
    {"stop": ["x"] * 16, "stop_token_ids": [0, VOCABULARY_SIZE - 1]},
    {"repetition_penalty": 10.0},
    {"max_divergence": 0.0, "latency_weight": 0.0, "memory_weight": 3.5},
    {"scenario": "accuracy-critical"},
    {"session_id": "tenant:a.b_c-1", "idempotency_key": "k" * 128},
    {"pipeline": "snapkv(keep=0.25, window=16) | kivi(bits=2, shadow=true) | host(order='mass')"},
    {"pipeline": "snapkv(keep=1)"},
    {"top_logprobs": 20},
    {"model": MODEL},
]


@pytest.mark.parametrize("options", GOOD, ids=str)
def test_good_requests_pass(options: dict[str, Any]) -> None:
    assert violations_of(make_request("hello", **options)) == {}


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"max_tokens": 0}, "sampling.max_tokens", f"1 to {CONTEXT_TOKENS - 1}"),
    ({"max_tokens": -1}, "sampling.max_tokens", "-1 given"),
    ({"max_tokens": CONTEXT_TOKENS}, "sampling.max_tokens", f"{CONTEXT_TOKENS} given"),
    ({"temperature": -0.1}, "sampling.temperature", "-0.1 given; accepted: 0 to 10"),
    ({"temperature": math.nan}, "sampling.temperature", "nan given"),
    ({"temperature": math.inf}, "sampling.temperature", "inf given"),
    ({"temperature": 10.5}, "sampling.temperature", "10.5 given"),
    ({"top_p": 0.0}, "sampling.top_p", "greater than 0, at most 1"),
    ({"top_p": 1.01}, "sampling.top_p", "1.01 given"),
    ({"top_p": math.nan}, "sampling.top_p", "nan given"),
    ({"top_k": -1}, "sampling.top_k", "-1 given"),
    ({"min_p": 1.0}, "sampling.min_p", "less than 1"),
    ({"min_p": -0.5}, "sampling.min_p", "-0.5 given"),
    ({"repetition_penalty": 0.0}, "sampling.repetition_penalty", "greater than 0"),
    ({"repetition_penalty": -math.inf}, "sampling.repetition_penalty", "-inf given"),
    ({"stop": ["ok", ""]}, "sampling.stop[1]", "'' given"),
    ({"stop": ["x"] * 17}, "sampling.stop", "17 stop strings given; accepted: at most 16"),
    ({"stop_token_ids": [1, VOCABULARY_SIZE]}, "sampling.stop_token_ids[1]", f"0 to {VOCABULARY_SIZE - 1}"),
    ({"top_logprobs": 21}, "top_logprobs", "21 given; accepted: 0 to 20"),
    ({"top_logprobs": -1}, "top_logprobs", "-1 given"),
    ({"session_id": "a b"}, "session_id", "'a b' given"),
    ({"session_id": "s" * 129}, "session_id", "up to 128 characters"),
    ({"idempotency_key": "ключ"}, "idempotency_key", "'ключ' given"),
    ({"model": "no-such"}, "model", f"'no-such' given; accepted: {MODEL}"),
    ({"max_divergence": -0.01}, "objective.max_divergence", "-0.01 given"),
    ({"max_divergence": math.nan}, "objective.max_divergence", "a finite number"),
    ({"latency_weight": -1.0}, "objective.latency_weight", "-1.0 given"),
    ({"memory_weight": math.inf}, "objective.memory_weight", "inf given"),
    ({"pipeline": "snapkv(keep="}, "pipeline", "expected a value for parameter 'keep'"),
    ({"pipeline": "snappy(keep=0.5)"}, "pipeline", "unknown stage 'snappy'"),
    ({"pipeline": "snapkv(kept=0.5)"}, "pipeline", "unknown parameter 'kept'"),
    ({"pipeline": "snapkv(window=0.5)"}, "pipeline", "not of type int"),
    ({"pipeline": "kivi(shadow=1)"}, "pipeline", "not of type bool"),
    ({"pipeline": "snapkv(keep=0)"}, "pipeline", "0.0 given; accepted: 0 < keep <= 1"),
    ({"pipeline": "snapkv(window=-1)"}, "pipeline", "-1 given; accepted: window >= 1"),
    ({"pipeline": "kivi(bits=3)"}, "pipeline", "3 given; accepted: 2 or 4"),
    ({"pipeline": "kivi(bits=3) | shrink"}, "pipeline", "3 given; accepted: 2 or 4; unknown stage 'shrink'"),
    ({"pipeline": "host | kivi"}, "pipeline", "in the order evict | compress | offload"),
    ({"pipeline": "full | host"}, "pipeline", "`full` stands alone"),
    ({"pipeline": 'kivi(bits="4")'}, "pipeline", "not of type int"),
    ({"pipeline": "full | " * 200 + "full"}, "pipeline", "at most 1024"),
]


def replay_request(**asked: Any) -> generation_pb2.GenerateRequest:
    """A replay of 500 tokens."""
    request = generation_pb2.GenerateRequest(token_ids=generation_pb2.TokenIds(ids=[1] * 500))
    request.replay.CopyFrom(generation_pb2.Replay(**({"at_tokens": [64, 96], "pipelines": ["full", "kivi"]} | asked)))
    return request


def test_a_good_replay_passes() -> None:
    assert violations_of(replay_request()) == {}
    assert violations_of(replay_request(horizon_tokens=256, measured_under=["full", "snapkv"])) == {}
    assert violations_of(replay_request(turns=3, prompt_tokens=90)) == {}


BAD_REPLAYS: list[tuple[dict[str, Any], str, str]] = [
    ({"at_tokens": []}, "replay.at_tokens", "0 places given; accepted: 1 to 64"),
    ({"at_tokens": list(range(64, 64 + 32 * 65, 32))}, "replay.at_tokens", "65 places given"),
    ({"at_tokens": [63]}, "replay.at_tokens[0]", "63 given; accepted: 64 or more"),
    ({"at_tokens": [100, 131]}, "replay.at_tokens[1]", "131 given; accepted: 132 or more"),
    ({"pipelines": []}, "replay.pipelines", "0 pipelines given; accepted: 1 to 64"),
    ({"pipelines": ["full", "kivi(bits=3)"]}, "replay.pipelines[1]", "3 given; accepted: 2 or 4"),
    ({"pipelines": ["full", ""]}, "replay.pipelines[1]", "'' given; accepted: a pipeline"),
    ({"measured_under": ["full"]}, "replay.measured_under", "as many as at_tokens: 2"),
    ({"measured_under": ["full", "shrink"]}, "replay.measured_under[1]", "unknown stage 'shrink'"),
    ({"horizon_tokens": -1}, "replay.horizon_tokens", "-1 given; accepted: 1 to 256"),
    ({"horizon_tokens": 257}, "replay.horizon_tokens", "257 given"),
    ({"prompt_tokens": -1}, "replay.prompt_tokens", "-1 given; accepted: 1 or more"),
    ({"turns": -1}, "replay.turns", "-1 given; accepted: 1 or more"),
]


@pytest.mark.parametrize(("asked", "field", "words"), BAD_REPLAYS, ids=lambda value: str(value)[:40])
def test_a_bad_field_of_a_replay_is_named_alone(asked: dict[str, Any], field: str, words: str) -> None:
    found = violations_of(replay_request(**asked))
    assert set(found) == {field}
    assert words in found[field]


def test_a_replay_generates_nothing() -> None:
    request = make_request(
        messages=[{"role": "user", "content": "hi"}], temperature=1.0, session_id="s", top_logprobs=1, pipeline="kivi"
    )
    request.replay.CopyFrom(generation_pb2.Replay(at_tokens=[64], pipelines=["full"]))
    assert set(violations_of(request)) == {"chat", "sampling", "session_id", "top_logprobs", "pipeline"}


@pytest.mark.parametrize(("options", "field", "words"), BAD, ids=lambda value: str(value)[:40])
def test_a_bad_field_is_named_alone(options: dict[str, Any], field: str, words: str) -> None:
    found = violations_of(make_request("hello", **options))
    assert set(found) == {field}
    assert words in found[field]


def chat(*turns: tuple[str, str]) -> generation_pb2.GenerateRequest:
    return make_request(messages=turns)


def test_bad_inputs_are_named() -> None:
    assert set(violations_of(generation_pb2.GenerateRequest())) == {"input"}
    assert set(violations_of(make_request(""))) == {"prompt"}
    assert set(violations_of(make_request(messages=[]))) == {"chat.messages"}
    assert set(violations_of(chat(("user", "hi"), ("robot", "hi"), ("", "hi")))) == {
        "chat.messages[1].role",
        "chat.messages[2].role",
    }
    assert set(violations_of(make_request(token_ids=[]))) == {"token_ids.ids"}
    assert set(violations_of(make_request(token_ids=[5, -1, VOCABULARY_SIZE]))) == {"token_ids.ids[1]"}
    assert set(violations_of(make_request(token_ids=[1] * CONTEXT_TOKENS))) == {"token_ids"}
    assert violations_of(make_request(token_ids=[1] * (CONTEXT_TOKENS - 1))) == {}


def test_a_chat_needs_a_template() -> None:
    plain = model()
    plain.chat = False
    found = violations_of(chat(("user", "hi")), ServedModels({MODEL: plain}, {MODEL: plain}))
    assert found == {"chat": f"model {MODEL!r} has no chat template; accepted: prompt or token_ids"}


def test_priorities() -> None:
    for priority in generation_pb2.Priority.values():
        assert violations_of(generation_pb2.GenerateRequest(prompt="hello", priority=priority)) == {}
    unknown = generation_pb2.GenerateRequest(prompt="hello", priority=7)  # type: ignore[arg-type]
    assert set(violations_of(unknown)) == {"priority"}
    assert "7 given; accepted: PRIORITY_UNSPECIFIED, PRIORITY_HIGH" in violations_of(unknown)["priority"]
    replay = replay_request()
    replay.priority = generation_pb2.PRIORITY_LOW
    assert violations_of(replay) == {}
    replay.priority = generation_pb2.PRIORITY_HIGH
    assert set(violations_of(replay)) == {"priority"}


def test_an_unknown_scenario_number() -> None:
    request = make_request("hello")
    request.scenario = 99  # type: ignore[assignment]
    assert set(violations_of(request)) == {"scenario"}


def test_a_model_must_be_named_among_several() -> None:
    other = model()
    other.name = "other"
    known = {MODEL: model(), "other": other}
    assert set(violations_of(make_request("hello"), ServedModels(known, known))) == {"model"}
    assert violations_of(make_request("hello"), ServedModels({MODEL: model()}, known)) == {}
    assert violations_of(make_request("hello", model="other"), ServedModels({MODEL: model()}, known)) == {}


def test_workers_of_one_model_serve_what_they_have_in_common() -> None:
    small = make_card("w2")
    small.hello.model.context_tokens = 100
    del small.hello.model.stages[1:]
    merged = merge([make_card("w1"), small])[MODEL]
    assert (merged.workers, merged.context_tokens) == (2, 100)
    assert [stage.name for stage in merged.stages] == ["full"]


@pytest.mark.parametrize("places", [(0, 1), (1, 0)])
def test_a_stage_that_one_worker_cannot_serve_is_refused_for_all(places: tuple[int, int]) -> None:
    cards = [make_card("w1"), make_card("w2")]
    cards[1].hello.model.stages[0].unfit = "it needs the model's profile"
    merged = merge([cards[place] for place in places])[MODEL]
    assert merged.stages[0].unfit == "it needs the model's profile"
    assert [stage.unfit for stage in merged.stages[1:]] == [""] * (len(merged.stages) - 1)


def test_long_lists_of_violations_fit_into_metadata() -> None:
    problem = bad_fields({f"sampling.stop[{place}]": "x" * 100 for place in range(1000)}).problem
    bad = error_details_pb2.BadRequest()
    assert status_of(problem).details[0].Unpack(bad)
    assert bad.ByteSize() < MAX_DETAIL_BYTES + 200
    assert "more bad fields" in bad.field_violations[-1].description


def everything_wrong() -> generation_pb2.GenerateRequest:
    return make_request(
        "",
        model="no-such",
        max_tokens=0,
        temperature=math.nan,
        top_p=2.0,
        stop=[""],
        session_id="a b",
        idempotency_key="a/b",
        pipeline="snapkv(",
        top_logprobs=-3,
        max_divergence=-1.0,
    )


EVERYTHING_WRONG = {
    "prompt",
    "model",
    "sampling.max_tokens",
    "sampling.temperature",
    "sampling.top_p",
    "sampling.stop[0]",
    "session_id",
    "idempotency_key",
    "pipeline",
    "top_logprobs",
    "objective.max_divergence",
}


@pytest.fixture
async def door(redis_url: str) -> AsyncIterator[FrontDoor]:
    async with front_door(redis_url) as door:
        yield door


async def test_all_bad_fields_arrive_at_an_aio_client(door: FrontDoor) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await door.stub.Generate(everything_wrong()).read()
    error = error_of_rpc(caught.value)
    assert isinstance(error, InvalidArgument)
    assert set(error.violations) == EVERYTHING_WRONG


async def test_all_bad_fields_arrive_at_a_sync_client(door: FrontDoor) -> None:
    def call() -> grpc.RpcError:
        with grpc.insecure_channel(door.target) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            with pytest.raises(grpc.RpcError) as caught:
                next(stub.Generate(everything_wrong(), timeout=10))
            return caught.value

    error = await asyncio.to_thread(call)
    status = rpc_status.from_call(error)
    bad = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(bad)
    assert {violation.field for violation in bad.field_violations} == EVERYTHING_WRONG
    assert set(error_of_rpc(error).violations) == EVERYTHING_WRONG


BAD_BYTES = [
    (b"\x0a\x02\xff\xfe", "prompt", "0xff at byte offset 0"),
    (b"\x0a\x03ok\xc3", "prompt", "0xc3 at byte offset 2"),
    (b"\x0a\x02ok\x22\x01\x80", "model", "0x80"),
    (b"\x12\x0c\x0a\x04\x0a\x02ok\x0a\x04\x0a\x02\xff\xff", "chat.messages[1].role", "0xff"),
    (b"\x0a\x02ok\x2a\x06\x3a\x01a\x3a\x01\xfe", "sampling.stop[1]", "0xfe"),
    (b"\x0a\x7fshort", "", "no kvpilot.v1.GenerateRequest message"),
    (b"\xff\xff\xff", "", "3 bytes"),
]


@pytest.mark.parametrize(("data", "field", "words"), BAD_BYTES, ids=lambda value: str(value))
async def test_bytes_that_do_not_parse_are_a_bad_field(door: FrontDoor, data: bytes, field: str, words: str) -> None:
    call = door.channel.unary_stream(
        "/kvpilot.v1.GenerationService/Generate",
        request_serializer=bytes,
        response_deserializer=generation_pb2.GenerateResponse.FromString,
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(data, timeout=10).read()
    error = error_of_rpc(caught.value)
    assert isinstance(error, InvalidArgument)
    assert set(error.violations) == {field}
    assert words in error.violations[field]


async def test_unary_methods_refuse_bytes_that_do_not_parse(door: FrontDoor) -> None:
    call = door.channel.unary_unary(
        "/kvpilot.v1.GenerationService/Get",
        request_serializer=bytes,
        response_deserializer=generation_pb2.GetResponse.FromString,
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(b"\x0a\x01\xff", timeout=10)
    assert set(error_of_rpc(caught.value).violations) == {"job_id"}


@given(st.binary(max_size=64))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    request = read(generation_pb2.GenerateRequest, data)
    if isinstance(request, Unreadable):
        assert request.violations
    else:
        assert isinstance(request, generation_pb2.GenerateRequest)


def test_every_bad_string_is_found() -> None:
    data = b"\x0a\x01\xff" + b"\x22\x01\xfe" + b"\x32\x01\xfd"
    found = find_bad_fields(generation_pb2.GenerateRequest.DESCRIPTOR, data)
    assert set(found) == {"prompt", "model", "session_id"}
