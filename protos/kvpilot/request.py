"""Generate requests from Python values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias, TypedDict, Unpack

from kvpilot.v1 import common_pb2, generation_pb2

Turn: TypeAlias = tuple[str, str] | Mapping[str, str]
"""One turn of a conversation: ``("user", "Hello")`` or ``{"role": "user", "content": "Hello"}``."""


class Options(TypedDict, total=False):
    """What a Generate request may say beside its input; see GenerateRequest and Sampling in generation.proto."""

    model: str
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    repetition_penalty: float
    session_id: str
    scenario: str
    """A scenario's name, e.g. ``long-context``."""
    max_divergence: float
    latency_weight: float
    memory_weight: float
    pipeline: str
    idempotency_key: str
    top_logprobs: int
    priority: str
    """``high``, ``normal`` or ``low``."""


class ReplayOptions(TypedDict, total=False):
    """What a replay may say beside its text, its places and its pipelines; see Replay in generation.proto."""

    horizon_tokens: int
    measured_under: Sequence[str]
    turns: int
    prompt_tokens: int
    model: str
    idempotency_key: str


SCENARIOS: dict[str, common_pb2.Scenario] = {
    name.removeprefix("SCENARIO_").lower().replace("_", "-"): common_pb2.Scenario.Value(name)
    for name in common_pb2.Scenario.keys()[1:]
}
"""Scenarios by the names people write, e.g. ``long-context``."""
PRIORITIES: dict[str, generation_pb2.Priority] = {
    name.removeprefix("PRIORITY_").lower(): generation_pb2.Priority.Value(name)
    for name in generation_pb2.Priority.keys()[1:]
}
"""Priorities by the names people write."""

_SAMPLING = frozenset(field.name for field in generation_pb2.Sampling.DESCRIPTOR.fields)
_OBJECTIVE = frozenset(field.name for field in common_pb2.Objective.DESCRIPTOR.fields)
_PLAIN = frozenset({"model", "session_id", "pipeline", "idempotency_key", "top_logprobs"})


def make_request(
    prompt: str | None = None,
    *,
    messages: Sequence[Turn] | None = None,
    token_ids: Sequence[int] | None = None,
    **options: Unpack[Options],
) -> generation_pb2.GenerateRequest:
    """Builds a request from exactly one of ``prompt``, ``messages`` and ``token_ids``, and options.

    Raises:
        TypeError: none or several inputs, an unknown option, or a value of another type.
        ValueError: an unknown scenario or priority, a turn without role or content, a number out of its field's range.
    """
    request = generation_pb2.GenerateRequest()
    if sum(given is not None for given in (prompt, messages, token_ids)) != 1:
        raise TypeError("exactly one of prompt, messages and token_ids must be given")
    if prompt is not None:
        request.prompt = prompt
    elif messages is not None:
        request.chat.messages.extend(_message(turn) for turn in messages)
        request.chat.SetInParent()
    else:
        request.token_ids.ids.extend(token_ids or ())
        request.token_ids.SetInParent()
    for name, value in options.items():
        if name == "scenario":
            request.scenario = parse_scenario(str(value))
        elif name == "priority":
            request.priority = parse_priority(str(value))
        elif name in _PLAIN:
            setattr(request, name, value)
        elif name in ("stop", "stop_token_ids"):
            getattr(request.sampling, name).extend([value] if isinstance(value, str) else value)
        elif name in _SAMPLING:
            setattr(request.sampling, name, value)
        elif name in _OBJECTIVE:
            setattr(request.objective, name, value)
        else:
            known = ", ".join(sorted(Options.__annotations__))
            raise TypeError(f"unknown option {name!r}; known: {known}")
    return request


def make_replay_request(
    prompt: str | None = None,
    *,
    token_ids: Sequence[int] | None = None,
    at_tokens: Sequence[int],
    pipelines: Sequence[str],
    **options: Unpack[ReplayOptions],
) -> generation_pb2.GenerateRequest:
    """Builds a replay of exactly one of ``prompt`` and ``token_ids``; see ``Client.replay``.

    Raises:
        TypeError: none or both inputs, an unknown option, or a value of another type.
        ValueError: a number out of its field's range.
    """
    if (prompt is None) == (token_ids is None):
        raise TypeError("exactly one of prompt and token_ids must be given")
    if unknown := sorted(set(options) - set(ReplayOptions.__annotations__)):
        known = ", ".join(sorted(ReplayOptions.__annotations__))
        raise TypeError(f"unknown option {unknown[0]!r}; known: {known}")
    replay = generation_pb2.Replay(
        at_tokens=at_tokens,
        pipelines=pipelines,
        horizon_tokens=options.get("horizon_tokens", 0),
        measured_under=options.get("measured_under", ()),
        turns=options.get("turns", 0),
        prompt_tokens=options.get("prompt_tokens", 0),
    )
    request = make_request(prompt, token_ids=token_ids)
    request.replay.CopyFrom(replay)
    request.model = options.get("model", "")
    request.idempotency_key = options.get("idempotency_key", "")
    return request


def parse_scenario(name: str) -> common_pb2.Scenario:
    """Reads a scenario's name; case and the choice of ``-``, ``_`` or spaces do not matter.

    Raises:
        ValueError: unknown; says which there are.
    """
    wanted = re.sub(r"[ _]", "-", name.strip().lower())
    if wanted not in SCENARIOS:
        raise ValueError(f"unknown scenario {name!r}; known: {', '.join(SCENARIOS)}")
    return SCENARIOS[wanted]


def parse_priority(name: str) -> generation_pb2.Priority:
    """Reads a priority's name; case does not matter.

    Raises:
        ValueError: unknown; says which there are.
    """
    wanted = name.strip().lower()
    if wanted not in PRIORITIES:
        raise ValueError(f"unknown priority {name!r}; known: {', '.join(PRIORITIES)}")
    return PRIORITIES[wanted]


def _message(turn: Turn) -> generation_pb2.Message:
    if isinstance(turn, Mapping):
        if set(turn) != {"role", "content"}:
            raise ValueError(f"a turn with {sorted(turn)}; it must have role and content")
        return generation_pb2.Message(role=turn["role"], content=turn["content"])
    role, content = turn
    return generation_pb2.Message(role=role, content=content)
