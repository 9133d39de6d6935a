"""The stages a worker described in Hello: which pipeline text is valid, and which texts mean the same."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import TypeAlias

from kvpilot.pipeline import PipelineError, StageSpec, Value, format_value, parse_pipeline
from kvpilot.v1 import generation_pb2

PipelineKey: TypeAlias = tuple[tuple[str, tuple[tuple[str, Value], ...]], ...]
"""A pipeline with every default filled in and parameters sorted: equal keys mean the same pipeline."""

_TYPES: dict[str, type] = {"int": int, "float": float, "bool": bool, "str": str}


class StageCatalog:
    """Stages by name.

    Only names and types are checked here; ranges and combinations are the worker's business, which refuses with a NACK.
    """

    def __init__(self, stages: Iterable[generation_pb2.StageInfo]) -> None:
        self._stages = {stage.name: {info.name: info for info in stage.parameters} for stage in stages}
        self._key = lru_cache(maxsize=1024)(self._read_key)

    def check(self, pipeline: str) -> tuple[StageSpec, ...]:
        """Reads pipeline text.

        Raises:
            PipelineError: text that does not parse, an unknown stage or parameter, a value of another type; says what
                would be accepted.
        """
        specs = parse_pipeline(pipeline)
        for spec in specs:
            self._check_stage(spec)
        return specs

    def knows(self, pipeline: str) -> bool:
        """Whether :meth:`check` accepts the text."""
        try:
            self.check(pipeline)
        except PipelineError:
            return False
        return True

    def key(self, pipeline: str) -> PipelineKey:
        """What the text means.

        Raises:
            PipelineError: as :meth:`check`.
        """
        return self._key(pipeline)

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
            values = {
                name: _read_default(info) for name, info in self._stages[spec.name].items() if info.default_value
            } | {name: self._as_declared(spec.name, name, value) for name, value in spec.parameters}
            stages.append((spec.name, tuple(sorted(values.items()))))
        return tuple(stages)

    def _check_stage(self, spec: StageSpec) -> None:
        parameters = self._stages.get(spec.name)
        if parameters is None:
            known = ", ".join(sorted(self._stages)) or "none"
            raise PipelineError(f"unknown stage {spec.name!r}; the worker knows {known}")
        for name, value in spec.parameters:
            if name not in parameters:
                accepted = ", ".join(parameters) or "none"
                raise PipelineError(f"unknown parameter {name!r} of stage {spec.name!r}; its parameters: {accepted}")
            wanted = parameters[name].type
            if type(self._as_declared(spec.name, name, value)) is not _TYPES[wanted]:
                raise PipelineError(
                    f"parameter {name!r} of stage {spec.name!r}: {format_value(value)} is not of type {wanted};"
                    f" accepted: {parameters[name].accepts}"
                )

    def _as_declared(self, stage: str, name: str, value: Value) -> Value:
        """An integer written for a float parameter is that float."""
        return float(value) if self._stages[stage][name].type == "float" and type(value) is int else value


def _read_default(info: generation_pb2.ParameterInfo) -> Value:
    """A parameter's default, which Hello gives in pipeline text."""
    ((_, value),) = parse_pipeline(f"x({info.name}={info.default_value})")[0].parameters
    return float(value) if info.type == "float" and type(value) is int else value
