"""A client's whole acquaintance with a stack: submit, stream, leave, come back, cancel, ask again."""

from __future__ import annotations

import asyncio
import math
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from kvpilot import AlreadyExists, AsyncClient, Client, FinishReason, JobState, NotFound, OutOfRange, Result
from tests.e2e.serving import ENDLESS, TIMEOUT_S, Following, Running
from tests.tiny import prompt, reference

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(2 * TIMEOUT_S)]
LENGTHS = (1, 32, 33, 257, 900)
TEXT = "The keeper of the lighthouse wrote: "


async def test_greedy_answers_are_those_of_generate(
    client: AsyncClient, transformers_model: Any, tiny_folder: Path
) -> None:
    prompts = [prompt(length, seed=length) for length in LENGTHS]
    results = await asyncio.gather(
        *(client.complete(token_ids=ids, max_tokens=80, ignore_eos=True, pipeline="full") for ids in prompts)
    )
    assert [result.token_ids for result in results] == [reference(transformers_model, ids, 80) for ids in prompts]
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    for result in results:
        assert result.text == tokenizer.decode(result.token_ids, skip_special_tokens=True)


async def test_text_and_conversations_are_tokenised(
    client: AsyncClient, transformers_model: Any, tiny_folder: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    plain = await client.complete(TEXT, max_tokens=16, ignore_eos=True)
    assert plain.token_ids == reference(transformers_model, tokenizer(TEXT)["input_ids"], 16)

    turns = [("system", "Be brief."), ("user", "Höhe?")]
    ids = tokenizer("[system]Be brief.\n[user]Höhe?\n[assistant]")["input_ids"]
    chat = await client.complete(messages=turns, max_tokens=16, ignore_eos=True)
    assert chat.usage.prompt_tokens == len(ids)
    assert chat.token_ids == reference(transformers_model, ids, 16)


async def test_events_tell_the_whole_story(client: AsyncClient) -> None:
    events = []
    async with aclosing(client.generate(TEXT, max_tokens=40, ignore_eos=True, top_logprobs=3)) as stream:
        async for event in stream:
            events.append(event)
    assert [event.offset for event in events] == list(range(len(events)))
    assert [events[0].kind, events[1].kind, events[-1].kind] == ["accepted", "started", "finished"]
    result = Result.of(event.message for event in events)
    assert result.finish_reason is FinishReason.LENGTH
    assert (result.usage.prompt_tokens, result.usage.generated_tokens) == (len(TEXT), 40)
    assert result.timings.prefill_ms > 0
    assert result.timings.decode_ms > 0
    assert len(result.logprobs) == 40
    for chosen in result.logprobs:
        assert chosen.top[0] == (chosen.token_id, chosen.logprob)  # greedy
        assert sum(math.exp(logprob) for _, logprob in chosen.top) <= 1 + 1e-6
        assert [logprob for _, logprob in chosen.top] == sorted((logprob for _, logprob in chosen.top), reverse=True)

    view = await client.get(result.job_id)
    assert (view.state, view.text, list(view.token_ids)) == (JobState.FINISHED, result.text, result.token_ids)
    assert view.next_offset == len(events)
    assert view.finished == result.finished


async def test_a_job_goes_on_without_its_client_and_is_resumed_from_any_offset(
    shared: Running, client: AsyncClient
) -> None:
    first = Following(client.generate(TEXT, max_tokens=1500, ignore_eos=True, pipeline="full"))
    await first.until(lambda: first.tokens >= 20)
    assert (await client.get(first.job_id)).state is JobState.RUNNING
    await first.leave()

    async with AsyncClient(shared.endpoint) as other:
        late = [event.message async for event in other.resume(first.job_id, first.result.next_offset)]
        assert late[0].offset == first.result.next_offset
        for event in late:
            first.result.add(event)
        assert len(first.result.token_ids) == 1500
        assert Result.of([event.message async for event in other.resume(first.job_id)]) == first.result
        end = first.result.next_offset
        assert [event.kind async for event in other.resume(first.job_id, end - 1)] == ["finished"]
        with pytest.raises(OutOfRange):
            await anext(other.resume(first.job_id, end + 1))
        with pytest.raises(NotFound):
            await anext(other.resume("job-of-nobody"))


async def test_cancel_keeps_what_there_is(client: AsyncClient) -> None:
    job = Following(client.generate(TEXT, max_tokens=ENDLESS, ignore_eos=True))
    await job.until(lambda: job.tokens >= 30)
    assert await client.cancel(job.job_id) is JobState.RUNNING
    result = await job.rest()
    assert result.finish_reason is FinishReason.CANCELLED
    assert 30 <= len(result.token_ids) < ENDLESS
    assert result.usage.generated_tokens == len(result.token_ids)
    assert await client.cancel(job.job_id) is JobState.FINISHED
    assert list((await client.get(job.job_id)).token_ids) == result.token_ids


async def test_a_key_names_one_job(client: AsyncClient) -> None:
    key = {"idempotency_key": "order-1", "max_tokens": 300, "ignore_eos": True, "temperature": 1.0}
    one, other = await asyncio.gather(client.complete(TEXT, **key), client.complete(TEXT, **key))
    assert one == other
    assert (await client.complete(TEXT, **key)) == one
    with pytest.raises(AlreadyExists):
        await client.complete(TEXT, **(key | {"max_tokens": 301}))


async def test_the_seed_that_was_drawn_repeats_the_answer(client: AsyncClient) -> None:
    sampling = {"max_tokens": 64, "ignore_eos": True, "temperature": 1.0, "top_p": 0.9}
    drawn = await client.complete(TEXT, **sampling)
    assert (await client.complete(TEXT, **sampling, seed=drawn.seed)).token_ids == drawn.token_ids
    assert (await client.complete(TEXT, **sampling, seed=drawn.seed + 1)).token_ids != drawn.token_ids


async def test_generation_stops_where_it_is_told_to(client: AsyncClient, transformers_model: Any) -> None:
    ids = prompt(60, seed=3)
    answer = reference(transformers_model, ids, 64)
    last = answer[9]
    by_token = await client.complete(token_ids=ids, max_tokens=64, ignore_eos=True, stop_token_ids=[last])
    assert by_token.finish_reason is FinishReason.STOP_TOKEN
    assert by_token.token_ids == answer[: answer.index(last) + 1]

    whole = await client.complete(token_ids=ids, max_tokens=64, ignore_eos=True)
    stop = whole.text[20:22]
    by_text = await client.complete(token_ids=ids, max_tokens=64, ignore_eos=True, stop=[stop])
    assert by_text.finish_reason is FinishReason.STOP_STRING
    assert by_text.text == whole.text[: whole.text.index(stop)]


def test_the_blocking_client_does_the_same(shared: Running, transformers_model: Any) -> None:
    ids = prompt(80, seed=4)
    with Client(shared.endpoint) as client:
        assert [model.name for model in client.models()] == ["tiny"]
        result = Result()
        for event in client.generate(token_ids=ids, max_tokens=48, ignore_eos=True):
            result.add(event.message)
        assert result.token_ids == reference(transformers_model, ids, 48)
        assert client.complete(token_ids=ids, max_tokens=48, ignore_eos=True).token_ids == result.token_ids
        assert Result.of(event.message for event in client.resume(result.job_id)) == result
        assert client.get(result.job_id).state is JobState.FINISHED
        assert client.cancel(result.job_id) is JobState.FINISHED
