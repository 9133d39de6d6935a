"""The job store in Redis: jobs, their events, leases, sessions, outcomes, decisions, operators' orders, bundles."""

from kvpilot.bus.pointers import Passed, Pointer, PointerMovedError, PointerState
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
    "Passed",
    "Pointer",
    "PointerMovedError",
    "PointerState",
    "QueueFullError",
    "Renewal",
]
