"""What workers do: publish themselves, claim jobs, write their events, hand them back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from redis.asyncio import Redis

from kvpilot.bus import keys, scripts
from kvpilot.bus.connection import Connection, milliseconds, read_streams, translated_errors
from kvpilot.bus.values import Append, Appended, AppendStatus, BusSettings, Claim, Renewal
from kvpilot.result import Result
from kvpilot.v1 import job_pb2


class Workshop(Connection):
    """The worker's half of the bus."""

    def __init__(self, client: Redis, settings: BusSettings) -> None:
        super().__init__(client, settings)
        self._claim = self._client.register_script(scripts.CLAIM)
        self._append = self._client.register_script(scripts.APPEND)
        self._heartbeat = self._client.register_script(scripts.HEARTBEAT)
        self._release = self._client.register_script(scripts.RELEASE)
        self._retire = self._client.register_script(scripts.RETIRE)

    async def heartbeat(self, card: job_pb2.WorkerCard, claims: Sequence[Claim], *, leaving: bool = False) -> Renewal:
        """Publishes a worker and renews the leases of its claims.

        Call it at a third of ``settings.lease_s``, and once before the first claim. A worker that is ``leaving`` is
        sent no more sessions' turns, and what waits for it alone is left to others at once.

        Raises:
            BusUnavailableError: Redis is out of reach.
        """
        hello = card.hello
        arguments: list[Any] = [
            hello.worker,
            hello.model.name,
            card.SerializeToString(),
            hello.model.SerializeToString(),
            milliseconds(self.settings.lease_s),
            int(leaving),
        ]
        for claim in claims:
            arguments += [claim.job.job_id, claim.epoch]
        with translated_errors():
            lost, stopped = await self._heartbeat(args=arguments)
        return Renewal(tuple(name.decode() for name in lost), tuple(name.decode() for name in stopped))

    async def claim(
        self,
        worker: str,
        model: str,
        count: int,
        block_ms: int = 0,
        *,
        take_over: bool = True,
        stop: asyncio.Event | None = None,
    ) -> list[Claim]:
        """Takes up to ``count`` jobs: those whose worker's lease has ended first, then queued ones by priority.

        Waits up to ``block_ms`` for a job where there is none, and takes none once ``stop`` is set.
        ``take_over=False`` leaves ended leases alone, for the time after an outage of Redis in which workers could not
        renew theirs.

        Raises:
            BusUnavailableError: Redis is out of reach. Jobs claimed by a call whose answer was lost come back when
                their lease ends.
        """
        arguments = [
            worker,
            model,
            count,
            milliseconds(self.settings.lease_s),
            int(take_over),
            milliseconds(self.settings.affinity_s),
            milliseconds(self.settings.session_s),
        ]
        deadline = time.monotonic() + block_ms / 1000
        while stop is None or not stop.is_set():
            with translated_errors():
                found, seen = await self._claim(args=arguments)
            left_ms = int(1000 * (deadline - time.monotonic()))
            if found or left_ms <= 0:
                return [await self._read_claim(worker, *claim) for claim in found]
            after = dict(zip(seen[::2], seen[1::2], strict=True))
            await self._wait_for_entries(after, min(left_ms, milliseconds(self.settings.block_s)), stop)
        return []

    async def _wait_for_entries(self, after: dict[Any, Any], block_ms: int, stop: asyncio.Event | None) -> None:
        """Returns when one of the streams has an entry behind that named, ``block_ms`` are over or ``stop`` is set."""
        with translated_errors():
            reading = asyncio.ensure_future(self._client.xread(after, count=1, block=block_ms))
            stopped = asyncio.ensure_future(stop.wait()) if stop is not None else None
            try:
                await asyncio.wait(
                    {reading} if stopped is None else {reading, stopped}, return_when=asyncio.FIRST_COMPLETED
                )
                if reading.done():
                    reading.result()
            finally:
                pending = [task for task in (reading, stopped) if task is not None and not task.done()]
                for task in pending:
                    task.cancel()
                await asyncio.gather(*pending, return_exceptions=True)

    async def append(self, batch: Sequence[Append]) -> list[Appended]:
        """Adds events to the streams of claimed jobs, all in one transaction, and moves the claims' offsets on.

        An append that was stored already, its answer lost, is answered STORED again.

        Raises:
            BusUnavailableError: Redis is out of reach; the claims are as they were, call again with the same events.
        """
        arguments: list[Any] = []
        for item in batch:
            ends = bool(item.events) and item.events[-1].HasField("finished")
            for place, event in enumerate(item.events):
                event.offset = item.claim.next_offset + place
            arguments += [
                item.claim.job.job_id,
                item.claim.epoch,
                item.claim.next_offset,
                int(ends),
                item.outcome.SerializeToString() if item.outcome is not None else b"",
                len(item.events),
                *(event.SerializeToString() for event in item.events),
            ]
        if not batch:
            return []
        head = [batch[0].claim.worker, milliseconds(self.settings.retention_s), self.settings.outcomes]
        with translated_errors():
            replies = await self._append(args=[*head, *arguments])
        answers = [Appended(AppendStatus(status.decode()), bool(cancel)) for status, cancel in replies]
        for item, answer in zip(batch, answers, strict=True):
            if answer.status is AppendStatus.STORED:
                item.claim.next_offset += len(item.events)
        return answers

    async def release(self, claims: Sequence[Claim]) -> None:
        """Hands jobs back unfinished: the next claim of any worker goes on with them. Lost claims are left alone.

        Raises:
            BusUnavailableError: Redis is out of reach; the jobs come back when their lease ends.
        """
        if not claims:
            return
        arguments = [part for claim in claims for part in (claim.worker, claim.job.job_id, claim.epoch)]
        with translated_errors():
            await self._release(args=arguments)

    async def cancellations(self, worker: str) -> AsyncGenerator[str, None]:
        """Yields ids of this worker's jobs as their clients cancel them, from now on, without end.

        A notice may be missed while Redis is out of reach: heartbeats and appends tell of it too.

        Raises:
            BusUnavailableError: Redis is out of reach.
        """
        name = keys.notices(worker)
        with translated_errors():
            last = await self._client.xrevrange(name, count=1)
        after: Any = last[0][0] if last else "0-0"
        while True:
            with translated_errors():
                reply = await self._client.xread({name: after}, block=milliseconds(self.settings.block_s))
            for _, entries in read_streams(reply):
                for entry_id, fields in entries:
                    after = entry_id
                    yield fields[b"job"].decode()

    async def retire(self, worker: str) -> None:
        """Takes a worker that has stopped off the list of live ones.

        Raises:
            BusUnavailableError: Redis is out of reach; the worker is forgotten when its lease ends.
        """
        with translated_errors():
            await self._retire(args=[worker])

    async def _read_claim(
        self, worker: str, job: bytes, epoch: int, attempts: int, cancel: int, next_offset: int
    ) -> Claim:
        parsed = job_pb2.Job.FromString(job)
        if next_offset == 1:
            progress = Result(parsed.job_id, parsed.request.sampling.seed, next_offset=1)
        else:
            progress = Result.of(await self.history(parsed.job_id))
        return Claim(parsed, worker, epoch, attempts, bool(cancel), progress, next_offset)
