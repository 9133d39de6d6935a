"""The pointers in a real job store, and that they never come to show what does not load."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest
import redis
from fsspec.implementations.local import LocalFileSystem

from kvpilot.bus import Bus, BusError, Pointer, PointerMovedError, PointerState
from kvpilot.bus.keys import pointer as pointer_key
from kvpilot.bus.pointers import HISTORY
from models.bundle import BundleError
from models.manifest import MANIFEST
from models.promotion import promote, rollback, shadow
from models.registry import Registry, RegistryError, StoreUnavailableError
from tests.models.fitted import made

pytestmark = pytest.mark.anyio


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = Registry(tmp_path / "store", shipped=tmp_path / "shipped")
    for version in ("a", "b", "c"):
        registry.put(made(version))
    return registry


def break_bundle(registry: Registry, version: str) -> None:
    manifest = Path(registry.url) / version / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"schema_hash": "0" * 16}))


async def test_nothing_is_active_at_first(bus: Bus) -> None:
    for which in Pointer:
        assert await bus.pointer(which) == PointerState()


async def test_going_back_from_the_first_leads_to_the_one_that_came_with_kvpilot(bus: Bus, tmp_path: Path) -> None:
    Registry(tmp_path / "shipped").put(made("shipped"))
    registry = Registry(tmp_path / "store", shipped=tmp_path / "shipped")
    registry.put(made("mine"))
    state = await promote(bus, registry, "mine", "better")
    assert (state.version, state.below) == ("mine", ("shipped",))
    assert state.history[0].reason == "came with kvpilot"
    assert (await rollback(bus, registry, "worse")).version == "shipped"
    with pytest.raises(RegistryError, match="nothing to go back to"):
        await rollback(bus, registry, "worse still")


async def test_promote_and_go_back_step_by_step(bus: Bus, registry: Registry) -> None:
    for version in ("a", "b", "c"):
        assert (await promote(bus, registry, version, f"try {version}")).version == version
    state = await rollback(bus, registry, "c was bad")
    assert (state.version, state.below, state.revision) == ("b", ("a",), 4)
    assert state == await bus.pointer(Pointer.ACTIVE)
    left = state.history[0]
    assert (left.version, left.reason, left.rolled_back, left.left_reason) == ("c", "try c", True, "c was bad")
    assert [passed.version for passed in state.history] == ["c", "b", "a"]
    assert [passed.rolled_back for passed in state.history] == [True, False, False]
    assert (await rollback(bus, registry, "b too")).version == "a"
    with pytest.raises(RegistryError, match="no bundle was active before a"):
        await rollback(bus, registry, "a too")
    assert (await bus.pointer(Pointer.ACTIVE)).version == "a"


async def test_going_back_after_a_new_promotion_leads_below_it(bus: Bus, registry: Registry) -> None:
    await promote(bus, registry, "a", "")
    await promote(bus, registry, "b", "")
    await rollback(bus, registry, "")
    await promote(bus, registry, "c", "")
    assert (await rollback(bus, registry, "")).version == "a"


async def test_promoting_what_is_active_changes_nothing(bus: Bus, registry: Registry) -> None:
    first = await promote(bus, registry, "a", "once")
    assert await promote(bus, registry, "a", "twice") == first


async def test_a_bundle_that_does_not_load_is_not_pointed_at(bus: Bus, registry: Registry) -> None:
    await promote(bus, registry, "a", "")
    await promote(bus, registry, "b", "")
    break_bundle(registry, "a")
    break_bundle(registry, "c")
    before = await bus.pointer(Pointer.ACTIVE)
    with pytest.raises(BundleError, match="bundle c: feature schema"):
        await promote(bus, registry, "c", "")
    with pytest.raises(BundleError, match="bundle c: feature schema"):
        await shadow(bus, registry, "c", "")
    with pytest.raises(RegistryError, match="no bundle that was active before b loads: bundle a: feature schema"):
        await rollback(bus, registry, "")
    with pytest.raises(RegistryError, match="no bundle 'd'"):
        await promote(bus, registry, "d", "")
    assert await bus.pointer(Pointer.ACTIVE) == before
    assert await bus.pointer(Pointer.SHADOW) == PointerState()


async def test_going_back_passes_over_what_does_not_load(bus: Bus, registry: Registry) -> None:
    for version in ("a", "b", "c"):
        await promote(bus, registry, version, f"try {version}")
    break_bundle(registry, "b")
    passed: dict[str, Exception] = {}
    state = await rollback(bus, registry, "c was bad", passed_over=passed.__setitem__)
    assert (state.version, state.below) == ("a", ())
    assert (state.history[0].version, state.history[0].left_reason) == ("c", "c was bad")
    assert list(passed) == ["b"]
    assert "feature schema" in str(passed["b"])


async def test_going_back_never_leads_to_what_is_left(bus: Bus, registry: Registry) -> None:
    for version in ("c", "a", "b", "a"):
        await promote(bus, registry, version, f"try {version}")
    break_bundle(registry, "b")
    assert (await rollback(bus, registry, "a was bad")).version == "c"


async def test_going_back_from_the_last_may_lead_to_none(bus: Bus, registry: Registry) -> None:
    await promote(bus, registry, "a", "")
    await promote(bus, registry, "b", "")
    shutil.rmtree(Path(registry.url) / "a")
    state = await rollback(bus, registry, "b broke its bound", away_from="b", or_none=True)
    assert (state.version, state.reason) == (None, "b broke its bound")
    assert (state.history[0].version, state.history[0].rolled_back) == ("b", True)
    registry.put(made("a"))
    assert (await rollback(bus, registry, "it is back")).version == "a"  # and b is not what lies below


async def test_a_store_that_does_not_answer_decides_nothing(
    bus: Bus, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    await promote(bus, registry, "a", "")
    before = await promote(bus, registry, "b", "")

    def no_route(*_: object, **__: object) -> bool:
        raise ConnectionError("no route")

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "exists", no_route)
        with pytest.raises(StoreUnavailableError, match="no route"):
            await rollback(bus, registry, "", or_none=True)
    assert await bus.pointer(Pointer.ACTIVE) == before
    assert (await rollback(bus, registry, "", or_none=True)).version == "a"


async def test_the_shadow_is_apart_and_can_be_taken_away(bus: Bus, registry: Registry) -> None:
    await promote(bus, registry, "a", "")
    assert (await shadow(bus, registry, "b", "look")).version == "b"
    assert (await bus.pointer(Pointer.ACTIVE)).version == "a"
    gone = await shadow(bus, registry, None, "enough")
    assert (gone.version, gone.revision, gone.history[0].version) == (None, 2, "b")


async def test_an_automatic_rollback_does_not_undo_what_somebody_did_meanwhile(bus: Bus, registry: Registry) -> None:
    await promote(bus, registry, "a", "")
    await promote(bus, registry, "b", "")
    await promote(bus, registry, "c", "")
    assert (await rollback(bus, registry, "b broke its bound", away_from="b")).version == "c"
    assert (await rollback(bus, registry, "c broke its bound", away_from="c")).version == "b"


async def test_a_stale_revision_is_refused(bus: Bus) -> None:
    await bus.move_pointer(Pointer.ACTIVE, "a", "", revision=0)
    with pytest.raises(PointerMovedError, match="revision 0 expected, 1 found, bundle a"):
        await bus.move_pointer(Pointer.ACTIVE, "b", "", revision=0)
    assert (await bus.pointer(Pointer.ACTIVE)).version == "a"


async def test_no_move_is_lost_when_many_move_at_once(bus: Bus) -> None:
    await asyncio.gather(*(bus.move_pointer(Pointer.ACTIVE, f"v{number}", "") for number in range(20)))
    state = await bus.pointer(Pointer.ACTIVE)
    assert state.revision == 20
    assert sorted([state.version or "", *state.below]) == sorted(f"v{number}" for number in range(20))


async def test_history_is_bounded(bus: Bus) -> None:
    for number in range(HISTORY + 5):
        state = await bus.move_pointer(Pointer.ACTIVE, f"v{number}", "")
    assert len(state.history) == len(state.below) == HISTORY
    assert state.history[0].version == state.below[0] == f"v{HISTORY + 3}"


async def test_a_move_wakes_who_listens(bus: Bus, redis_url: str) -> None:
    async def first_move() -> Pointer:
        async for which in bus.pointer_moves():
            return which
        raise AssertionError("the stream ended")

    listening = asyncio.create_task(first_move())
    with redis.Redis.from_url(redis_url) as client:
        async with asyncio.timeout(10):
            while not client.pubsub_channels():
                await asyncio.sleep(0.01)
    await bus.move_pointer(Pointer.SHADOW, "a", "")
    async with asyncio.timeout(10):
        assert await listening is Pointer.SHADOW


async def test_a_key_that_holds_something_else_is_named(bus: Bus, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.set(pointer_key("active"), "rubbish")
    with pytest.raises(BusError, match="kvpilot:pointer:active holds no pointer"):
        await bus.pointer(Pointer.ACTIVE)
