"""What a job's events add up to: the one reading of an event stream shared by clients, front doors and workers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from kvpilot.v1 import common_pb2, generation_pb2


class FinishReason(StrEnum):
    """Why a generation ended; see ``FinishReason`` in generation.proto."""

    STOP_TOKEN = "stop_token"
    STOP_STRING = "stop_string"
    LENGTH = "length"
    CANCELLED = "cancelled"
    FAILED = "failed"
    MEASURED = "measured"


class JobState(StrEnum):
    """Where a job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    FINISHED = "finished"

    @classmethod
    def of(cls, state: generation_pb2.JobState) -> JobState:
        """Reads the enum of generation.proto."""
        return cls(generation_pb2.JobState.Name(state).removeprefix("JOB_STATE_").lower())


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probabilities (natural log) of one generated token.

    Attributes:
        token_id: the chosen token.
        logprob: its log-probability under the model's unmodified distribution.
        top: the most likely tokens at this place with theirs, most likely first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Result:
    """A job's answer so far; whole once ``finished`` is set.

    Attributes:
        job_id: name for resume, get and cancel; empty until the job was accepted.
        seed: seed in use.
        text: text released so far.
        token_ids: tokens generated so far.
        logprobs: one entry per token where log-probabilities were asked for, else empty.
        switches: changes of pipeline so far, in order.
        replayed: what a replay has measured so far, place by place.
        worker: the worker that has, or had, the job; empty while it is queued.
        next_offset: offset of the first event not yet seen.
        finished: how it ended, None while it has not.
    """

    job_id: str = ""
    seed: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    switches: list[common_pb2.Switch] = field(default_factory=list)
    replayed: list[generation_pb2.Replayed] = field(default_factory=list)
    worker: str = ""
    next_offset: int = 0
    finished: generation_pb2.Finished | None = None

    def add(self, event: generation_pb2.GenerationEvent) -> None:
        """Takes in the next event.

        Raises:
            ValueError: ``event`` is not the next one: its offset leaves a gap or repeats.
        """
        if event.offset != self.next_offset:
            raise ValueError(f"event with offset {event.offset} where {self.next_offset} was expected")
        self.next_offset += 1
        kind = event.WhichOneof("event")
        if kind == "accepted":
            self.job_id, self.seed = event.accepted.job_id, event.accepted.seed
        elif kind == "started":
            self.worker = event.started.worker
        elif kind == "switch":
            self.switches.append(event.switch)
        elif kind == "replayed":
            self.replayed.append(event.replayed)
        elif kind == "tokens":
            self.text += event.tokens.text
            for token in event.tokens.tokens:
                self.token_ids.append(token.id)
                if token.HasField("logprob"):
                    top = tuple((other.id, other.logprob) for other in token.top)
                    self.logprobs.append(TokenLogprob(token.id, token.logprob, top))
        elif kind == "finished":
            self.finished = event.finished

    @classmethod
    def of(cls, events: Iterable[generation_pb2.GenerationEvent]) -> Result:
        """Adds up events from offset 0 on."""
        result = cls()
        for event in events:
            result.add(event)
        return result

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended, None while it has not."""
        if self.finished is None:
            return None
        name = generation_pb2.FinishReason.Name(self.finished.reason)
        return FinishReason(name.removeprefix("FINISH_REASON_").lower())

    @property
    def usage(self) -> generation_pb2.Usage:
        """Token counts; zeros until it is finished."""
        return self._end.usage

    @property
    def cache(self) -> common_pb2.CacheBytes:
        """Cache bytes at the end and at their peak; zeros until it is finished."""
        return self._end.cache

    @property
    def timings(self) -> generation_pb2.Timings:
        """Where the time went, milliseconds; zeros until it is finished."""
        return self._end.timings

    @property
    def pipeline(self) -> str:
        """Pipeline at the end, in text form; empty until it is finished."""
        return self._end.pipeline

    @property
    def _end(self) -> generation_pb2.Finished:
        return self.finished if self.finished is not None else generation_pb2.Finished()
