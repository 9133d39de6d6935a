"""What front doors do: submit jobs, follow their events, cancel them, look at workers and models."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import time
from collections.abc import AsyncGenerator

from redis.asyncio import Redis

from kvpilot.bus import keys, scripts
from kvpilot.bus.connection import STATES, Connection, milliseconds, translated_errors
from kvpilot.bus.values import (
    BusError,
    BusSettings,
    BusUnavailableError,
    IdempotencyConflictError,
    JobNotFoundError,
    OffsetOutOfRangeError,
    QueueFullError,
)
from kvpilot.bus.watch import Watcher
from kvpilot.result import Result
from kvpilot.v1 import generation_pb2, job_pb2

_CHECK_S = 5.0
_RETRY_S = 0.25
_NOTICES_MS = 3_600_000
_CANCEL_ATTEMPTS = 16
PRIORITIES = {
    generation_pb2.PRIORITY_HIGH: keys.Priority.HIGH,
    generation_pb2.PRIORITY_NORMAL: keys.Priority.NORMAL,
    generation_pb2.PRIORITY_LOW: keys.Priority.LOW,
}


class FrontDoor(Connection):
    """The front door's half of the bus."""

    def __init__(self, client: Redis, settings: BusSettings) -> None:
        super().__init__(client, settings)
        self._watcher = Watcher(self._client, settings.block_s)
        self._submit = self._client.register_script(scripts.SUBMIT)
        self._cancel = self._client.register_script(scripts.CANCEL)

    async def close(self) -> None:
        """Closes the connections; open event streams end with BusUnavailableError."""
        await self._watcher.close()
        await super().close()

    async def submit(
        self, job: job_pb2.Job, *, idempotency_key: str = "", request_digest: str = "", max_queued: int = 1024
    ) -> tuple[str, bool]:
        """Stores a job with its Accepted event and queues it for its model's workers.

        ``job.job_id``, ``job.request.model`` and the seed must be set. Repeating the call with the same job id is safe.

        Returns:
            The job's id and whether it is new; not new is the job that the same key and digest became before.

        Raises:
            QueueFullError: ``max_queued`` jobs of the model wait already that are of its priority or a higher one.
            IdempotencyConflictError: the key belongs to a request with another digest.
            BusUnavailableError: Redis is out of reach.
        """
        request = job.request
        accepted = generation_pb2.GenerationEvent(
            accepted=generation_pb2.Accepted(job_id=job.job_id, seed=request.sampling.seed)
        )
        arguments = [
            job.job_id,
            job.SerializeToString(),
            accepted.SerializeToString(),
            request.model,
            max_queued,
            keys.idempotency(idempotency_key) if idempotency_key else "",
            request_digest,
            milliseconds(self.settings.idempotency_s),
            keys.session(request.model, request.session_id) if request.session_id else "",
            job.create_time.ToMilliseconds(),
            priority_of(request).suffix,
        ]
        with translated_errors():
            verdict, value = await self._submit(args=arguments)
        if verdict == b"full":
            raise QueueFullError(request.model, int(value), max_queued)
        if verdict == b"conflict":
            raise IdempotencyConflictError(idempotency_key, value.decode())
        return value.decode(), verdict == b"created"

    async def events(self, job_id: str, offset: int = 0) -> AsyncGenerator[generation_pb2.GenerationEvent, None]:
        """Streams a job's events from ``offset`` on, live ones included, until Finished.

        Raises:
            JobNotFoundError: unknown or expired.
            OffsetOutOfRangeError: the job finished with no more than ``offset`` events.
            BusUnavailableError: Redis is out of reach at the start, or later for longer than ``settings.patience_s``.
        """
        wanted = offset
        record = await self.record(job_id)
        if record.next_offset < offset:
            offset = record.next_offset
        if record.state == generation_pb2.JOB_STATE_FINISHED and wanted >= record.next_offset:
            raise OffsetOutOfRangeError(job_id, wanted, record.next_offset)
        async with contextlib.aclosing(self._follow(job_id, offset)) as events:
            async for event in events:
                finished = event.HasField("finished")
                if event.offset >= wanted:
                    yield event
                elif finished:
                    raise OffsetOutOfRangeError(job_id, wanted, event.offset + 1)
                if finished:
                    return

    async def cancel(self, job_id: str) -> generation_pb2.JobState:
        """Asks for a job to stop; one that no live worker holds ends at once.

        Returns:
            The job's state when the call was made.

        Raises:
            JobNotFoundError: unknown or expired.
            BusUnavailableError: Redis is out of reach.
        """
        for _ in range(_CANCEL_ATTEMPTS):
            progress = Result.of(await self.history(job_id))
            end = generation_pb2.GenerationEvent(
                offset=progress.next_offset, finished=cancelled(len(progress.token_ids))
            )
            arguments = [
                job_id,
                end.offset,
                end.SerializeToString(),
                milliseconds(self.settings.retention_s),
                _NOTICES_MS,
            ]
            with translated_errors():
                verdict, _ = await self._cancel(args=arguments)
            if verdict == b"gone":
                raise JobNotFoundError(job_id)
            if verdict != b"again":
                return STATES[verdict]
        raise BusError(f"job {job_id!r} kept moving between workers while it was being cancelled")

    async def cards(self) -> list[job_pb2.WorkerCard]:
        """Returns the cards of live workers, by name.

        Raises:
            BusUnavailableError: Redis is out of reach.
        """
        with translated_errors():
            names = sorted(name.decode() for name in await self._client.hkeys(keys.WORKERS))
            cards = await self._client.mget([keys.card(name) for name in names]) if names else []
        return [job_pb2.WorkerCard.FromString(card) for card in cards if card is not None]

    async def models(self) -> dict[str, generation_pb2.Model]:
        """Returns every model that a worker has ever served here, as last published; live workers: :meth:`cards`.

        Raises:
            BusUnavailableError: Redis is out of reach.
        """
        with translated_errors():
            found = await self._client.hgetall(keys.MODELS)
        return {name.decode(): generation_pb2.Model.FromString(model) for name, model in sorted(found.items())}

    async def _follow(self, job_id: str, offset: int) -> AsyncGenerator[generation_pb2.GenerationEvent, None]:
        """Events from an existing ``offset`` on; goes on after outages of Redis."""
        lost_at: float | None = None
        while True:
            try:
                async with contextlib.aclosing(self._read_on(job_id, offset)) as events:
                    async for event in events:
                        lost_at = None
                        offset = event.offset + 1
                        yield event
            except BusUnavailableError:
                now = time.monotonic()
                lost_at = now if lost_at is None else lost_at
                if now - lost_at > self.settings.patience_s:
                    raise
                await asyncio.sleep(_RETRY_S)

    async def _read_on(self, job_id: str, offset: int) -> AsyncGenerator[generation_pb2.GenerationEvent, None]:
        """Events from an existing ``offset`` on: pages while there are any, then live ones, pages again on overflow."""
        while True:
            while page := await self._page(job_id, offset):
                for event in page:
                    yield event
                offset += len(page)
            async with self._watcher.watch(job_id, offset) as watch:
                while not watch.overflowed:
                    entries = await watch.take(_CHECK_S)
                    for _, serialised in entries:
                        yield generation_pb2.GenerationEvent.FromString(serialised)
                    offset += len(entries)
                    if not entries:
                        await self.record(job_id)


def new_job_id() -> str:
    """Draws a job id that sorts by time: 48 bits of Unix milliseconds and 80 random bits in Crockford's base 32."""
    number = time.time_ns() // 1_000_000 << 80 | secrets.randbits(80)
    digits = ("0123456789abcdefghjkmnpqrstvwxyz"[number >> shift & 31] for shift in range(125, -1, -5))
    return f"job-{''.join(digits)}"


def priority_of(request: generation_pb2.GenerateRequest) -> keys.Priority:
    """The priority of a request: low for a replay, else what it says, and normal where it says nothing."""
    if request.HasField("replay"):
        return keys.Priority.LOW
    return PRIORITIES.get(request.priority, keys.Priority.NORMAL)


def digest_of(request: generation_pb2.GenerateRequest) -> str:
    """Returns what identifies a request under an idempotency key, the key itself left out."""
    copy = generation_pb2.GenerateRequest()
    copy.CopyFrom(request)
    copy.idempotency_key = ""
    return hashlib.sha256(copy.SerializeToString(deterministic=True)).hexdigest()


def cancelled(generated_tokens: int) -> generation_pb2.Finished:
    """Returns the end of a job that was cancelled while no engine had it."""
    return generation_pb2.Finished(
        reason=generation_pb2.FINISH_REASON_CANCELLED,
        usage=generation_pb2.Usage(generated_tokens=generated_tokens),
    )
