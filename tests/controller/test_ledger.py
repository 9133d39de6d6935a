"""What operators ordered outlives the controller: restarts, outages of the job store, and requests that end unseen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import grpc
import pytest
import structlog

from controller import ledger
from controller.server import ControllerServer
from controller.settings import SteeringMode
from controller.state import Override
from kvpilot.bus import Append, Bus
from kvpilot.v1 import common_pb2, job_pb2, operator_pb2, operator_pb2_grpc, policy_pb2
from kvpilot.v1.common_pb2 import Orderer, Scenario
from kvpilot.v1.operator_pb2 import Mode
from tests.conftest import RedisProcess
from tests.controller.scripted import WAIT_S, ScriptedWorker, controller, hello, request_state, until
from tests.jobs_help import FAST_BUS, connected, finished_event, make_job, next_claims

pytestmark = pytest.mark.anyio

PINNED = job_pb2.Override(pipeline="int8", reason="to see")


@pytest.fixture
async def job_id(bus: Bus) -> str:
    """A job that the store knows and that has not ended."""
    return (await bus.submit(make_job()))[0]


def exact(request_id: str, ordered_by: Orderer | None = None, **fields: object) -> policy_pb2.RequestState:
    """A request that the planner keeps on `full`, or brings there."""
    state = request_state(request_id, scenario=Scenario.SCENARIO_ACCURACY_CRITICAL, **fields)
    if ordered_by is not None:
        state.last_switch.CopyFrom(common_pb2.Switch(to_pipeline=state.pipeline, ordered_by=ordered_by))
    return state


@asynccontextmanager
async def running(bus: Bus | None, **settings: object) -> AsyncIterator[tuple[ControllerServer, Operator]]:
    """A controller with this job store, and an operator who has its ear."""
    async with (
        controller(bus, **{"tick_ms": 1, **settings}) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        yield server, Operator(channel)


class Operator:
    """The calls of these tests."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.stub = operator_pb2_grpc.OperatorServiceStub(channel)

    async def set_mode(self, mode: Mode) -> None:
        await self.stub.SetMode(operator_pb2.SetModeRequest(mode=mode))

    async def mode(self) -> Mode:
        return (await self.stub.GetMode(operator_pb2.GetModeRequest())).mode

    async def pin(self, worker: ScriptedWorker, request_id: str, pipeline: str = "int8") -> policy_pb2.Directive:
        """Overrides a live request; its worker obeys."""
        request = operator_pb2.OverridePipelineRequest(request_id=request_id, pipeline=pipeline, reason="to see")
        call = self.stub.OverridePipeline(request)
        directive = await worker.directive()
        await worker.ack(directive)
        await call
        return directive

    async def release(self, request_id: str) -> None:
        await self.stub.ReleasePipeline(operator_pb2.ReleasePipelineRequest(request_id=request_id))

    async def overridden(self) -> dict[str, bool]:
        requests = (await self.stub.ListRequests(operator_pb2.ListRequestsRequest())).requests
        return {one.state.request_id: one.overridden for one in requests}


async def until_true(condition: Callable[[], Awaitable[bool]]) -> None:
    """Asks until the answer is yes."""
    async with asyncio.timeout(WAIT_S):
        while not await condition():
            await asyncio.sleep(0.005)


async def kept(bus: Bus) -> tuple[Mode | None, dict[str, str]]:
    orders = await bus.orders()
    return orders.mode, {request_id: one.pipeline for request_id, one in orders.overrides.items()}


def is_kept(bus: Bus, mode: Mode | None, overrides: dict[str, str]) -> Callable[[], Awaitable[bool]]:
    async def holds() -> bool:
        return await kept(bus) == (mode, overrides)

    return holds


async def live(server: ControllerServer, worker: ScriptedWorker, *states: policy_pb2.RequestState) -> None:
    """Reports requests and waits until the controller knows them."""
    await worker.report(*states)
    assert server.steering is not None
    steering = server.steering
    await until(lambda: all(steering.state.find(state.request_id) for state in states))


# ---- restarts


async def test_calls_return_when_the_store_has_the_order(bus: Bus, job_id: str) -> None:
    async with running(bus) as (server, operator), ScriptedWorker.attach(server.address) as worker:
        await live(server, worker, exact(job_id))
        await operator.set_mode(Mode.MODE_ADVISORY)
        assert await kept(bus) == (Mode.MODE_ADVISORY, {})
        await operator.pin(worker, job_id)
        assert (await bus.orders()).overrides == {job_id: PINNED}
        await operator.release(job_id)
        assert await kept(bus) == (Mode.MODE_ADVISORY, {})


async def test_an_obeyed_override_holds_over_a_restart_and_is_not_sent_again(bus: Bus, job_id: str) -> None:
    async with running(bus) as (server, operator), ScriptedWorker.attach(server.address) as worker:
        await live(server, worker, exact(job_id))
        epoch = (await operator.pin(worker, job_id)).epoch
    said = hello(epochs={job_id: epoch})
    async with running(bus) as (server, operator), ScriptedWorker.attach(server.address, said) as worker:
        obeying = exact(job_id, Orderer.ORDERER_OPERATOR, pipeline="int8", epoch=epoch)
        await live(server, worker, obeying)
        await worker.report(request_state("job-2"))  # a directive for the first would come before this one's
        assert (await worker.directive()).request_id == "job-2"
        assert await operator.overridden() == {job_id: True, "job-2": False}

        await operator.release(job_id)
        obeying.generated_tokens = 60
        await worker.report(obeying)
        back = await worker.directive()
        assert (back.request_id, back.pipeline, back.epoch) == (job_id, "full", epoch + 1)


async def test_an_override_that_is_not_obeyed_yet_is_sent_with_a_higher_epoch(bus: Bus, job_id: str) -> None:
    await bus.keep_orders(None, {job_id: PINNED})
    async with (
        running(bus) as (server, operator),
        ScriptedWorker.attach(server.address, hello(epochs={job_id: 7})) as worker,
    ):
        await worker.report(exact(job_id, Orderer.ORDERER_CONTROLLER, epoch=7))
        directive = await worker.directive()
        assert (directive.request_id, directive.pipeline, directive.reason) == (job_id, "int8", "to see")
        assert directive.ordered_by == Orderer.ORDERER_OPERATOR
        assert directive.epoch == 8
        await worker.ack(directive)
        await worker.report(exact(job_id, Orderer.ORDERER_OPERATOR, pipeline="int8", epoch=8))
        await worker.report(request_state("job-2"))
        assert (await worker.directive()).request_id == "job-2"
        assert (await operator.overridden())[job_id]


async def test_the_kept_mode_wins_over_the_configured_one(bus: Bus) -> None:
    async with running(bus, mode="advisory") as (server, operator):
        assert await operator.mode() == Mode.MODE_ADVISORY  # none is kept yet
        await operator.set_mode(Mode.MODE_OFF)
    with structlog.testing.capture_logs() as logs:
        async with running(bus, mode="active") as (server, operator):
            assert await operator.mode() == Mode.MODE_OFF
            assert server.steering is not None
            assert server.steering.mode is SteeringMode.OFF
    assert [(one["kept"], one["configured"]) for one in logs if "kept mode" in one["event"]] == [("off", "active")]
    assert [one["mode"] for one in logs if one["event"] == "serving"] == ["off"]


async def test_a_configured_mode_is_not_kept(bus: Bus) -> None:
    async with running(bus, mode="off"):
        pass
    assert await kept(bus) == (None, {})


async def test_without_a_store_orders_end_with_the_process(redis_url: str) -> None:
    async with running(None) as (_, operator):
        await operator.set_mode(Mode.MODE_OFF)
    async with running(None) as (_, operator):
        assert await operator.mode() == Mode.MODE_ACTIVE


# ---- the end of a request


async def test_an_override_is_removed_when_the_worker_says_that_its_request_ended(bus: Bus, job_id: str) -> None:
    async with running(bus) as (server, operator), ScriptedWorker.attach(server.address) as worker:
        await live(server, worker, exact(job_id))
        await operator.pin(worker, job_id)
        await finish(bus)
        await worker.report(ended=[job_id])
        await until_true(is_kept(bus, None, {}))
        assert server.steering is not None
        assert not server.steering.state.overrides


async def test_an_override_follows_a_request_that_its_worker_hands_back(bus: Bus, job_id: str) -> None:
    """A worker that stops reports its requests as ended; the store knows better."""
    async with running(bus) as (server, operator):
        assert server.steering is not None
        async with ScriptedWorker.attach(server.address) as worker:
            await live(server, worker, exact(job_id))
            await operator.pin(worker, job_id)
            await worker.report(ended=[job_id])
            await until(lambda: server.steering.state.find(job_id) is None)
        await server.steering.ledger.settle()
        async with ScriptedWorker.attach(server.address, hello("w1")) as other:
            await other.report(exact(job_id))
            directive = await other.directive()
            assert (directive.pipeline, directive.ordered_by) == ("int8", Orderer.ORDERER_OPERATOR)
        assert await kept(bus) == (None, {job_id: "int8"})


async def test_a_refused_override_is_not_kept(bus: Bus, job_id: str) -> None:
    async with running(bus) as (server, operator), ScriptedWorker.attach(server.address) as worker:
        await live(server, worker, exact(job_id))
        call = operator.stub.OverridePipeline(operator_pb2.OverridePipelineRequest(request_id=job_id, pipeline="int8"))
        await worker.nack(await worker.directive())
        with pytest.raises(grpc.aio.AioRpcError):
            await call
        await until_true(is_kept(bus, None, {}))


async def finish(bus: Bus) -> None:
    """Ends the one job in the store."""
    (claim,) = await next_claims(bus, "w9", 1)
    await bus.append([Append(claim, [finished_event()])])


async def test_overrides_of_finished_and_unknown_jobs_are_dropped_at_the_start(bus: Bus, job_id: str) -> None:
    await finish(bus)
    alive, _ = await bus.submit(make_job())
    await bus.keep_orders(None, {job_id: PINNED, alive: PINNED, "job-gone": PINNED})
    async with running(bus) as (server, _):
        assert server.steering is not None
        assert server.steering.state.overrides == {alive: Override("int8", "to see", restored=True)}
        assert await kept(bus) == (None, {alive: "int8"})


async def test_overrides_of_requests_that_end_unseen_are_dropped_in_time(
    bus: Bus, job_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "SWEEP_S", 0.01)
    await bus.keep_orders(None, {job_id: PINNED})
    async with running(bus) as (server, _):
        assert server.steering is not None
        overrides = server.steering.state.overrides
        assert list(overrides) == [job_id]
        await bus.keep_orders(None, {"job-gone": PINNED})  # another controller's, which has died since
        await until_true(is_kept(bus, None, {job_id: "int8"}))
        await finish(bus)
        await until_true(is_kept(bus, None, {}))
        assert not overrides


# ---- a store that is not there


async def test_orders_given_in_an_outage_hold_at_once_and_are_kept_later(durable_redis: RedisProcess) -> None:
    durable_redis.write_at_once()
    async with connected(durable_redis.url) as bus:
        job_id, _ = await bus.submit(make_job())
        released, _ = await bus.submit(make_job())
        async with running(bus) as (server, operator), ScriptedWorker.attach(server.address) as worker:
            await live(server, worker, exact(job_id), exact(released))
            await operator.pin(worker, released)
            durable_redis.kill()
            with structlog.testing.capture_logs() as logs:
                await operator.set_mode(Mode.MODE_OFF)
                await operator.pin(worker, job_id)
                await operator.release(released)
                await operator.set_mode(Mode.MODE_ADVISORY)
            warnings = [one["event"] for one in logs if one["log_level"] == "warning"]
            assert "orders are kept in this process only for now" in warnings
            assert await operator.mode() == Mode.MODE_ADVISORY
            assert await operator.overridden() == {job_id: True, released: False}
            durable_redis.start()
            await until_true(is_kept(bus, Mode.MODE_ADVISORY, {job_id: "int8"}))
        async with running(bus) as (server, operator):
            assert await operator.mode() == Mode.MODE_ADVISORY
            assert server.steering is not None
            assert list(server.steering.state.overrides) == [job_id]


async def test_it_serves_without_the_store_and_takes_up_what_is_kept_when_it_is_back(
    durable_redis: RedisProcess,
) -> None:
    durable_redis.write_at_once()
    async with connected(durable_redis.url) as bus:
        job_id, _ = await bus.submit(make_job())
        await bus.keep_orders(Mode.MODE_OFF, {job_id: PINNED})
    durable_redis.kill()
    bus = Bus.open(durable_redis.url, FAST_BUS)
    async with running(bus) as (server, operator), ScriptedWorker.attach(server.address) as worker:
        assert await operator.mode() == Mode.MODE_ACTIVE
        await worker.report(request_state(job_id))
        planned = await worker.directive()  # steering goes on
        assert (planned.ordered_by, planned.epoch) == (Orderer.ORDERER_CONTROLLER, 1)
        await worker.ack(planned)
        durable_redis.start()
        restored = await worker.directive()
        assert (restored.pipeline, restored.ordered_by) == ("int8", Orderer.ORDERER_OPERATOR)
        assert restored.epoch == 2
        assert await operator.mode() == Mode.MODE_OFF
    await bus.close()


async def test_what_was_ordered_before_the_load_wins_over_what_was_kept(durable_redis: RedisProcess) -> None:
    durable_redis.write_at_once()
    async with connected(durable_redis.url) as bus:
        changed, _ = await bus.submit(make_job())
        released, _ = await bus.submit(make_job())
        await bus.keep_orders(Mode.MODE_OFF, {changed: PINNED, released: PINNED})
    durable_redis.kill()
    bus = Bus.open(durable_redis.url, FAST_BUS)
    async with running(bus) as (server, operator), ScriptedWorker.attach(server.address) as worker:
        await live(server, worker, exact(changed), exact(released))
        await operator.set_mode(Mode.MODE_ADVISORY)
        await operator.pin(worker, changed, "host")
        await operator.release(released)
        durable_redis.start()
        await until_true(is_kept(bus, Mode.MODE_ADVISORY, {changed: "host"}))
        assert await operator.mode() == Mode.MODE_ADVISORY
        assert await operator.overridden() == {changed: True, released: False}
    await bus.close()


async def test_a_store_that_hangs_holds_nobody_up(durable_redis: RedisProcess) -> None:
    async with connected(durable_redis.url) as bus, running(bus) as (server, operator):
        durable_redis.pause()
        try:
            async with asyncio.timeout(WAIT_S), ScriptedWorker.attach(server.address) as worker:
                setting = asyncio.create_task(operator.set_mode(Mode.MODE_ADVISORY))
                assert server.steering is not None
                steering = server.steering
                await until(lambda: steering.mode is SteeringMode.ADVISORY)
                await live(server, worker, request_state())
                await setting
        finally:
            durable_redis.resume()
        await until_true(is_kept(bus, Mode.MODE_ADVISORY, {}))


async def test_entries_that_cannot_be_read_keep_nobody_from_serving(bus: Bus) -> None:
    await bus._client.set("kvpilot:mode", "MODE_WARP")
    with structlog.testing.capture_logs() as logs:
        async with running(bus) as (_, operator):
            assert await operator.mode() == Mode.MODE_ACTIVE
    assert any("MODE_WARP" in one.get("error", "") for one in logs)


async def test_an_error_that_nobody_foresaw_does_not_end_the_listening(
    bus: Bus, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    listen, failures = bus.order_changes, []

    async def fails_once() -> AsyncIterator[None]:
        if not failures:
            failures.append(True)
            raise RuntimeError("nobody foresaw this")
        async for _ in listen():
            yield

    monkeypatch.setattr(ledger, "_LAST_BACKOFF_S", 0.01)
    monkeypatch.setattr(bus, "order_changes", fails_once)
    with structlog.testing.capture_logs() as logs:
        async with running(bus) as (server, _), connected(redis_url, FAST_BUS) as another:
            for mode, meant in ((Mode.MODE_ADVISORY, SteeringMode.ADVISORY), (Mode.MODE_OFF, SteeringMode.OFF)):
                await another.keep_orders(mode, {})
                await until(lambda meant=meant: server.steering is not None and server.steering.mode is meant)
    assert [entry["event"] for entry in logs if entry.get("exc_info")] == [
        "listening for orders failed; it is tried again"
    ]
