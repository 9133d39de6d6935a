"""The job store: jobs, their events, leases, sessions, outcomes, decisions, and operators' orders, in Redis."""

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
    Orders,
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
    "Orders",
    "QueueFullError",
    "Renewal",
]
