"""Moving the active and the shadow pointer: never to a bundle that does not load."""

from __future__ import annotations

import asyncio

from kvpilot.bus.pointers import Pointer, PointerBoard, PointerState
from models.registry import Registry, RegistryError


async def promote(board: PointerBoard, registry: Registry, version: str, reason: str) -> PointerState:
    """Makes a bundle the one that decides. Promoting the active one changes nothing.

    Where none was promoted before, the bundle that came with kvpilot has decided: it is what going back leads to.

    Raises:
        BundleError: it must not be used; the active one stays.
        RegistryError: there is none of this version.
        BusError: the job store refused or is out of reach.
    """
    await asyncio.to_thread(registry.load, version)
    state = await board.pointer(Pointer.ACTIVE)
    if state.version == version:
        return state
    if not state.revision and (shipped := await asyncio.to_thread(registry.shipped)) and shipped != version:
        state = await board.move_pointer(Pointer.ACTIVE, shipped, "came with kvpilot", revision=state.revision)
    return await board.move_pointer(Pointer.ACTIVE, version, reason, revision=state.revision)


async def rollback(board: PointerBoard, registry: Registry, reason: str, away_from: str | None = None) -> PointerState:
    """Goes back to the bundle that was active before; once more, to the one before that.

    Args:
        board: the pointers.
        registry: the bundles.
        reason: kept in the history.
        away_from: go back only while this bundle is the active one, else change nothing.

    Raises:
        RegistryError: no bundle was active before, or it is gone.
        BundleError: the one before must not be used; the active one stays.
        BusError: the job store refused or is out of reach, or the pointer was moved meanwhile.
    """
    state = await board.pointer(Pointer.ACTIVE)
    if away_from is not None and state.version != away_from:
        return state
    if not state.below:
        raise RegistryError(f"nothing to go back to: no bundle was active before {state.version or 'now'}")
    before = state.below[0]
    await asyncio.to_thread(registry.load, before)
    return await board.move_pointer(Pointer.ACTIVE, before, reason, back=True, revision=state.revision)


async def shadow(board: PointerBoard, registry: Registry, version: str | None, reason: str) -> PointerState:
    """Makes a bundle the one that is scored beside the active one; None for no bundle.

    Raises:
        As :func:`promote`.
    """
    if version is not None:
        await asyncio.to_thread(registry.load, version)
    state = await board.pointer(Pointer.SHADOW)
    if state.version == version:
        return state
    return await board.move_pointer(Pointer.SHADOW, version, reason, revision=state.revision)
