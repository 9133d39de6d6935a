"""A controller's metrics: served by real servers, recorded of scripted workers and real calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest

from controller.server import ControllerServer
from controller.settings import ControllerSettings, PlannerKind, Role
from kvpilot.bus import Bus
from kvpilot.v1 import common_pb2, generation_pb2, generation_pb2_grpc, operator_pb2, operator_pb2_grpc, policy_pb2
from kvpilot.v1.common_pb2 import Scenario
from models.features import SCHEMA_HASH
from tests.conftest import RedisProcess
from tests.controller.predictors import FakePredictor, FakeSource
from tests.controller.scripted import ScriptedWorker, hello, request_state, until
from tests.engines import MODEL
from tests.jobs_help import connected, make_card
from tests.scraping import scrape
from workers import errors

pytestmark = pytest.mark.anyio
STEERING = frozenset({Role.STEERING, Role.OPERATOR})


@asynccontextmanager
async def controller(
    bus: Bus | None = None, source: FakeSource | None = None, **settings: object
) -> AsyncIterator[ControllerServer]:
    fields = {
        "listen": "127.0.0.1:0",
        "metrics_listen": "127.0.0.1:0",
        "roles": STEERING,
        "coalesce_ms": 0.0,
        "planner": PlannerKind.AUTO if source else PlannerKind.RULE,
    }
    server = ControllerServer(ControllerSettings.load(**{**fields, **settings}), bus, bundles=source)
    await server.start()
    try:
        yield server
    finally:
        await server.stop(0)


def learning() -> policy_pb2.Hello:
    said = hello()
    said.feature_schema_hash = SCHEMA_HASH
    return said


async def test_what_bundles_predict_and_audits_measure() -> None:
    source = FakeSource("v1", "v2", v1=FakePredictor("v1"), v2=FakePredictor("v2"))
    async with (
        controller(source=source) as server,
        ScriptedWorker.attach(server.address, learning()) as worker,
    ):
        page = await scrape(server.metrics_address)
        assert page.value("kvpilot_bundle_info", place="active", bundle="v1") == 1
        assert page.value("kvpilot_bundle_info", place="shadow", bundle="v2") == 1
        assert page.value("kvpilot_bundle_alpha") == pytest.approx(0.1)
        assert page.value("kvpilot_bounded_audits_total") == 0
        await worker.report(request_state())
        directive = await worker.directive()
        assert directive.cause != common_pb2.CAUSE_UNSPECIFIED
        await worker.ack(directive)
        assert server.steering is not None
        live = server.steering.state.workers["w0"].requests["job-1"]
        assert live.decision is not None
        forecast = live.decision.forecast
        assert forecast is not None
        audits = [policy_pb2.Audit(at_token=17, pipeline=directive.pipeline, divergence=9.0)] * 50
        state = request_state(generated_tokens=32, pipeline=directive.pipeline, epoch=directive.epoch, audits=audits)
        await worker.report(state)
        await until(lambda: len(source.rollbacks) == 1)
        page = await scrape(server.metrics_address)
    family = forecast.family.value
    assert page.value("kvpilot_predicted_divergence_nats_count", family=family) >= 1
    buckets = [one for one in page.named("kvpilot_predicted_divergence_nats_bucket") if one.labels["family"] == family]
    within = min(float(one.labels["le"]) for one in buckets if one.value >= 1)
    assert forecast.divergence <= within
    assert page.value("kvpilot_bounded_audits_total", bundle="v1", family=family) == 50
    assert page.value("kvpilot_bound_violations_total", bundle="v1", family=family) == 50
    for name in ("guard_alarms", "guard_rollbacks"):
        assert page.value(f"kvpilot_{name}_total") == 1
    assert page.value("kvpilot_bundle_swaps_total") == 2  # v1, and away from it
    assert page.value("kvpilot_bundle_info", place="active") == 0
    assert page.value("kvpilot_decisions_total", decided_by="bundle", outcome="sent") == 1


async def test_nacks_and_directives_without_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("controller.steering.ANSWER_TIMEOUT_S", 0.05)
    async with controller(tick_ms=10.0) as server, ScriptedWorker.attach(server.address) as worker:
        unused = await scrape(server.metrics_address)
        await worker.report(request_state(scenario=Scenario.SCENARIO_LONG_CONTEXT))
        await worker.nack(await worker.directive(), code=8)
        assert server.steering is not None
        state = server.steering.state
        await until(lambda: state.workers["w0"].requests["job-1"].sent is None)
        first = await scrape(server.metrics_address)
        await worker.report(request_state("job-2", scenario=Scenario.SCENARIO_LONG_CONTEXT))
        await worker.directive()
        live = state.workers["w0"].requests["job-2"]
        await until(lambda: live.sent is None)
        second = await scrape(server.metrics_address)
    name = "kvpilot_directive_answers_total"
    assert {
        (one.labels["answer"], one.labels["code"]): one.value for one in unused.named(name)
    } == {  # `increase` sees the first of each
        ("ack", "OK"): 0,
        ("none", "DEADLINE_EXCEEDED"): 0,
        **{("nack", word): 0 for word, code in vars(errors).items() if isinstance(code, int)},
    }
    assert first.value(name, answer="nack", code="RESOURCE_EXHAUSTED") == first.value(name) == 1
    assert second.value(name, answer="none", code="DEADLINE_EXCEEDED") == 1
    assert second.value("kvpilot_directive_answer_seconds_count") == 1
    assert second.value("kvpilot_directives_total", ordered_by="controller") == 2
    assert second.value("kvpilot_steering_streams") == 1


async def test_calls_are_counted_by_their_end(redis_url: str) -> None:
    """One that is refused, one that its client leaves, one that is under way, one that succeeds."""
    async with (
        connected(redis_url) as bus,
        controller(bus, roles=frozenset(Role)) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        await bus.heartbeat(make_card("w1"), [])
        door = generation_pb2_grpc.GenerationServiceStub(channel)
        operator = operator_pb2_grpc.OperatorServiceStub(channel)
        await operator.GetMode(operator_pb2.GetModeRequest())
        with pytest.raises(grpc.aio.AioRpcError):
            await operator.SetMode(operator_pb2.SetModeRequest())
        left, stays = (door.Generate(generation_pb2.GenerateRequest(prompt=text)) for text in ("a", "b"))
        for call in (left, stays):
            await call.read()
        page = await scrape(server.metrics_address)
        assert page.value("kvpilot_grpc_calls_open", method="Generate") == 2
        assert page.value("kvpilot_streams_open") == 2
        assert page.value("kvpilot_queue_jobs", model=MODEL, priority="normal") == 2
        left.cancel()
        open_calls = server.instruments.registry.get_sample_value
        labels = {"service": "kvpilot.v1.GenerationService", "method": "Generate"}
        await until(lambda: open_calls("kvpilot_grpc_calls_open", labels) == 1)
        page = await scrape(server.metrics_address)
        stays.cancel()
    calls = "kvpilot_grpc_calls_total"
    assert page.value(calls, method="GetMode", code="OK") == 1
    assert page.value(calls, method="SetMode", code="INVALID_ARGUMENT") == 1
    assert page.value(calls, method="Generate", code="CANCELLED") == page.value(calls, method="Generate") == 1
    assert page.value("kvpilot_grpc_call_seconds_count", method="Generate") == 1
    assert page.value("kvpilot_streams_open") == 1


async def test_without_its_job_store_the_page_says_so_and_has_all_else(forgetful_redis: RedisProcess) -> None:
    async with (
        connected(forgetful_redis.url) as bus,
        controller(bus, roles=frozenset(Role)) as server,
    ):
        await bus.heartbeat(make_card("w1"), [])
        before = await scrape(server.metrics_address)
        assert before.value("kvpilot_workers_live", model=MODEL) == 1
        assert before.value("kvpilot_store_connects_total") >= 1
        forgetful_redis.kill()
        await asyncio.sleep(0.6)  # scrapes within half a second share a look
        page = await scrape(server.metrics_address)
        assert page.named("kvpilot_queue_jobs") == page.named("kvpilot_workers_live") == []
        failed = "kvpilot_store_errors_total"
        page = await scrape(server.metrics_address)  # errors stand on the page above the look that has failed
        assert page.value(failed, kind="unavailable") > before.value(failed, kind="unavailable")
        assert page.value("kvpilot_steering_mode", mode="active") == 1
        forgetful_redis.start()
        await bus.heartbeat(make_card("w1"), [])
        await asyncio.sleep(0.6)
        again = await scrape(server.metrics_address)
        assert again.value("kvpilot_workers_live", model=MODEL) == 1
        assert again.value("kvpilot_store_connects_total") > before.value("kvpilot_store_connects_total")


async def test_a_role_that_is_not_there_has_no_metrics() -> None:
    async with controller() as server:
        page = await scrape(server.metrics_address)
    assert "kvpilot_steering_streams" in page.families
    assert "kvpilot_queue_jobs" not in page.families
    assert "kvpilot_jobs_accepted" not in page.families


async def test_log_levels_need_a_job_store() -> None:
    async with controller() as server, grpc.aio.insecure_channel(server.address) as channel:
        operator = operator_pb2_grpc.OperatorServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await operator.ListLogLevels(operator_pb2.ListLogLevelsRequest())
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
