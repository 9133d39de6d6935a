"""The steering stream over real gRPC, with a worker made of messages."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from controller.planner import Decision, WorkerView
from controller.settings import SteeringMode
from controller.state import Outcome
from kvpilot.v1 import operator_pb2, operator_pb2_grpc, policy_pb2, policy_pb2_grpc
from kvpilot.v1.common_pb2 import Orderer
from kvpilot.v1.operator_pb2 import DecisionOutcome
from tests.controller.scripted import ScriptedWorker, controller, hello, request_state, until

pytestmark = pytest.mark.anyio

LONG = "kivi(bits=4)"


async def test_welcome_carries_the_settings() -> None:
    async with (
        controller(report_interval_tokens=8, default_pipeline="int8") as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        worker = ScriptedWorker(channel)
        await worker.send(hello=hello())
        welcome = (await worker.receive()).welcome
        assert (welcome.controller, welcome.report_interval_tokens) == ("test-controller", 8)
        assert welcome.default_pipeline == "int8"
        worker.call.cancel()


@pytest.mark.parametrize(
    ("first", "code"),
    [
        (policy_pb2.SteerRequest(report=policy_pb2.Report()), grpc.StatusCode.FAILED_PRECONDITION),
        (policy_pb2.SteerRequest(), grpc.StatusCode.FAILED_PRECONDITION),
        (policy_pb2.SteerRequest(hello=policy_pb2.Hello(raw_dtype="float32")), grpc.StatusCode.INVALID_ARGUMENT),
        (policy_pb2.SteerRequest(hello=policy_pb2.Hello(worker="w0")), grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_a_stream_must_begin_with_a_usable_hello(first: policy_pb2.SteerRequest, code: grpc.StatusCode) -> None:
    async with controller() as server, grpc.aio.insecure_channel(server.address) as channel:
        call = policy_pb2_grpc.SteeringServiceStub(channel).Steer()
        await call.write(first)
        assert await call.code() is code


async def test_a_second_hello_is_refused() -> None:
    async with controller() as server, ScriptedWorker.attach(server.address) as worker:
        await worker.send(hello=hello())
        assert await worker.ended_with() is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_long_context_is_sent_to_four_bits() -> None:
    async with controller() as server, ScriptedWorker.attach(server.address) as worker:
        await worker.report(request_state())
        directive = await worker.directive()
        assert directive.pipeline == LONG
        assert directive.epoch == 1
        assert directive.ordered_by == Orderer.ORDERER_CONTROLLER
        assert "2016 tokens >= 512" in directive.reason
        assert server.steering is not None
        _, live = server.steering.live("job-1")
        await worker.ack(directive)
        await until(lambda: live.state.pipeline == LONG)
        assert live.sent is None
        assert live.state.last_switch.at_token == 16


async def test_the_latest_decision_is_kept_and_beside_it_the_last_switch() -> None:
    async with controller(tick_ms=1) as server, ScriptedWorker.attach(server.address) as worker:
        await worker.report(request_state())
        directive = await worker.directive()
        assert server.steering is not None
        _, live = server.steering.live("job-1")
        await worker.ack(directive)
        await until(lambda: live.state.pipeline == LONG)
        switch = live.state.last_switch
        for generated in (32, 48):
            await worker.report(request_state(generated_tokens=generated, pipeline=LONG, epoch=0))
        await until(lambda: live.decision is not None and "2048 tokens" in live.decision.reason)
        assert live.decision is not None
        assert (live.decision.pipeline, live.decision.outcome) == (LONG, Outcome.KEEP)
        assert live.state.last_switch == switch
        assert (switch.from_pipeline, switch.to_pipeline) == ("full", LONG)


async def test_epochs_go_on_above_those_in_hello_and_nonces_differ() -> None:
    async with controller() as server, ScriptedWorker.attach(server.address, hello(epochs={"job-1": 7})) as worker:
        await worker.report(request_state(), request_state("job-2", epoch=3))
        directives = {one.request_id: one for one in [await worker.directive(), await worker.directive()]}
        assert {name: one.epoch for name, one in directives.items()} == {"job-1": 8, "job-2": 4}
        assert directives["job-1"].nonce != directives["job-2"].nonce


async def test_one_outstanding_directive_per_request() -> None:
    async with controller(tick_ms=1) as server, ScriptedWorker.attach(server.address) as worker:
        await worker.report(request_state())
        first = await worker.directive()
        for generated in (17, 18, 19):
            await worker.report(request_state(generated_tokens=generated))
        await worker.report(request_state("job-2"))  # planned after them: the next directive must be this one's
        second = await worker.directive()
        assert (first.request_id, second.request_id) == ("job-1", "job-2")


async def test_a_refused_pipeline_is_left_alone_for_a_while() -> None:
    async with (
        controller(tick_ms=1, nack_backoff_ms=60_000) as server,
        ScriptedWorker.attach(server.address) as worker,
    ):
        await worker.report(request_state())
        await worker.nack(await worker.directive(), message="device tier is full")
        assert server.steering is not None
        _, live = server.steering.live("job-1")
        await until(lambda: live.decision is not None and live.decision.refusal == "device tier is full")
        await worker.report(request_state(generated_tokens=48))
        await worker.report(request_state("job-2"))
        assert (await worker.directive()).request_id == "job-2"


async def test_a_refused_pipeline_is_tried_again_after_the_back_off() -> None:
    async with controller(tick_ms=1, nack_backoff_ms=1) as server, ScriptedWorker.attach(server.address) as worker:
        await worker.report(request_state())
        first = await worker.directive()
        await worker.nack(first)
        second = await worker.directive()
        assert (second.pipeline, second.epoch) == (first.pipeline, first.epoch + 1)
        assert second.nonce != first.nonce


async def test_an_invalid_pipeline_is_never_tried_again() -> None:
    async with controller(tick_ms=1, nack_backoff_ms=1) as server, ScriptedWorker.attach(server.address) as worker:
        await worker.report(request_state())
        await worker.nack(await worker.directive(), code=3, message="cannot serve this model")
        for generated in range(17, 40):
            await worker.report(request_state(generated_tokens=generated))
        await worker.report(request_state("job-2"))
        assert (await worker.directive()).request_id == "job-2"


async def test_a_report_from_before_the_switch_does_not_undo_it() -> None:
    async with controller() as server, ScriptedWorker.attach(server.address) as worker:
        await worker.report(request_state())
        await worker.ack(await worker.directive())
        await worker.report(request_state(generated_tokens=32, epoch=0))  # was on its way when the switch was made
        assert server.steering is not None
        _, live = server.steering.live("job-1")
        await until(lambda: live.state.generated_tokens == 32)
        assert live.state.pipeline == LONG
        assert live.state.epoch == 1
        assert live.state.last_switch.to_pipeline == LONG


async def test_an_answer_to_nothing_changes_nothing() -> None:
    async with controller() as server, ScriptedWorker.attach(server.address) as worker:
        await worker.send(ack=policy_pb2.Ack(nonce="never sent", request_id="job-1", epoch=9))
        await worker.send(nack=policy_pb2.Nack(nonce="never sent", request_id="job-1"))
        await worker.report(request_state())
        assert (await worker.directive()).epoch == 1


async def test_ended_requests_are_forgotten() -> None:
    async with controller() as server, ScriptedWorker.attach(server.address) as worker:
        assert server.steering is not None
        state = server.steering.state
        await worker.report(request_state(), request_state("job-2"))
        await until(lambda: state.find("job-2") is not None)
        await worker.report(ended=["job-1"])
        await until(lambda: state.find("job-1") is None)
        assert state.find("job-2") is not None


async def test_the_newer_stream_of_a_name_wins() -> None:
    async with controller() as server, ScriptedWorker.attach(server.address) as older:
        await older.report(request_state())
        await older.directive()
        async with ScriptedWorker.attach(server.address, hello(epochs={"job-1": 1})) as newer:
            assert await older.ended_with() is grpc.StatusCode.ABORTED
            await newer.report(request_state(epoch=1))
            assert (await newer.directive()).epoch == 2
            assert server.steering is not None
            assert list(server.steering.state.workers) == ["w0"]


async def test_a_lost_worker_is_detached() -> None:
    async with controller() as server:
        assert server.steering is not None
        async with ScriptedWorker.attach(server.address):
            assert list(server.steering.state.workers) == ["w0"]
        await until(lambda: server.steering is not None and not server.steering.state.workers)


async def test_stopping_ends_streams_with_unavailable() -> None:
    async with controller() as server, ScriptedWorker.attach(server.address) as worker:
        await server.stop(1)
        assert await worker.ended_with() is grpc.StatusCode.UNAVAILABLE


async def test_off_plans_nothing() -> None:
    async with (
        controller(mode=SteeringMode.OFF, tick_ms=1) as server,
        ScriptedWorker.attach(server.address) as worker,
    ):
        await worker.report(request_state())
        assert server.steering is not None
        steering = server.steering
        await until(lambda: steering.state.find("job-1") is not None)
        _, live = steering.live("job-1")
        steering.set_mode(SteeringMode.ACTIVE)
        directive = await worker.directive()
        assert directive.pipeline == LONG
        assert live.epoch == 1  # the first directive ever


async def test_advisory_decides_but_sends_nothing() -> None:
    async with (
        controller(mode=SteeringMode.ADVISORY, tick_ms=1) as server,
        ScriptedWorker.attach(server.address) as worker,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        operator = operator_pb2_grpc.OperatorServiceStub(channel)
        await worker.report(request_state())
        decision = operator_pb2.Decision()
        async with asyncio.timeout(10):
            while not decision.pipeline:
                requests = (await operator.ListRequests(operator_pb2.ListRequestsRequest())).requests
                decision = requests[0].decision if requests else decision
        assert decision.pipeline == LONG
        assert decision.outcome == DecisionOutcome.DECISION_OUTCOME_ADVISED
        assert requests[0].state.pipeline == "full"
        assert server.steering is not None
        assert server.steering.live("job-1")[1].epoch == 0


async def test_a_failing_planner_ends_nothing() -> None:
    async with controller(tick_ms=1) as server, ScriptedWorker.attach(server.address) as worker:
        await worker.report(request_state(scenario=99, pipeline="no-such-stage"))
        await worker.report(request_state("job-2"))
        assert (await worker.directive()).request_id == "job-2"


class Counting:
    """A planner that decides nothing."""

    def __init__(self) -> None:
        self.plans = 0

    def prepare(self, view: WorkerView) -> None: ...

    def plan(self, view: WorkerView) -> list[Decision]:
        self.plans += 1
        return []


async def test_news_that_comes_as_a_tick_ends_is_planned_for_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    clock, ahead_s, tick_s = loop.time, 0.0, 600.0
    monkeypatch.setattr(loop, "time", lambda: clock() + ahead_s)
    planner = Counting()
    async with controller(tick_ms=1e3 * tick_s) as server, ScriptedWorker.attach(server.address):
        assert server.steering is not None
        steering = server.steering
        steering._planner = planner

        async def pass_a_tick(news: bool) -> None:
            """Has the loop see the tick's end late, and in the same turn, behind it, news where there are any."""
            nonlocal ahead_s
            passed: asyncio.Future[None] = loop.create_future()
            if news:
                loop.call_at(loop.time() + tick_s, steering._replan, "w0")
            loop.call_at(loop.time() + tick_s, passed.set_result, None)
            ahead_s += 2 * tick_s
            await passed
            await until(lambda: not steering._wake.is_set())

        await pass_a_tick(news=False)  # the first plan
        assert planner.plans == 1
        await pass_a_tick(news=False)
        assert planner.plans == 1
        await pass_a_tick(news=True)
        assert planner.plans == 2
