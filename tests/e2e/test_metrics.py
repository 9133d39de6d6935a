"""Real processes, scraped: every metric is there with its labels, and says what happened."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from cli import tether
from kvpilot.client import AsyncClient
from kvpilot.errors import KvpilotError
from kvpilot.metrics import Kind, Part, metrics_of
from kvpilot.v1 import operator_pb2
from tests.e2e.serving import TIMEOUT_S, Following, Running, operator_of, serving
from tests.scraping import Page, scrape

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.timeout(4 * TIMEOUT_S),
    pytest.mark.skipif(not tether.SUPPORTED, reason="needs Linux"),
]
QUANTISED = "kivi(bits=4,shadow=true)"
TARGETS = ("full", "kivi(bits=2,shadow=true)", "host(recent=64)")
PROMPT = "The keeper of the lighthouse wrote in his book: "
MODEL = "tiny"
EMPTY_UNTIL = {
    "kvpilot_bundle_info": "a bundle is active",
    "kvpilot_bundle_alpha": "a bundle is active",
    "kvpilot_bounded_audits_total": "a bundle's decision is audited",
    "kvpilot_bound_violations_total": "a bundle's decision is audited",
    "kvpilot_predicted_divergence_nats": "a bundle decides",
    "kvpilot_recall_blocks_total": "a tier is asked for blocks",
}
"""Metrics without a sample in a stack that the rule steers; their own tests show these."""


@pytest.fixture(scope="module")
async def stack(
    anyio_backend: str, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Running]:
    """A stack of its own: what it counts is what these tests do. Steered by nobody, so that switches are theirs."""
    settings = {"worker": {"audit_every_tokens": 32, "audit_budget": 100.0}, "mode": "off"}
    async with serving(tiny_folder, tmp_path_factory.mktemp("metrics"), **settings) as running:
        yield running


async def worker_page(stack: Running) -> Page:
    return await scrape(stack.stack.metrics["worker-0"])


async def controller_page(stack: Running) -> Page:
    return await scrape(stack.stack.metrics["controller"])


async def until(look: Callable[[], object]) -> None:
    """Waits for what comes with the next report."""
    async with asyncio.timeout(TIMEOUT_S):
        while not await look():  # type: ignore[misc]
            await asyncio.sleep(0.02)


async def test_numbers_equal_what_happened(stack: Running) -> None:
    before = await worker_page(stack)
    async with AsyncClient(stack.endpoint) as client, operator_of(stack) as operator:
        plain = await client.complete(PROMPT, max_tokens=40, ignore_eos=True)
        job = Following(client.generate(PROMPT * 4, max_tokens=900, ignore_eos=True, pipeline=QUANTISED))
        await job.more(80)  # an audit begins within 32 tokens, where the job's name says, and takes 32 at most
        acks = [
            await operator.override(job.job_id, text)
            for text in ("full", "kivi(bits=2,shadow=true)", "host(recent=64)")
        ]
        with contextlib.suppress(Exception):  # refused: it is counted as such
            await operator.override(job.job_id, "snapkv(keep=0.5) | nosuchstage")
        steered = await job.rest()
        gone = Following(client.generate(PROMPT, max_tokens=5000, ignore_eos=True))
        await gone.more(3)
        cancelled = await gone.cancel(client)
    results = (plain, steered, cancelled)

    calls = {"service": "kvpilot.v1.GenerationService", "method": "Generate"}

    async def all_over() -> bool:  # for the worker, and for the front door, which may know it after its client
        page, door = await worker_page(stack), await controller_page(stack)
        ended = page.value("kvpilot_requests_total") - before.value("kvpilot_requests_total")
        answered = door.value("kvpilot_grpc_calls_total", **calls)
        return (ended, page.value("kvpilot_requests_running"), answered) == (3, 0, 3)

    await until(all_over)
    worker, controller = await worker_page(stack), await controller_page(stack)

    def rose(name: str, **labels: str) -> float:
        return worker.value(name, **labels) - before.value(name, **labels)

    delivered = sum(len(result.token_ids) for result in results)
    assert rose("kvpilot_generated_tokens_total", model=MODEL) == delivered
    assert controller.value("kvpilot_delivered_tokens_total") == delivered
    assert rose("kvpilot_prompt_tokens_total") == sum(result.usage.prompt_tokens for result in results)
    assert rose("kvpilot_reused_prompt_tokens_total") == sum(result.usage.reused_prompt_tokens for result in results)
    assert rose("kvpilot_requests_total", outcome="length") == 2
    assert rose("kvpilot_requests_total", outcome="cancelled") == 1
    assert rose("kvpilot_time_to_first_token_seconds_count") == 3
    assert rose("kvpilot_inter_token_seconds_count") == delivered - 3
    assert rose("kvpilot_jobs_claimed_total", kind="fresh") == 3

    taken_s = sum(result.timings.queued_ms + result.timings.prefill_ms for result in results) / 1e3
    first_s = rose("kvpilot_time_to_first_token_seconds_sum")
    assert first_s == pytest.approx(taken_s, abs=0.2 + 0.5 * taken_s)
    decoded_s = sum(result.timings.decode_ms for result in results) / 1e3
    assert rose("kvpilot_inter_token_seconds_sum") == pytest.approx(decoded_s, abs=0.2 + 0.1 * decoded_s)
    assert rose("kvpilot_request_decode_seconds_sum") == pytest.approx(
        rose("kvpilot_inter_token_seconds_sum"), rel=1e-6
    )
    assert rose("kvpilot_request_duration_seconds_sum") >= first_s + rose("kvpilot_request_decode_seconds_sum") - 1e-6
    assert controller.value("kvpilot_first_token_delivery_seconds_sum", model=MODEL) >= 0.5 * first_s

    assert len(acks) == len(steered.switches) == 3
    switches = {"model": MODEL, "ordered_by": "operator", "reason": "operator"}
    assert rose("kvpilot_switches_total", **switches, outcome="applied") == len(acks)
    assert controller.value("kvpilot_directive_answers_total", answer="ack", code="OK") == len(acks)
    assert controller.value("kvpilot_directives_total", ordered_by="operator", reason="operator") == len(acks)
    stalls_s = sum(switch.stall_ms for switch in steered.switches) / 1e3
    assert rose("kvpilot_switch_stall_seconds_count") == len(acks)
    assert rose("kvpilot_switch_stall_seconds_sum") == pytest.approx(stalls_s, rel=1e-6)
    freed = sum(max(0, one.before.device_bytes - one.after.device_bytes) for one in steered.switches)
    assert rose("kvpilot_switch_device_bytes_total", direction="freed") == freed
    assert rose("kvpilot_audits_total") == rose("kvpilot_measured_divergence_nats_count") > 0
    assert rose("kvpilot_measured_divergence_nats_count", family="quantise") == rose("kvpilot_audits_total")
    assert rose("kvpilot_audit_seconds_total") > 0
    assert worker.value("kvpilot_requests_by_pipeline") == 0

    assert controller.value("kvpilot_grpc_calls_total", **calls, code="OK") == 3
    assert controller.value("kvpilot_grpc_call_seconds_count", **calls) == 3
    assert controller.value("kvpilot_grpc_calls_open", **calls) == 0
    assert controller.value("kvpilot_jobs_accepted_total", model=MODEL, kind="created") == 3


async def test_gauges_follow_a_live_request(stack: Running) -> None:
    async with AsyncClient(stack.endpoint) as client, operator_of(stack) as operator:
        job = Following(client.generate(PROMPT * 8, max_tokens=12_000, ignore_eos=True, pipeline=QUANTISED))
        await job.more(80)

        async def shown() -> bool:
            page = await worker_page(stack)
            quantised = page.value("kvpilot_cache_bytes", tier="device", format="int4")
            by = page.value("kvpilot_requests_by_pipeline", family="quantise", loss_class="recoverable")
            return bool(quantised and by == 1 and page.value("kvpilot_shadow_bytes"))

        await until(shown)
        page, controller = await worker_page(stack), await controller_page(stack)
        [live] = (await operator.live()).values()
        assert page.value("kvpilot_requests_running") == page.value("kvpilot_jobs_held") == 1
        used = page.value("kvpilot_tier_used_bytes", tier="device")
        assert 0 < used <= page.value("kvpilot_tier_budget_bytes", tier="device")
        assert page.value("kvpilot_request_bytes", tier="device") <= page.value("kvpilot_full_cache_bytes")
        assert live.state.cache.full_cache_bytes > 0
        assert page.value("kvpilot_worker_steered") == 1
        assert controller.value("kvpilot_steering_streams") == 1
        assert controller.value("kvpilot_steering_mode", mode="off") == 1
        assert controller.value("kvpilot_steering_mode") == 1
        assert controller.value("kvpilot_streams_open") == 1
        assert controller.value("kvpilot_workers_live", model=MODEL) == 1
        await job.cancel(client)


async def test_waiting_jobs_are_seen_in_the_queue(stack: Running) -> None:
    """The worker holds eight; what comes on top waits in the job store, the longer the older."""
    async with AsyncClient(stack.endpoint) as client:
        queue = {"model": MODEL, "priority": "normal"}
        jobs = [Following(client.generate(f"{n} {PROMPT}", max_tokens=12_000, ignore_eos=True)) for n in range(8)]
        try:
            for job in jobs:
                await job.more(1)
            waiting = [Following(client.generate(PROMPT, max_tokens=4, ignore_eos=True)) for _ in range(2)]
            for job in waiting:
                await job.next()
            page = await queues_seen(stack, 2)
            age_s = page.value("kvpilot_queue_oldest_age_seconds", **queue)
            assert page.value("kvpilot_queue_jobs", **queue) == 2
            assert 0 <= age_s < TIMEOUT_S

            async def older() -> bool:
                return (await controller_page(stack)).value("kvpilot_queue_oldest_age_seconds") > age_s

            await until(older)
        finally:
            for job in jobs:
                await job.cancel(client)
        for job in waiting:
            assert len((await job.rest()).token_ids) == 4
        assert (await queues_seen(stack, 0)).value("kvpilot_queue_oldest_age_seconds") == 0


async def queues_seen(stack: Running, jobs: int) -> Page:
    """A page on which so many jobs wait: scrapes within half a second share a look at the queues."""
    async with asyncio.timeout(TIMEOUT_S):
        while (page := await controller_page(stack)).value("kvpilot_queue_jobs") != jobs:
            await asyncio.sleep(0.02)
    return page


async def test_refused_calls_are_counted_by_code(stack: Running) -> None:
    before = await controller_page(stack)
    async with AsyncClient(stack.endpoint) as client:
        with pytest.raises(KvpilotError):
            await client.complete(PROMPT, temperature=-1.0)
        with pytest.raises(KvpilotError):
            await client.get("job-nobody")
    calls = [("Generate", "INVALID_ARGUMENT"), ("Get", "NOT_FOUND")]

    def counted(page: Page) -> list[float]:
        name, service = "kvpilot_grpc_calls_total", "kvpilot.v1.GenerationService"
        return [page.value(name, service=service, method=method, code=code) for method, code in calls]

    wanted = [count + 1 for count in counted(before)]

    async def told() -> bool:  # a call is counted once it is over, which its client may know first
        now = counted(await controller_page(stack))
        assert all(count <= most for count, most in zip(now, wanted, strict=True))
        return now == wanted

    await until(told)


async def test_directives_of_the_planner_are_counted_with_what_they_are_for(stack: Running) -> None:
    before, worker_before = await controller_page(stack), await worker_page(stack)
    async with AsyncClient(stack.endpoint) as client, operator_of(stack) as operator:
        await operator.set_mode(operator_pb2.MODE_ACTIVE)
        result = await client.complete(PROMPT * 30, max_tokens=400, ignore_eos=True, scenario="edge")
        await operator.set_mode(operator_pb2.MODE_OFF)
    ordered = [switch for switch in result.switches if switch.ordered_by == 2]
    assert ordered, "the planner has not moved it"
    page, worker = await controller_page(stack), await worker_page(stack)

    def rose(name: str, **labels: str) -> float:
        return page.value(name, **labels) - before.value(name, **labels)

    name = "kvpilot_switches_total"
    applied = {"ordered_by": "controller", "outcome": "applied"}
    assert worker.value(name, **applied) - worker_before.value(name, **applied) == len(ordered)
    assert worker.value(name, **applied, reason="other") == 0
    assert rose("kvpilot_directive_answers_total", answer="ack") == len(ordered)
    assert rose("kvpilot_directives_total", ordered_by="controller") >= len(ordered)
    assert rose("kvpilot_decisions_total", decided_by="rule", outcome="sent") == rose("kvpilot_directives_total")
    assert rose("kvpilot_plan_seconds_count") > 0
    assert rose("kvpilot_planned_requests_total") > 0
    assert rose("kvpilot_decisions_total", outcome="keep") > 0


async def test_every_metric_is_exposed_with_its_labels(stack: Running) -> None:
    """After the tests above, which make all of them happen that can in such a stack."""
    pages = {"worker": await worker_page(stack), "controller": await controller_page(stack)}
    parts = {
        "worker": metrics_of(Part.PROCESS, Part.WORKER),
        "controller": metrics_of(Part.PROCESS, Part.SERVER, Part.GENERATION, Part.STEERING),
    }
    for process, defined in parts.items():
        page = pages[process]
        for metric in defined:
            family = page.families.get(metric.name.removesuffix("_total"))
            assert family is not None, f"{process} does not expose {metric.name}"
            assert (family.type, family.documentation) == (metric.kind.value, metric.help)
            if metric.name not in EMPTY_UNTIL:
                assert family.samples, f"{metric.name} has no sample"
            for sample in family.samples:
                extra = {"le"} if metric.kind is Kind.HISTOGRAM else set()
                assert set(sample.labels) - extra == set(metric.labels)
        ours = {name for name in page.families if name.startswith("kvpilot_")}
        assert ours == {metric.name.removesuffix("_total") for metric in defined}


async def test_prometheus_is_told_where_to_look(stack: Running) -> None:
    targets = json.loads(stack.stack.targets_file.read_text())
    assert {entry["labels"]["name"] for entry in targets} == {"controller", "worker-0"}
    for entry in targets:
        [address] = entry["targets"]
        page = await scrape(address)
        assert page.named("kvpilot_build_info")[0].labels["process"] == entry["labels"]["name"]
