"""From what a replay measured at a place to rows of a dataset."""

from __future__ import annotations

from typing import Any

from kvpilot.catalog import StageCatalog
from kvpilot.v1 import generation_pb2
from models.collect.plan import Asked, Plan
from models.features import NAMES, SCHEMA_HASH, family_of

_OWN = ("divergence", "divergence_max", "top1_agreement", "loss", "full_loss", "conversion_ms", "step_ms")
_CACHE = (
    "device_bytes",
    "host_bytes",
    "shadow_bytes",
    "full_cache_bytes",
    "device_bytes_16bit",
    "full_cache_bytes_16bit",
)


class MeasureError(ValueError):
    """A result that is not what was asked for; says what differs."""


def rows_of(place: generation_pb2.Replayed, plan: Plan, asked: Asked, catalog: StageCatalog) -> list[dict[str, Any]]:
    """A row per pipeline, with the columns of :mod:`models.dataset`.

    Raises:
        MeasureError: another feature schema, other pipelines, or another number of features.
    """
    if place.feature_schema_hash != SCHEMA_HASH:
        raise MeasureError(
            f"the worker measures features of schema {place.feature_schema_hash or 'not named'}; this version reads "
            f"{SCHEMA_HASH}: both have to be of one release"
        )
    measured = [entry.pipeline for entry in place.pipelines]
    if measured != list(asked.pipelines):
        raise MeasureError(f"asked for {list(asked.pipelines)}; measured were {measured}")
    rows = []
    for entry in place.pipelines:
        if len(entry.features) != len(NAMES):
            raise MeasureError(f"{len(entry.features)} features of {entry.pipeline!r}; the schema has {len(NAMES)}")
        rows.append(
            {
                "document": plan.document,
                "kind": plan.kind,
                "model": asked.model,
                "pipeline": entry.pipeline,
                "family": family_of(catalog.key(entry.pipeline)).value,
                "measured_under": place.measured_under,
                "at_token": place.at_token,
                **dict(zip(NAMES, entry.features, strict=True)),
                **{name: getattr(entry, name) for name in _OWN},
                **{name: float(getattr(entry.cache, name)) for name in _CACHE},
            }
        )
    return rows
