"""Moving the active and the shadow pointer: never to a bundle that does not load."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kvpilot.bus.pointers import Pointer, PointerBoard, PointerState
from models.bundle import BundleError
from models.registry import Registry, RegistryError, StoreUnavailableError


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


async def rollback(
    board: PointerBoard,
    registry: Registry,
    reason: str,
    away_from: str | None = None,
    *,
    or_none: bool = False,
    passed_over: Callable[[str, Exception], None] = lambda version, error: None,
) -> PointerState:
    """Goes back to the bundle that was active before; once more, to the one before that.

    Bundles that do not load are passed over: the next below is taken.

    Args:
        board: the pointers.
        registry: the bundles.
        reason: kept in the history.
        away_from: go back only while this bundle is the active one, else change nothing. While nobody moved the
            pointer, that is the one that came with kvpilot.
        or_none: point to no bundle where none is left to go back to.
        passed_over: told each bundle that does not load, and why.

    Raises:
        RegistryError: no bundle that loads was active before; not with ``or_none``.
        StoreUnavailableError: the store does not say whether one loads; the active one stays.
        BusError: the job store refused or is out of reach, or the pointer was moved meanwhile.
    """
    state = await board.pointer(Pointer.ACTIVE)
    active = state.version if state.revision else await asyncio.to_thread(registry.shipped)
    if away_from is not None and active != away_from:
        return state
    problems: dict[str, Exception] = {}
    for version in state.below:
        if version == active or version in problems:
            continue  # it lay there twice, with what is passed over in between
        try:
            await asyncio.to_thread(registry.load, version)
        except StoreUnavailableError:
            raise
        except (BundleError, RegistryError) as error:
            problems[version] = error
            passed_over(version, error)
        else:
            return await board.move_pointer(Pointer.ACTIVE, version, reason, back=True, revision=state.revision)
    if or_none:
        return await board.move_pointer(Pointer.ACTIVE, None, reason, back=True, revision=state.revision)
    if problems:
        told = "; ".join(str(error) for error in problems.values())
        raise RegistryError(f"nothing to go back to: no bundle that was active before {active} loads: {told}")
    raise RegistryError(f"nothing to go back to: no bundle was active before {state.version or 'now'}")


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
