"""All stages by name, and how pipeline text becomes a pipeline.

A new stage is one file and one line in ``BUILT_IN``; a package from outside adds its own through the entry point group
``kvpilot.stages``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from functools import cache
from importlib.metadata import entry_points
from typing import Any

import structlog

from kernels.layout import CacheShape
from kvpilot.catalog import StageCatalog
from kvpilot.pipeline import PipelineError, format_value
from kvpilot.v1 import common_pb2, generation_pb2
from workers.stages.base import Coded, Full, LossClass, Pipeline, Stage, accepted
from workers.stages.compress.aged import Aged
from workers.stages.compress.fp8 import FP8
from workers.stages.compress.gear import Gear
from workers.stages.compress.int8 import Int8
from workers.stages.compress.kivi import Kivi
from workers.stages.compress.kvquant import KVQuant
from workers.stages.compress.lowrank import LowRank
from workers.stages.compress.minicache import MiniCache
from workers.stages.compress.quantdense import QuantDense
from workers.stages.compress.think import ThinK
from workers.stages.compress.turboquant import TurboQuant
from workers.stages.compress.zipcache import ZipCache
from workers.stages.evict.dilated import Dilated
from workers.stages.evict.duo import Duo
from workers.stages.evict.expected_attention import ExpectedAttention
from workers.stages.evict.fastgen import FastGen
from workers.stages.evict.h2o import H2O
from workers.stages.evict.hashevict import HashEvict
from workers.stages.evict.infinipot import InfiniPot
from workers.stages.evict.keydiff import KeyDiff
from workers.stages.evict.knorm import KNorm
from workers.stages.evict.kvzip import KVzip
from workers.stages.evict.merge import Merge
from workers.stages.evict.morphkv import MorphKV
from workers.stages.evict.nacl import NaCL
from workers.stages.evict.qhitter import QHitter
from workers.stages.evict.razor import Razor
from workers.stages.evict.rkv import RKV
from workers.stages.evict.scissorhands import Scissorhands
from workers.stages.evict.snapkv import SnapKV
from workers.stages.evict.tova import Tova
from workers.stages.evict.window import Window
from workers.stages.offload.arkvale import ArkVale
from workers.stages.offload.clo import CLO
from workers.stages.offload.conversation import Conversation
from workers.stages.offload.disk import Disk
from workers.stages.offload.host import Host
from workers.stages.offload.infinigen import InfiniGen
from workers.stages.offload.kvpr import KVPR
from workers.stages.offload.layerkv import LayerKV
from workers.stages.offload.neardata import NearData
from workers.stages.offload.oneiros import Oneiros
from workers.stages.offload.quest import Quest
from workers.stages.offload.recallsparse import RecallSparse
from workers.stages.offload.shadowkv import ShadowKV
from workers.stages.offload.spread import Spread
from workers.stages.offload.swap import Swap

BUILT_IN: tuple[type[Stage], ...] = (
    Full,
    Window,
    Dilated,
    H2O,
    QHitter,
    Scissorhands,
    Tova,
    SnapKV,
    KeyDiff,
    KNorm,
    KVzip,
    InfiniPot,
    Merge,
    NaCL,
    HashEvict,
    MorphKV,
    RKV,
    ExpectedAttention,
    Duo,
    Razor,
    FastGen,
    Aged,
    FP8,
    Int8,
    Kivi,
    ThinK,
    TurboQuant,
    Gear,
    ZipCache,
    LowRank,
    KVQuant,
    MiniCache,
    QuantDense,
    Host,
    Disk,
    Spread,
    LayerKV,
    KVPR,
    Swap,
    NearData,
    Quest,
    ArkVale,
    InfiniGen,
    CLO,
    Conversation,
    ShadowKV,
    RecallSparse,
    Oneiros,
)
ENTRY_POINT_GROUP = "kvpilot.stages"

log = structlog.get_logger(__name__)

_LOSS_CLASSES = {
    LossClass.EXACT: common_pb2.LOSS_CLASS_EXACT,
    LossClass.RECOVERABLE: common_pb2.LOSS_CLASS_RECOVERABLE,
    LossClass.PERMANENT: common_pb2.LOSS_CLASS_PERMANENT,
}


@cache
def stages() -> dict[str, type[Stage]]:
    """Every stage known to this process. One from outside that cannot be used is left out, with an error in the log.

    Raises:
        ValueError: two stages of one name.
    """
    known: dict[str, type[Stage]] = {}
    for stage in (*BUILT_IN, *_outside()):
        if stage.name in known:
            raise ValueError(f"stage {stage.name!r} is defined by {known[stage.name]!r} and {stage!r}")
        known[stage.name] = stage
    return known


def _outside() -> Iterator[type[Stage]]:
    """The stages of other packages. A broken one must not keep a worker from serving with the rest."""
    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            stage = point.load()
            reason = _unusable(stage)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        if reason:
            log.error("stage left out", entry_point=point.value, why=reason)
        else:
            yield stage


def _unusable(stage: Any) -> str:
    """Why a class cannot be registered; empty if it can."""
    if not (isinstance(stage, type) and issubclass(stage, Stage)):
        return f"{stage!r} is not a subclass of workers.stages.base.Stage"
    if missing := [name for name in ("name", "kind", "summary") if not hasattr(stage, name)]:
        return f"no class variable {' nor '.join(missing)}"
    for field in dataclasses.fields(stage):
        if "bounds" not in field.metadata or field.default is dataclasses.MISSING:
            return f"parameter {field.name!r} is not declared with parameter(default, bounds)"
        if _type_name(field) not in ("int", "float", "bool", "str"):
            return f"parameter {field.name!r} is of type {_type_name(field)}, not int, float, bool or str"
    stage()
    return ""


def build(text: str, shape: CacheShape, profiled: frozenset[str] = frozenset()) -> Pipeline:
    """The pipeline that the text names, if it can serve a model; arguments are those of :func:`catalog`.

    Raises:
        PipelineError: for text that does not parse, an unknown stage or parameter, a value out of range, kinds that do
            not go together, or a stage that cannot serve the model, lacks something of its profile or cannot be
            beside another; says what would be accepted.
    """
    built = []
    for spec in catalog(shape, profiled).check(text):
        try:
            built.append(stages()[spec.name](**dict(spec.parameters)))
        except ValueError as error:  # a condition that bounds cannot state
            raise PipelineError(str(error)) from None
    for stage in built:
        if reason := stage.refuses(shape):
            raise PipelineError(f"stage {stage.name!r} cannot serve this model: {reason}")
    return Pipeline(tuple(built))


@cache
def catalog(shape: CacheShape, profiled: frozenset[str] = frozenset()) -> StageCatalog:
    """The stages as the catalog that reads pipeline text.

    Args:
        shape: the model's cache dimensions.
        profiled: the tensors that its profile has.
    """
    return StageCatalog(describe(shape, profiled))


def describe(shape: CacheShape, profiled: Collection[str] = ()) -> list[generation_pb2.StageInfo]:
    """What clients and controllers are told of the stages, for a model; arguments are those of :func:`catalog`."""
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
                    default_value=format_value(getattr(stage(), field.name)),
                    accepts=accepted(field),
                    bounds=field.metadata["bounds"].to_proto(),
                )
                for field in dataclasses.fields(stage)
            ],
            unfit=stage().refuses(shape) or stage().lacks(profiled) or "",
            conflicts=[
                generation_pb2.StageConflict(stage=other.name, reason=reason)
                for other in stages().values()
                if other.kind is not stage.kind and (reason := stage().refuses_beside(other()))
            ],
        )
        for name, stage in stages().items()
    ]


def _type_name(field: dataclasses.Field[Any]) -> str:
    """``int``, whether the stage's module postpones its annotations or not."""
    return field.type if isinstance(field.type, str) else field.type.__name__


def coded_stages() -> list[str]:
    """Names of the codecs that bring formats of their own."""
    return [name for name, stage in stages().items() if issubclass(stage, Coded)]


def loss_class_proto(loss: LossClass) -> common_pb2.LossClass:
    """The API's word for a loss class."""
    return _LOSS_CLASSES[loss]
