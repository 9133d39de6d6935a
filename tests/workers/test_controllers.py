"""Several controllers: the order in which workers try them, when they move, and that moving disturbs nothing."""

from __future__ import annotations

import asyncio
import random
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import pytest

from controller.server import ControllerServer
from kvpilot.v1 import policy_pb2, policy_pb2_grpc
from tests.conftest import free_port
from tests.controller.scripted import WAIT_S, ScriptedWorker, controller, hello, request_state, until
from tests.workers.test_steering import BookkeepingEngine, attached, state_at
from workers.controllers import Address, Load, choose, rank, resolve
from workers.steering import SteeringSettings

pytestmark = pytest.mark.anyio

QUICK = SteeringSettings(reconnect_min_ms=5, reconnect_max_ms=20, balance_s=0.05)
STAYING = SteeringSettings(reconnect_min_ms=5, reconnect_max_ms=20, balance_s=0)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module", autouse=True)
async def one_event_loop(anyio_backend: str) -> AsyncIterator[None]:
    """See tests/controller/conftest.py."""
    yield  # noqa: PT022  # keeps the loop alive until the last test


class NamedEngine(BookkeepingEngine):
    """A worker with a name of its own."""

    def __init__(self, name: str, *states: policy_pb2.RequestState) -> None:
        super().__init__(*states)
        self.name = name

    def hello(self) -> policy_pb2.Hello:
        said = super().hello()
        said.worker = self.name
        return said


def addresses(count: int) -> list[Address]:
    return [Address(f"10.0.0.{number}:7450", "controllers:7450") for number in range(count)]


def workers_of(server: ControllerServer) -> set[str]:
    assert server.steering is not None
    return set(server.steering.state.workers)


# ---- order


def test_workers_spread_over_controllers_and_only_those_of_a_gone_one_move() -> None:
    four = addresses(4)
    first = {name: rank(name, four)[0] for name in (f"worker-{number}" for number in range(400))}
    assert all(70 <= count <= 130 for count in Counter(first.values()).values())
    three = [address for address in four if address != four[1]]
    moved = {name for name, address in first.items() if rank(name, three)[0] != address}
    assert moved == {name for name, address in first.items() if address == four[1]}
    assert len({rank(name, three)[0] for name in moved}) == 3  # to all of the others


async def test_every_address_of_a_name_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(host: str, port: int, **_: object) -> list[Any]:
        if host == "unknown":
            raise socket.gaierror("unknown")
        found = {"headless": ["10.0.0.1", "10.0.0.2"], "one": ["10.0.0.2"]}[host]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in found]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", answer)
    found = await resolve(["headless:7450", "one:7450", "unknown:7450", "one:7451"])
    assert [address.target for address in found] == ["10.0.0.1:7450", "10.0.0.2:7450", "10.0.0.2:7451"]
    assert found[0].name == "headless:7450"
    with pytest.raises(OSError, match="unknown:7450"):
        await resolve(["unknown:7450"])


async def test_numbers_and_brackets_are_addresses_too() -> None:
    found = await resolve(["127.0.0.1:7450", "[::1]:7450"])
    assert [address.target for address in found] == ["127.0.0.1:7450", "[::1]:7450"]


# ---- balance


def settle(loads: dict[str, int], rounds: int, at_once: bool) -> dict[str, int]:
    """What becomes of the numbers when every worker looks once a round, on the same numbers or one after the other."""
    chance = random.Random(7)
    loads = dict(loads)
    names = {Address(name, name): name for name in loads}
    for _ in range(rounds):
        seen = dict(loads)
        for own in list(loads):
            for _ in range(seen[own]):
                told = seen if at_once else loads
                view = {name: Load(count, Address(name, name)) for name, count in told.items()}
                better = choose(own, view, chance)
                if better is not None:
                    loads[own] -= 1
                    loads[names[better]] += 1
    return loads


@pytest.mark.parametrize("at_once", [True, False], ids=["all look at once", "one after the other"])
@pytest.mark.parametrize(
    "loads", [{"a": 3, "b": 0}, {"a": 100, "b": 0}, {"a": 40, "b": 41, "c": 0}, {"a": 7, "b": 1, "c": 1, "d": 1}]
)
def test_numbers_become_even_and_stay_so(loads: dict[str, int], at_once: bool) -> None:
    after = settle(loads, 60, at_once)
    assert sum(after.values()) == sum(loads.values())
    assert max(after.values()) - min(after.values()) <= (1 if not at_once else 2)
    if max(after.values()) - min(after.values()) <= 1:
        assert settle(after, 20, at_once) == after


def test_all_that_look_at_once_do_not_leave_at_once() -> None:
    after = settle({"a": 100, "b": 0}, 1, at_once=True)
    assert 30 <= after["b"] <= 70


def test_a_controller_that_does_not_tell_its_load_keeps_its_workers() -> None:
    assert choose("silent", {"b": Load(0, Address("b", "b"))}, random.Random(1)) is None


# ---- real controllers


async def test_a_lost_controllers_workers_go_to_the_other_at_once() -> None:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(controller(name="a"))
        second = await stack.enter_async_context(controller(name="b"))
        engines = [NamedEngine(f"w{number}", request_state(generated_tokens=0)) for number in range(8)]
        for engine in engines:
            await stack.enter_async_context(attached(engine, [first.address, second.address], STAYING))
        await until(lambda: len(workers_of(first)) + len(workers_of(second)) == 8)
        begun = asyncio.get_running_loop().time()
        await first.stop(0)
        await until(lambda: len(workers_of(second)) == 8)
        assert asyncio.get_running_loop().time() - begun < 2.0
        for engine in engines:
            engine.generate(16)
        await until(lambda: all(engine.states["job-1"].epoch == 1 for engine in engines))


async def test_workers_move_to_a_new_controller_and_stay_steered() -> None:
    port = free_port()
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(controller(name="a"))
        engines = [NamedEngine(f"w{number}", request_state(generated_tokens=0)) for number in range(4)]
        for engine in engines:
            await stack.enter_async_context(attached(engine, [first.address, f"127.0.0.1:{port}"], QUICK))
        await until(lambda: len(workers_of(first)) == 4)
        for engine in engines:
            engine.generate(16)
        await until(lambda: all(engine.states["job-1"].epoch == 1 for engine in engines))
        second = await stack.enter_async_context(controller(name="b", listen=f"127.0.0.1:{port}"))
        await until(lambda: len(workers_of(first)) == len(workers_of(second)) == 2)
        assert workers_of(first) | workers_of(second) == {engine.name for engine in engines}
        assert all(False not in engine.attachments for engine in engines)  # never without a controller
        moved = [engine for engine in engines if engine.name in workers_of(second)]
        for engine in moved:
            engine.states["job-1"].pipeline = "full"  # so that there is something to order again
            engine.generate(48)
        await until(lambda: all(engine.states["job-1"].epoch == 2 for engine in moved))
        assert [one.epoch for one in moved[0].directives] == [1, 2]


async def test_a_closed_port_costs_no_wait() -> None:
    engine = NamedEngine("w0")
    async with controller() as server:
        begun = asyncio.get_running_loop().time()
        closed = [f"127.0.0.1:{free_port()}" for _ in range(5)]
        async with attached(engine, [*closed, server.address], SteeringSettings(connect_timeout_ms=60_000)):
            await until(lambda: engine.attachments == [True])
        assert asyncio.get_running_loop().time() - begun < 5.0


class Told(policy_pb2_grpc.SteeringServiceServicer):
    """A controller that keeps what it is told."""

    def __init__(self, name: str, workers: int, before_welcome: Callable[[], Awaitable[None]] | None = None) -> None:
        self.reports: asyncio.Queue[policy_pb2.Report] = asyncio.Queue()
        self.hello = policy_pb2.Hello()
        self._load = policy_pb2.GetLoadResponse(controller=name, workers=workers)
        self._before_welcome = before_welcome

    async def Steer(self, request_iterator: Any, context: Any) -> None:  # noqa: N802
        async for request in request_iterator:
            if request.HasField("hello"):
                self.hello = request.hello
                if self._before_welcome is not None:
                    await self._before_welcome()
                welcome = policy_pb2.Welcome(controller=self._load.controller, protocol_version=1)
                await context.write(policy_pb2.SteerResponse(welcome=welcome))
            elif request.HasField("report"):
                self.reports.put_nowait(request.report)

    async def GetLoad(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._load

    @asynccontextmanager
    async def serving(self, address: str) -> AsyncIterator[None]:
        server = grpc.aio.server()
        policy_pb2_grpc.add_SteeringServiceServicer_to_server(self, server)  # type: ignore[no-untyped-call]
        server.add_insecure_port(address)
        await server.start()
        try:
            yield
        finally:
            await server.stop(0)

    async def until_ended(self, request_id: str) -> None:
        """Waits until a report says that a request has ended."""
        async with asyncio.timeout(WAIT_S):
            while request_id not in (await self.reports.get()).ended_request_ids:
                pass


async def test_a_request_that_ends_while_its_worker_moves_is_told_to_both() -> None:
    engine = NamedEngine("w0", request_state(generated_tokens=0))

    async def end() -> None:
        engine.end("job-1")
        await old.until_ended("job-1")  # the new one is not told by what the old one leaves

    old, new = Told("old", workers=8), Told("new", workers=0, before_welcome=end)
    targets = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    async with attached(engine, targets, QUICK), old.serving(targets[0]):
        await until(lambda: engine.attachments == [True])
        async with new.serving(targets[1]):
            await new.until_ended("job-1")
    assert [entry.request_id for entry in new.hello.epochs] == ["job-1"]


# ---- the release before


async def test_an_older_worker_is_steered_as_before() -> None:
    older = hello("older")
    assert older.protocol_version == 0
    async with controller() as server, grpc.aio.insecure_channel(server.address) as channel:
        call: Any = policy_pb2_grpc.SteeringServiceStub(channel).Steer()  # type: ignore[no-untyped-call]
        await call.write(policy_pb2.SteerRequest(hello=older))
        welcome = (await call.read()).welcome
        assert (welcome.controller, welcome.protocol_version) == ("test-controller", 0)
        call.cancel()
        async with ScriptedWorker.attach(server.address, older) as worker:
            await worker.report(request_state())
            assert (await worker.directive()).epoch == 1


async def test_a_newer_worker_is_answered_with_what_is_known() -> None:
    newer = hello("newer")
    newer.protocol_version = 99
    async with controller() as server, grpc.aio.insecure_channel(server.address) as channel:
        call: Any = policy_pb2_grpc.SteeringServiceStub(channel).Steer()  # type: ignore[no-untyped-call]
        await call.write(policy_pb2.SteerRequest(hello=newer))
        welcome = (await call.read()).welcome
        assert (welcome.protocol_version, welcome.workers) == (1, 1)
        call.cancel()


class OlderController(policy_pb2_grpc.SteeringServiceServicer):
    """Version 0: a Welcome without the new fields, no GetLoad."""

    def __init__(self) -> None:
        self.load_asked = 0
        self.hellos: list[policy_pb2.Hello] = []
        self.directive: policy_pb2.Directive | None = None
        self.acks: list[policy_pb2.Ack] = []

    async def Steer(self, request_iterator: Any, context: Any) -> None:  # noqa: N802
        async for request in request_iterator:
            if request.HasField("hello"):
                self.hellos.append(request.hello)
                welcome = policy_pb2.Welcome(controller="older", report_interval_tokens=16, version="0.1.0")
                await context.write(policy_pb2.SteerResponse(welcome=welcome))
            elif request.HasField("ack"):
                self.acks.append(request.ack)
            elif request.HasField("report") and request.report.requests and self.directive is not None:
                await context.write(policy_pb2.SteerResponse(directive=self.directive))
                self.directive = None

    async def GetLoad(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.load_asked += 1
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")


async def test_an_older_controller_steers_and_is_not_asked_for_what_it_does_not_know() -> None:
    older = OlderController()
    older.directive = policy_pb2.Directive(nonce="n", epoch=1, request_id="job-1", pipeline="kivi(bits=4)")
    server = grpc.aio.server()
    policy_pb2_grpc.add_SteeringServiceServicer_to_server(older, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        engine = NamedEngine("w0", request_state(generated_tokens=0))
        targets = [f"127.0.0.1:{port}", f"127.0.0.1:{free_port()}"]
        async with attached(engine, targets, QUICK):
            await until(lambda: engine.attachments == [True])
            engine.generate(16)
            await until(lambda: len(older.acks) == 1)
            await asyncio.sleep(3 * QUICK.balance_s)  # time for a look that must not come
        assert older.hellos[0].protocol_version == 1
        assert older.load_asked == 0
        assert older.acks[0].epoch == 1
    finally:
        await server.stop(0)


async def test_workers_of_an_older_controller_come_over_when_it_goes() -> None:
    server = grpc.aio.server()
    policy_pb2_grpc.add_SteeringServiceServicer_to_server(OlderController(), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    new_port = free_port()
    engine = NamedEngine("w0")
    async with attached(engine, [f"127.0.0.1:{port}", f"127.0.0.1:{new_port}"], QUICK):
        await until(lambda: engine.attachments == [True])
        async with controller(listen=f"127.0.0.1:{new_port}") as newer:
            await server.stop(0)
            await until(lambda: workers_of(newer) == {"w0"})


async def test_states_and_epochs_come_along() -> None:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(controller(name="a"))
        second = await stack.enter_async_context(controller(name="b"))
        engine = NamedEngine("w0", request_state(generated_tokens=0))
        await stack.enter_async_context(attached(engine, [first.address, second.address], STAYING))
        engine.generate(16)
        await until(lambda: engine.states["job-1"].epoch == 1)
        here, there = (first, second) if state_at(first) else (second, first)
        await here.stop(0)
        await until(lambda: workers_of(there) == {"w0"})
        engine.generate(16)
        await until(lambda: (state := state_at(there)) is not None and state.epoch == 1)
