"""A deterministic engine without a model: tokens by a rule from the prompt, one per step, on its own thread."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from kvpilot.bounds import ANY, Bounds
from kvpilot.v1 import common_pb2, generation_pb2, job_pb2, policy_pb2
from workers.engine.api import Event
from workers.errors import INVALID_ARGUMENT, ProblemError

MODEL = "scripted"
VOCABULARY_SIZE = 1000
CONTEXT_TOKENS = 512
REFUSED_PROMPT = "refuse me"


def model() -> generation_pb2.Model:
    """The model that the scripted engine claims to serve."""
    described = generation_pb2.Model(
        name=MODEL,
        context_tokens=CONTEXT_TOKENS,
        vocabulary_size=VOCABULARY_SIZE,
        chat=True,
        default_pipeline="full",
    )
    exact, permanent = common_pb2.LOSS_CLASS_EXACT, common_pb2.LOSS_CLASS_PERMANENT

    def parameter(name: str, kind: str, default: str, accepts: str, bounds: Bounds = ANY) -> Any:
        return generation_pb2.ParameterInfo(
            name=name, type=kind, default_value=default, accepts=accepts, bounds=bounds.to_proto()
        )

    keep = parameter("keep", "float", "0.5", "0 < keep <= 1", Bounds(above=0, most=1))
    window = parameter("window", "int", "32", "window >= 1", Bounds(least=1))
    bits = parameter("bits", "int", "4", "2 or 4", Bounds(choices=(2, 4)))
    shadow = parameter("shadow", "bool", "false", "true or false")
    order = parameter("order", "str", '"age"', "age or mass")
    described.stages.add(name="full", kind="full", loss_class=exact)
    described.stages.add(name="snapkv", kind="evict", loss_class=permanent, parameters=[keep, window])
    described.stages.add(name="kivi", kind="compress", loss_class=permanent, parameters=[bits, shadow])
    described.stages.add(name="host", kind="offload", loss_class=exact, parameters=[order])
    return described


def scripted_tokens(prompt: str, count: int) -> list[int]:
    """The tokens that follow a prompt."""
    return [zlib.crc32(f"{prompt}/{index}".encode()) % VOCABULARY_SIZE for index in range(count)]


def scripted_text(token_ids: Sequence[int]) -> str:
    """The text of generated tokens."""
    return "".join(f" w{token_id}" for token_id in token_ids)


@dataclass
class _Sequence:
    job: job_pb2.Job
    emitted: int
    started: bool = False
    cancelled: bool = False

    @property
    def max_tokens(self) -> int:
        sampling = self.job.request.sampling
        return sampling.max_tokens if sampling.HasField("max_tokens") else 256

    @property
    def prompt(self) -> str:
        request = self.job.request
        kind = request.WhichOneof("input")
        if kind == "prompt":
            return request.prompt
        if kind == "chat":
            return "\n".join(f"{message.role}: {message.content}" for message in request.chat.messages)
        return str(list(request.token_ids.ids))


@dataclass
class ScriptedEngine:
    """Implements EngineApi.

    Attributes:
        slots: jobs held at once.
        steps: steps it may still make; None makes them freely. :meth:`allow` adds to them.
        breaks_on: a prompt whose submission raises a bug's exception.
    """

    slots: int = 8
    steps: int | None = None
    breaks_on: str = ""
    submissions: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    _live: dict[str, _Sequence] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._turn = threading.Condition()
        self._ended = False
        self._thread: threading.Thread | None = None

    def start(
        self,
        on_events: Callable[[list[Event]], None],
        on_report: Callable[[policy_pb2.Report], None],
        on_death: Callable[[BaseException], None],
    ) -> None:
        self._on_events, self._on_report, self._on_death = on_events, on_report, on_death
        self._thread = threading.Thread(target=self._run, name="scripted-engine", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        with self._turn:
            self._ended = True
            self._turn.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def allow(self, steps: int) -> None:
        """Lets a held engine make more steps; each gives every live job a token."""
        with self._turn:
            assert self.steps is not None
            self.steps += steps
            self._turn.notify_all()

    def submit(self, job: job_pb2.Job, emitted: Sequence[int] = (), measured: int = 0) -> None:
        with self._turn:
            self.submissions.append((job.job_id, tuple(emitted)))
            if job.request.prompt == REFUSED_PROMPT:
                raise ProblemError(INVALID_ARGUMENT, "the prompt is refused", {"prompt": "not this one"})
            if self.breaks_on and job.request.prompt == self.breaks_on:
                raise RuntimeError("a bug in the engine")
            if job.job_id in self._live:
                raise RuntimeError(f"job {job.job_id} is already here")
            self._live[job.job_id] = _Sequence(job, len(emitted))
            self._turn.notify_all()

    def cancel(self, job_id: str) -> None:
        with self._turn:
            if job_id in self._live:
                self._live[job_id].cancelled = True
                self._turn.notify_all()

    def direct(self, directive: policy_pb2.Directive) -> Future[policy_pb2.Ack]:
        raise NotImplementedError

    def free_slots(self) -> int:
        with self._turn:
            return self.slots - len(self._live)

    def live_jobs(self) -> list[str]:
        with self._turn:
            return list(self._live)

    def hello(self) -> policy_pb2.Hello:
        return policy_pb2.Hello(worker="scripted", model=model())

    def configure(self, welcome: policy_pb2.Welcome) -> None:
        raise NotImplementedError

    def steered(self, connected: bool) -> None:
        raise NotImplementedError

    def _ready(self) -> bool:
        waits = any(not sequence.started or sequence.cancelled for sequence in self._live.values())
        return self._ended or waits or (bool(self._live) and (self.steps is None or self.steps > 0))

    def _run(self) -> None:
        while True:
            with self._turn:
                self._turn.wait_for(self._ready)
                if self._ended:
                    return
                may_step = self.steps is None or self.steps > 0
                events = [
                    event for sequence in list(self._live.values()) for event in self._advance(sequence, may_step)
                ]
                if self.steps and any(event.HasField("tokens") for _, event in events):
                    self.steps -= 1
                states = [
                    policy_pb2.RequestState(
                        request_id=job_id,
                        generated_tokens=sequence.emitted,
                        audits=[policy_pb2.Audit(at_token=sequence.emitted)],
                    )
                    for job_id, sequence in self._live.items()
                ]
            self._on_report(policy_pb2.Report(requests=states))
            self._on_events(events)

    def _advance(self, sequence: _Sequence, may_step: bool) -> Iterator[Event]:
        job_id = sequence.job.job_id
        if not sequence.started:
            sequence.started = True
            started = generation_pb2.Started(worker="scripted", pipeline="full", prompt_tokens=len(sequence.prompt))
            yield job_id, generation_pb2.GenerationEvent(started=started)
        elif not sequence.cancelled and may_step and sequence.emitted < sequence.max_tokens:
            token_id = scripted_tokens(sequence.prompt, sequence.emitted + 1)[-1]
            tokens = generation_pb2.Tokens(first_index=sequence.emitted, text=scripted_text([token_id]))
            token = tokens.tokens.add(id=token_id)
            if sequence.job.request.top_logprobs:
                token.logprob = -0.5
                token.top.add(id=token_id, logprob=-0.5)
            sequence.emitted += 1
            yield job_id, generation_pb2.GenerationEvent(tokens=tokens)
        if sequence.cancelled or sequence.emitted >= sequence.max_tokens:
            del self._live[job_id]
            reason = generation_pb2.FINISH_REASON_LENGTH
            if sequence.cancelled:
                reason = generation_pb2.FINISH_REASON_CANCELLED
            finished = generation_pb2.Finished(reason=reason, pipeline="full")
            finished.usage.prompt_tokens = len(sequence.prompt)
            finished.usage.generated_tokens = sequence.emitted
            yield job_id, generation_pb2.GenerationEvent(finished=finished)
