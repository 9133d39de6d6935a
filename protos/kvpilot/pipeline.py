"""Pipeline text: the one spelling of a cache pipeline used by clients, controller, workers and logs.

A pipeline is stages joined by ``|``; a stage is a name with optional parameters in parentheses::

    snapkv(keep=0.5) | kivi(bits=4) | host(recent=256)

Values are integers, floats, ``true``/``false``, or strings, which need quotes unless they are one word that is none of
the others. This module knows the grammar only; which stages and parameters exist is the worker's registry's business. A
name alone may also be that of a recipe (``kvpilot.recipes``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Value: TypeAlias = bool | int | float | str

_TOKEN = re.compile(
    r"""\s*(?:
        (?P<name>[A-Za-z_][A-Za-z0-9_-]*)
      | (?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)
      | (?P<string>"[^"\\]*"|'[^'\\]*')
      | (?P<mark>[|(),=])
    )""",
    re.VERBOSE,
)
MAX_PIPELINE_CHARACTERS = 1024
STAGE_ORDER = ("evict", "compress", "offload")
"""Kinds of stage in the order in which a pipeline names them."""


class PipelineError(ValueError):
    """Pipeline text that does not parse, or names what does not exist. ``str(error)`` says what was expected."""


@dataclass(frozen=True)
class StageSpec:
    """A stage as written: its name and the parameters given, in order."""

    name: str
    parameters: tuple[tuple[str, Value], ...] = ()

    def __str__(self) -> str:
        if not self.parameters:
            return self.name
        return f"{self.name}({', '.join(f'{key}={format_value(value)}' for key, value in self.parameters)})"


def format_value(value: Value) -> str:
    """Spells a parameter value as pipeline text."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"'
    return repr(value)


def format_pipeline(stages: tuple[StageSpec, ...]) -> str:
    """Spells stages as pipeline text; the inverse of :func:`parse_pipeline`."""
    return " | ".join(str(stage) for stage in stages)


def parse_pipeline(text: str) -> tuple[StageSpec, ...]:
    """Reads pipeline text.

    Raises:
        PipelineError: naming the place and what was expected there.

    >>> parse_pipeline("snapkv(keep=0.5) | kivi(bits=4)")[1]
    StageSpec(name='kivi', parameters=(('bits', 4),))
    """
    if len(text) > MAX_PIPELINE_CHARACTERS:
        raise PipelineError(f"pipeline text of {len(text)} characters; at most {MAX_PIPELINE_CHARACTERS} are accepted")
    reader = _Reader(text)
    stages = [_read_stage(reader)]
    while not reader.at_end():
        reader.expect_mark("|", "`|` before the next stage, or the end")
        stages.append(_read_stage(reader))
    return tuple(stages)


def parse_value(text: str) -> Value:
    """Reads one parameter value; the inverse of :func:`format_value`.

    Raises:
        PipelineError: it is none.
    """
    reader = _Reader(text)
    value = _read_value(reader, "value")
    if not reader.at_end():
        raise PipelineError(f"value {text!r}: expected one number, true, false or string")
    return value


def check_kinds(text: str, kinds: Sequence[str]) -> None:
    """Checks that the stages of a pipeline go together, by their kinds.

    Raises:
        PipelineError: two stages of a kind, kinds out of order, or another stage beside ``full``.
    """
    if "full" in kinds and len(kinds) > 1:
        raise PipelineError(f"pipeline {text!r}: `full` stands alone")
    if any(kind not in STAGE_ORDER for kind in kinds if kind != "full"):
        return  # a kind of a later release; the worker knows
    places = [STAGE_ORDER.index(kind) for kind in kinds if kind != "full"]
    if len(set(places)) < len(places) or places != sorted(places):
        raise PipelineError(
            f"pipeline {text!r}: at most one stage of each kind, in the order {' | '.join(STAGE_ORDER)};"
            f" this one reads {' | '.join(kinds)}"
        )


class _Reader:
    """Tokens of pipeline text, one at a time, with their places for error messages."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = list(self._split())
        self._next = 0

    def _split(self) -> Iterator[tuple[str, str, int]]:
        place = 0
        while self._text[place:].strip():
            match = _TOKEN.match(self._text, place)
            if match is None:
                start = place + len(self._text[place:]) - len(self._text[place:].lstrip())
                raise PipelineError(f"unexpected {self._text[start]!r} at character {start} of pipeline {self._text!r}")
            kind = str(match.lastgroup)
            yield kind, match.group(kind), match.start(kind)
            place = match.end()

    def at_end(self) -> bool:
        return self._next == len(self._tokens)

    def next_is(self, mark: str) -> bool:
        return not self.at_end() and self._tokens[self._next][:2] == ("mark", mark)

    def take(self, kinds: tuple[str, ...], wanted: str) -> tuple[str, str]:
        if self.at_end():
            raise PipelineError(f"expected {wanted} at the end of pipeline {self._text!r}")
        kind, word, place = self._tokens[self._next]
        if kind not in kinds:
            raise PipelineError(f"expected {wanted}, not {word!r}, at character {place} of pipeline {self._text!r}")
        self._next += 1
        return kind, word

    def expect_mark(self, mark: str, wanted: str) -> None:
        if not self.next_is(mark):
            self.take(("never",), wanted)
        self._next += 1


def _read_stage(reader: _Reader) -> StageSpec:
    _, name = reader.take(("name",), "a stage name")
    parameters: list[tuple[str, Value]] = []
    if reader.next_is("("):
        reader.expect_mark("(", "`(`")
        while not reader.next_is(")"):
            if parameters:
                reader.expect_mark(",", "`,` or `)`")
            _, key = reader.take(("name",), f"a parameter name of stage {name!r}")
            if any(key == seen for seen, _ in parameters):
                raise PipelineError(f"parameter {key!r} of stage {name!r} is given twice")
            reader.expect_mark("=", f"`=` after parameter {key!r}")
            parameters.append((key, _read_value(reader, key)))
        reader.expect_mark(")", "`)`")
    return StageSpec(name, tuple(parameters))


def _read_value(reader: _Reader, key: str) -> Value:
    kind, word = reader.take(("number", "string", "name"), f"a value for parameter {key!r}")
    if kind == "string":
        return word[1:-1]
    if kind == "number":
        return float(word) if re.search(r"[.eE]", word) else int(word)
    return word == "true" if word in ("true", "false") else word
