"""OperatorService over real gRPC, beside a worker made of messages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from controller.server import ControllerServer
from kvpilot.v1 import operator_pb2, operator_pb2_grpc, policy_pb2
from kvpilot.v1.common_pb2 import Orderer, Scenario
from kvpilot.v1.operator_pb2 import DecisionOutcome, Mode
from tests.controller.scripted import ScriptedWorker, controller, hello, request_state, until, worker_state

pytestmark = pytest.mark.anyio


def exact(**fields: object) -> policy_pb2.RequestState:
    """job-1, which the planner keeps on `full`."""
    return request_state(scenario=Scenario.SCENARIO_ACCURACY_CRITICAL, **fields)


@asynccontextmanager
async def stack(
    **settings: object,
) -> AsyncIterator[tuple[ControllerServer, ScriptedWorker, operator_pb2_grpc.OperatorServiceStub]]:
    """A controller, one worker with the live request job-1 that the planner leaves alone, and an operator's stub."""
    async with (
        controller(**{"tick_ms": 1, **settings}) as server,
        ScriptedWorker.attach(server.address) as worker,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        await worker.report(exact())
        assert server.steering is not None
        state = server.steering.state
        await until(lambda: state.find("job-1") is not None)
        yield server, worker, operator_pb2_grpc.OperatorServiceStub(channel)


def override(
    pipeline: str = "int8", request_id: str = "job-1", reason: str = ""
) -> operator_pb2.OverridePipelineRequest:
    return operator_pb2.OverridePipelineRequest(request_id=request_id, pipeline=pipeline, reason=reason)


async def test_lists_workers_and_requests() -> None:
    async with stack() as (_, _, operator):
        workers = (await operator.ListWorkers(operator_pb2.ListWorkersRequest())).workers
        assert [worker.hello.worker for worker in workers] == ["w0"]
        assert workers[0].hello == hello()
        assert workers[0].state.tiers[0].name == "device"
        assert workers[0].attach_time.seconds <= workers[0].report_time.seconds
        requests = (await operator.ListRequests(operator_pb2.ListRequestsRequest())).requests
        assert [(one.worker, one.state.request_id, one.overridden) for one in requests] == [("w0", "job-1", False)]
        other = await operator.ListRequests(operator_pb2.ListRequestsRequest(worker="w1"))
        assert not other.requests


async def test_what_lower_tiers_took_comes_through_as_reported() -> None:
    async with stack() as (server, worker, operator):
        assert server.steering is not None
        attached = server.steering.state.workers["w0"]
        state = exact()
        state.recalls.tiers.add(name="disk", there_blocks=3, waited_blocks=1)
        state.recalls.moved.add(from_tier="disk", to_tier="host", bytes=1 << 40)
        load = worker_state()
        load.recalls.CopyFrom(state.recalls)
        await worker.send(report=policy_pb2.Report(sequence_number=9, worker=load, requests=[state]))
        await until(lambda: bool(attached.state.recalls.tiers))
        (told,) = (await operator.ListWorkers(operator_pb2.ListWorkersRequest())).workers
        assert told.state == load
        (request,) = (await operator.ListRequests(operator_pb2.ListRequestsRequest())).requests
        assert request.state == state


async def test_an_override_returns_the_workers_answer_and_pins() -> None:
    async with stack() as (_, worker, operator):
        call = operator.OverridePipeline(override("int8", reason="to see"))
        directive = await worker.directive()
        assert (directive.pipeline, directive.reason) == ("int8", "to see")
        assert directive.ordered_by == Orderer.ORDERER_OPERATOR
        await worker.ack(directive)
        assert (await call).ack.nonce == directive.nonce
        for generated in range(20, 40):  # the planner would bring it back to full
            await worker.report(exact(generated_tokens=generated, pipeline="int8", epoch=directive.epoch))
        (one,) = (await operator.ListRequests(operator_pb2.ListRequestsRequest())).requests
        assert one.overridden
        assert one.decision.outcome == DecisionOutcome.DECISION_OUTCOME_APPLIED

        await operator.ReleasePipeline(operator_pb2.ReleasePipelineRequest(request_id="job-1"))
        await worker.report(exact(generated_tokens=60, pipeline="int8", epoch=directive.epoch))
        released = await worker.directive()
        assert (released.pipeline, released.epoch) == ("full", directive.epoch + 1)
        assert released.ordered_by == Orderer.ORDERER_CONTROLLER


async def test_an_override_by_a_recipes_name_goes_out_as_its_pipeline() -> None:
    async with stack() as (server, worker, operator):
        call = operator.OverridePipeline(override("snapkv-int4"))
        directive = await worker.directive()
        assert directive.pipeline == "snapkv(keep=0.5) | kivi(bits=4)"
        assert server.steering.state.overrides["job-1"].pipeline == directive.pipeline
        await worker.ack(directive)
        await call


async def test_an_override_waits_for_the_outstanding_directive() -> None:
    async with stack() as (_, worker, operator):
        await worker.report(request_state("job-2"))
        planned = await worker.directive()
        call = operator.OverridePipeline(override("int8", "job-2"))
        await operator.GetMode(operator_pb2.GetModeRequest())  # one more round trip: nothing was sent meanwhile
        await worker.ack(planned)
        pinned = await worker.directive()
        assert (pinned.pipeline, pinned.epoch) == ("int8", planned.epoch + 1)
        await worker.ack(pinned)
        await call


async def test_an_override_holds_when_another_worker_takes_the_request_over() -> None:
    async with stack() as (server, worker, operator):
        call = operator.OverridePipeline(override("int8"))
        first = await worker.directive()
        await worker.ack(first)
        await call
        async with ScriptedWorker.attach(server.address, hello("w1")) as other:
            await other.report(exact())
            again = await other.directive()
            assert (again.pipeline, again.ordered_by) == ("int8", Orderer.ORDERER_OPERATOR)
            assert again.epoch > first.epoch


async def test_overrides_go_out_in_mode_off() -> None:
    async with stack(mode="off") as (_, worker, operator):
        call = operator.OverridePipeline(override())
        await worker.ack(await worker.directive())
        await call


async def test_a_refused_override_carries_the_workers_status_and_pins_nothing() -> None:
    async with stack() as (server, worker, operator):
        call = operator.OverridePipeline(override())
        await worker.nack(await worker.directive(), code=8, message="device tier is full")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert caught.value.details() == "device tier is full"
        assert server.steering is not None
        assert not server.steering.state.overrides


async def test_an_override_without_an_answer_ends_with_deadline_exceeded_and_holds() -> None:
    async with stack(override_timeout_ms=20) as (server, worker, operator):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await operator.OverridePipeline(override())
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert server.steering is not None
        assert server.steering.state.overrides["job-1"].pipeline == "int8"
        await worker.ack(await worker.directive())


async def test_an_override_of_a_request_that_ends_is_not_found() -> None:
    async with stack() as (_, worker, operator):
        call = operator.OverridePipeline(override())
        await worker.directive()
        await worker.report(ended=["job-1"])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("pipeline", "words"),
    [
        ("", "expected a stage name"),
        ("window(recent=", "expected a value"),
        ("telepathy", "unknown stage 'telepathy'; known are expected_attention, fp8, full, h2o"),
        ("window(width=3)", "unknown parameter 'width'"),
        ("window(recent=0.5)", "not of type int"),
        ("kivi(bits=true)", "not of type int"),
    ],
)
async def test_bad_pipelines_are_invalid_arguments(pipeline: str, words: str) -> None:
    async with stack() as (_, _, operator):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await operator.OverridePipeline(override(pipeline))
        status = rpc_status.from_call(caught.value)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        bad = error_details_pb2.BadRequest()
        assert status.details[0].Unpack(bad)
        assert bad.field_violations[0].field == "pipeline"
        assert words in bad.field_violations[0].description


async def test_requests_that_are_not_live_are_not_found() -> None:
    async with stack() as (_, _, operator):
        for call in (
            operator.OverridePipeline(override(request_id="job-9")),
            operator.ReleasePipeline(operator_pb2.ReleasePipelineRequest(request_id="job-9")),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_newer_override_replaces_the_one_that_waits() -> None:
    async with stack() as (_, worker, operator):
        first = asyncio.ensure_future(operator.OverridePipeline(override("int8")))
        directive = await worker.directive()
        second = operator.OverridePipeline(override("host"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await first
        assert caught.value.code() is grpc.StatusCode.ABORTED
        await worker.ack(directive)
        newer = await worker.directive()
        assert newer.pipeline == "host"
        await worker.ack(newer)
        assert (await second).ack.nonce == newer.nonce


async def test_the_mode_can_be_read_and_set() -> None:
    async with stack() as (_, _, operator):
        assert (await operator.GetMode(operator_pb2.GetModeRequest())).mode == Mode.MODE_ACTIVE
        answer = await operator.SetMode(operator_pb2.SetModeRequest(mode=Mode.MODE_OFF))
        assert answer.previous == Mode.MODE_ACTIVE
        assert (await operator.GetMode(operator_pb2.GetModeRequest())).mode == Mode.MODE_OFF
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await operator.SetMode(operator_pb2.SetModeRequest())
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
