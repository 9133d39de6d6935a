"""Bundles from a real registry and a real job store: pointers, what audits teach, and the way back."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import redis
import structlog

from controller.bundles import Pointers
from controller.server import ControllerServer
from controller.settings import ControllerSettings, Role
from controller.source import RegistrySource
from kvpilot.bus import Bus, Pointer, PointerMovedError, PointerState, keys
from kvpilot.v1 import common_pb2, job_pb2, policy_pb2
from models import bundle as bundles
from models.bundle import Bundle, BundleError
from models.features import SCHEMA_HASH, Family
from models.manifest import PREDICTOR
from models.online import AdaptivePredictor
from models.promotion import promote, shadow
from models.registry import Registry, RegistryError
from tests.conftest import RedisProcess
from tests.controller.scripted import ScriptedWorker, hello, request_state, until
from tests.jobs_help import connected
from tests.models.fitted import held_out, made

pytestmark = pytest.mark.anyio

WAIT_S = 10.0
ADMITTED = common_pb2.Objective(max_divergence=0.2)
"""Enough for a small bundle, whose bounds are wide."""
BROKEN = 9.0
"""Nats per token: above every bound."""


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """``a`` and ``b``, and ``default`` that came with kvpilot."""
    registry = Registry(tmp_path / "store", shipped=tmp_path / "shipped")
    for version in ("a", "b"):
        registry.put(made(version))
    bundles.write(tmp_path / "shipped" / "default", made("default"))
    return registry


@pytest.fixture
def source(registry: Registry, bus: Bus) -> RegistrySource:
    return RegistrySource(registry, bus)


def bounds(predictor: object, family: Family = Family.WINDOW) -> np.ndarray:
    """Of the held-out rows of a family."""
    assert isinstance(predictor, AdaptivePredictor)
    examples = held_out()
    rows = [place for place, of in enumerate(examples.families) if of is family]
    return predictor.predict(examples.rows[rows], [family] * len(rows)).bound


def exceed(source: RegistrySource, version: str, times: int = 20, family: Family = Family.WINDOW) -> None:
    for _ in range(times):
        source.observe(version, family, 0.01, BROKEN)


async def moved(bus: Bus, revision: int) -> PointerState:
    """Waits until the active pointer has been moved so many times."""
    async with asyncio.timeout(WAIT_S):
        while (state := await bus.pointer(Pointer.ACTIVE)).revision < revision:
            await asyncio.sleep(0.005)
        return state


# --- pointers --------------------------------------------------------------------------------------------------------


async def test_while_nobody_moved_the_pointer_what_came_along_is_active(source: RegistrySource, bus: Bus) -> None:
    assert await source.pointers() == Pointers(active="default")
    await bus.move_pointer(Pointer.SHADOW, "b", "the shadow says nothing of the active one")
    assert await source.pointers() == Pointers(active="default", shadow="b")


async def test_nothing_is_active_where_nothing_came_along(tmp_path: Path, bus: Bus) -> None:
    source = RegistrySource(Registry(tmp_path / "store", shipped=tmp_path / "shipped"), bus)
    assert await source.pointers() == Pointers()


async def test_pointers_are_those_of_the_job_store(source: RegistrySource, registry: Registry, bus: Bus) -> None:
    await promote(bus, registry, "a", "try a")
    await shadow(bus, registry, "b", "look at b")
    assert await source.pointers() == Pointers(active="a", shadow="b")
    await bus.move_pointer(Pointer.ACTIVE, None, "the rule, for now")
    assert await source.pointers() == Pointers(active="", shadow="b")


async def test_a_promotion_wakes(source: RegistrySource, registry: Registry, bus: Bus, redis_url: str) -> None:
    waiting = asyncio.create_task(source.changed())
    with redis.Redis.from_url(redis_url) as client:
        await until(lambda: client.pubsub_channels() == [keys.POINTERS_MOVED.encode()])
        assert not waiting.done()
        await promote(bus, registry, "a", "try a")
        async with asyncio.timeout(WAIT_S):
            await waiting
        await until(lambda: client.pubsub_channels() == [])  # nothing is left behind


async def test_waiting_can_be_given_up_at_any_time(source: RegistrySource, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        for turns in range(100):  # of the event loop: from before it begins until well after it listens
            waiting = asyncio.create_task(source.changed())
            for _ in range(turns):
                await asyncio.sleep(0)
            waiting.cancel()
            done, _ = await asyncio.wait({waiting}, timeout=WAIT_S)
            waiting.cancel()  # lest one that forgot the first time keeps the test from failing
            assert done, f"cancelled after {turns} turns, it goes on"
            assert waiting.cancelled()
        await until(lambda: client.pubsub_channels() == [])


async def test_without_a_job_store_there_is_what_came_along(registry: Registry) -> None:
    source = RegistrySource(registry, None)
    assert await source.pointers() == Pointers(active="default")
    assert (await source.load("default")).version == "default"
    await source.rollback("default", "nowhere to keep that")
    assert await source.pointers() == Pointers(active="default")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await source.changed()


# --- what audits teach -----------------------------------------------------------------------------------------------


async def test_exceedances_raise_the_bounds_of_their_bundle_and_family_alone(source: RegistrySource) -> None:
    a, b = await source.load("a"), await source.load("b")
    assert isinstance(a, AdaptivePredictor)
    assert (a.version, a.schema_hash, a.alpha) == ("a", SCHEMA_HASH, a.predictor.alpha)
    before, other = bounds(a), bounds(a, Family.QUANTISE)
    np.testing.assert_array_equal(bounds(b), before)  # of one fit
    exceed(source, "a")
    rise = math.exp(20 * a.calibrator.step * (1 - a.alpha))
    assert rise > 2
    np.testing.assert_allclose(bounds(a), rise * before)
    np.testing.assert_array_equal(bounds(a, Family.QUANTISE), other)
    np.testing.assert_array_equal(bounds(b), before)
    exceed(source, "never loaded")
    np.testing.assert_allclose(bounds(a), rise * before)


async def test_every_copy_of_a_bundle_learns(source: RegistrySource) -> None:
    """The active one goes on learning when its like is loaded for the shadow, or again after a while."""
    active = await source.load("a")
    exceed(source, "a", 5)
    early = bounds(active)
    again = await source.load("a")
    np.testing.assert_array_equal(bounds(again), early)
    exceed(source, "a", 5)
    assert (bounds(active) > early).all()
    np.testing.assert_array_equal(bounds(again), bounds(active))


@pytest.mark.parametrize(("measured", "exceeds"), [(math.nan, True), (math.inf, True), (-1e-9, False)])
async def test_what_no_audit_should_say_is_taken_as_the_guard_takes_it(
    source: RegistrySource, measured: float, exceeds: bool
) -> None:
    loaded = await source.load("a")
    before = bounds(loaded)
    source.observe("a", Family.WINDOW, 0.01, measured)
    assert isinstance(loaded, AdaptivePredictor)
    assert loaded.calibrator.audits(Family.WINDOW) == (1, int(exceeds))
    assert (bounds(loaded) > before).any() == exceeds
    source.observe("a", Family.WINDOW, math.inf, measured)  # whatever is lost, such a bound is no promise
    assert loaded.calibrator.audits(Family.WINDOW) == (1, int(exceeds))


async def test_a_bundle_is_loaded_in_a_thread(
    source: RegistrySource, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []
    load = registry.load

    def note(version: str) -> Bundle:
        threads.append(threading.get_ident())
        return load(version)

    monkeypatch.setattr(registry, "load", note)
    await source.load("a")
    assert len(threads) == 1
    assert threading.get_ident() not in threads


async def test_what_must_not_be_used_is_not_loaded(source: RegistrySource, registry: Registry) -> None:
    tamper(registry, "b")
    with pytest.raises(BundleError, match=r"bundle b: "):
        await source.load("b")
    with pytest.raises(RegistryError, match="no bundle 'c'"):
        await source.load("c")


def tamper(registry: Registry, version: str) -> None:
    file = Path(registry.url) / version / PREDICTOR
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


# --- what the log teaches --------------------------------------------------------------------------------------------


def logged(version: str, divergence: float, number: int, controller: str = "w0") -> list[job_pb2.DecisionEvent]:
    """A decision of a bundle and an audit of it, as a controller logs them."""
    examples = held_out()
    row = examples.rows[examples.families.index(Family.WINDOW)]
    name = f"{controller}-{number}"
    decided = job_pb2.Decided(bundle=version, feature_schema_hash=SCHEMA_HASH, features=row, family=Family.WINDOW.value)
    measured = job_pb2.Measured(audit=policy_pb2.Audit(at_token=16, divergence=divergence), bound=0.5)
    return [
        job_pb2.DecisionEvent(decision_id=name, decided=decided),
        job_pb2.DecisionEvent(decision_id=name, measured=measured),
    ]


async def test_a_bundle_learns_from_the_log_of_all_controllers_when_it_is_first_loaded(
    source: RegistrySource, bus: Bus
) -> None:
    events = [*logged("a", BROKEN, 1), *logged("b", BROKEN, 2), *logged("a", BROKEN, 1, "other"), *logged("a", 0.0, 3)]
    await bus.log_decisions(events)
    a = await source.load("a")
    assert isinstance(a, AdaptivePredictor)
    assert a.calibrator.audits(Family.WINDOW) == (3, 2)
    await bus.log_decisions(logged("a", BROKEN, 4))
    await source.load("a")  # what came since, it was told
    assert a.calibrator.audits(Family.WINDOW) == (3, 2)


async def test_no_more_than_the_newest_of_the_log_is_read(
    source: RegistrySource, registry: Registry, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    await bus.log_decisions([event for number in range(20) for event in logged("a", BROKEN, number)])
    await bus.log_decisions([event for number in range(20, 30) for event in logged("a", 0.0, number)])
    monkeypatch.setattr("controller.source._PAGE", 6)
    monkeypatch.setattr("controller.source.LOG_ENTRIES", 30)
    a = await source.load("a")
    assert isinstance(a, AdaptivePredictor)
    assert a.calibrator.audits(Family.WINDOW) == (15, 5)
    monkeypatch.setattr("controller.source.MOST_AUDITS", 11)
    again = await RegistrySource(registry, bus).load("a")
    assert isinstance(again, AdaptivePredictor)
    assert again.calibrator.audits(Family.WINDOW) == (11, 1)


async def test_a_log_out_of_reach_stops_no_load(registry: Registry, forgetful_redis: RedisProcess) -> None:
    async with connected(forgetful_redis.url) as bus:
        forgetful_redis.kill()
        with structlog.testing.capture_logs() as logs:
            loaded = await RegistrySource(registry, bus).load("a")
    assert loaded.version == "a"
    assert [(line["log_level"], line["bundle"]) for line in logs] == [("warning", "a")]
    assert "out of reach" in logs[0]["error"]


async def test_what_is_no_log_stops_no_load(source: RegistrySource, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.xadd(keys.DECISIONS, {"event": b"\xff"})
    with structlog.testing.capture_logs() as logs:
        assert (await source.load("a")).version == "a"
    assert [line["log_level"] for line in logs] == ["warning"]


# --- the way back ----------------------------------------------------------------------------------------------------


async def test_a_rollback_goes_to_the_one_before_then_to_what_came_along_and_then_to_none(
    source: RegistrySource, registry: Registry, bus: Bus
) -> None:
    await promote(bus, registry, "a", "try a")
    await promote(bus, registry, "b", "try b")
    await source.rollback("b", "b broke its bound")
    state = await bus.pointer(Pointer.ACTIVE)
    assert (state.version, state.reason) == ("a", "b broke its bound")
    assert (state.history[0].version, state.history[0].rolled_back) == ("b", True)
    assert await source.pointers() == Pointers(active="a")
    await source.rollback("a", "a too")
    assert await source.pointers() == Pointers(active="default")
    await source.rollback("default", "that too")
    state = await bus.pointer(Pointer.ACTIVE)
    assert (state.version, state.reason, state.history[0].version) == (None, "that too", "default")
    assert await source.pointers() == Pointers()


async def test_what_came_along_is_not_taken_up_again_once_it_was_rolled_back(source: RegistrySource, bus: Bus) -> None:
    await source.rollback("default", "it broke its bound")
    state = await bus.pointer(Pointer.ACTIVE)
    assert (state.version, state.revision, state.reason) == (None, 1, "it broke its bound")
    assert await source.pointers() == Pointers()


async def test_a_rollback_leads_past_what_does_not_load(source: RegistrySource, registry: Registry, bus: Bus) -> None:
    await promote(bus, registry, "a", "try a")
    await promote(bus, registry, "b", "try b")
    tamper(registry, "a")
    with structlog.testing.capture_logs() as logs:
        await source.rollback("b", "b broke its bound")
    assert (await bus.pointer(Pointer.ACTIVE)).version == "default"
    assert [(line["bundle"], line["log_level"]) for line in logs] == [("a", "warning")]


async def test_a_rollback_undoes_nothing_that_an_operator_did_meanwhile(
    source: RegistrySource, registry: Registry, bus: Bus
) -> None:
    await promote(bus, registry, "a", "try a")
    moved = await promote(bus, registry, "b", "the operator was quicker")
    for stale in ("a", "default", ""):
        await source.rollback(stale, "too late")
        assert await bus.pointer(Pointer.ACTIVE) == moved


async def test_nor_what_an_operator_does_between_its_look_and_its_move(
    source: RegistrySource, registry: Registry, bus: Bus, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await promote(bus, registry, "a", "try a")
    looked, refused = bus.pointer, []

    async def look_then_be_overtaken(which: Pointer) -> PointerState:
        seen = await looked(which)
        async with connected(redis_url) as operator:
            await operator.move_pointer(which, "b", "the operator was quicker")
        return seen

    move = bus.move_pointer

    async def note_refusal(*arguments: object, **options: object) -> PointerState:
        try:
            return await move(*arguments, **options)
        except PointerMovedError as error:
            refused.append(error)
            raise

    monkeypatch.setattr(bus, "pointer", look_then_be_overtaken)
    monkeypatch.setattr(bus, "move_pointer", note_refusal)
    await source.rollback("a", "a broke its bound")
    assert len(refused) == 1
    assert (await looked(Pointer.ACTIVE)).reason == "the operator was quicker"


# --- in a controller -------------------------------------------------------------------------------------------------


@asynccontextmanager
async def controller(source: RegistrySource, bus: Bus) -> AsyncIterator[ControllerServer]:
    settings = ControllerSettings.load(
        listen="127.0.0.1:0",
        roles=frozenset({Role.STEERING, Role.OPERATOR}),
        coalesce_ms=0.0,
        tick_ms=1,
        bundle_poll_s=0.05,  # a wake between two waits is lost
    )
    server = ControllerServer(settings, bus, bundles=source, calibrator=source)
    await server.start()
    try:
        yield server
    finally:
        await server.stop(0)


def learning() -> policy_pb2.Hello:
    said = hello()
    said.feature_schema_hash = SCHEMA_HASH
    return said


async def decides(server: ControllerServer, version: str) -> None:
    """Waits until a bundle is active in a controller; empty for none."""
    holder = server.bundles
    assert holder is not None
    await until(lambda: (holder.active.version if holder.active is not None else "") == version)


async def directed(worker: ScriptedWorker, request_id: str) -> policy_pb2.Directive:
    """The directive for a new request; it is carried out, as are any for others before it."""
    await worker.report(request_state(request_id, objective=ADMITTED))
    while True:
        directive = await worker.directive()
        await worker.ack(directive)
        if directive.request_id == request_id:
            return directive


async def report_audits(worker: ScriptedWorker, carried_out: policy_pb2.Directive, *measured: float) -> None:
    """A report with audits of what a directive led to."""
    audits = [
        policy_pb2.Audit(at_token=token, pipeline=carried_out.pipeline, divergence=lost)
        for token, lost in enumerate(measured, 17)
    ]
    await worker.report(
        request_state(
            carried_out.request_id,
            objective=ADMITTED,
            generated_tokens=32,
            pipeline=carried_out.pipeline,
            epoch=carried_out.epoch,
            audits=audits,
        )
    )


async def test_a_bundle_promoted_under_an_open_stream_decides_what_comes_next(
    source: RegistrySource, registry: Registry, bus: Bus
) -> None:
    async with controller(source, bus) as server, ScriptedWorker.attach(server.address, learning()) as worker:
        assert (await directed(worker, "job-1")).bundle == "default"
        for number, version in enumerate(("a", "b", "a"), 2):
            await promote(bus, registry, version, "try it")
            await decides(server, version)
            directive = await directed(worker, f"job-{number}")
            assert directive.bundle == version
            assert directive.reason.endswith(f"bundle {version}")
        assert not worker.call.done()


async def test_a_tampered_bundle_is_refused_by_name_and_the_active_one_stays(
    source: RegistrySource, registry: Registry, bus: Bus
) -> None:
    await promote(bus, registry, "a", "try a")
    tamper(registry, "b")
    with structlog.testing.capture_logs() as logs:
        async with controller(source, bus) as server, ScriptedWorker.attach(server.address, learning()) as worker:
            assert (await directed(worker, "job-1")).bundle == "a"
            await bus.move_pointer(Pointer.ACTIVE, "b", "by hand, past every check")
            holder = server.bundles
            assert holder is not None
            await until(lambda: "b" in holder.refused)
            assert holder.refused["b"].startswith(f"bundle b: {PREDICTOR} ")
            assert (await directed(worker, "job-2")).bundle == "a"
            await promote(bus, registry, "default", "what came along, then")
            await decides(server, "default")
            assert holder.refused == {}
            assert (await directed(worker, "job-3")).bundle == "default"
            assert not worker.call.done()
    (refused,) = [line for line in logs if line["event"] == "bundle refused"]
    assert (refused["bundle"], refused["active"], refused["log_level"]) == ("b", "a", "error")


async def test_audits_far_above_the_bound_take_the_bundle_back(
    source: RegistrySource, registry: Registry, bus: Bus
) -> None:
    await promote(bus, registry, "a", "try a")
    async with controller(source, bus) as server, ScriptedWorker.attach(server.address, learning()) as worker:
        await directed(worker, "job-1")
        await promote(bus, registry, "b", "try b")
        await decides(server, "b")
        directive = await directed(worker, "job-2")
        assert directive.bundle == "b"
        assert server.steering is not None
        before = await bus.pointer(Pointer.ACTIVE)
        await report_audits(worker, directive, *[BROKEN] * 49)
        await until(lambda: server.steering.guard.audits.total() == 49)
        leaving = await worker.directive()  # the bounds have risen, beyond what the request admits
        assert (leaving.request_id, leaving.bundle) == ("job-2", "b")
        assert "; leaves a bound of " in leaving.reason
        assert await bus.pointer(Pointer.ACTIVE) == before  # the guard concludes nothing from fewer than 50
        await report_audits(worker, directive, BROKEN)
        state = await moved(bus, before.revision + 1)
        assert state.version == "a"
        assert "50 of 50 audits exceeded their bound" in state.reason
        assert (state.history[0].version, state.history[0].rolled_back) == ("b", True)
        await decides(server, "a")
        assert (await directed(worker, "job-3")).bundle == "a"
        assert not worker.call.done()


async def test_what_audits_taught_outlives_the_controller(source: RegistrySource, registry: Registry, bus: Bus) -> None:
    await promote(bus, registry, "a", "try a")
    async with controller(source, bus) as server, ScriptedWorker.attach(server.address, learning()) as worker:
        directive = await directed(worker, "job-1")
        await report_audits(worker, directive, *[BROKEN] * 9, 0.0)
        guard = server.steering.guard
        await until(lambda: guard.audits.total() == 10)
        ((_, family),) = guard.audits
        before = await source.load("a")
    restarted = RegistrySource(registry, bus)
    async with controller(restarted, bus) as server:
        await decides(server, "a")
        after = server.bundles.active
        assert after.calibrator.audits(family) == before.calibrator.audits(family) == (10, 9)
        assert after.calibrator.offset(family) == before.calibrator.offset(family) > 0.3
        np.testing.assert_array_equal(bounds(after, family), bounds(before, family))


async def test_with_nothing_before_it_the_rule_takes_over_and_stays(
    source: RegistrySource, registry: Registry, bus: Bus
) -> None:
    async with controller(source, bus) as server, ScriptedWorker.attach(server.address, learning()) as worker:
        directive = await directed(worker, "job-1")
        assert directive.bundle == "default"
        await report_audits(worker, directive, *[BROKEN] * 50)
        state = await moved(bus, 1)
        assert state.version is None
        assert "50 of 50 audits" in state.reason
        await decides(server, "")
        assert server.bundles is not None
        await server.bundles.refresh()
        await decides(server, "")
        assert (await directed(worker, "job-2")).bundle == ""
        await promote(bus, registry, "a", "a new try")
        await decides(server, "a")
        assert (await directed(worker, "job-3")).bundle == "a"
        assert not worker.call.done()


async def test_an_audit_that_is_no_number_ends_no_stream(source: RegistrySource, bus: Bus) -> None:
    async with controller(source, bus) as server, ScriptedWorker.attach(server.address, learning()) as worker:
        directive = await directed(worker, "job-1")
        await report_audits(worker, directive, math.inf, math.nan, -1e-9, 1e-9)
        assert (await directed(worker, "job-2")).bundle == "default"
        assert server.steering is not None
        assert server.steering.guard.audits.total() == 4
        assert server.steering.guard.exceeded.total() == 2
        assert not worker.call.done()
