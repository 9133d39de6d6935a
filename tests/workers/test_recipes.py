"""Every recipe and scenario's static pipeline on real caches: it builds, and takes the bytes that are foretold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.layout import CacheShape, Format
from kvpilot.recipes import Recipe, recipes
from models.scenarios import PRESETS
from tests.tiny import random_profile
from workers.cache.accounting import TABLE_BYTES_PER_BLOCK, CacheUse
from workers.cache.disk import DiskStore
from workers.cache.kvcache import KVCache
from workers.cache.sequence_cache import Occasion
from workers.expected import expected_use
from workers.stages.base import LossClass, Pipeline
from workers.stages.offload.swap import Swap
from workers.stages.registry import build, stages

SHAPES = {
    "mha": CacheShape(layers=2, kv_heads=2, query_heads=2, head_dim=16, dtype=torch.float32),
    "gqa": CacheShape(layers=3, kv_heads=2, query_heads=6, head_dim=24, dtype=torch.bfloat16),
}
PROFILES = {shape: random_profile(shape) for shape in SHAPES.values()}
STATICS = sorted({preset.static for preset in PRESETS.values()})
TAILORED = ("quantdense(threshold=0.5)", "recallsparse(recent=64, threshold=0.5)", "kivi | recallsparse(threshold=0.5)")
ON_HOST = ("snapkv(keep=0.5) | host(recent=64)", "layerkv(recent=64)", "kivi | layerkv(recent=32, resident=0.2)")
MORE = ("full", "fp8", "dilated", "rkv(size=128)", "int8(shadow=false)", "quest", *ON_HOST, *TAILORED)
ON_DISK = (
    "spread(device=0.3, host=0.3)",
    "kivi(bits=4) | spread(device=0, host=0.2)",
    "disk(recent=64)",
    "snapkv(keep=0.5) | kivi(bits=4) | disk(recent=64)",
    "swap(recent=64)",
    "swap(recent=64, bits=8)",
)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_recipe = pytest.mark.parametrize("recipe", recipes().values(), ids=recipes())


def measured(pipeline: Pipeline, shape: CacheShape, tokens: int, disk: DiskStore | None = None) -> CacheUse:
    """What a cache of random numbers takes under the pipeline, at the end of a prompt."""
    cache = KVCache(shape, 16 << 20, 16 << 20, 1, 2048, "m", torch.device("cpu"), "cpu", PROFILES[shape], disk)
    generator = torch.Generator().manual_seed(tokens)
    seq = cache.open(2048)
    cache.reserve(seq, tokens)
    cache.advance(seq, tokens)
    size = (shape.kv_heads, tokens, shape.head_dim)
    for layer in range(shape.layers):
        k, v = (torch.randn(size, generator=generator).to(shape.dtype) for _ in range(2))
        cache.backend.write(seq.slot, layer, 0, k, v)
    count = min(tokens, 32)
    queries = torch.randn(shape.layers, shape.query_heads, count, shape.head_dim, generator=generator)
    cache.recent.note(seq.slot, tokens - count, queries.to(shape.dtype))
    for name in ("mass", "votes"):
        values = torch.rand((shape.layers, *size[:2]), generator=generator).numpy()
        getattr(cache.tables, name)[seq.slot, :, :, :tokens] = values
    cache.apply(seq, pipeline, Occasion.PROMPT)
    return cache.use(seq)


@every_shape
@every_recipe
def test_a_recipe_builds_and_its_text_is_its_pipelines(recipe: Recipe, shape: CacheShape) -> None:
    pipeline = build(recipe.name, shape, PROFILES[shape].names)
    assert pipeline == build(recipe.pipeline, shape, PROFILES[shape].names)
    assert pipeline.text == recipe.pipeline


def test_no_recipe_has_the_name_of_a_stage() -> None:
    assert not set(recipes()) & set(stages())


def check_disk(pipeline: Pipeline, expected_bytes: int, found_bytes: int) -> None:
    """To the byte, but for blocks that are packed in files: how much smaller they are, only the text tells."""
    packed = isinstance(pipeline.placer, Swap) and pipeline.codec is None and pipeline.placer.bits < 8
    assert (0 < found_bytes < expected_bytes) if packed and expected_bytes else (found_bytes == expected_bytes)


@pytest.mark.parametrize("tokens", [1, 33, 320, 1500])
@every_shape
@pytest.mark.parametrize("text", [*recipes(), *STATICS, *MORE])
def test_expected_bytes_are_those_of_a_real_cache(text: str, shape: CacheShape, tokens: int, tmp_path: Path) -> None:
    """To the byte; where heads share what a layer keeps, the heads' last blocks differ: by a block for each."""
    profile, disk = PROFILES[shape], DiskStore(tmp_path, 16 << 20)
    pipeline = build(text, shape, profile.names)
    expected, found = expected_use(pipeline, shape, tokens, profile), measured(pipeline, shape, tokens, disk)
    disk.close()
    shares_by_head = pipeline.evictor is not None and pipeline.evictor.rule == "ada"
    block = shape.block_bytes(Format.RAW) + TABLE_BYTES_PER_BLOCK
    slack = shape.layers * shape.kv_heads * block if shares_by_head else 0
    assert abs(expected.device_bytes - found.device_bytes) <= slack
    assert abs(expected.device_bytes_16bit - found.device_bytes_16bit) <= slack
    for name in ("host_bytes", "shadow_bytes"):
        assert getattr(expected, name) == getattr(found, name)
    check_disk(pipeline, expected.disk_bytes, found.disk_bytes)
    assert (expected.full_bytes, expected.full_bytes_16bit) == (found.full_bytes, found.full_bytes_16bit)


@pytest.mark.parametrize("tokens", [33, 320])
@every_shape
@pytest.mark.parametrize("text", ON_DISK)
def test_expected_bytes_on_disk_and_on_the_way(text: str, shape: CacheShape, tokens: int, tmp_path: Path) -> None:
    profile, disk = PROFILES[shape], DiskStore(tmp_path, 16 << 20)
    pipeline = build(text, shape, profile.names)
    expected, found = expected_use(pipeline, shape, tokens, profile), measured(pipeline, shape, tokens, disk)
    disk.close()
    for name in ("device_bytes", "host_bytes", "shadow_bytes"):
        assert getattr(expected, name) == getattr(found, name)
    check_disk(pipeline, expected.disk_bytes, found.disk_bytes)
    assert bool(found.disk_bytes) == (tokens == 320)


def test_the_exact_scenario_has_an_exact_static_pipeline() -> None:
    for scenario, preset in PRESETS.items():
        exact = build(preset.static, SHAPES["gqa"]).loss_class is LossClass.EXACT
        assert exact == (preset.max_divergence == 0), scenario


def test_a_pyramid_takes_what_a_level_budget_takes() -> None:
    """The rule moves tokens between layers, it adds none: but for each layer's rounding to whole blocks."""
    shape = CacheShape(layers=12, kv_heads=1, query_heads=1, head_dim=64, dtype=torch.float16)
    pyramid, level = (
        expected_use(build(text, shape), shape, 8000).device_bytes
        for text in ('snapkv(keep=0.12, budgets="pyramid")', "snapkv(keep=0.12)")
    )
    assert np.isclose(pyramid, level, rtol=0.03)
