"""The controller is killed in mid-generation and comes back: tokens go on, and so does steering."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from cli import tether
from cli.up import wait_attached
from kvpilot import AsyncClient, FinishReason, Settings, Unavailable
from kvpilot.bus import Bus
from kvpilot.v1 import operator_pb2
from kvpilot.v1.common_pb2 import Orderer
from tests.e2e.serving import ENDLESS, TIMEOUT_S, Following, assert_greedy, operator_of, serving
from tests.tiny import prompt

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    pytest.mark.timeout(4 * TIMEOUT_S),
    pytest.mark.skipif(not tether.SUPPORTED, reason="needs Linux"),
]
SHORT, LONG = prompt(200, seed=51), prompt(300, seed=52)
SHORT_TOKENS = 1200
AGAIN = "still in charge"


def said(job: Following) -> str:
    """The reason of a job's last switch."""
    return job.result.switches[-1].reason if job.result.switches else ""


async def test_generation_and_then_steering_outlive_the_controller(
    tiny_folder: Path, transformers_model: Any, tmp_path: Path
) -> None:
    quick = {"reconnect_max_ms": 200}
    async with (
        serving(tiny_folder, tmp_path, worker=quick, device_budget=16 << 20, host_budget=16 << 20) as running,
        AsyncClient(running.endpoint, Settings(retries=100)) as client,  # the controller is away for long
        operator_of(running) as operator,
    ):
        exact = {"ignore_eos": True, "scenario": "accuracy-critical"}
        short = Following(client.generate(token_ids=SHORT, max_tokens=SHORT_TOKENS, **exact))
        long = Following(client.generate(token_ids=LONG, max_tokens=ENDLESS, **exact))
        for job in (short, long):
            await job.until(lambda job=job: job.tokens >= 40)
        first = await operator.override(long.job_id, "host(recent=128)")
        assert first.epoch >= 1

        await running.kill("controller")
        seen_dead = long.tokens
        following = asyncio.gather(short.rest(), long.until(lambda: said(long) == AGAIN))
        async with AsyncClient(running.endpoint, Settings(retries=0)) as impatient:
            with pytest.raises(Unavailable):
                await impatient.complete("x", max_tokens=1)
        bus = await Bus.connect(running.redis_url)
        try:
            async for event in bus.events(short.job_id):  # to its end, without a controller
                last = event
            assert last.finished.usage.generated_tokens == SHORT_TOKENS
            history = await bus.history(long.job_id)
            assert sum(len(event.tokens.tokens) for event in history) > seen_dead + SHORT_TOKENS // 2
        finally:
            await bus.close()
        assert not short.result.finished  # nobody could tell the client yet

        await running.restart("controller")
        await wait_attached(running.endpoint, 1)
        [worker] = (await operator.stub.ListWorkers(operator_pb2.ListWorkersRequest(), wait_for_ready=True)).workers
        assert {entry.request_id: entry.epoch for entry in worker.hello.epochs}[long.job_id] >= first.epoch
        while (live := await operator.find(long.job_id)) is None:
            pass
        assert live.state.epoch >= first.epoch
        second = await operator.override(long.job_id, "host(recent=32)", AGAIN)
        assert second.epoch > live.state.epoch

        await following
        result = short.result
        assert result.finish_reason is FinishReason.LENGTH
        assert len(result.token_ids) == SHORT_TOKENS
        assert_greedy(transformers_model, SHORT, result.token_ids)
        assert short.workers == long.workers == ["worker-0"]  # never taken from it

        await long.more(64)
        result = await long.cancel(client)
        by_operator = [switch for switch in result.switches if switch.ordered_by == Orderer.ORDERER_OPERATOR]
        assert [switch.to_pipeline for switch in by_operator] == ["host(recent=128)", "host(recent=32)"]
        assert by_operator[1].at_token > seen_dead + SHORT_TOKENS // 2
        assert list((await client.get(long.job_id)).token_ids) == result.token_ids
        assert_greedy(transformers_model, LONG, result.token_ids)
