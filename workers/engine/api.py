"""What the asyncio side of a worker (jobs, steering) sees of the engine thread; callable from any thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol, TypeAlias

from kvpilot.v1 import generation_pb2, job_pb2, policy_pb2

Event: TypeAlias = tuple[str, generation_pb2.GenerationEvent]
"""A job id and one of its events; ``offset`` is unset, the job store numbers them."""


class EngineApi(Protocol):
    """A running engine.

    Events of a job come in order: Started, then Tokens and Switch (or Replayed), then Finished exactly once; nothing
    after it.
    """

    def start(
        self,
        on_events: Callable[[list[Event]], None],
        on_report: Callable[[policy_pb2.Report], None],
        on_death: Callable[[BaseException], None],
    ) -> None:
        """Starts the step loop. The callbacks run on the engine's thread and must return at once.

        ``on_death`` is called once if the loop ends by an exception: the process should then exit.
        """
        ...

    def stop(self, timeout_s: float) -> None:
        """Ends the step loop after the step at work; unfinished requests are dropped (the job store re-runs them)."""
        ...

    def submit(self, job: job_pb2.Job, emitted: Sequence[int] = (), measured: int = 0) -> None:
        """Admits a job. ``emitted`` are tokens already delivered by an earlier worker: they are computed again as part
        of the prompt, not emitted again, and their number is where token indices and random numbers go on. ``measured``
        is the number of places of a replay that an earlier worker delivered: they are left out.

        Raises:
            ProblemError: INVALID_ARGUMENT or RESOURCE_EXHAUSTED; the job was not admitted and no event will come.
        """
        ...

    def cancel(self, job_id: str) -> None:
        """Ends a job with FINISH_REASON_CANCELLED; unknown or finished jobs are left alone."""
        ...

    def direct(self, directive: policy_pb2.Directive) -> Future[policy_pb2.Ack]:
        """Carries a directive out between two steps, or over several where it would keep one waiting for long.

        The future is set when it is done, and fails with ProblemError where it is refused.
        """
        ...

    def free_slots(self) -> int:
        """How many more jobs the engine wants to hold now."""
        ...

    def live_jobs(self) -> list[str]:
        """Jobs admitted and not finished."""
        ...

    def hello(self) -> policy_pb2.Hello:
        """The worker's description, current epochs included."""
        ...

    def configure(self, welcome: policy_pb2.Welcome) -> None:
        """Takes over what a controller asks for."""
        ...

    def steered(self, connected: bool) -> None:
        """Told when a controller is attached or lost; without one the worker's static rule applies."""
        ...
