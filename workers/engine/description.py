"""What a worker says of itself when it meets a controller."""

from __future__ import annotations

from collections.abc import Mapping

from kernels.layout import Format, Tier
from kvpilot.v1 import generation_pb2, policy_pb2
from models.features import SCHEMA_HASH
from workers.cache.kvcache import KVCache
from workers.engine.intake import Limits
from workers.engine.runner import LoadedModel
from workers.profile.profile import names_of
from workers.signals import FAR_HORIZONS_TOKENS
from workers.stages.base import Pipeline
from workers.stages.registry import build, coded_stages, describe

VERSION = "0.1.0"


def describe_worker(
    name: str,
    loaded: LoadedModel,
    cache: KVCache,
    limits: Limits,
    default: Pipeline,
    bandwidths: Mapping[Tier, float],
) -> policy_pb2.Hello:
    """The greeting of a worker of that name, without the requests it has.

    Args:
        name: the worker's.
        loaded: its model.
        cache: its cache.
        limits: what a request may take of it.
        default: the pipeline of requests that name none.
        bandwidths: of each tier, bytes per second.
    """
    shape = cache.shape
    return policy_pb2.Hello(
        worker=name,
        version=VERSION,
        model=generation_pb2.Model(
            name=loaded.name,
            context_tokens=limits.context_tokens,
            vocabulary_size=loaded.vocabulary_size,
            chat=loaded.chat,
            workers=1,
            stages=_stages(cache),
            default_pipeline=default.text,
            capacity_bytes=limits.capacity_bytes,
            raw_bytes_per_token=limits.bytes_per_token,
        ),
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        query_heads=shape.query_heads,
        head_dim=shape.head_dim,
        raw_dtype=str(shape.dtype).removeprefix("torch."),
        formats=[*(fmt.name.lower() for fmt in Format), *coded_stages()],
        tiers=[
            policy_pb2.Tier(
                name=arena.tier.name.lower(),
                budget_bytes=arena.budget_bytes,
                bandwidth_bytes_per_s=bandwidths[arena.tier],
            )
            for arena in cache.tiers
        ],
        far_horizons_tokens=FAR_HORIZONS_TOKENS,
        feature_schema_hash=SCHEMA_HASH,
    )


def _stages(cache: KVCache) -> list[generation_pb2.StageInfo]:
    """All stages; those that need what the worker has not are unfit."""
    profiled = names_of(cache.profile)
    described = describe(cache.shape, profiled)
    for info in described:
        if not info.unfit and (reason := cache.refuses(build(info.name, cache.shape, profiled))):
            info.unfit = reason
    return described
