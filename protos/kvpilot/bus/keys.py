"""Names of the job store's keys. The scripts spell the same names; tests/protos/test_bus.py compares them."""

from __future__ import annotations

PREFIX = "kvpilot:"
GROUP = "workers"
"""Consumer group of every queue."""

WORKERS = f"{PREFIX}workers"
"""Hash: worker name -> model name."""
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


def queue(model: str) -> str:
    """Stream of job ids that any worker of the model may take."""
    return f"{PREFIX}jobs:{model}"


def queue_for(worker: str) -> str:
    """Stream of job ids whose session's cache is on this worker; others take them when it is busy or gone."""
    return f"{PREFIX}jobs-for:{worker}"


def card(worker: str) -> str:
    """WorkerCard; expires with the worker's lease."""
    return f"{PREFIX}worker:{worker}"


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
