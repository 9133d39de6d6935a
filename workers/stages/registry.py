"""All stages by name, and how pipeline text becomes a pipeline.

A new stage is one file and one line in ``BUILT_IN``; a package from outside adds its own through the entry point group
``kvpilot.stages``.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from kernels.layout import CacheShape
from kvpilot.pipeline import PipelineError, StageSpec, Value, format_value, parse_pipeline
from kvpilot.v1 import common_pb2, generation_pb2
from workers.stages.base import Full, Kind, LossClass, Pipeline, Stage
from workers.stages.compress.int8 import Int8
from workers.stages.compress.kivi import Kivi
from workers.stages.evict.h2o import H2O
from workers.stages.evict.snapkv import SnapKV
from workers.stages.evict.window import Window
from workers.stages.offload.host import Host

BUILT_IN: tuple[type[Stage], ...] = (
    Full,
    Window,
    H2O,
    SnapKV,
    Int8,
    Kivi,
    Host,
)
ENTRY_POINT_GROUP = "kvpilot.stages"

_TYPES = {"int": int, "float": float, "bool": bool, "str": str}
_LOSS_CLASSES = {
    LossClass.EXACT: common_pb2.LOSS_CLASS_EXACT,
    LossClass.RECOVERABLE: common_pb2.LOSS_CLASS_RECOVERABLE,
    LossClass.PERMANENT: common_pb2.LOSS_CLASS_PERMANENT,
}


@cache
def stages() -> dict[str, type[Stage]]:
    """Every stage known to this process.

    Raises:
        ValueError: two stages of one name.
    """
    outside = [point.load() for point in entry_points(group=ENTRY_POINT_GROUP)]
    known: dict[str, type[Stage]] = {}
    for stage in (*BUILT_IN, *outside):
        if stage.name in known:
            raise ValueError(f"stage {stage.name!r} is defined by {known[stage.name]!r} and {stage!r}")
        known[stage.name] = stage
    return known


def build(text: str, shape: CacheShape) -> Pipeline:
    """The pipeline that the text names, if it can serve a cache of this shape.

    Raises:
        PipelineError: for text that does not parse, an unknown stage or parameter, a value out of range, kinds that do
            not go together, or a stage that cannot serve the model; says what would be accepted.
    """
    built = tuple(_build_stage(spec) for spec in parse_pipeline(text))
    kinds = [stage.kind for stage in built]
    order = list(Kind)
    if Kind.FULL in kinds and len(kinds) > 1:
        raise PipelineError(f"pipeline {text!r}: `full` stands alone")
    if len(set(kinds)) < len(kinds) or kinds != sorted(kinds, key=order.index):
        raise PipelineError(
            f"pipeline {text!r}: at most one stage of each kind, in the order evict | compress | offload;"
            f" this one reads {' | '.join(kind.value for kind in kinds)}"
        )
    for stage in built:
        if reason := stage.refuses(shape):
            raise PipelineError(f"stage {stage.name!r} cannot serve this model: {reason}")
    return Pipeline(built)


def _build_stage(spec: StageSpec) -> Stage:
    stage = stages().get(spec.name)
    if stage is None:
        raise PipelineError(f"unknown stage {spec.name!r}; known are {', '.join(sorted(stages()))}")
    fields = {field.name: field for field in dataclasses.fields(stage)}
    given: dict[str, Value] = {}
    for key, value in spec.parameters:
        if key not in fields:
            accepted = ", ".join(fields) or "none"
            raise PipelineError(f"unknown parameter {key!r} of stage {spec.name!r}; its parameters: {accepted}")
        given[key] = _convert(spec.name, key, value, _type_name(fields[key]))
    try:
        return stage(**given)
    except ValueError as error:
        raise PipelineError(str(error)) from None


def _type_name(field: dataclasses.Field[Any]) -> str:
    """``int``, whether the stage's module postpones its annotations or not."""
    return field.type if isinstance(field.type, str) else field.type.__name__


def _convert(stage: str, key: str, value: Value, type_name: str) -> Value:
    wanted = _TYPES[type_name]
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise PipelineError(f"parameter {key} of stage {stage}: {format_value(value)} is not of type {type_name}")
    return value


def describe() -> list[generation_pb2.StageInfo]:
    """What clients and controllers are told of the stages."""
    return [
        generation_pb2.StageInfo(
            name=name,
            kind=stage.kind.value,
            summary=stage.summary,
            loss_class=_LOSS_CLASSES[stage().loss_class],
            parameters=[
                generation_pb2.ParameterInfo(
                    name=field.name,
                    type=_type_name(field),
                    default_value="" if field.default is dataclasses.MISSING else format_value(field.default),
                    accepts=field.metadata["accepts"],
                )
                for field in dataclasses.fields(stage)
            ],
        )
        for name, stage in stages().items()
    ]


def loss_class_proto(loss: LossClass) -> common_pb2.LossClass:
    """The API's word for a loss class."""
    return _LOSS_CLASSES[loss]
