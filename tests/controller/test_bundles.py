"""Hot swap: what is loaded when, what is refused, and streams that take no notice."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
import structlog

from controller.bundles import BundleHolder
from controller.server import ControllerServer
from controller.settings import ControllerSettings, PlannerKind, Role
from kvpilot.bus import Bus
from kvpilot.v1 import operator_pb2, operator_pb2_grpc, policy_pb2
from kvpilot.v1.common_pb2 import Scenario
from models.features import SCHEMA_HASH
from tests.controller.predictors import FakePredictor, FakeSource
from tests.controller.scripted import ScriptedWorker, hello, request_state, until

pytestmark = pytest.mark.anyio

HOUR_S = 3600.0


@asynccontextmanager
async def holding(source: FakeSource, poll_s: float = HOUR_S) -> AsyncIterator[BundleHolder]:
    holder = BundleHolder(source, poll_s)
    await holder.start()
    try:
        yield holder
    finally:
        await holder.stop()


def version(holder: BundleHolder) -> str:
    return holder.active.version if holder.active is not None else ""


async def test_what_is_wanted_is_loaded_before_anything_else() -> None:
    source = FakeSource("v1", "v2", v1=FakePredictor("v1"), v2=FakePredictor("v2"))
    async with holding(source) as holder:
        assert version(holder) == "v1"
        assert holder.shadow is source.store["v2"]


async def test_a_wake_swaps_and_the_shadow_is_promoted_without_a_second_load() -> None:
    source = FakeSource("v1", "v2", v1=FakePredictor("v1"), v2=FakePredictor("v2"))
    async with holding(source) as holder:
        source.point("v2")
        await until(lambda: version(holder) == "v2" and holder.shadow is None)
        assert source.loads == ["v1", "v2"]
        source.point("")
        await until(lambda: holder.active is None)


async def test_a_lost_wake_is_made_up_for() -> None:
    source = FakeSource("v1", v1=FakePredictor("v1"), v2=FakePredictor("v2"))
    async with holding(source, poll_s=0.001) as holder:
        source.point("v2", wake=False)
        await until(lambda: version(holder) == "v2")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (ValueError("self-test failed"), "self-test failed"),
        (FakePredictor("v2", schema_hash="another"), "reads feature schema another"),
        (FakePredictor("v3"), "calls itself 'v3'"),
        (FakePredictor("v2", alpha=0.0), "alpha 0"),
    ],
)
async def test_a_bad_bundle_is_refused_by_name_and_the_active_one_stays(
    bad: FakePredictor | Exception, words: str
) -> None:
    source = FakeSource("v1", v1=FakePredictor("v1"), v2=bad, v4=FakePredictor("v4"))
    with structlog.testing.capture_logs() as logs:
        async with holding(source) as holder:
            source.point("v2", "v2")
            await until(lambda: "v2" in holder.refused)
            assert version(holder) == "v1"
            assert words in holder.refused["v2"]
            source.point("v4")
            await until(lambda: version(holder) == "v4")
            assert holder.refused == {}
    (refused,) = [line for line in logs if line["event"] == "bundle refused"]
    assert (refused["bundle"], refused["log_level"]) == ("v2", "error")


async def test_pointers_out_of_reach_change_nothing() -> None:
    source = FakeSource("v1", v1=FakePredictor("v1"), v2=FakePredictor("v2"))
    async with holding(source) as holder:
        source.reachable = False
        reads = source.reads
        source.point("v2")
        await until(lambda: source.reads > reads)
        assert version(holder) == "v1"
        source.reachable = True
        source.wake.set()
        await until(lambda: version(holder) == "v2")


async def test_a_rollback_takes_effect_at_once_and_holds_while_the_pointer_lags() -> None:
    source = FakeSource("v1", v1=FakePredictor("v1"), v2=FakePredictor("v2"))
    async with holding(source) as holder:
        source.point("v2")
        await until(lambda: version(holder) == "v2")
        assert not holder.rollback("v1", "not active any more")
        assert holder.rollback("v2", "bounds broken")
        assert version(holder) == "v1"
        await until(lambda: source.rollbacks == [("v2", "bounds broken")])
        await holder.refresh()  # the pointer still names v2
        assert version(holder) == "v1"
        source.point("v1")
        await until(lambda: not source.wake.is_set())
        await holder.refresh()
        source.point("v2")  # promoted again, knowingly
        await until(lambda: version(holder) == "v2")


async def test_a_rollback_of_the_first_bundle_leaves_the_rule() -> None:
    source = FakeSource("v1", v1=FakePredictor("v1"))
    async with holding(source) as holder:
        assert holder.rollback("v1", "bounds broken")
        assert holder.active is None


# --- in a controller -------------------------------------------------------------------------------------------------


@asynccontextmanager
async def controller(source: FakeSource, bus: Bus | None = None, **settings: object) -> AsyncIterator[ControllerServer]:
    roles = frozenset({Role.STEERING, Role.OPERATOR})
    fields = {"listen": "127.0.0.1:0", "roles": roles, "coalesce_ms": 0.0, "tick_ms": 1, "bundle_poll_s": HOUR_S}
    server = ControllerServer(ControllerSettings.load(**{**fields, **settings}), bus, bundles=source)
    await server.start()
    try:
        yield server
    finally:
        await server.stop(0)


def learning(worker: str = "w0") -> policy_pb2.Hello:
    said = hello(worker)
    said.feature_schema_hash = SCHEMA_HASH
    return said


async def test_the_bundle_is_named_in_directives_and_shown_to_the_operator() -> None:
    source = FakeSource("v1", v1=FakePredictor("v1"))
    async with (
        controller(source) as server,
        ScriptedWorker.attach(server.address, learning()) as worker,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        await worker.report(request_state())
        directive = await worker.directive()
        assert directive.bundle == "v1"
        assert directive.reason.endswith("bundle v1")
        listed = await operator_pb2_grpc.OperatorServiceStub(channel).ListRequests(operator_pb2.ListRequestsRequest())
        shown = listed.requests[0].decision
        assert (shown.bundle, shown.pipeline) == ("v1", directive.pipeline)
        assert 0 < shown.predicted_divergence < shown.bound <= 0.03
        assert shown.runner_up


async def test_swaps_under_load_drop_no_stream() -> None:
    bundles = {f"v{number}": FakePredictor(f"v{number}") for number in range(6)}
    source = FakeSource("v0", **bundles)
    async with (
        controller(source) as server,
        ScriptedWorker.attach(server.address, learning("w0")) as one,
        ScriptedWorker.attach(server.address, learning("w1")) as other,
    ):
        for number in range(6):
            source.gate.clear()
            source.point(f"v{number}")
            named = set()
            for worker, name in ((one, "a"), (other, "b")):  # while the new one loads, the old one decides
                await worker.report(request_state(f"{name}{number}"))
                directive = await worker.directive()
                assert directive.request_id == f"{name}{number}"
                named.add(directive.bundle)
                await worker.ack(directive)
            assert named == {f"v{max(0, number - 1)}"}
            source.gate.set()
            assert server.bundles is not None
            holder = server.bundles
            await until(lambda holder=holder, number=number: version(holder) == f"v{number}")
        await one.report(request_state("last"))
        assert (await one.directive()).bundle == "v5"
        assert server.steering is not None
        assert sorted(server.steering.state.workers) == ["w0", "w1"]


async def test_a_worker_of_another_schema_is_steered_by_the_rule() -> None:
    source = FakeSource("v1", v1=FakePredictor("v1"))
    async with controller(source) as server, ScriptedWorker.attach(server.address, hello()) as worker:
        await worker.report(request_state())
        directive = await worker.directive()
        assert directive.bundle == ""
        assert "the worker reports none, by the rule: " in directive.reason


async def audited(worker: ScriptedWorker, count: int, request_id: str = "job-1") -> None:
    """A request whose pipeline loses far more than any bound, as so many audits say."""
    await worker.report(request_state(request_id))
    directive = await worker.directive()
    await worker.ack(directive)
    audits = [policy_pb2.Audit(at_token=17, pipeline=directive.pipeline, divergence=9.0)] * count
    await worker.report(
        request_state(
            request_id, generated_tokens=32, pipeline=directive.pipeline, epoch=directive.epoch, audits=audits
        )
    )


async def test_broken_bounds_roll_back_to_the_rule() -> None:
    source = FakeSource("v1", v1=FakePredictor("v1"))
    async with controller(source) as server, ScriptedWorker.attach(server.address, learning()) as worker:
        await audited(worker, 50)
        await until(lambda: len(source.rollbacks) == 1)
        assert source.rollbacks[0][0] == "v1"
        assert "50 of 50 audits" in source.rollbacks[0][1]
        await worker.report(request_state("job-2"))
        assert (await worker.directive()).bundle == ""


async def test_settings_say_when_bounds_are_broken() -> None:
    source = FakeSource("v1", v1=FakePredictor("v1"))
    async with (
        controller(source, guard_least_audits=5, guard_error=1e-2) as server,
        ScriptedWorker.attach(server.address, learning()) as worker,
    ):
        await audited(worker, 5)
        await until(lambda: len(source.rollbacks) == 1)
        assert "5 of 5 audits" in source.rollbacks[0][1]
        assert "0.01 at most" in source.rollbacks[0][1]


async def test_with_automatic_rollback_off_broken_bounds_are_said_and_counted() -> None:
    source = FakeSource("v1", v1=FakePredictor("v1"))
    with structlog.testing.capture_logs() as logs:
        async with (
            controller(source, guard_rollback=False, guard_least_audits=50) as server,
            ScriptedWorker.attach(server.address, learning()) as worker,
        ):
            await audited(worker, 100)
            guard = server.steering.guard
            await until(lambda: guard.audits.total() == 100)
            assert guard.alarms["v1"] == 2
            await worker.report(request_state("job-2"))
            assert (await worker.directive()).bundle == "v1"
            assert source.rollbacks == []
    said = [line for line in logs if line["event"].startswith("bundle stays")]
    assert [(line["bundle"], line["log_level"]) for line in said] == [("v1", "warning")] * 2
    assert "50 of 50 audits" in said[0]["reason"]


async def test_operators_see_what_audits_say_of_each_bundle() -> None:
    source = FakeSource("v1", "v2", v1=FakePredictor("v1"), v2=FakePredictor("v2", alpha=0.2))
    async with (
        controller(source) as server,
        ScriptedWorker.attach(server.address, learning()) as worker,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        operator = operator_pb2_grpc.OperatorServiceStub(channel)
        first, second = (await operator.ListBundles(operator_pb2.ListBundlesRequest())).bundles
        assert (first.version, first.active, first.shadow, first.alpha, first.audits) == ("v1", True, False, 0.1, 0)
        assert (second.version, second.active, second.shadow, second.alpha) == ("v2", False, True, 0.2)
        assert not first.HasField("mean_log_residual")
        await audited(worker, 49)
        guard = server.steering.guard
        await until(lambda: guard.audits.total() == 49)
        first, _ = (await operator.ListBundles(operator_pb2.ListBundlesRequest())).bundles
        assert (first.audits, first.exceeded, first.alarms) == (49, 49, 0)
        assert first.mean_log_residual == pytest.approx(guard.residual("v1"))
        assert first.mean_log_residual > 4  # 9 nats where some hundredths were predicted
        source.point("none such", "v2")
        await until(lambda: "none such" in server.bundles.refused)
        await audited(worker, 1, "job-2")
        await until(lambda: len(source.rollbacks) == 1)
        listed = (await operator.ListBundles(operator_pb2.ListBundlesRequest())).bundles
        assert [(one.version, one.active, one.alarms) for one in listed] == [
            ("v2", False, 0),
            ("none such", False, 0),
            ("v1", False, 1),
        ]
        assert "no bundle none such" in listed[1].refusal


async def test_learned_needs_bundles() -> None:
    settings = ControllerSettings.load(planner=PlannerKind.LEARNED, roles=frozenset({Role.STEERING}))
    with pytest.raises(ValueError, match="planner learned needs a source of bundles"):
        ControllerServer(settings)


async def test_the_rule_takes_no_bundles() -> None:
    source = FakeSource("v1", v1=FakePredictor("v1"))
    async with (
        controller(source, planner=PlannerKind.RULE) as server,
        ScriptedWorker.attach(server.address, learning()) as worker,
    ):
        await worker.report(request_state(scenario=Scenario.SCENARIO_LONG_CONTEXT))
        assert (await worker.directive()).bundle == ""
        assert source.loads == []
