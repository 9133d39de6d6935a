"""What the quality report measures: every stage, at given shares of the full cache's bytes; every recipe; combinations.

Stages are found in the registry. Of each, the parameter that says how much stays is found by turning it, and is then
set so that the device bytes foretold (``workers.expected``) come as near as they can to a share without exceeding it.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from kernels.layout import BLOCK_TOKENS, CacheShape
from kvpilot.pipeline import PipelineError
from kvpilot.recipes import recipes
from workers.expected import expected_use
from workers.stages.base import Codec, Full, Pipeline, Stage
from workers.stages.registry import build, stages

TARGETS = (0.5, 0.25, 0.125)
"""Shares of the full cache's device bytes."""
COMBINATIONS = {
    "window | kivi(bits=4)": (0.25, 0.125),
    "h2o | kivi(bits=4)": (0.25, 0.125),
    "snapkv | int8": (0.25, 0.125),
    "snapkv | kivi(bits=4)": (0.25, 0.125),
}
"""Two ways to the same bytes: fewer tokens, or fewer bits of more tokens. The first stage's parameter is set."""
FULL, RECIPE, COMBINATION = Full.name, "recipe", "combination"
PROBE_TOKENS = 1024
"""Length at which parameters are turned to see which of them counts."""
ENOUGH = 0.7
"""A share counts as reached by as much of it: blocks of 32 tokens allow no more at short lengths."""
_PREFERRED = ("keep", "size", "recent")
_STEPS = 1000  # of a parameter that is no whole number
_NEAR = 0.97  # of the best share; counts as the same
_FAR = 1.5  # as much above a share: no looking around helps
_SCANNED = 40
_SLACK = 1e-9


class LeftOut(Exception):  # noqa: N818 -- no error: the row says why there is nothing to measure
    """Why a subject has no pipeline."""


@dataclass(frozen=True)
class Subject:
    """A row of every table."""

    name: str
    """Of the stage, the recipe or the combination."""
    kind: str
    """A stage's kind, ``recipe`` or ``combination``."""
    target: float | None
    """The share of the full cache's device bytes that it is set to; None: it has its own."""
    make: Callable[[int], Pipeline] = dataclasses.field(compare=False)
    """Its pipeline for a length in tokens; raises LeftOut."""
    variant: str = ""
    """Tells apart the rows of a stage that has no share set."""

    @property
    def label(self) -> str:
        """Its name, told apart from its other rows."""
        at = "" if self.target is None else f" at {self.target:.3g}"
        return f"{self.name}{self.variant}{at}"


def all_subjects(shape: CacheShape, only: Sequence[str] = (), profiled: frozenset[str] = frozenset()) -> list[Subject]:
    """The full cache first, then what ``only`` names, or everything.

    Args:
        shape: the model's cache dimensions.
        only: names.
        profiled: the tensors that the model's profile has.

    Raises:
        KeyError: ``only`` names something else; the message says what there is.
    """
    of = (_of_stages, _of_recipes, _of_combinations)
    found = [subject for group in of for subject in group(shape, profiled)]
    names = list(dict.fromkeys(subject.name for subject in found))
    for name in only:
        if name not in names:
            raise KeyError(f"{name!r} given; accepted: {', '.join(repr(known) for known in names)}")
    chosen = [subject for subject in found if not only or subject.name in (FULL, *only)]
    return sorted(chosen, key=lambda subject: subject.name != FULL)


def _of_stages(shape: CacheShape, profiled: frozenset[str]) -> Iterator[Subject]:
    for name, kind in stages().items():
        stage = kind()
        if why := stage.refuses(shape) or stage.lacks(profiled):
            yield Subject(name, stage.kind.value, None, _never(f"cannot serve this model: {why}"))
            continue
        for variant in _variants(stage):
            text = f"({', '.join(f'{field}={value}' for field, value in variant.items())})" if variant else ""
            pipeline = Pipeline((dataclasses.replace(stage, **variant),))
            yield from _at_targets(name, stage.kind.value, pipeline, shape, TARGETS, text)


def _of_recipes(shape: CacheShape, profiled: frozenset[str]) -> Iterator[Subject]:
    for name in recipes():
        yield Subject(name, RECIPE, None, _built(name, shape, profiled))


def _of_combinations(shape: CacheShape, profiled: frozenset[str]) -> Iterator[Subject]:
    for text, targets in COMBINATIONS.items():
        try:
            pipeline = build(text, shape, profiled)
        except PipelineError as error:
            yield Subject(text, COMBINATION, None, _never(str(error)))
        else:
            yield from _at_targets(text, COMBINATION, pipeline, shape, targets)


def _variants(stage: Stage) -> list[dict[str, Any]]:
    """What a codec may be set to: each choice of the parameter that has some, such as the bits."""
    for field in dataclasses.fields(stage) if isinstance(stage, Codec) else ():
        if _major(field) and field.metadata["bounds"].choices:
            return [{field.name: choice} for choice in field.metadata["bounds"].choices]
    return [{}]


def _at_targets(
    name: str, kind: str, pipeline: Pipeline, shape: CacheShape, targets: Sequence[float], variant: str = ""
) -> Iterator[Subject]:
    """One for each share if a parameter of the first stage changes the bytes, else one as it is."""
    knob = _knob(pipeline, shape)
    if knob is None:
        yield Subject(name, kind, None, lambda tokens: pipeline, variant)
    else:
        for target in targets:
            yield Subject(name, kind, target, _set_to(pipeline, knob, shape, target), variant)


# -- the parameter that counts -----------------------------------------------------------------------------------------


def fraction(pipeline: Pipeline, shape: CacheShape, tokens: int) -> float:
    """Device bytes foretold, of the full cache's, raw ones as if they were of 16 bits."""
    use = expected_use(pipeline.without_shadow(), shape, tokens)
    return use.device_bytes_16bit / use.full_bytes_16bit


def _knob(pipeline: Pipeline, shape: CacheShape) -> str | None:
    """The parameter of the first stage that changes its bytes; None: none does."""
    fields = [field for field in dataclasses.fields(pipeline.stages[0]) if _major(field)]
    order = {name: place for place, name in enumerate(_PREFERRED)}
    for field in sorted(fields, key=lambda field: order.get(field.name, len(order))):
        if field.type not in ("int", "float", int, float) or field.metadata["bounds"].choices:
            continue
        values = _values(field, PROBE_TOKENS)
        try:
            first, last = (fraction(_turned(pipeline, field.name, at), shape, PROBE_TOKENS) for at in _ends(values))
        except ValueError:  # not without another parameter
            continue
        if first != last:
            return field.name
    return None


def _set_to(pipeline: Pipeline, knob: str, shape: CacheShape, target: float) -> Callable[[int], Pipeline]:
    @cache
    def make(tokens: int) -> Pipeline:
        field = next(field for field in dataclasses.fields(pipeline.stages[0]) if field.name == knob)

        def taken(value: float) -> float:
            return fraction(_turned(pipeline, knob, value), shape, tokens)

        try:
            value, reached = _most_within(_values(field, tokens), taken, target, tokens)
        except ValueError as error:
            raise LeftOut(f"cannot be set to {target:.3g} of the bytes by {knob}: {error}") from None
        if reached > target + _SLACK:
            raise LeftOut(f"takes {reached:.3g} of the bytes at least, at {tokens} tokens with {knob}={value:g}")
        if reached < ENOUGH * target:
            raise LeftOut(f"comes no nearer to it than {reached:.3g}, at {tokens} tokens with {knob}={value:g}")
        return _turned(pipeline, knob, value)

    return make


def _most_within(
    values: Sequence[float], taken: Callable[[float], float], target: float, tokens: int
) -> tuple[float, float]:
    """The value that takes most of what the target allows, and what it takes; if none fits, the one that takes least.

    What is taken rises or falls with the value, but for a little to and fro at the edges of blocks, where a few more
    tokens fill a block that can then be coded. So the values around are looked at, and of those that take about the
    same the one that keeps most counts.
    """
    if taken(values[0]) > taken(values[-1]):
        values = values[::-1]
    place = max(bisect_right(values, target + _SLACK, key=taken) - 1, 0)
    found = (values[place], taken(values[place]))
    if abs(found[1] - target) <= _SLACK or found[1] > _FAR * target:
        return found
    reach = max(1, round(len(values) * 4 * BLOCK_TOKENS / tokens))
    around = values[max(0, place - reach) : place + reach]
    looked_at = [(value, taken(value)) for value in around[:: -(-len(around) // _SCANNED)]]
    fitting = [one for one in looked_at if one[1] <= target + _SLACK]
    if not fitting:
        return min((found, *looked_at), key=lambda one: one[1])
    best = max(found[1] if found[1] <= target + _SLACK else 0.0, *(share for _, share in fitting), 0.0)
    return next((one for one in reversed(fitting) if one[1] >= _NEAR * best), found)


def _values(field: dataclasses.Field[Any], tokens: int) -> Sequence[float]:
    """What a numeric parameter may be, rising: whole numbers up to the length, or a thousand steps."""
    bounds = field.metadata["bounds"]
    if field.type in ("int", int):
        least = bounds.least if bounds.least is not None else (math.floor(bounds.above) + 1 if bounds.above else 1)
        most = min(bounds.most, tokens) if bounds.most is not None else tokens
        return range(int(least), max(int(least), int(most)) + 1, int(bounds.step or 1))
    low = bounds.least if bounds.least is not None else (bounds.above or 0.0)
    default: Any = field.default
    high = bounds.most if bounds.most is not None else max(1.0, 8 * default)
    steps = [round(low + (high - low) * step / _STEPS, 6) for step in range(_STEPS + 1)]
    return [value for value in steps if bounds.accept(value)]


def _ends(values: Sequence[float]) -> tuple[float, float]:
    return values[0], values[-1]


def _turned(pipeline: Pipeline, knob: str, value: float) -> Pipeline:
    first, *others = pipeline.stages
    return Pipeline((dataclasses.replace(first, **{knob: value}), *others))


def _major(field: dataclasses.Field[Any]) -> bool:
    return not field.metadata["minor"]


def _built(text: str, shape: CacheShape, profiled: frozenset[str]) -> Callable[[int], Pipeline]:
    def make(tokens: int) -> Pipeline:
        try:
            return build(text, shape, profiled)
        except PipelineError as error:
            raise LeftOut(str(error)) from None

    return make


def _never(why: str) -> Callable[[int], Pipeline]:
    def make(tokens: int) -> Pipeline:
        raise LeftOut(why)

    return make
