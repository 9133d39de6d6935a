"""Two controllers of one job store, which operators need not tell apart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
import structlog

from controller.peers import reachable
from controller.server import ControllerServer
from controller.settings import SteeringMode
from kvpilot.bus import Bus
from kvpilot.v1 import job_pb2, operator_pb2, operator_pb2_grpc
from tests.conftest import free_port
from tests.controller.scripted import ScriptedWorker, controller, hello, request_state, until
from tests.jobs_help import make_job, next_claims

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def pair(bus: Bus) -> AsyncIterator[tuple[ControllerServer, ControllerServer, Any]]:
    """Controllers a and b, which know of each other, and an operator who calls a."""
    async with controller(bus, name="a") as first, controller(bus, name="b") as second:
        async with asyncio.timeout(10):
            while {card.name for card in await bus.controllers()} != {"a", "b"}:
                await asyncio.sleep(0.01)
        async with grpc.aio.insecure_channel(first.address) as channel:
            yield first, second, operator_pb2_grpc.OperatorServiceStub(channel)  # type: ignore[no-untyped-call]


async def running_job(bus: Bus) -> str:
    """A job that the store knows to be running."""
    job = make_job()
    await bus.submit(job)
    await next_claims(bus, "w0", 1)
    return job.job_id


async def test_lists_are_of_all_controllers(bus: Bus) -> None:
    async with (
        pair(bus) as (first, second, operator),
        ScriptedWorker.attach(first.address, hello("here")) as here,
        ScriptedWorker.attach(second.address, hello("there")) as there,
    ):
        await here.report(request_state("job-1"))
        await there.report(request_state("job-2"))
        await until(lambda: second.steering is not None and second.steering.state.find("job-2") is not None)
        await until(lambda: first.steering is not None and first.steering.state.find("job-1") is not None)
        workers = await operator.ListWorkers(operator_pb2.ListWorkersRequest())
        assert {(one.hello.worker, one.controller) for one in workers.workers} == {("here", "a"), ("there", "b")}
        requests = await operator.ListRequests(operator_pb2.ListRequestsRequest())
        assert {one.state.request_id for one in requests.requests} == {"job-1", "job-2"}
        only = await operator.ListRequests(operator_pb2.ListRequestsRequest(worker="there"))
        assert [one.state.request_id for one in only.requests] == ["job-2"]
        mine = await operator.ListWorkers(operator_pb2.ListWorkersRequest(only_here=True))
        assert [one.hello.worker for one in mine.workers] == ["here"]


async def test_an_override_reaches_the_controller_that_has_the_request(bus: Bus) -> None:
    job_id = await running_job(bus)
    async with pair(bus) as (_, second, operator), ScriptedWorker.attach(second.address) as worker:
        assert second.steering is not None
        second.steering.mode = SteeringMode.OFF
        await worker.report(request_state(job_id))
        await until(lambda: second.steering is not None and second.steering.state.find(job_id) is not None)
        call = operator.OverridePipeline(
            operator_pb2.OverridePipelineRequest(request_id=job_id, pipeline="host(recent=64)", reason="by hand")
        )
        directive = await worker.directive()
        assert (directive.pipeline, directive.reason) == ("host(recent=64)", "by hand")
        await worker.ack(directive)
        assert (await call).ack.request_id == job_id
        await operator.ReleasePipeline(operator_pb2.ReleasePipelineRequest(request_id=job_id))
        assert not second.steering.state.overrides


async def test_what_the_worker_answers_there_is_told_here(bus: Bus) -> None:
    job_id = await running_job(bus)
    async with pair(bus) as (_, second, operator), ScriptedWorker.attach(second.address) as worker:
        await worker.report(request_state(job_id, far_mass=()))
        await until(lambda: second.steering is not None and second.steering.state.find(job_id) is not None)
        bad = operator_pb2.OverridePipelineRequest(request_id=job_id, pipeline="nonsense(")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await operator.OverridePipeline(bad)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "controller b" in str(refused.value.details())
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await operator.ReleasePipeline(operator_pb2.ReleasePipelineRequest(request_id="job-of-nobody"))
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_controller_that_does_not_answer_is_named(bus: Bus) -> None:
    async with pair(bus) as (_, _, operator):
        dead = job_pb2.ControllerCard(name="dead", address=f"127.0.0.1:{free_port()}")
        await bus.show_controller(dead, 60.0)
        listed = await operator.ListWorkers(operator_pb2.ListWorkersRequest())
        assert list(listed.silent_controllers) == ["dead"]
        assert list((await operator.ListBundles(operator_pb2.ListBundlesRequest())).silent_controllers) == ["dead"]
        here = await operator.ListBundles(operator_pb2.ListBundlesRequest(only_here=True))
        assert not here.silent_controllers
        with pytest.raises(grpc.aio.AioRpcError) as missing:
            await operator.ReleasePipeline(operator_pb2.ReleasePipelineRequest(request_id="job-1"))
        assert missing.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "dead (UNAVAILABLE)" in str(missing.value.details())


async def test_the_mode_holds_for_all(bus: Bus) -> None:
    async with pair(bus) as (_, second, operator):
        await operator.SetMode(operator_pb2.SetModeRequest(mode=operator_pb2.MODE_ADVISORY))
        await until(lambda: second.steering is not None and second.steering.mode is SteeringMode.ADVISORY)


async def test_an_override_goes_along_when_its_worker_changes_controllers(bus: Bus) -> None:
    job_id = await running_job(bus)
    async with pair(bus) as (first, second, operator):
        async with ScriptedWorker.attach(first.address) as worker:
            await worker.report(request_state(job_id, far_mass=()))
            await until(lambda: first.steering is not None and first.steering.state.find(job_id) is not None)
            call = operator.OverridePipeline(
                operator_pb2.OverridePipelineRequest(request_id=job_id, pipeline="host(recent=64)")
            )
            directive = await worker.directive()
            while directive.pipeline != "host(recent=64)":  # the planner may have been first
                await worker.ack(directive)
                directive = await worker.directive()
            await worker.ack(directive)
            await call
        assert second.steering is not None
        await until(lambda: job_id in second.steering.state.overrides)
        async with ScriptedWorker.attach(second.address, hello(epochs={job_id: directive.epoch})) as worker:
            await worker.report(request_state(job_id, epoch=directive.epoch, pipeline="full"))  # not obeyed any more
            again = await worker.directive()
            assert (again.pipeline, again.epoch) == ("host(recent=64)", directive.epoch + 1)
            await worker.ack(again)


async def test_a_controller_that_stops_leaves_the_list(bus: Bus) -> None:
    async with controller(bus, name="a"):
        async with asyncio.timeout(10):
            while not await bus.controllers():
                await asyncio.sleep(0.01)
    assert await bus.controllers() == []
    await bus.show_controller(job_pb2.ControllerCard(name="killed", address="x:1"), 0.05)
    async with asyncio.timeout(10):
        while await bus.controllers():
            await asyncio.sleep(0.01)


async def test_an_error_that_nobody_foresaw_does_not_end_the_publishing(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    show, failures = bus.show_controller, []

    async def fails_once(card: job_pb2.ControllerCard, life_s: float) -> None:
        if not failures:
            failures.append(True)
            raise RuntimeError("nobody foresaw this")
        await show(card, life_s)

    monkeypatch.setattr("controller.peers.RENEW_S", 0.01)
    monkeypatch.setattr(bus, "show_controller", fails_once)
    with structlog.testing.capture_logs() as logs:
        async with controller(bus, name="a"), asyncio.timeout(10):
            while not await bus.controllers():
                await asyncio.sleep(0.01)
    [seen] = [entry for entry in logs if entry.get("exc_info")]
    assert (seen["event"], seen["error"]) == ("other controllers may not find this one", "nobody foresaw this")


def test_the_address_that_others_are_told() -> None:
    assert reachable("", "10.0.0.1:7450") == "10.0.0.1:7450"
    assert reachable("controller-0:7450", "0.0.0.0:7450") == "controller-0:7450"
    assert reachable("", "0.0.0.0:7450").endswith(":7450")
    assert not reachable("", "[::]:7450").startswith("[")
