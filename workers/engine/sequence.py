"""One request inside the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from kvpilot.v1 import common_pb2, generation_pb2, policy_pb2
from workers.cache.parked import SessionKey
from workers.cache.sequence_cache import SequenceCache
from workers.engine.sampler import SamplingParameters
from workers.engine.text import TextStream
from workers.stages.base import Pipeline


class Phase(Enum):
    """Where a request stands in the scheduler."""

    WAITING = "waiting"
    PREFILL = "prefill"
    REPEAT = "repeat"
    """The prompt is computed; before its pipeline takes effect the model repeats it."""
    DECODE = "decode"
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """A request: what was asked, what has been generated, where it stands.

    ``token_ids`` is prompt plus generated tokens. ``computed`` counts those whose keys and values are in the cache: all
    but the newest one while decoding, and whatever prefill has reached before.
    """

    job_id: str
    session_id: str
    scenario: common_pb2.Scenario
    objective: common_pb2.Objective
    token_ids: list[int]
    prompt_tokens: int
    max_tokens: int
    sampling: SamplingParameters
    stop_token_ids: frozenset[int]
    text: TextStream | None
    top_logprobs: int
    pipeline: Pipeline
    """The pipeline in force, or that will be once the prompt is complete."""
    pinned: Pipeline | None
    """The pipeline the client named: the request returns to it when pressure has moved it elsewhere."""
    accept_time_s: float
    prompt: policy_pb2.PromptStatistics | None = None
    trace_id: str = ""
    """Of the trace it belongs to, 32 hexadecimal digits; empty: none."""
    caller: str = ""
    """Who asks. Jobs carry no identity: all have this one."""

    phase: Phase = Phase.WAITING
    computed: int = 0
    settled: bool = True
    """Whether its blocks are where ``pipeline`` wants them; False after a tier had no room, until it has."""
    cache: SequenceCache | None = None
    to_repeat: int = 0
    """Tokens the model has yet to be fed again for its pipeline's evictor, or for that of a switch to come."""
    epoch: int = 0
    reused_prompt_tokens: int = 0
    preemptions: int = 0
    switches: list[common_pb2.Switch] = field(default_factory=list)
    admit_time_s: float = 0.0
    first_token_time_s: float = 0.0
    last_token_time_s: float = 0.0
    finish: generation_pb2.FinishReason = generation_pb2.FINISH_REASON_UNSPECIFIED
    problem: common_pb2.Problem | None = None

    @property
    def ids(self) -> dict[str, str | int]:
        """What a log line about it says of it."""
        traced = {"trace_id": self.trace_id} if self.trace_id else {}
        return {"request": self.job_id, "epoch": self.epoch, **traced}

    @property
    def session(self) -> SessionKey | None:
        """The session it is a turn of."""
        return SessionKey(self.caller, self.session_id) if self.session_id else None

    @property
    def home(self) -> Pipeline | None:
        """The pipeline it goes back to when there is room; None: it stays where it is."""
        return self.pinned.without_shadow() if self.pinned and self.cache and self.cache.lost else self.pinned

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.prompt_tokens

    @property
    def to_compute(self) -> int:
        """Tokens whose keys and values are missing."""
        return len(self.token_ids) - self.computed

    @property
    def next_chunk(self) -> int:
        """Tokens of the prompt that may be computed in one go: those up to the next eviction, if there is one."""
        evictor = self.pipeline.evictor
        if evictor and evictor.evicts_while_prefilling:
            return min(self.to_compute, evictor.next_eviction(self.computed) - self.computed)
        return self.to_compute

    @property
    def most_tokens(self) -> int:
        """Tokens it may come to hold."""
        return self.prompt_tokens + self.max_tokens
