"""The job store: jobs, their events, leases, sessions and outcomes in Redis, shared by front doors and workers."""

from kvpilot.bus.store import Bus
from kvpilot.bus.values import (
    Append,
    Appended,
    AppendStatus,
    BusError,
    BusSettings,
    BusUnavailableError,
    Claim,
    IdempotencyConflictError,
    JobNotFoundError,
    JobRecord,
    OffsetOutOfRangeError,
    QueueFullError,
    Renewal,
)

__all__ = [
    "Append",
    "AppendStatus",
    "Appended",
    "Bus",
    "BusError",
    "BusSettings",
    "BusUnavailableError",
    "Claim",
    "IdempotencyConflictError",
    "JobNotFoundError",
    "JobRecord",
    "OffsetOutOfRangeError",
    "QueueFullError",
    "Renewal",
]
