"""Moves jobs from the job store to the engine and their events back, under leases."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import structlog

from kvpilot.bus import Append, AppendStatus, Bus, BusUnavailableError, Claim
from kvpilot.tracing import trace_id_of
from kvpilot.v1 import common_pb2, generation_pb2, job_pb2, policy_pb2
from kvpilot.words import reason_word
from workers.engine.api import EngineApi, Event
from workers.errors import INTERNAL, ProblemError

log = structlog.get_logger(__name__)
Value = TypeVar("Value")

_FIRST_BACKOFF_S = 0.05
_LAST_BACKOFF_S = 1.0
_MOST_EVENTS_PER_JOB = 256
_MOST_EVENTS_PER_APPEND = 4096


@dataclass(frozen=True)
class JobSettings:
    """How a worker takes and keeps jobs.

    Attributes:
        heartbeat_s: leases are renewed this often; at most a third of the store's lease.
        most_attempts: a job that this many workers have lost is failed instead of tried again.
        claim_block_s: how long one claim waits for a job; bounds how long stopping takes.
        full_poll_s: how often a full engine is asked for room when no job ends meanwhile.
    """

    heartbeat_s: float = 2.0
    most_attempts: int = 3
    claim_block_s: float = 1.0
    full_poll_s: float = 0.2


@dataclass
class _Job:
    """A job this worker holds.

    Attributes:
        claim: its hold on it.
        undelivered: events of the engine that the store does not have yet, in order.
        ended: its last event is among them or delivered: the engine does not have it, or no more.
        submitted: the engine may know it.
        stopping: its client wants it stopped.
        state: as last reported by the engine.
        audits: all that the engine reported.
    """

    claim: Claim
    undelivered: list[generation_pb2.GenerationEvent] = field(default_factory=list)
    ended: bool = False
    submitted: bool = False
    stopping: bool = False
    state: policy_pb2.RequestState | None = None
    audits: list[policy_pb2.Audit] = field(default_factory=list)

    @property
    def job_id(self) -> str:
        return self.claim.job.job_id

    @property
    def ids(self) -> dict[str, str | int]:
        """What a log line about it says of it."""
        trace_id = trace_id_of(self.claim.job.traceparent)
        traced = {"trace_id": trace_id} if trace_id else {}
        return {"request": self.job_id, "worker": self.claim.worker, "lease_epoch": self.claim.epoch, **traced}


class JobObserver(Protocol):
    """Is told, on the event loop, what becomes of the jobs that a worker holds."""

    def claimed(self, claim: Claim) -> None:
        """A job is held from now on; its events follow."""
        ...

    def happened(self, at_s: float, events: Sequence[Event]) -> None:
        """Events of held jobs that will be delivered; the engine made them at this time, seconds of the epoch."""
        ...

    def reported(self, report: policy_pb2.Report) -> None:
        """The engine made a report."""
        ...

    def let_go(self, job_id: str, reason: str) -> None:
        """A job is no longer held though it did not finish here."""
        ...


class JobRunner:
    """A worker's consumer of the job store.

    Wire :meth:`on_events` and :meth:`on_report` to the engine's callbacks, start the engine, then await :meth:`run`.
    Events that cannot be delivered while Redis is out of reach wait here, in order. A job whose lease another worker
    took over is dropped at once; the store refuses its events in any case.
    """

    def __init__(
        self,
        bus: Bus,
        engine: EngineApi,
        name: str,
        settings: JobSettings | None = None,
        observers: Sequence[JobObserver] = (),
    ) -> None:
        self.name = name
        self._observers = observers
        self.settings = settings or JobSettings()
        self._bus = bus
        self._engine = engine
        self._jobs: dict[str, _Job] = {}
        self._leaving: dict[str, asyncio.Event] = {}  # dropped here, not yet ended by the engine
        self._card = job_pb2.WorkerCard()
        self._card.start_time.GetCurrentTime()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._beginnings: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()
        self._change = asyncio.Event()
        self._stopping = asyncio.Event()
        self._stopped = asyncio.Event()
        self._drain_s = 0.0
        self._hurry = asyncio.Event()
        self._take_over_from = 0.0

    def on_events(self, events: list[Event]) -> None:
        """Takes a step's events; called on the engine's thread."""
        self._hand_over(self._take_events, (time.time(), events))

    def on_report(self, report: policy_pb2.Report) -> None:
        """Takes the requests' states, kept for the outcomes; called on the engine's thread."""
        self._hand_over(self._take_report, report)

    async def run(self) -> None:
        """Works until :meth:`stop`. Redis out of reach is waited out; any other failure is raised."""
        self._loop = asyncio.get_running_loop()
        await self._first_beat()
        try:
            async with asyncio.TaskGroup() as tasks:
                claiming = tasks.create_task(self._claim_jobs(), name="claim")
                others = [
                    tasks.create_task(self._deliver(), name="deliver"),
                    tasks.create_task(self._beat(), name="heartbeat"),
                    tasks.create_task(self._watch_cancellations(), name="cancellations"),
                ]
                await self._stopping.wait()
                await self._say_goodbye()
                await claiming
                await self._drain()
                for task in others:
                    task.cancel()
            await self._retire()
        finally:
            for task in self._beginnings:
                task.cancel()
            self._stopped.set()

    async def stop(self, drain_s: float = 0.0, hurry: asyncio.Event | None = None) -> None:
        """Claims no more jobs, lets those held finish for up to ``drain_s``, hands back the rest and ends `run`.

        Replays are handed back at once: they are long, and lose nothing. So is everything once ``hurry`` is set.
        """
        self._drain_s, self._hurry = drain_s, hurry or self._hurry
        self._stopping.set()
        await self._stopped.wait()

    @property
    def undelivered(self) -> int:
        """Events that the job store does not have yet."""
        return sum(len(job.undelivered) for job in list(self._jobs.values()))

    def held_jobs(self) -> list[str]:
        """Ids of the jobs held now, in the order they were claimed."""
        return list(self._jobs)

    # ---- from the engine's thread

    def _hand_over(self, take: Callable[[Value], None], value: Value) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody is left to deliver to
                self._loop.call_soon_threadsafe(take, value)

    def _take_events(self, happened: tuple[float, list[Event]]) -> None:
        at_s, events = happened
        taken: list[Event] = []
        for job_id, event in events:
            if job_id in self._leaving:
                if event.HasField("finished"):
                    self._leaving.pop(job_id).set()
                continue
            job = self._jobs.get(job_id)
            if job is not None and not job.ended:
                job.undelivered.append(event)
                job.ended = event.HasField("finished")
                taken.append((job_id, event))
                self._news.set()
        for observer in self._observers:
            observer.happened(at_s, taken)

    def _take_report(self, report: policy_pb2.Report) -> None:
        for state in report.requests:
            if job := self._jobs.get(state.request_id):
                job.state = state
                job.audits.extend(state.audits)
        for observer in self._observers:
            observer.reported(report)

    # ---- claiming

    async def _claim_jobs(self) -> None:
        backoff_s = _FIRST_BACKOFF_S
        model = self._card.hello.model.name
        block_ms = int(1000 * self.settings.claim_block_s)
        while not self._stopping.is_set():
            room = self._engine.free_slots() - len(self._beginnings)
            if room <= 0:
                self._change.clear()
                await _wait(self._change, self.settings.full_poll_s)
                continue
            take_over = asyncio.get_running_loop().time() >= self._take_over_from
            try:
                claims = await self._bus.claim(
                    self.name, model, room, block_ms, take_over=take_over, stop=self._stopping
                )
            except BusUnavailableError as error:
                self._note_outage(error)
                await _wait(self._stopping, backoff_s)
                backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)
                continue
            backoff_s = _FIRST_BACKOFF_S
            for claim in claims:
                self._begin(claim)

    def _begin(self, claim: Claim) -> None:
        """Takes a claimed job on."""
        job_id = claim.job.job_id
        held = self._jobs.get(job_id)
        if held is not None:  # our own lease had ended: what was not delivered is computed again
            self._drop(held, "own lease ended")
        job = self._jobs[job_id] = _Job(claim)
        for observer in self._observers:
            observer.claimed(claim)
        log.info("job claimed", **job.ids, attempts=claim.attempts)
        generated = len(claim.progress.token_ids)
        if claim.cancelled:
            self._conclude(job, generation_pb2.FINISH_REASON_CANCELLED, generated)
        elif claim.attempts > self.settings.most_attempts:
            message = f"{claim.attempts - 1} workers were lost while they worked on the job; it is not tried again"
            self._conclude(
                job,
                generation_pb2.FINISH_REASON_FAILED,
                generated,
                common_pb2.Problem(code=INTERNAL, message=message),
            )
        else:
            task = asyncio.create_task(self._submit(job), name=f"submit {job_id}")
            self._beginnings.add(task)
            task.add_done_callback(self._beginnings.discard)

    async def _submit(self, job: _Job) -> None:
        """Gives a job to the engine, once the engine has let go of an earlier claim of it."""
        if job.job_id in self._leaving:
            await self._leaving[job.job_id].wait()
        if not self._holds(job):
            return
        job.submitted = True
        progress = job.claim.progress
        try:
            await asyncio.to_thread(
                self._engine.submit, job.claim.job, tuple(progress.token_ids), len(progress.replayed)
            )
        except Exception as error:
            problem = self._problem_of(job, error)
            if self._holds(job):
                self._conclude(job, generation_pb2.FINISH_REASON_FAILED, len(progress.token_ids), problem)
            elif job.job_id in self._leaving:
                self._leaving.pop(job.job_id).set()
        else:
            if job.stopping or not self._holds(job):  # decided while the engine did not know the job yet
                self._engine.cancel(job.job_id)

    def _problem_of(self, job: _Job, error: Exception) -> common_pb2.Problem:
        if isinstance(error, ProblemError):
            return error.problem
        log.error("job not admitted", **job.ids, exc_info=error)
        return common_pb2.Problem(code=INTERNAL, message=f"the worker failed to admit the job: {error!r}")

    def _conclude(
        self,
        job: _Job,
        reason: generation_pb2.FinishReason,
        generated_tokens: int,
        problem: common_pb2.Problem | None = None,
    ) -> None:
        """Ends a job that the engine does not have."""
        usage = generation_pb2.Usage(generated_tokens=generated_tokens)
        finished = generation_pb2.Finished(reason=reason, usage=usage, problem=problem)
        event = generation_pb2.GenerationEvent(finished=finished)
        job.undelivered.append(event)
        job.ended = True
        for observer in self._observers:
            observer.happened(time.time(), [(job.job_id, event)])
        self._news.set()

    def _holds(self, job: _Job) -> bool:
        return self._jobs.get(job.job_id) is job

    def _forget(self, job: _Job) -> None:
        del self._jobs[job.job_id]
        self._change.set()

    def _drop(self, job: _Job, reason: str) -> None:
        """Lets go of a job that is no longer ours, in the engine too."""
        log.warning("job dropped", **job.ids, reason=reason)
        self._forget(job)
        for observer in self._observers:
            observer.let_go(job.job_id, reason)
        if job.submitted and not job.ended:
            self._leaving[job.job_id] = asyncio.Event()
            self._engine.cancel(job.job_id)

    # ---- delivering

    async def _deliver(self) -> None:
        backoff_s = _FIRST_BACKOFF_S
        while True:
            await self._news.wait()
            self._news.clear()
            while batch := self._next_batch():
                try:
                    answers = await self._bus.append(batch)
                except BusUnavailableError as error:
                    self._note_outage(error)
                    await asyncio.sleep(backoff_s)
                    backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)
                    continue
                backoff_s = _FIRST_BACKOFF_S
                for item, answer in zip(batch, answers, strict=True):
                    await self._settle(item, answer.status, answer.cancelled)

    def _next_batch(self) -> list[Append]:
        """Undelivered events of all jobs, as many as one transaction should carry."""
        batch: list[Append] = []
        room = _MOST_EVENTS_PER_APPEND
        for job in self._jobs.values():
            events = job.undelivered[: min(room, _MOST_EVENTS_PER_JOB)]
            if events:
                batch.append(Append(job.claim, events, self._outcome(job, events[-1])))
                room -= len(events)
        return batch

    def _outcome(self, job: _Job, last: generation_pb2.GenerationEvent) -> job_pb2.Outcome | None:
        if not last.HasField("finished"):
            return None
        return job_pb2.Outcome(
            job_id=job.job_id, worker=self.name, last_state=job.state, finished=last.finished, audits=job.audits
        )

    async def _settle(self, item: Append, status: AppendStatus, cancelled: bool) -> None:
        job = self._jobs.get(item.claim.job.job_id)
        if job is None or job.claim is not item.claim:
            return
        if status is AppendStatus.STORED:
            del job.undelivered[: len(item.events)]
            if item.events[-1].HasField("finished"):
                log.info("job finished", **job.ids, reason=reason_word(item.events[-1].finished.reason))
                self._forget(job)
            elif cancelled:
                self._stop_job(job.job_id)
        elif status is AppendStatus.GAP:
            self._drop(job, "the store lost events that were delivered before")
            with contextlib.suppress(BusUnavailableError):  # then its lease ends by itself
                await self._bus.release([job.claim])
        else:
            self._drop(job, f"append answered {status.value}")

    # ---- leases and cancellations

    async def _first_beat(self) -> None:
        """Publishes the worker, waiting for Redis where it is not there yet."""
        backoff_s = _FIRST_BACKOFF_S
        while not self._stopping.is_set():
            try:
                return await self._renew()
            except BusUnavailableError as error:
                self._note_outage(error)
                await _wait(self._stopping, backoff_s)
                backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self.settings.heartbeat_s)
            try:
                await self._renew()
            except BusUnavailableError as error:
                self._note_outage(error)

    async def _renew(self) -> None:
        self._card.hello.CopyFrom(self._engine.hello())
        self._card.hello.worker = self.name
        claims = {job_id: job.claim for job_id, job in self._jobs.items()}
        renewal = await self._bus.heartbeat(self._card, list(claims.values()), leaving=self._stopping.is_set())
        for job_id in renewal.lost:
            job = self._jobs.get(job_id)
            if job is not None and job.claim is claims[job_id]:
                self._drop(job, "lease lost")
        for job_id in renewal.cancelled:
            self._stop_job(job_id)

    async def _watch_cancellations(self) -> None:
        while True:
            try:
                async for job_id in self._bus.cancellations(self.name):
                    self._stop_job(job_id)
            except BusUnavailableError as error:
                self._note_outage(error)
                await asyncio.sleep(_LAST_BACKOFF_S)

    def _stop_job(self, job_id: str) -> None:
        job = self._jobs.get(job_id)
        if job is not None and not job.stopping and not job.ended:
            job.stopping = True
            if job.submitted:
                self._engine.cancel(job_id)

    def _note_outage(self, error: BusUnavailableError) -> None:
        """No worker could renew its leases meanwhile: leaves the others' jobs alone until they had the time to."""
        log.warning("job store out of reach", worker=self.name, error=str(error), held=len(self._jobs))
        self._take_over_from = asyncio.get_running_loop().time() + self._bus.settings.lease_s

    # ---- stopping

    async def _say_goodbye(self) -> None:
        """Tells the store that we leave, so that nothing more is put into our own queues."""
        try:
            await self._renew()
        except BusUnavailableError as error:
            self._note_outage(error)

    async def _drain(self) -> None:
        """Lets jobs finish."""
        if not self._drain_s:
            return
        await self._hand_back([job for job in self._jobs.values() if job.claim.job.request.HasField("replay")])
        hurrying = asyncio.ensure_future(self._hurry.wait())
        try:
            async with asyncio.timeout(self._drain_s):
                while self._jobs and not hurrying.done():
                    self._change.clear()
                    changing = asyncio.ensure_future(self._change.wait())
                    await asyncio.wait({changing, hurrying}, return_when=asyncio.FIRST_COMPLETED)
                    changing.cancel()
        except TimeoutError:
            log.info("jobs not finished in time are handed back", worker=self.name, drain_s=self._drain_s)
        finally:
            hurrying.cancel()

    async def _retire(self) -> None:
        """Hands back what is still held and leaves the list of workers."""
        await self._hand_back(list(self._jobs.values()))
        try:
            await self._bus.retire(self.name)
        except BusUnavailableError as error:
            log.warning("worker stays listed until its lease ends", worker=self.name, error=str(error))

    async def _hand_back(self, jobs: list[_Job]) -> None:
        """Releases jobs; what the store does not have of them is computed again by the next worker."""
        for job in jobs:
            self._drop(job, "worker stops")
        try:
            await self._bus.release([job.claim for job in jobs])
        except BusUnavailableError as error:
            log.warning("jobs not handed back; their leases will end", worker=self.name, error=str(error))


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    """Waits for an event, at most ``timeout_s``."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
