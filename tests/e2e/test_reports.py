"""What the real engine tells the controller: signals in their ranges, bytes that add up, epochs that rise."""

from __future__ import annotations

import itertools
import math

import pytest

from kvpilot import AsyncClient
from kvpilot.v1 import operator_pb2, policy_pb2
from tests.e2e.serving import DEVICE_BYTES, ENDLESS, HOST_BYTES, RUNNING, TIMEOUT_S, Following, Operator
from tests.tiny import prompt

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(2 * TIMEOUT_S)]
PROMPT_TOKENS = 600


async def _hello(operator: Operator) -> policy_pb2.Hello:
    listed = await operator.stub.ListWorkers(operator_pb2.ListWorkersRequest())
    assert len(listed.workers) == 1
    return listed.workers[0].hello


async def _states(job: Following, operator: Operator, count: int) -> list[policy_pb2.RequestState]:
    """The next ``count`` states of a job that measured something, as the controller learns them."""
    states: dict[int, policy_pb2.RequestState] = {}
    while len(states) < count:
        live = await operator.find(job.job_id)
        if live is not None and live.state.signals.steps:
            states.setdefault(live.state.generated_tokens, live.state)
        await job.more(1)
    return list(states.values())


async def test_the_worker_says_what_it_is(client: AsyncClient, operator: Operator) -> None:
    hello = await _hello(operator)
    assert (hello.layers, hello.kv_heads, hello.query_heads, hello.head_dim) == (2, 2, 4, 16)
    assert hello.raw_dtype == "float32"
    assert {"raw", "int8", "int4"} <= set(hello.formats)
    budgets = {"device": DEVICE_BYTES, "host": HOST_BYTES, "disk": 2 << 30}
    assert {tier.name: tier.budget_bytes for tier in hello.tiers} == budgets
    assert all(tier.bandwidth_bytes_per_s > 0 for tier in hello.tiers)
    assert {"full", "window", "h2o", "snapkv", "kivi", "int8", "host"} <= {stage.name for stage in hello.model.stages}
    [served] = await client.models()
    assert served == hello.model
    assert (served.name, served.chat, served.workers, served.vocabulary_size) == ("tiny", True, 1, 258)


async def test_signals_and_bytes_of_a_live_request(client: AsyncClient, operator: Operator) -> None:
    horizons = list((await _hello(operator)).far_horizons_tokens)
    assert horizons == sorted(horizons)
    job = Following(
        client.generate(
            token_ids=prompt(PROMPT_TOKENS, seed=31),
            max_tokens=ENDLESS,
            ignore_eos=True,
            scenario="accuracy-critical",
            session_id="of-report",
        )
    )
    await job.until(lambda: job.tokens > 0)
    states = await _states(job, operator, 5)
    for state in states:
        signals, cache = state.signals, state.cache
        assert (state.prompt_tokens, state.max_tokens, state.session_id) == (PROMPT_TOKENS, ENDLESS, "of-report")
        assert state.objective.max_divergence == 0
        assert not state.prefilling
        masses = zip(horizons, signals.far_mass, signals.far_mass_max, strict=True)
        assert list(signals.far_mass) == sorted(signals.far_mass, reverse=True)  # farther is less
        seen = state.prompt_tokens + state.generated_tokens
        for horizon, mean, most in masses:
            assert 0 <= mean <= most <= 1 + 1e-6
            assert mean > 0 or horizon > PROMPT_TOKENS - 64
            assert mean == 0 or horizon < seen
        assert 0 <= signals.sink_mass <= 1
        assert 0 < signals.attention_entropy <= 1 + 1e-6
        assert 0 < signals.next_token_entropy <= math.log(258)
        assert 1 / 258 <= signals.top1_probability <= 1
        assert 0 <= signals.repeat_rate <= 1
        assert seen - 1 <= state.kept_tokens <= seen
        assert cache.device_bytes + cache.host_bytes > 0
        assert cache.peak_device_bytes >= cache.device_bytes
        assert cache.full_cache_bytes == cache.device_bytes + cache.host_bytes
        assert cache.device_bytes_16bit < cache.device_bytes
    assert [state.epoch for state in states] == [0] * len(states)
    generated = [state.generated_tokens for state in states]
    assert all(later > earlier for earlier, later in itertools.pairwise(generated))
    await job.cancel(client)


async def test_epochs_rise_and_bytes_follow_the_pipeline(client: AsyncClient, operator: Operator) -> None:
    ids = prompt(PROMPT_TOKENS, seed=32)
    job = Following(client.generate(token_ids=ids, max_tokens=ENDLESS, ignore_eos=True, pipeline="full"))
    await job.until(lambda: job.tokens > 0)
    [state] = await _states(job, operator, 1)
    epochs, before = [state.epoch], state.cache
    for pipeline in ("kivi(bits=4)", "kivi(bits=4) | host(recent=64)", "window(sinks=4, recent=128)", "full"):
        ack = await operator.override(job.job_id, pipeline)
        epochs.append(ack.epoch)
        after = ack.applied.after
        assert after.peak_device_bytes >= max(after.device_bytes, before.device_bytes), pipeline
        assert (after.device_bytes < 0.75 * after.full_cache_bytes) == (pipeline != "full")
        assert (after.host_bytes > 0) == ("host" in pipeline)
        await job.more(64)
        live = await operator.find(job.job_id)
        assert live is not None
        assert live.state.epoch == ack.epoch
        assert live.state.pipeline == pipeline
        before = live.state.cache
    assert epochs == sorted(set(epochs))
    result = await job.cancel(client)
    assert result.finished.switches[-1].after.device_bytes == result.finished.switches[-1].after.full_cache_bytes


async def test_the_worker_reports_its_load_and_its_end(client: AsyncClient, operator: Operator) -> None:
    jobs = [Following(client.generate(f"job {n}", max_tokens=ENDLESS, ignore_eos=True)) for n in range(RUNNING)]
    for job in jobs:
        await job.until(lambda job=job: job.tokens >= 40)
    listed = await operator.stub.ListWorkers(operator_pb2.ListWorkersRequest())
    load = listed.workers[0].state
    assert (load.running, load.waiting) == (RUNNING, 0)
    assert load.step_ms > 0
    assert load.tokens_per_s > 0
    used = {tier.name: tier for tier in load.tiers}
    assert 0 < used["device"].used_bytes <= used["device"].budget_bytes == DEVICE_BYTES
    for job in jobs:
        await job.cancel(client)
        while await operator.find(job.job_id) is not None:
            pass


async def test_what_lower_tiers_took_reaches_the_operator(client: AsyncClient, operator: Operator) -> None:
    job = Following(
        client.generate(
            token_ids=prompt(PROMPT_TOKENS, seed=33), max_tokens=ENDLESS, ignore_eos=True, pipeline="disk(recent=64)"
        )
    )
    await job.until(lambda: job.tokens > 0)
    earlier, later = (state.recalls for state in await _states(job, operator, 2))
    [before], [after] = earlier.tiers, later.tiers
    assert before.name == after.name == "disk"
    asked = [tier.there_blocks + tier.ahead_blocks + tier.waited_blocks for tier in (before, after)]
    assert 0 < asked[0] < asked[1]
    moved = {(pair.from_tier, pair.to_tier): pair.bytes for pair in later.moved}
    assert moved["device", "disk"] > 0
    listed = await operator.stub.ListWorkers(operator_pb2.ListWorkersRequest())
    whole = {(pair.from_tier, pair.to_tier): pair.bytes for pair in listed.workers[0].state.recalls.moved}
    assert all(whole[way] >= nbytes for way, nbytes in moved.items())
    await job.cancel(client)
