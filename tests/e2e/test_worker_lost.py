"""A worker is killed in mid-generation: another one finishes its jobs, and their clients notice nothing but a pause."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from cli import tether
from kvpilot import AsyncClient, FinishReason
from tests.e2e.serving import TIMEOUT_S, Following, assert_greedy, serving
from tests.tiny import prompt

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    pytest.mark.timeout(4 * TIMEOUT_S),
    pytest.mark.skipif(not tether.SUPPORTED, reason="needs Linux"),
]
TOKENS = 700
JOBS = 4


async def test_another_worker_finishes_what_a_killed_one_had(
    tiny_folder: Path, transformers_model: Any, tmp_path: Path
) -> None:
    prompts = [prompt(150 + number, seed=60 + number) for number in range(JOBS)]
    random = {"temperature": 0.8, "top_p": 0.9, "seed": 5}
    options = [{} if number % 2 else random for number in range(JOBS)]
    always = {"max_tokens": TOKENS, "ignore_eos": True, "scenario": "accuracy-critical"}
    budgets = {"device_budget": 32 << 20, "host_budget": 32 << 20}
    async with (
        serving(tiny_folder, tmp_path, workers=2, **budgets) as running,
        AsyncClient(running.endpoint) as client,
    ):
        jobs = [
            Following(client.generate(token_ids=ids, **always, **chosen))
            for ids, chosen in zip(prompts, options, strict=True)
        ]
        for job in jobs:
            await job.until(lambda job=job: job.tokens >= 50)
        victim = jobs[0].workers[0]
        await running.kill(victim)
        # The same requests, undisturbed, by the worker that is left. Meanwhile the leases of the killed one end.
        again = asyncio.gather(
            *(client.complete(token_ids=ids, **always, **chosen) for ids, chosen in zip(prompts, options, strict=True))
        )
        results = await asyncio.gather(*(job.rest() for job in jobs))
        undisturbed = await again

    lost = [job for job in jobs if job.workers[0] == victim]
    [survivor] = {"worker-0", "worker-1"} - {victim}
    assert all(job.workers == [victim, survivor] for job in lost)
    assert all(job.workers == [survivor] for job in jobs if job not in lost)
    for ids, chosen, result in zip(prompts, options, results, strict=True):
        assert result.finish_reason is FinishReason.LENGTH
        assert len(result.token_ids) == result.usage.generated_tokens == TOKENS
        if not chosen:
            assert_greedy(transformers_model, ids, result.token_ids)
    assert [result.token_ids for result in undisturbed] == [result.token_ids for result in results]
    assert [result.text for result in undisturbed] == [result.text for result in results]
    assert {result.worker for result in undisturbed} == {survivor}
