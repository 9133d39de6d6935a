"""Names of the job store's keys. The scripts spell the same names; tests/protos/test_bus.py compares them."""

from __future__ import annotations

from enum import StrEnum

PREFIX = "kvpilot:"
GROUP = "workers"
"""Consumer group of every queue."""

WORKERS = f"{PREFIX}workers"
"""Hash: worker name -> model name."""
TAKERS = f"{PREFIX}takers"
"""Hash: worker name -> model name; of workers that read the queues of all priorities."""
LEAVING = f"{PREFIX}leaving"
"""Set: names of workers that take no more jobs."""
MODELS = f"{PREFIX}models"
"""Hash: model name -> Model as last published by a worker that serves it."""
OUTCOMES = f"{PREFIX}outcomes"
"""Stream of Outcome."""
DECISIONS = f"{PREFIX}decisions"
"""Stream of DecisionEvent."""
MODE = f"{PREFIX}mode"
"""Name of the operator's Mode that was last set; not there while none was."""
OVERRIDES = f"{PREFIX}overrides"
"""Hash: job id -> Override. Without expiry: controllers remove what has ended."""

CONTROLLERS = f"{PREFIX}controllers"
"""Set: names of controllers, some of which may be gone."""
ORDERS_CHANGED = f"{PREFIX}orders-changed"
"""Channel: says that the mode or the overrides are worth reading again."""

POINTERS_MOVED = f"{PREFIX}pointers-moved"
"""Channel: names of pointers that were moved."""


def pointer(name: str) -> str:
    """State of a pointer to a bundle, JSON."""
    return f"{PREFIX}pointer:{name}"


def job(job_id: str) -> str:
    """Hash: the job, its state, owner, epoch, attempts, number of events, and where it is queued."""
    return f"{PREFIX}job:{job_id}"


def events(job_id: str) -> str:
    """Stream of GenerationEvent; the event with offset n has the entry ID ``{n + 1}-0``."""
    return f"{PREFIX}events:{job_id}"


class Priority(StrEnum):
    """Priorities of waiting jobs, highest first; how they share the workers: ``scripts.CLAIM``."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"

    @property
    def suffix(self) -> str:
        """What it adds to a queue's name: nothing for normal, which workers without priorities read too."""
        return "" if self is Priority.NORMAL else f":{self.value}"


def queue(model: str, priority: Priority = Priority.NORMAL) -> str:
    """Stream of job ids that any worker of the model may take."""
    return f"{PREFIX}jobs:{model}{priority.suffix}"


def queue_for(worker: str, priority: Priority = Priority.NORMAL) -> str:
    """Stream of job ids whose session's cache is on this worker; others take them when it is busy or gone."""
    return f"{PREFIX}jobs-for:{worker}{priority.suffix}"


def turns(model: str) -> str:
    """Number of jobs that the model's workers have taken; says whose turn it is."""
    return f"{PREFIX}turns:{model}"


def released(model: str) -> str:
    """Stream that wakes the model's waiting workers when jobs were handed back."""
    return f"{PREFIX}released:{model}"


LOG_LEVELS = f"{PREFIX}log-levels"
"""Hash: LogLevelOrder by name of the process, ``*`` for all."""


def card(worker: str) -> str:
    """WorkerCard; expires with the worker's lease."""
    return f"{PREFIX}worker:{worker}"


def controller(name: str) -> str:
    """ControllerCard; expires unless renewed."""
    return f"{PREFIX}controller:{name}"


def idempotency(key: str) -> str:
    """Hash: digest of the request and the job it became."""
    return f"{PREFIX}idempotency:{key}"


def session(model: str, session_id: str) -> str:
    """Name of the worker that had the session's last turn."""
    return f"{PREFIX}session:{model}:{session_id}"


def notices(worker: str) -> str:
    """Stream of ids of running jobs that their clients want stopped."""
    return f"{PREFIX}notices:{worker}"


def wake(watcher: str) -> str:
    """Stream that interrupts a front door's blocking read."""
    return f"{PREFIX}wake:{watcher}"
