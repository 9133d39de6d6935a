"""Which bundle decides and which one is scored beside it: pointers that every controller reads and operators move."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any

from redis.exceptions import WatchError

from kvpilot.bus import keys
from kvpilot.bus.connection import Connection, translated_errors
from kvpilot.bus.values import BusError

HISTORY = 50
"""Entries of a pointer's history that are kept."""


class Pointer(Enum):
    """What a pointer is for."""

    ACTIVE = "active"
    SHADOW = "shadow"


@dataclass(frozen=True)
class Passed:
    """What a pointer once showed.

    Attributes:
        version: of the bundle; None if it showed none.
        since: when it was set, seconds of the epoch.
        reason: why.
        rolled_back: whether it was left by going back.
        left_reason: why it was left.
    """

    version: str | None
    since: float
    reason: str
    rolled_back: bool
    left_reason: str


@dataclass(frozen=True)
class PointerState:
    """What a pointer shows.

    Attributes:
        version: of the bundle; None while there is none.
        revision: rises by one with every move.
        since: when it was set, seconds of the epoch; 0 if it never was.
        reason: why.
        below: versions that going back leads to, the nearest first.
        history: what it showed before, newest first.
    """

    version: str | None = None
    revision: int = 0
    since: float = 0.0
    reason: str = ""
    below: tuple[str, ...] = ()
    history: tuple[Passed, ...] = ()

    def moved(self, version: str | None, reason: str, back: bool, now: float) -> PointerState:
        """The state after a move; going back takes ``version`` and what lies above it from :attr:`below`."""
        passed = Passed(self.version, self.since, self.reason, back, reason)
        if back:
            below = self.below[self.below.index(version) + 1 :] if version in self.below else self.below
        else:
            below = (*((self.version,) if self.version else ()), *self.below)
        return PointerState(
            version=version,
            revision=self.revision + 1,
            since=now,
            reason=reason,
            below=below[:HISTORY],
            history=((passed, *self.history) if self.revision else self.history)[:HISTORY],
        )


class PointerMovedError(BusError):
    """Somebody else moved the pointer in the meantime."""

    def __init__(self, pointer: Pointer, expected: int, found: PointerState) -> None:
        super().__init__(
            f"the {pointer.value} pointer was moved in the meantime: revision {expected} expected, "
            f"{found.revision} found, bundle {found.version}"
        )
        self.found = found


class PointerBoard(Connection):
    """The pointers' part of the bus.

    A pointer is one key that holds the whole of its state; a message on a channel only says that it is worth looking.
    """

    async def pointer(self, which: Pointer) -> PointerState:
        """Returns what a pointer shows.

        Raises:
            BusError: the key holds something else.
            BusUnavailableError: Redis is out of reach.
        """
        with translated_errors():
            value = await self._client.get(keys.pointer(which.value))
        return _read(which, value)[0]

    async def move_pointer(
        self, which: Pointer, version: str | None, reason: str, *, back: bool = False, revision: int | None = None
    ) -> PointerState:
        """Moves a pointer and wakes who listens; may be repeated after a lost answer without moving it twice.

        Args:
            which: the pointer.
            version: what it is to show; None for no bundle.
            reason: kept in its history.
            back: this is a step back, to one of ``below``.
            revision: the one that it must have; by default whatever it has.

        Raises:
            PointerMovedError: it has another revision.
            BusError: the key holds something else.
            BusUnavailableError: Redis is out of reach.
        """
        key, token, now = keys.pointer(which.value), uuid.uuid4().hex, time.time()
        with translated_errors():
            async with self._client.pipeline(transaction=True) as pipeline:
                while True:
                    try:
                        await pipeline.watch(key)
                        state, written_by = _read(which, await pipeline.get(key))
                        if written_by == token:
                            return state  # done, only the answer was lost
                        if revision is not None and state.revision != revision:
                            raise PointerMovedError(which, revision, state)
                        moved = state.moved(version, reason, back, now)
                        pipeline.multi()
                        pipeline.set(key, _write(moved, token))
                        pipeline.publish(keys.POINTERS_MOVED, which.value)
                        await pipeline.execute()
                        return moved
                    except WatchError:
                        continue

    async def pointer_moves(self) -> AsyncIterator[Pointer]:
        """Yields a pointer whenever it may have moved. Messages get lost: read the pointers now and then all the same.

        Ends with an exception when the connection does; call it again then.

        Raises:
            BusUnavailableError: Redis is out of reach.
        """
        async with contextlib.aclosing(self._messages(keys.POINTERS_MOVED)) as messages:
            async for message in messages:
                yield Pointer(message.decode())


def _write(state: PointerState, token: str) -> str:
    return json.dumps(asdict(state) | {"written_by": token})


def _read(which: Pointer, value: bytes | None) -> tuple[PointerState, str]:
    if value is None:
        return PointerState(), ""
    try:
        content: dict[str, Any] = json.loads(value)
        token = str(content.pop("written_by"))
        history = tuple(Passed(**entry) for entry in content.pop("history"))
        return replace(PointerState(**content | {"below": tuple(content["below"])}), history=history), token
    except (ValueError, TypeError, KeyError) as error:
        raise BusError(f"{keys.pointer(which.value)} holds no pointer: {error}") from None
