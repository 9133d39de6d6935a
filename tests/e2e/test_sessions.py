"""A session's turns meet the worker that keeps its cache, and lose nothing but time when that worker is killed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from cli import tether
from kvpilot import AsyncClient, FinishReason
from kvpilot.result import Result
from tests.e2e.serving import TIMEOUT_S, Following, assert_greedy, serving
from tests.tiny import prompt

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    pytest.mark.timeout(4 * TIMEOUT_S),
    pytest.mark.skipif(not tether.SUPPORTED, reason="needs Linux"),
]
SESSIONS = 4
PIPELINE = "host(recent=64)"
"""Exact, and its rows are never published as prefixes: what is reused was the session's."""


async def test_turns_return_to_their_worker_and_outlive_it(
    tiny_folder: Path, transformers_model: Any, tmp_path: Path
) -> None:
    worker = {"disk_folder": str(tmp_path / "blocks"), "session_host_s": 0.0}
    options = {"ignore_eos": True, "pipeline": PIPELINE}
    talks = {f"talk-{number}": prompt(200 + number, seed=80 + number) for number in range(SESSIONS)}
    async with (
        serving(tiny_folder, tmp_path / "stack", workers=2, worker=worker) as running,
        AsyncClient(running.endpoint) as client,
    ):

        async def turn(name: str) -> Result:
            result = await client.complete(token_ids=talks[name], session_id=name, max_tokens=40, **options)
            assert result.finish_reason is FinishReason.LENGTH
            assert_greedy(transformers_model, talks[name], result.token_ids)
            talks[name] += [*result.token_ids, *prompt(50, seed=len(talks[name]))]
            return result

        first = dict(zip(talks, await asyncio.gather(*map(turn, talks)), strict=True))
        parked = {name: (len(ids) - 50 - 1) // 32 * 32 for name, ids in talks.items()}
        second = {name: await turn(name) for name in reversed(talks)}  # one at a time: any worker would be free
        for name, result in second.items():
            assert result.worker == first[name].worker
            assert result.usage.reused_prompt_tokens == parked[name]
        parked = {name: (len(ids) - 50 - 1) // 32 * 32 for name, ids in talks.items()}

        [victim, *_] = [result.worker for result in first.values()]
        [survivor] = {"worker-0", "worker-1"} - {victim}
        theirs = [name for name, result in first.items() if result.worker == victim]
        long = {"max_tokens": 700, **options}
        jobs = {name: Following(client.generate(token_ids=talks[name], session_id=name, **long)) for name in theirs}
        for job in jobs.values():
            await job.until(lambda job=job: job.tokens >= 50)
        await running.kill(victim)
        for name, job in jobs.items():
            result = await job.rest()
            assert job.workers == [victim, survivor]
            assert result.usage.reused_prompt_tokens == 0  # its session was on the killed worker
            assert len(result.token_ids) == 700
            assert_greedy(transformers_model, talks[name], result.token_ids)
            talks[name] += result.token_ids
            parked[name] = (len(talks[name]) - 1) // 32 * 32
            talks[name] += prompt(50, seed=1)
        for name in talks:
            result = await turn(name)
            assert result.worker == survivor
            assert result.usage.reused_prompt_tokens == parked[name]
        folders = set((tmp_path / "blocks").glob("worker-*"))
        assert len(folders) == 2  # the killed worker's is still there ...
        await running.restart(victim)
        assert len(set((tmp_path / "blocks").glob("worker-*")) & folders) == 1  # ... until the next one starts
