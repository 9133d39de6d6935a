"""What goes into and comes out of the job store, and how it refuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum

from kvpilot.result import Result
from kvpilot.v1 import generation_pb2, job_pb2, operator_pb2


@dataclass(frozen=True)
class BusSettings:
    """How long things live in the job store. Every process that shares a store should use the same values.

    Attributes:
        lease_s: a worker that has not renewed a job for this long loses it to another.
        retention_s: finished jobs and their events are kept this long.
        idempotency_s: idempotency keys are kept this long.
        session_s: a session's worker is remembered this long after its last turn.
        affinity_s: a session's turn waits at most this long for the worker that has its cache.
        outcomes: about this many outcomes are kept.
        decisions: about this many entries of the decision log are kept.
        block_s: longest single blocking read; bounds how late a lost connection is noticed.
        retries: how often a call is tried again after a connection failure before it raises BusUnavailableError.
        patience_s: a stream of events waits this long for Redis to come back before it raises BusUnavailableError.
        timeout_s: how long a single answer is waited for, blocking time not counted.
        connections: most connections to Redis at a time.
    """

    lease_s: float = 10.0
    retention_s: float = 86_400.0
    idempotency_s: float = 86_400.0
    session_s: float = 3_600.0
    affinity_s: float = 0.5
    outcomes: int = 100_000
    decisions: int = 200_000
    block_s: float = 1.0
    retries: int = 3
    patience_s: float = 30.0
    timeout_s: float = 3.0
    connections: int = 64


class BusError(Exception):
    """The job store refused or failed."""


class BusUnavailableError(BusError):
    """Redis is out of reach, or cannot do a call now; trying again later may help."""


class JobNotFoundError(BusError):
    """No such job, or it has expired."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"no job {job_id!r}: it never existed here or has expired")
        self.job_id = job_id


class QueueFullError(BusError):
    """As many jobs wait for this model as are accepted."""

    def __init__(self, model: str, waiting: int, max_queued: int) -> None:
        super().__init__(f"{waiting} jobs wait for model {model!r}; at most {max_queued} may")
        self.waiting = waiting


class IdempotencyConflictError(BusError):
    """The idempotency key belongs to a different request."""

    def __init__(self, key: str, job_id: str) -> None:
        super().__init__(f"idempotency key {key!r} was used with a different request, job {job_id!r}")
        self.job_id = job_id


class OffsetOutOfRangeError(BusError):
    """An offset past the end of a finished job."""

    def __init__(self, job_id: str, offset: int, next_offset: int) -> None:
        super().__init__(f"offset {offset} is past the end of job {job_id!r}, which finished with {next_offset} events")
        self.next_offset = next_offset


@dataclass(frozen=True)
class JobRecord:
    """A job as it stands.

    Attributes:
        job: as accepted.
        state: queued, running or finished.
        create_time: when it was accepted, UTC.
        worker: the worker that has, or had, it; empty while it was never claimed.
        attempts: how often it was claimed, handed-back claims not counted.
        next_offset: number of its events.
    """

    job: job_pb2.Job
    state: generation_pb2.JobState
    create_time: datetime
    worker: str
    attempts: int
    next_offset: int


@dataclass
class Claim:
    """A worker's hold on a job.

    Attributes:
        job: the job.
        worker: who holds it.
        epoch: fence: rises with every claim of the job; a write under an older epoch is refused.
        attempts: how often it was claimed, this time included, handed-back claims not counted.
        cancelled: its client has asked for it to stop.
        progress: what earlier workers delivered; ``progress.token_ids`` are the tokens not to emit again.
        next_offset: offset of the next event to write; the bus moves it on.
    """

    job: job_pb2.Job
    worker: str
    epoch: int
    attempts: int
    cancelled: bool
    progress: Result
    next_offset: int


@dataclass(frozen=True)
class Append:
    """Events to add to a claimed job's stream, in order; their offsets are set by the bus.

    Attributes:
        claim: under which they are written.
        events: the last one may be Finished, which ends the job and the claim.
        outcome: kept for training, in the same transaction as Finished.
    """

    claim: Claim
    events: Sequence[generation_pb2.GenerationEvent]
    outcome: job_pb2.Outcome | None = None


class AppendStatus(Enum):
    """What became of an append."""

    STORED = "stored"
    """The events are in the stream (also when they already were: an append may be repeated)."""
    FENCED = "fenced"
    """Another worker holds the job; nothing was written and nothing more must be."""
    GAP = "gap"
    """The store lost events that were written before; nothing was written. Release the job: it is run again."""
    GONE = "gone"
    """The store does not know the job."""


@dataclass(frozen=True)
class Appended:
    """Answer to an :class:`Append`; ``cancelled`` says that the client has asked for the job to stop."""

    status: AppendStatus
    cancelled: bool


@dataclass(frozen=True)
class Orders:
    """What operators have ordered: the mode, None while none was set, and the overrides by job id."""

    mode: operator_pb2.Mode | None
    overrides: Mapping[str, job_pb2.Override]


@dataclass(frozen=True)
class Renewal:
    """Answer to a heartbeat: jobs among the claims that are no longer this worker's, and those to be stopped."""

    lost: tuple[str, ...]
    cancelled: tuple[str, ...]
