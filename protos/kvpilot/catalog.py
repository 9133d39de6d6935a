"""The stages a worker described: which pipeline text is valid, and which texts mean the same.

The worker's registry, the controller's front door and its planner all read pipeline text through this catalog, so that
what is refused is refused at the first of them, in the same words.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import TypeAlias

from kvpilot.bounds import Bounds
from kvpilot.pipeline import (
    PipelineError,
    StageSpec,
    Value,
    check_kinds,
    format_value,
    parse_pipeline,
    parse_value,
)
from kvpilot.recipes import recipes
from kvpilot.v1 import generation_pb2

PipelineKey: TypeAlias = tuple[tuple[str, tuple[tuple[str, Value], ...]], ...]
"""A pipeline with every default filled in and parameters sorted: equal keys mean the same pipeline."""

_TYPES: dict[str, type] = {"int": int, "float": float, "bool": bool, "str": str}


class StageCatalog:
    """Stages by name. What it accepts, a worker that described them builds."""

    def __init__(self, stages: Iterable[generation_pb2.StageInfo]) -> None:
        self._stages = {stage.name: _Stage.of(stage) for stage in stages}
        self._read = lru_cache(maxsize=1024)(self._read_key)

    def expand(self, pipeline: str) -> str:
        """The pipeline of the recipe that the text names; any other text as it is.

        A stage goes before a recipe of its name: what a package's stage meant before a recipe came, it still means.
        """
        name = pipeline.strip()
        recipe = None if name in self._stages else recipes().get(name)
        return recipe.pipeline if recipe else pipeline

    def check(self, pipeline: str) -> tuple[StageSpec, ...]:
        """Reads pipeline text, or the name of a recipe; each parameter's value has its declared type in the result.

        Raises:
            PipelineError: text that does not parse, or everything that is wrong with it: unknown stages and parameters,
                values of another type or out of bounds, stages that do not go together or cannot serve the model.
        """
        text = self.expand(pipeline)
        specs = parse_pipeline(text)
        wrong = [complaint for spec in specs for complaint in self._complaints(spec)]
        if wrong:
            named = "" if text == pipeline else f"recipe {pipeline.strip()!r}, which is {text!r}: "
            raise PipelineError(named + "; ".join(wrong))
        check_kinds(text, [self._stages[spec.name].kind for spec in specs])
        for one, other in permutations(specs, 2):
            if reason := self._stages[one.name].conflicts.get(other.name):
                raise PipelineError(f"stage {one.name!r} does not go with {other.name!r}: {reason}")
        return tuple(self._typed(spec) for spec in specs)

    def knows(self, pipeline: str) -> bool:
        """Whether :meth:`check` accepts the text."""
        try:
            self.key(pipeline)
        except PipelineError:
            return False
        return True

    def key(self, pipeline: str) -> PipelineKey:
        """What the text means.

        Raises:
            PipelineError: as :meth:`check`.
        """
        return self._read(pipeline)

    def same(self, one: str, other: str) -> bool:
        """Whether two texts mean the same pipeline. Text that this catalog does not know equals only itself."""
        if one == other:
            return True
        try:
            return self.key(one) == self.key(other)
        except PipelineError:
            return False

    def _read_key(self, pipeline: str) -> PipelineKey:
        stages = []
        for spec in self.check(pipeline):
            values = self._stages[spec.name].defaults() | dict(spec.parameters)
            stages.append((spec.name, tuple(sorted(values.items()))))
        return tuple(stages)

    def _typed(self, spec: StageSpec) -> StageSpec:
        parameters = self._stages[spec.name].parameters
        return StageSpec(spec.name, tuple((name, parameters[name].typed(value)) for name, value in spec.parameters))

    def _complaints(self, spec: StageSpec) -> list[str]:
        stage = self._stages.get(spec.name)
        if stage is None and (recipe := recipes().get(spec.name)):
            return [
                f"{spec.name!r} is a recipe: accepted alone and without parameters, or as stages: {recipe.pipeline}"
            ]
        if stage is None:
            known = ", ".join(sorted(self._stages)) or "none"
            return [f"unknown stage {spec.name!r}; known are {known}; recipes: {', '.join(sorted(recipes()))}"]
        wrong = []
        for name, value in spec.parameters:
            parameter = stage.parameters.get(name)
            if parameter is None:
                accepted = ", ".join(stage.parameters) or "none"
                wrong.append(f"unknown parameter {name!r} of stage {spec.name!r}; its parameters: {accepted}")
            elif complaint := parameter.complaint(value):
                wrong.append(f"parameter {name!r} of stage {spec.name!r}: {complaint}")
        if stage.unfit:
            wrong.append(f"stage {spec.name!r} cannot serve this model: {stage.unfit}")
        return wrong


@dataclass(frozen=True)
class _Parameter:
    type: str
    default: Value | None
    accepts: str
    bounds: Bounds

    @classmethod
    def of(cls, info: generation_pb2.ParameterInfo) -> _Parameter:
        plain = cls(info.type, None, info.accepts, Bounds.from_proto(info.bounds))
        default = plain.typed(parse_value(info.default_value)) if info.default_value else None
        return cls(info.type, default, info.accepts, plain.bounds)

    def typed(self, value: Value) -> Value:
        """An integer written for a float parameter is that float."""
        return float(value) if self.type == "float" and type(value) is int else value

    def complaint(self, value: Value) -> str | None:
        """What is wrong with a value, or None."""
        value = self.typed(value)
        if type(value) is not _TYPES.get(self.type, object):
            return f"{format_value(value)} is not of type {self.type}; accepted: {self.accepts}"
        return None if self.bounds.accept(value) else f"{format_value(value)} given; accepted: {self.accepts}"


@dataclass(frozen=True)
class _Stage:
    kind: str
    unfit: str
    parameters: dict[str, _Parameter]
    conflicts: dict[str, str]

    @classmethod
    def of(cls, info: generation_pb2.StageInfo) -> _Stage:
        parameters = {entry.name: _Parameter.of(entry) for entry in info.parameters}
        return cls(info.kind, info.unfit, parameters, {entry.stage: entry.reason for entry in info.conflicts})

    def defaults(self) -> dict[str, Value]:
        return {name: entry.default for name, entry in self.parameters.items() if entry.default is not None}
