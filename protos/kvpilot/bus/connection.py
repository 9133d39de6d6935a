"""The connection to Redis, the reads that several sides need, and the one place where Redis' errors are translated."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import (
    BusyLoadingError,
    ClusterDownError,
    ConnectionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,
    TryAgainError,
)

from kvpilot.bus import keys
from kvpilot.bus.values import BusError, BusSettings, BusUnavailableError, JobNotFoundError, JobRecord
from kvpilot.v1 import generation_pb2, job_pb2

STATES = {
    b"queued": generation_pb2.JOB_STATE_QUEUED,
    b"running": generation_pb2.JOB_STATE_RUNNING,
    b"finished": generation_pb2.JOB_STATE_FINISHED,
}
_OUT_OF_REACH = (ConnectionError, TimeoutError, BusyLoadingError)
_NOT_NOW = (ReadOnlyError, OutOfMemoryError, ClusterDownError, TryAgainError)  # ClusterDownError: MASTERDOWN too
_NOT_NOW_CODES = {"MISCONF", "NOREPLICAS", "UNBLOCKED", "BUSY", "READONLY", "OOM", "MASTERDOWN"}
"""Codes of errors that pass, where the client gives no class of its own: it has none for the first four (UNBLOCKED ends
the blocking reads of a primary that becomes a replica), and a transaction's error only quotes the others."""
_CODE = re.compile(r"(?:.* of pipeline caused error: \(?['\"]?|.* discarded because of: )?([A-Z]+)\b", re.DOTALL)
"""The code that an error begins with, or the one that it quotes."""
_PAGE = 256


@dataclass
class StoreCounts:
    """What this process has seen of job stores; they only rise."""

    connects: int = 0
    """Connections opened."""
    unavailable: int = 0
    """Calls that failed since the store was out of reach, or could not do them then."""
    refused: int = 0
    """Calls that it refused, or answered with what nobody understands."""


STORE_COUNTS = StoreCounts()


async def _connected(connection: Any) -> None:
    """Counts a connection and does with it what the client would."""
    STORE_COUNTS.connects += 1
    await connection.on_connect()


class Connection:
    """A pool of connections to the job store and the reads that all parts of the bus share."""

    def __init__(self, client: Redis, settings: BusSettings) -> None:
        self.settings = settings
        self._client: Any = client  # redis-py's annotations leave open whether replies are bytes or str; ours are bytes

    @classmethod
    def open(cls, url: str, settings: BusSettings | None = None) -> Self:
        """The Redis at ``url`` (``redis://host:port/db``; ``rediss://`` for TLS), whether or not it answers yet.

        Raises:
            ValueError: not such a URL.
        """
        settings = settings or BusSettings()
        pool: BlockingConnectionPool = BlockingConnectionPool.from_url(
            url,
            max_connections=settings.connections,
            timeout=settings.timeout_s,
            protocol=2,
            redis_connect_func=_connected,
            socket_timeout=settings.timeout_s + settings.block_s,
            socket_connect_timeout=settings.timeout_s,
            retry=Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.5), settings.retries),
            health_check_interval=15,
        )
        return cls(Redis(connection_pool=pool), settings)

    @classmethod
    async def connect(cls, url: str, settings: BusSettings | None = None) -> Self:
        """As :meth:`open`, once it answers.

        Raises:
            BusUnavailableError: it does not.
        """
        bus = cls.open(url, settings)
        try:
            await bus.ping()
        except BaseException:
            await bus.close()
            raise
        return bus

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.aclose()
        await self._client.connection_pool.disconnect()

    async def ping(self) -> None:
        """Asks for a sign of life.

        Raises:
            BusUnavailableError: there is none.
        """
        with translated_errors():
            await self._client.ping()

    async def record(self, job_id: str) -> JobRecord:
        """Returns where a job stands.

        Raises:
            JobNotFoundError: unknown or expired.
            BusUnavailableError: Redis is out of reach.
        """
        with translated_errors():
            job, state, owner, attempts, events, create_ms = await self._client.hmget(
                keys.job(job_id), ["job", "state", "owner", "attempts", "events", "create_ms"]
            )
        if state is None:
            raise JobNotFoundError(job_id)
        return JobRecord(
            job=job_pb2.Job.FromString(job),
            state=STATES[state],
            create_time=datetime.fromtimestamp(int(create_ms) / 1000, UTC),
            worker=owner.decode(),
            attempts=int(attempts),
            next_offset=int(events),
        )

    async def history(self, job_id: str, offset: int = 0) -> list[generation_pb2.GenerationEvent]:
        """Returns a job's events so far, from ``offset`` on.

        Raises:
            JobNotFoundError: unknown or expired.
            BusUnavailableError: Redis is out of reach.
        """
        found: list[generation_pb2.GenerationEvent] = []
        while page := await self._page(job_id, offset + len(found)):
            found += page
            if len(page) < _PAGE:
                break
        if not found:
            await self.record(job_id)
        return found

    async def _messages(self, channel: str) -> AsyncGenerator[bytes, None]:
        """Yields what is said on a channel, once it is listened to. Ends with an exception when the connection does.

        Raises:
            BusUnavailableError: Redis is out of reach.
        """
        async with self._client.pubsub(ignore_subscribe_messages=True) as listened:
            with translated_errors():
                await listened.subscribe(channel)
            while True:
                with translated_errors():  # each call, lest the loop outlive a forgotten cancellation
                    message = await listened.get_message(timeout=self.settings.block_s)
                if message is not None:
                    yield message["data"]

    async def _page(self, job_id: str, offset: int) -> list[generation_pb2.GenerationEvent]:
        with translated_errors():
            found = await self._client.xrange(keys.events(job_id), min=f"{offset + 1}-0", count=_PAGE)
        return [generation_pb2.GenerationEvent.FromString(parse_entry(entry)[1]) for entry in found]


def parse_entry(entry: tuple[bytes, dict[bytes, bytes]]) -> tuple[int, bytes]:
    """Reads an entry of an event stream: the event's offset and its serialised form."""
    entry_id, fields = entry
    return int(entry_id.partition(b"-")[0]) - 1, fields[b"event"]


def read_streams(reply: Any) -> Iterator[tuple[str, list[tuple[bytes, dict[bytes, bytes]]]]]:
    """Goes through an XREAD answer, which client versions give as a mapping or as pairs."""
    for name, entries in reply.items() if isinstance(reply, dict) else reply or ():
        if entries:
            yield name.decode(), entries


def milliseconds(seconds: float) -> int:
    """Whole milliseconds, at least one: Redis takes 0 for "without end" or refuses it."""
    return max(1, int(seconds * 1000))


@contextlib.contextmanager
def translated_errors() -> Iterator[None]:
    """Turns Redis' errors into the bus's, around awaited calls of the Redis client.

    Also makes up for ``asyncio.wait_for`` of Python 3.11, by which the client sends its commands: it forgets a
    cancellation that arrives just as the sending is done, and the task would live on.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task is not None else 0
    try:
        try:
            yield
        finally:
            if task is not None and task.cancelling() > before:
                raise asyncio.CancelledError
    except _OUT_OF_REACH as error:
        STORE_COUNTS.unavailable += 1
        raise BusUnavailableError(f"the job store is out of reach: {error}") from error
    except ResponseError as error:
        if isinstance(error, _NOT_NOW) or _code(error) in _NOT_NOW_CODES:
            STORE_COUNTS.unavailable += 1
            raise BusUnavailableError(f"the job store cannot do this now: {error}") from error
        STORE_COUNTS.refused += 1
        raise BusError(f"the job store refused: {error}") from error
    except RedisError as error:
        STORE_COUNTS.refused += 1
        raise BusError(f"the job store failed: {error}") from error


def _code(error: ResponseError) -> str:
    found = _CODE.match(str(error))
    return found[1] if found else ""
