"""One blocking read for all the event streams that a process follows, however many clients it serves."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import structlog

from kvpilot.bus import keys
from kvpilot.bus.connection import parse_entry, read_streams, translated_errors
from kvpilot.bus.values import BusError

Entry: TypeAlias = tuple[int, bytes]
"""Offset of an event and its serialised form."""

MAX_WAITING_ENTRIES = 1024
"""Entries kept for a reader that does not keep up; beyond it the watch is over, and the reader reads by itself until it
has caught up and begins another."""
_BATCH = 256
_FIRST_BACKOFF_S = 0.05
_LAST_BACKOFF_S = 1.0

log = structlog.get_logger(__name__)


class Watch:
    """The entries of one job's stream that arrive from now on."""

    def __init__(self, job_id: str, next_offset: int) -> None:
        self.job_id = job_id
        self.next_offset = next_offset
        self.overflowed = False
        self._entries: list[Entry] = []
        self._news = asyncio.Event()

    async def take(self, timeout_s: float) -> list[Entry]:
        """Waits for entries and takes all there are; empty after ``timeout_s`` without any, or after an overflow."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        self._news.clear()
        taken, self._entries = self._entries, []
        return taken

    def put(self, entry: Entry) -> None:
        """Hands over an entry; one that was handed over before is passed over."""
        offset, _ = entry
        if self.overflowed or offset < self.next_offset:
            return
        if len(self._entries) >= MAX_WAITING_ENTRIES:
            self.overflowed = True
        else:
            self._entries.append(entry)
            self.next_offset = offset + 1
        self._news.set()


class Watcher:
    """Follows any number of jobs with one connection to Redis.

    A connection that breaks is opened again for as long as anything is watched: readers just wait meanwhile.
    """

    def __init__(self, client: Any, block_s: float) -> None:
        self._client = client
        self._block_ms = int(block_s * 1000)
        self._watches: dict[str, set[Watch]] = {}
        self._wake_key = keys.wake(uuid.uuid4().hex)
        self._last_wake = "0-0"
        self._task: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def watch(self, job_id: str, next_offset: int) -> AsyncIterator[Watch]:
        """Watches a job's events from ``next_offset`` on while the context is open.

        Raises:
            BusUnavailableError: Redis is out of reach when the watch begins.
        """
        watch = Watch(job_id, next_offset)
        self._watches.setdefault(job_id, set()).add(watch)
        try:
            if self._task is None or self._task.done():
                self._task = asyncio.create_task(self._follow(), name="kvpilot-watcher")
            with translated_errors():
                await self._interrupt()
            yield watch
        finally:
            watching = self._watches[job_id]
            watching.discard(watch)
            if not watching:
                del self._watches[job_id]

    async def close(self) -> None:
        """Stops following."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _interrupt(self) -> None:
        """Makes the read at work return, so that the next one includes a new watch."""
        async with self._client.pipeline(transaction=False) as pipeline:
            pipeline.xadd(self._wake_key, {"wake": 1}, maxlen=1, approximate=False)
            pipeline.expire(self._wake_key, 3600)
            await pipeline.execute()

    async def _follow(self) -> None:
        backoff_s = _FIRST_BACKOFF_S
        while self._watches:
            try:
                await self._read()
                backoff_s = _FIRST_BACKOFF_S
            except BusError as error:
                log.warning("event streams out of reach", error=str(error), retry_s=backoff_s)
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)

    async def _read(self) -> None:
        """One blocking read of everything watched, but for whom it is too much already: it would return at once."""
        names: dict[str, str] = {}
        after: dict[Any, Any] = {self._wake_key: self._last_wake}
        for job_id, watches in self._watches.items():
            if offsets := [watch.next_offset for watch in watches if not watch.overflowed]:
                names[keys.events(job_id)] = job_id
                after[keys.events(job_id)] = f"{min(offsets)}-0"
        with translated_errors():
            reply = await self._client.xread(after, count=_BATCH, block=self._block_ms)
        for name, entries in read_streams(reply):
            if name == self._wake_key:
                self._last_wake = entries[-1][0].decode()
                continue
            for watch in tuple(self._watches.get(names[name], ())):
                for entry in entries:
                    watch.put(parse_entry(entry))
