"""The estimate against the block layout that workers really use."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.layout import CacheShape, Format
from models.candidates import CANDIDATES
from models.footprint import BLOCK_TOKENS, SHARE_EVICTORS, CacheLayout, estimate, estimate_many
from tests.controller.scripted import CATALOG
from tests.tiny import random_profile
from workers.cache.accounting import TABLE_BYTES_PER_BLOCK
from workers.expected import expected_use, kept_tokens
from workers.stages.registry import build, catalog

SHAPES = [(30, 3, 64, "float32"), (2, 2, 16, "bfloat16"), (8, 4, 80, "float16")]


def test_blocks_are_those_of_the_kernels() -> None:
    assert BLOCK_TOKENS == 32
    for layers, heads, dim, dtype in SHAPES:
        layout = CacheLayout.of(layers, heads, dim, dtype)
        shape = CacheShape(layers, heads, heads, dim, getattr(torch, dtype))
        for bits, fmt in ((None, Format.RAW), (8, Format.INT8), (4, Format.INT4)):
            assert layout.block_bytes(bits) == shape.block_bytes(fmt)


@pytest.mark.parametrize(
    ("pipeline", "tokens", "device", "host", "shadow"),
    [  # in blocks: (raw, int4) on the device, (raw, int4) on the host, raw shadows
        ("full", 1, (1, 0), (0, 0), 0),
        ("full", 65, (3, 0), (0, 0), 0),
        ("kivi(bits=4)", 63, (2, 0), (0, 0), 1),
        ("kivi(bits=4)", 64, (1, 1), (0, 0), 2),
        ("kivi(bits=4)", 330, (2, 9), (0, 0), 10),
        ("kivi(bits=4, shadow=false)", 330, (2, 9), (0, 0), 0),
        ("host(recent=256)", 330, (9, 0), (2, 0), 0),
        ("host(recent=256)", 200, (7, 0), (0, 0), 0),
        ("kivi(bits=4) | host(recent=64)", 330, (2, 1), (0, 8), 10),
        ("window(sinks=4, recent=128)", 1000, (6, 0), (0, 0), 31),
        ("snapkv(keep=0.5) | kivi(bits=4)", 640, (1, 9), (0, 0), 20),
    ],
)
def test_estimates(pipeline: str, tokens: int, device: tuple[int, int], host: tuple[int, int], shadow: int) -> None:
    layout = CacheLayout.of(30, 3, 64, "float32")
    raw, int4 = layout.block_bytes(None) * 90, layout.block_bytes(4) * 90
    guess = estimate(CATALOG.key(pipeline), tokens, layout)
    assert guess is not None
    assert guess.device_bytes == device[0] * raw + device[1] * int4
    assert guess.host_bytes == host[0] * raw + host[1] * int4
    assert guess.shadow_bytes == shadow * raw
    assert guess.lower_tier_bytes == guess.host_bytes + guess.shadow_bytes


@pytest.mark.parametrize("pipeline", [*CANDIDATES, "fp8", *(f"{name}(keep=0.3)" for name in SHARE_EVICTORS)])
@pytest.mark.parametrize("tokens", [1, 50, 333, 1000, 4096])
def test_estimates_are_what_a_worker_foretells(pipeline: str, tokens: int) -> None:
    shape = CacheShape(30, 3, 9, 64, torch.float32)
    profile = random_profile(shape)
    built = build(pipeline, shape, profile.names)
    foretold = expected_use(built, shape, tokens, profile)
    guess = estimate_many(
        catalog(shape, profile.names).key(pipeline), np.array([tokens]), CacheLayout.of(30, 3, 64, "float32")
    )
    assert guess is not None
    kept = kept_tokens(built.evictor, shape, tokens, profile)
    if "window" in pipeline:  # between two evictions a head holds up to a block more
        assert (kept <= guess.kept_tokens[0]).all()
        assert (guess.kept_tokens[0] <= kept + BLOCK_TOKENS).all()
        return
    assert (kept == guess.kept_tokens[0]).all()
    tables = int((-(-kept // BLOCK_TOKENS)).sum()) * TABLE_BYTES_PER_BLOCK  # estimates leave them out
    assert guess.device_bytes[0] + tables == foretold.device_bytes
    assert guess.host_bytes[0] == foretold.host_bytes
    assert guess.shadow_bytes[0] == foretold.shadow_bytes


def test_unknown_stages_have_no_estimate() -> None:
    assert estimate((("telepathy", ()),), 100, CacheLayout.of(1, 1, 64, "float32")) is None


def test_an_unknown_dtype_is_an_error() -> None:
    with pytest.raises(ValueError, match="raw_dtype 'int3': expected one of float32"):
        CacheLayout.of(1, 1, 64, "int3")
