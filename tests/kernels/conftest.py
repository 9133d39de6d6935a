"""A small cache to run kernels on: poisoned arenas, block tables, and the numbers that should be in them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from kernels.api import Backend, Tables, TokenSource
from kernels.backends import make_backend
from kernels.layout import BLOCK_TOKENS, GROUP, MEMORY_TIERS, UNIT_BYTES, CacheShape, Format, Tier

POISON = 0xFF  # as float32, float16, bfloat16 and e4m3 alike, a NaN


def poison(size: int, dtype: torch.dtype, number: float) -> torch.Tensor:
    """Bytes that read as NaN, or as infinity in this dtype: nothing may make a number of what nobody wrote."""
    if np.isnan(number):
        return torch.full((size,), POISON, dtype=torch.uint8)
    one = torch.tensor([number]).to(dtype).view(torch.uint8)
    return one.repeat(size // len(one))


def _e4m3(code: int) -> float:
    """The number of an e4m3 code, by the table of arXiv 2209.05433."""
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


E4M3 = np.array([_e4m3(code) for code in range(256)])


def unpack(shape: CacheShape, fmt: Format, block: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """K and V float64 [32, D] of a block's bytes, read off the layout's table one field after the other."""
    raw, at, d, groups = block.numpy().tobytes(), 0, shape.head_dim, shape.value_groups

    def field(dtype: str, *size: int) -> np.ndarray:
        nonlocal at
        count = int(np.prod(size))
        array = np.frombuffer(raw, dtype, count, at).reshape(size)
        at += array.nbytes
        return array

    if fmt is Format.RAW:
        size = BLOCK_TOKENS * d * shape.dtype.itemsize
        k, v = (block[i * size : (i + 1) * size].view(shape.dtype).double().numpy().reshape(-1, d) for i in (0, 1))
        return k, v
    bits = {Format.INT8: 8, Format.INT4: 4, Format.INT2: 2, Format.FP8: 8}[fmt]
    width = -(-d * bits // 8)
    packed = field("u1", BLOCK_TOKENS, width), field("u1", BLOCK_TOKENS, width)
    if fmt is Format.FP8:
        k, v = (E4M3[codes] for codes in packed)
        k_scale = field("f2", d).astype(float)
        return k * k_scale, v * field("f2", BLOCK_TOKENS, groups).astype(float).repeat(GROUP, 1)[:, :d]
    k, v = (np.concatenate([codes >> at & (1 << bits) - 1 for at in range(0, 8, bits)], 1)[:, :d] for codes in packed)
    k_scale, k_zero = field("f2", d).astype(float), field("f2", d).astype(float)
    v_scale, v_zero = (field("f2", BLOCK_TOKENS, groups).astype(float).repeat(GROUP, 1)[:, :d] for _ in range(2))
    return k * k_scale + k_zero, v * v_scale + v_zero


@dataclass
class World:
    """One backend over two arenas, and K and V of every table as they are stored."""

    backend: Backend
    kv: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]]  # (slot, layer, head) -> float64 [kept, D]

    @property
    def shape(self) -> CacheShape:
        return self.backend.shape

    @property
    def tables(self) -> Tables:
        return self.backend.tables

    def source(self, slot: int, layer: int, head: int, tokens: list[int]) -> TokenSource:
        """These kept tokens of a table as new blocks, the last one padded."""
        padded = np.array(tokens + [-1] * (-len(tokens) % BLOCK_TOKENS), np.int64).reshape(-1, BLOCK_TOKENS)
        block = np.maximum(padded, 0) // BLOCK_TOKENS
        tables, where = self.tables, (slot, layer, head)
        address = np.where(padded < 0, -1, tables.address[where][block]).astype(np.int32)
        row = (padded % BLOCK_TOKENS).astype(np.uint8)
        return TokenSource(address, tables.format[where][block], tables.tier[where][block], row)

    def step(self, slots: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v of a decode step. A slot's numbers depend on the slot and the seed only; ``kv`` learns k and v."""
        shape, rows = self.shape, []
        for slot in slots:
            g = torch.Generator().manual_seed(1000 * seed + slot)
            heads = shape.query_heads + 2 * shape.kv_heads
            rows.append(torch.randn(heads, shape.head_dim, generator=g).to(shape.dtype))
        q, k, v = torch.stack(rows).split([shape.query_heads, shape.kv_heads, shape.kv_heads], 1)
        return q, k, v

    def extend(self, slots: list[int], layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Notes that a decode step has appended k, v [R, H, D]."""
        for row, slot in enumerate(slots):
            for head in range(self.shape.kv_heads):
                keys, values = self.kv[slot, layer, head]
                keys = torch.cat([keys, k[row, head, None].double()])
                values = torch.cat([values, v[row, head, None].double()])
                self.kv[slot, layer, head] = keys, values

    def attention(self, slot: int, layer: int, q: torch.Tensor, scaling: float) -> tuple[torch.Tensor, list]:
        """Plain attention of q [query heads, D] in float64: the output, and a head's shares [G, kept]."""
        outputs, shares = [], []
        for head, queries in enumerate(q.double().chunk(self.shape.kv_heads)):
            keys, values = self.kv[slot, layer, head]
            shares.append(torch.softmax(queries @ keys.T * scaling, -1))
            outputs.append(shares[-1] @ values)
        return torch.cat(outputs), shares


def build(
    name: str,
    shape: CacheShape,
    kept: np.ndarray,  # [S, L, H] tokens of each table before the step
    formats: tuple[Format, ...] = (Format.RAW,),
    tiers: tuple[Tier, ...] = (Tier.DEVICE,),
    seed: int = 0,
    unwritten: float = float("nan"),
) -> World:
    """Tables whose full blocks get formats and tiers at random; tail blocks are raw, on the device, with room for one.

    ``length`` counts the token that the next step will bring. Memory that nobody wrote reads as ``unwritten``.
    """
    rng = np.random.default_rng(seed)
    slots = len(kept)
    tables = Tables.allocate(slots, shape, int(kept.max()) + 1)
    largest = max(shape.block_units(fmt) for fmt in Format)
    places = rng.permutation(tables.address.size)  # blocks lie in no order
    arenas = tuple(poison(tables.address.size * largest * UNIT_BYTES, shape.dtype, unwritten) for _ in MEMORY_TIERS)
    tables.address[:] = (places * largest).reshape(tables.address.shape)
    tables.length[:] = kept + 1
    world = World(make_backend(name, shape, arenas, tables), {})
    for slot in range(slots):
        for layer in range(shape.layers):
            for head in range(shape.kv_heads):
                # a generator for each table, so that a table's content does not depend on which others there are
                g = torch.Generator().manual_seed(hash((seed, slot, layer, head)))
                count = int(kept[slot, layer, head])
                numbers = torch.randn(2, count, shape.head_dim, generator=g) * 2
                channel = torch.randn(shape.head_dim, generator=g)
                k, v = (numbers + channel).to(shape.dtype)
                world.kv[slot, layer, head] = k.double(), v.double()
                choice = np.random.default_rng(slot + seed)
                _fill(world, (slot, layer, head), k, v, formats, tiers, choice, unwritten)
    return world


def _fill(
    world: World,
    table: tuple[int, int, int],
    k: torch.Tensor,
    v: torch.Tensor,
    formats: tuple[Format, ...],
    tiers: tuple[Tier, ...],
    rng: np.random.Generator,
    unwritten: float,
) -> None:
    """Lays out K, V [kept, D] as raw blocks without the backend's help, then converts and moves the full ones."""
    backend, tables, shape = world.backend, world.tables, world.shape
    keys, values = world.kv[table]
    first = tables.address[table].astype(np.int64) * UNIT_BYTES
    part_bytes = shape.payload_bytes(Format.RAW) // 2
    for b, start in enumerate(range(0, len(k), BLOCK_TOKENS)):
        for part, numbers in enumerate((k, v)):
            content = numbers[start : start + BLOCK_TOKENS].contiguous().view(torch.uint8).flatten()
            backend.arenas[0][first[b] + part * part_bytes :][: len(content)] = content

    full = len(k) // BLOCK_TOKENS
    wanted_format, wanted_tier = rng.choice(formats, full).astype(np.uint8), rng.choice(tiers, full).astype(np.uint8)
    encoded = {}
    for fmt in formats:
        chosen = np.flatnonzero(wanted_format == fmt)
        tokens = (chosen[:, None] * BLOCK_TOKENS + np.arange(BLOCK_TOKENS)).flatten().tolist()
        encoded[fmt] = chosen, backend.encode(world.source(*table, tokens), fmt)
    for b in range(full):
        size = shape.block_bytes(Format.RAW)
        backend.arenas[0][first[b] :][:size] = poison(size, shape.dtype, unwritten)
    for fmt, (chosen, blocks) in encoded.items():
        for tier in tiers:
            here = wanted_tier[chosen] == tier
            backend.store(tier, tables.address[table][chosen[here]], blocks[torch.from_numpy(here)])
        for b, block in zip(chosen, blocks, strict=True):
            rows = slice(b * BLOCK_TOKENS, (b + 1) * BLOCK_TOKENS)
            keys[rows], values[rows] = map(torch.from_numpy, unpack(shape, fmt, block))
    tables.format[table][:full], tables.tier[table][:full] = wanted_format, wanted_tier


@pytest.fixture(autouse=True)
def _one_torch_thread(one_torch_thread: None) -> None:
    """All tests of kernels are on tensors that small."""


NAMES = ["reference", "cpu", *(["triton"] if importlib.util.find_spec("triton") else [])]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """Every kernel test runs on every backend."""
    return str(request.param)


@pytest.fixture
def names() -> list[str]:
    """All backends that can be tested here."""
    return NAMES


@pytest.fixture
def make_world(name: str) -> Callable[..., World]:
    """``build`` for the backend under test."""
    return lambda *args, **kwargs: build(name, *args, **kwargs)


@pytest.fixture
def make_any_world() -> Callable[..., World]:
    """``build`` for a backend given by name."""
    return build


@pytest.fixture
def unpack_block() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """``unpack``."""
    return unpack
