"""Requests with different pipelines in one batch: none of them notices the others."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from kvpilot import AsyncClient, Result
from tests.e2e.serving import RUNNING, TIMEOUT_S, Following
from tests.tiny import prompt, reference

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(2 * TIMEOUT_S)]
PIPELINES = (
    "full",
    "window(sinks=4, recent=96)",
    "h2o(keep=0.5)",
    "snapkv(keep=0.5)",
    "kivi(bits=4)",
    "int8",
    "host(recent=64)",
    "snapkv(keep=0.5) | kivi(bits=4) | host(recent=64)",
)
PROMPT = prompt(500, seed=21)
TOKENS = 160


async def _together(client: AsyncClient, pipelines: tuple[str, ...]) -> dict[str, Result]:
    """All of them at once; none ends before each has begun."""
    jobs = [
        Following(client.generate(token_ids=PROMPT, max_tokens=TOKENS, ignore_eos=True, pipeline=pipeline))
        for pipeline in pipelines
    ]
    order: list[tuple[str, int]] = []

    async def follow(number: int, job: Following) -> Result:
        await job.until(lambda: job.tokens > 0)
        order.append(("began", number))
        result = await job.rest()
        order.append(("ended", number))
        return result

    results = await asyncio.gather(*(follow(number, job) for number, job in enumerate(jobs)))
    assert {kind for kind, _ in order[: len(jobs)]} == {"began"}, "they did not run at the same time"
    return dict(zip(pipelines, results, strict=True))


async def test_neighbours_change_no_token(client: AsyncClient, transformers_model: Any) -> None:
    assert len(PIPELINES) == RUNNING
    batch = await _together(client, PIPELINES)
    alone = {pipeline: (await _together(client, (pipeline,)))[pipeline] for pipeline in PIPELINES}
    assert {name: result.token_ids for name, result in batch.items()} == {
        name: result.token_ids for name, result in alone.items()
    }
    assert {name: result.pipeline for name, result in batch.items()} == {name: name for name in PIPELINES}
    assert not any(result.switches for result in (*batch.values(), *alone.values()))

    full = reference(transformers_model, PROMPT, TOKENS)
    lossless = {name for name, result in batch.items() if result.token_ids == full}
    assert {"full", "host(recent=64)"} <= lossless
    assert {"window(sinks=4, recent=96)", "kivi(bits=4)"}.isdisjoint(lossless)  # they do what they are named for


async def test_each_pipeline_takes_the_bytes_it_should(client: AsyncClient) -> None:
    uses = {name: result.cache for name, result in (await _together(client, PIPELINES)).items()}
    full = uses["full"].full_cache_bytes
    assert {use.full_cache_bytes for use in uses.values()} == {full}
    assert uses["full"].device_bytes == full
    for name, use in uses.items():
        assert 0 < use.device_bytes <= use.peak_device_bytes <= full, name
        assert use.device_bytes < 0.75 * full or name == "full", name
        assert (use.host_bytes > 0) == ("host" in name), name
        if name != "host(recent=64)":  # whose blocks pass through the host while the prompt is computed
            assert (use.shadow_bytes > 0) == (name != "full"), name
    assert uses["kivi(bits=4)"].device_bytes < uses["int8"].device_bytes
    assert uses["host(recent=64)"].device_bytes + uses["host(recent=64)"].host_bytes == full
