"""What a request must hold, checked as a whole: every bad field is named with its value and what is accepted."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import grpc

from controller.refusals import bad_fields, refusal
from controller.served import ServedModels
from kvpilot.catalog import StageCatalog
from kvpilot.pipeline import PipelineError, parse_pipeline
from kvpilot.v1 import common_pb2, generation_pb2

MAX_NAME_CHARACTERS = 128
MAX_STOP_STRINGS = 16
MAX_TEMPERATURE = 10.0
MAX_REPETITION_PENALTY = 10.0
MAX_TOP_LOGPROBS = 20
MAX_REPLAYED = 64
"""Most places, and most pipelines, of a replay."""
MAX_HORIZON_TOKENS = 256
FIRST_PLACE = 64
PLACE_DISTANCE = 32
"""Tokens before the first place of a replay, and between two."""
ROLES = ("system", "user", "assistant")
_NAME = re.compile(r"[A-Za-z0-9._:-]*")
_SHOWN_CHARACTERS = 80


class Violations(dict[str, str]):
    """Bad fields found so far: path in the request -> the value and what is accepted."""

    def add(self, field: str, value: Any, accepted: str) -> None:
        """Notes a bad field; the first complaint about a field stays."""
        self.setdefault(field, f"{shown(value)} given; accepted: {accepted}")


def shown(value: Any) -> str:
    """A value for an error message, shortened where it is long."""
    text = repr(value[: 2 * _SHOWN_CHARACTERS]) if isinstance(value, str) else repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def check_generate(request: generation_pb2.GenerateRequest, models: ServedModels) -> generation_pb2.Model:
    """Checks a Generate request; returns the model it is for.

    Raises:
        RefusedError: INVALID_ARGUMENT with every bad field, or UNAVAILABLE where no worker ever served a model here.
    """
    if not models.known:
        raise refusal(
            grpc.StatusCode.UNAVAILABLE,
            "no worker has registered yet, so no model is known; start a worker, or wait until one is up",
            retry_after_ms=1000,
        )
    bad = Violations()
    model = _check_model(request, models, bad)
    _check_input(request, model, bad)
    _check_sampling(request.sampling, model, bad)
    _check_objective(request.objective, bad)
    _check_pipeline("pipeline", request.pipeline, model, bad)
    if request.HasField("replay"):
        _check_replay(request, model, bad)
    check_name("session_id", request.session_id, bad)
    check_name("idempotency_key", request.idempotency_key, bad)
    if request.scenario not in common_pb2.Scenario.values():
        bad.add("scenario", request.scenario, ", ".join(common_pb2.Scenario.keys()))
    if request.priority not in generation_pb2.Priority.values():
        bad.add("priority", request.priority, ", ".join(generation_pb2.Priority.keys()))
    if not 0 <= request.top_logprobs <= MAX_TOP_LOGPROBS:
        bad.add("top_logprobs", request.top_logprobs, f"0 to {MAX_TOP_LOGPROBS}")
    if bad or model is None:
        raise bad_fields(bad)
    return model


def expand_recipes(request: generation_pb2.GenerateRequest, model: generation_pb2.Model) -> None:
    """Puts pipelines where an accepted request names recipes: a worker may know others by these names."""
    catalog = StageCatalog(model.stages)
    request.pipeline = catalog.expand(request.pipeline)
    for pipelines in (request.replay.pipelines, request.replay.measured_under) if request.HasField("replay") else ():
        pipelines[:] = [catalog.expand(pipeline) for pipeline in pipelines]


def check_job_id(job_id: str, bad: Violations) -> None:
    """A job's name as Accepted gave it."""
    if not job_id or len(job_id) > MAX_NAME_CHARACTERS or not _NAME.fullmatch(job_id):
        bad.add("job_id", job_id, "the job id that Accepted gave")


def check_name(field: str, name: str, bad: Violations) -> None:
    """A name that a client chose; unset is fine."""
    if len(name) > MAX_NAME_CHARACTERS or not _NAME.fullmatch(name):
        bad.add(field, name, f"up to {MAX_NAME_CHARACTERS} characters of A-Z a-z 0-9 . _ : -")


def _check_model(
    request: generation_pb2.GenerateRequest, models: ServedModels, bad: Violations
) -> generation_pb2.Model | None:
    if request.model:
        if request.model not in models.known:
            bad.add("model", request.model, ", ".join(sorted(models.known)))
        return models.known.get(request.model)
    choice = models.live or models.known
    if len(choice) > 1:
        bad.add("model", "", f"one of {', '.join(sorted(choice))}; several are served, so one must be named")
        return None
    return next(iter(choice.values()))


def _check_input(request: generation_pb2.GenerateRequest, model: generation_pb2.Model | None, bad: Violations) -> None:
    kind = request.WhichOneof("input")
    if kind is None:
        bad["input"] = "not set; accepted: one of prompt, chat, token_ids"
    elif kind == "prompt":
        if not request.prompt:
            bad.add("prompt", "", "a text that is not empty")
    elif kind == "chat":
        _check_chat(request.chat, model, bad)
    else:
        _check_token_ids(request.token_ids, model, bad)


def _check_chat(chat: generation_pb2.Chat, model: generation_pb2.Model | None, bad: Violations) -> None:
    if not chat.messages:
        bad.add("chat.messages", [], "at least one message")
    for place, turn in enumerate(chat.messages):
        if turn.role not in ROLES:
            bad.add(f"chat.messages[{place}].role", turn.role, ", ".join(ROLES))
    if model is not None and not model.chat:
        bad["chat"] = f"model {model.name!r} has no chat template; accepted: prompt or token_ids"


def _check_token_ids(token_ids: generation_pb2.TokenIds, model: generation_pb2.Model | None, bad: Violations) -> None:
    if not token_ids.ids:
        bad.add("token_ids.ids", [], "at least one token id")
    if model is None:
        return
    if len(token_ids.ids) >= model.context_tokens:
        bad["token_ids"] = (
            f"{len(token_ids.ids)} token ids given; accepted: fewer than the context's {model.context_tokens} tokens"
        )
    _check_ids("token_ids.ids", token_ids.ids, model, bad)


def _check_ids(field: str, ids: Iterable[int], model: generation_pb2.Model, bad: Violations) -> None:
    """Token ids within the vocabulary; names the first bad one."""
    for place, token_id in enumerate(ids):
        if not 0 <= token_id < model.vocabulary_size:
            bad.add(f"{field}[{place}]", token_id, f"0 to {model.vocabulary_size - 1}, the vocabulary of {model.name}")
            return


def _check_sampling(sampling: generation_pb2.Sampling, model: generation_pb2.Model | None, bad: Violations) -> None:
    def check(field: str, accepts: Callable[[float], bool], accepted: str) -> None:
        value = getattr(sampling, field)
        if sampling.HasField(field) and not (math.isfinite(value) and accepts(value)):
            bad.add(f"sampling.{field}", value, accepted)

    most = model.context_tokens - 1 if model is not None else math.inf
    check("max_tokens", lambda value: 1 <= value <= most, f"1 to {most}, what the context holds beside a prompt")
    check("temperature", lambda value: 0 <= value <= MAX_TEMPERATURE, f"0 to {MAX_TEMPERATURE:g}; 0 is greedy")
    check("top_p", lambda value: 0 < value <= 1, "greater than 0, at most 1")
    check("top_k", lambda value: value >= 0, "0 (all) or more")
    check("min_p", lambda value: 0 <= value < 1, "0 (none) or more, less than 1")
    check(
        "repetition_penalty",
        lambda value: 0 < value <= MAX_REPETITION_PENALTY,
        f"greater than 0, at most {MAX_REPETITION_PENALTY:g}; 1 is none",
    )
    if len(sampling.stop) > MAX_STOP_STRINGS:
        bad["sampling.stop"] = f"{len(sampling.stop)} stop strings given; accepted: at most {MAX_STOP_STRINGS}"
    for place, stop in enumerate(sampling.stop):
        if not stop:
            bad.add(f"sampling.stop[{place}]", stop, "a text that is not empty")
    if model is not None:
        _check_ids("sampling.stop_token_ids", sampling.stop_token_ids, model, bad)


def _check_objective(objective: common_pb2.Objective, bad: Violations) -> None:
    for field in ("max_divergence", "latency_weight", "memory_weight"):
        value = getattr(objective, field)
        if objective.HasField(field) and not (math.isfinite(value) and value >= 0):
            bad.add(f"objective.{field}", value, "a finite number, 0 or more")


def _check_replay(request: generation_pb2.GenerateRequest, model: generation_pb2.Model | None, bad: Violations) -> None:
    replay = request.replay
    if request.WhichOneof("input") == "chat":
        bad["chat"] = "a replay needs the whole text; accepted: prompt or token_ids"
    for field in ("pipeline", "session_id", "top_logprobs"):
        if getattr(request, field):
            bad.add(field, getattr(request, field), "unset with replay, which generates nothing")
    if request.priority not in (generation_pb2.PRIORITY_UNSPECIFIED, generation_pb2.PRIORITY_LOW):
        bad.add("priority", request.priority, "unset or PRIORITY_LOW with replay")
    if request.HasField("sampling"):
        bad["sampling"] = "given; accepted: unset with replay, which generates nothing"
    if not 0 <= replay.horizon_tokens <= MAX_HORIZON_TOKENS:
        bad.add("replay.horizon_tokens", replay.horizon_tokens, f"1 to {MAX_HORIZON_TOKENS}; 0 or unset is 32")
    if replay.turns < 0:
        bad.add("replay.turns", replay.turns, "1 or more; 0 or unset is 1")
    if replay.prompt_tokens < 0:
        bad.add("replay.prompt_tokens", replay.prompt_tokens, "1 or more; 0 or unset: the text is not a prompt's")
    places = list(replay.at_tokens)
    if not 1 <= len(places) <= MAX_REPLAYED:
        bad["replay.at_tokens"] = f"{len(places)} places given; accepted: 1 to {MAX_REPLAYED}"
    for index, (before, place) in enumerate(zip([FIRST_PLACE - PLACE_DISTANCE, *places], places, strict=False)):
        if place < before + PLACE_DISTANCE:
            accepted = f"{before + PLACE_DISTANCE} or more: {FIRST_PLACE} at first, then {PLACE_DISTANCE} apart"
            bad.add(f"replay.at_tokens[{index}]", place, accepted)
    if not 1 <= len(replay.pipelines) <= MAX_REPLAYED:
        bad["replay.pipelines"] = f"{len(replay.pipelines)} pipelines given; accepted: 1 to {MAX_REPLAYED}"
    if len(replay.measured_under) not in (0, len(places)):
        accepted = f"none, or as many as at_tokens: {len(places)}"
        bad["replay.measured_under"] = f"{len(replay.measured_under)} pipelines given; accepted: {accepted}"
    for field in ("pipelines", "measured_under"):
        for index, pipeline in enumerate(getattr(replay, field)[:MAX_REPLAYED]):
            if not pipeline:
                bad.add(f"replay.{field}[{index}]", pipeline, "a pipeline")
            _check_pipeline(f"replay.{field}[{index}]", pipeline, model, bad)


def _check_pipeline(field: str, pipeline: str, model: generation_pb2.Model | None, bad: Violations) -> None:
    if not pipeline:
        return
    try:
        if model is None:
            parse_pipeline(pipeline)
        else:
            StageCatalog(model.stages).check(pipeline)
    except PipelineError as error:
        bad[field] = str(error)
