"""From a job to a sequence: tokenise, check against the model and the worker's memory, refuse with reasons."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import dataclass

from kernels.layout import BLOCK_TOKENS, CacheShape
from kvpilot.pipeline import PipelineError
from kvpilot.tracing import trace_id_of
from kvpilot.v1 import generation_pb2, job_pb2
from models.scenarios import effective_scenario, fill_objective
from workers.engine.repeating import Words, refusal
from workers.engine.replay import SIGNAL_TOKENS, Place, Replay
from workers.engine.runner import LoadedModel
from workers.engine.sampler import SamplingParameters
from workers.engine.sequence import Sequence
from workers.engine.text import TextStream
from workers.errors import INVALID_ARGUMENT, RESOURCE_EXHAUSTED, ProblemError
from workers.profile.profile import names_of
from workers.signals import prompt_statistics
from workers.stages.base import LossClass, Pipeline
from workers.stages.registry import build

DEFAULT_MAX_TOKENS = 256
DEFAULT_HORIZON_TOKENS = 32


@dataclass(frozen=True)
class Limits:
    """What a worker can take on."""

    context_tokens: int
    capacity_bytes: int
    """Bytes one request's cache may take over all tiers."""
    bytes_per_token: int
    """Raw bytes of one token over all layers and heads."""


class Intake:
    """Reads jobs for one model.

    Args:
        loaded: the model.
        shape: its cache dimensions.
        limits: what the worker can take on.
        default_pipeline: pipeline of requests that name none; may be changed later.
        refuses: says why no request can have a pipeline on this worker.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        shape: CacheShape,
        limits: Limits,
        default_pipeline: Pipeline,
        refuses: Callable[[Pipeline], str | None],
    ) -> None:
        self._loaded = loaded
        self._shape = shape
        self._limits = limits
        self._words = Words.of(loaded)
        self.default_pipeline = default_pipeline
        self._refuses = refuses

    def read(self, job: job_pb2.Job, emitted: Ids[int]) -> Sequence:
        """The sequence of a job.

        Args:
            job: as validated by a front door; what depends on model and memory is checked here.
            emitted: tokens that an earlier worker delivered.

        Raises:
            ProblemError: INVALID_ARGUMENT naming every bad field, or RESOURCE_EXHAUSTED.
        """
        request = job.request
        violations: dict[str, str] = {}
        field = request.WhichOneof("input") or "prompt"
        prompt = self._tokenise(request, violations)
        room = self._limits.context_tokens - len(prompt)
        if not violations and room < 1:
            violations[field] = (
                f"{len(prompt)} tokens; at most {self._limits.context_tokens - 1} fit the context of"
                f" {self._limits.context_tokens} and leave room for an answer"
            )
        wanted = request.sampling.max_tokens if request.sampling.HasField("max_tokens") else 0
        if not violations and wanted > room:
            violations["sampling.max_tokens"] = (
                f"{wanted}; the context of {self._limits.context_tokens} tokens leaves {room} after the prompt"
            )
        pipeline = self._named_pipeline("pipeline", request.pipeline, violations) if request.pipeline else None
        in_force = pipeline or self.default_pipeline
        if reason := refusal(in_force, self._words, len(prompt), self._limits.context_tokens):
            violations["pipeline"] = reason
        for token_id in request.sampling.stop_token_ids:
            if not 0 <= token_id < self._loaded.vocabulary_size:
                violations["sampling.stop_token_ids"] = f"{token_id}; ids are below {self._loaded.vocabulary_size}"
        if violations:
            summary = "; ".join(f"{name}: {description}" for name, description in violations.items())
            raise ProblemError(INVALID_ARGUMENT, summary, violations)
        max_tokens = wanted or min(DEFAULT_MAX_TOKENS, room)
        self._check_capacity(_held_tokens(in_force, len(prompt) + max_tokens))
        return self._sequence(job, prompt, list(emitted), max_tokens, pipeline)

    def read_replay(self, job: job_pb2.Job, measured: int) -> Replay:
        """The replay of a job, without the first ``measured`` places, which an earlier worker delivered.

        Raises:
            ProblemError: INVALID_ARGUMENT naming every bad field.
        """
        request, asked = job.request, job.request.replay
        violations: dict[str, str] = {}
        tokens = self._tokenise(request, violations)
        horizon = asked.horizon_tokens or DEFAULT_HORIZON_TOKENS
        field = request.WhichOneof("input") or "prompt"
        if len(tokens) > self._limits.context_tokens:
            violations[field] = f"{len(tokens)} tokens; at most {self._limits.context_tokens} fit the context"
        if asked.at_tokens and asked.at_tokens[-1] + horizon > len(tokens):
            violations["replay.at_tokens"] = (
                f"{asked.at_tokens[-1]}; {horizon} tokens must follow, and the text has {len(tokens)}"
            )
        pipelines = [
            (text, self._named_pipeline(f"replay.pipelines[{place}]", text, violations))
            for place, text in enumerate(asked.pipelines)
        ]
        under = [
            self._named_pipeline(f"replay.measured_under[{place}]", text, violations)
            for place, text in enumerate(asked.measured_under)
        ] or [Pipeline()] * len(asked.at_tokens)
        furthest = asked.at_tokens[-1] if asked.at_tokens else 0
        named = [(f"replay.pipelines[{place}]", pipeline) for place, (_, pipeline) in enumerate(pipelines)]
        named += [(f"replay.measured_under[{place}]", pipeline) for place, pipeline in enumerate(under)]
        for field_name, named_pipeline in named:
            why = named_pipeline and refusal(named_pipeline, self._words, furthest, self._limits.context_tokens)
            if why:
                violations[field_name] = why
        if violations:
            summary = "; ".join(f"{name}: {description}" for name, description in violations.items())
            raise ProblemError(INVALID_ARGUMENT, summary, violations)
        places = [Place(at, pipeline) for at, pipeline in zip(asked.at_tokens, under, strict=True) if pipeline]
        self._check_capacity(asked.at_tokens[-1] + horizon)
        return Replay(
            job_id=job.job_id,
            token_ids=tokens,
            places=deque(places[measured:]),
            pipelines=tuple((text, pipeline) for text, pipeline in pipelines if pipeline),
            horizon_tokens=horizon,
            scenario=effective_scenario(request.scenario),
            objective=fill_objective(request.scenario, request.objective),
            prompt_tokens=asked.prompt_tokens,
            first_token=places[0].at_token - SIGNAL_TOKENS,
            turns=max(1, asked.turns),
        )

    def _tokenise(self, request: generation_pb2.GenerateRequest, violations: dict[str, str]) -> list[int]:
        kind = request.WhichOneof("input")
        tokenizer, vocabulary = self._loaded.tokenizer, self._loaded.vocabulary_size
        ids: list[int] = []
        if kind == "token_ids":
            ids = list(request.token_ids.ids)
            if bad := [token_id for token_id in ids if not 0 <= token_id < vocabulary]:
                violations["token_ids.ids"] = f"{bad[0]}; ids are from 0 to {vocabulary - 1}"
        elif tokenizer is None:
            violations[kind or "prompt"] = "this model has no tokenizer; token_ids is accepted"
            return ids
        elif kind == "chat":
            if not self._loaded.chat:
                violations["chat"] = "this model has no chat template; prompt and token_ids are accepted"
                return ids
            messages = [{"role": message.role, "content": message.content} for message in request.chat.messages]
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        elif kind == "prompt":
            ids = tokenizer(request.prompt)["input_ids"]
        if not ids:
            violations.setdefault(kind or "prompt", "empty; at least one token is needed")
        return ids

    def _named_pipeline(self, field: str, text: str, violations: dict[str, str]) -> Pipeline | None:
        try:
            pipeline = build(text, self._shape, names_of(self._loaded.profile))
        except PipelineError as error:
            violations[field] = str(error)
            return None
        if reason := self._refuses(pipeline):
            violations[field] = reason
            return None
        return pipeline

    def _check_capacity(self, tokens: int) -> None:
        needed, capacity = tokens * self._limits.bytes_per_token, self._limits.capacity_bytes
        if needed > capacity:
            raise ProblemError(
                RESOURCE_EXHAUSTED,
                f"{tokens} tokens (prompt and max_tokens) need {needed} bytes of cache; this worker has {capacity} over"
                f" all tiers, enough for {capacity // self._limits.bytes_per_token} tokens",
            )

    def _sequence(
        self, job: job_pb2.Job, prompt: list[int], emitted: list[int], max_tokens: int, pipeline: Pipeline | None
    ) -> Sequence:
        request, asked = job.request, job.request.sampling
        stream = TextStream(self._loaded.tokenizer, tuple(asked.stop)) if self._loaded.tokenizer else None
        for token_id in emitted:
            if stream:
                stream.add(token_id)
        return Sequence(
            job_id=job.job_id,
            session_id=request.session_id,
            scenario=effective_scenario(request.scenario),
            objective=fill_objective(request.scenario, request.objective),
            token_ids=prompt + emitted,
            prompt_tokens=len(prompt),
            max_tokens=max_tokens,
            sampling=SamplingParameters(
                temperature=asked.temperature,
                top_p=asked.top_p if asked.HasField("top_p") else 1.0,
                top_k=asked.top_k,
                min_p=asked.min_p,
                repetition_penalty=asked.repetition_penalty if asked.HasField("repetition_penalty") else 1.0,
                seed=asked.seed,
            ),
            stop_token_ids=frozenset(asked.stop_token_ids)
            | (frozenset() if asked.ignore_eos else self._loaded.eos_token_ids),
            text=stream,
            top_logprobs=request.top_logprobs,
            pipeline=pipeline or self.default_pipeline,
            pinned=pipeline,
            accept_time_s=job.create_time.ToNanoseconds() / 1e9,
            prompt=prompt_statistics(prompt, _turns(request)),
            trace_id=trace_id_of(job.traceparent),
        )


def _held_tokens(pipeline: Pipeline, tokens: int) -> int:
    """The most tokens a request of so many holds at once: fewer where it evicts from the first on and for good."""
    evictor = pipeline.evictor
    if evictor and evictor.evicts_while_prefilling and pipeline.loss_class is LossClass.PERMANENT:
        return min(tokens, evictor.next_eviction(0) + BLOCK_TOKENS)
    return tokens


def _turns(request: generation_pb2.GenerateRequest) -> int:
    """User turns of a chat so far; 1 for any other input."""
    if request.WhichOneof("input") != "chat":
        return 1
    return sum(message.role == "user" for message in request.chat.messages)
