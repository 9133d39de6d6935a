"""What ``kvpilot bench kernels`` attends over: keys and values as a peer wants them, and as blocks of one format.

R rows (requests), L layers, H KV heads, T tokens, D head_dim. The blocks hold the very numbers the peer gets, put there
through the backend's own interface.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from kernels.api import I32, Backend, DecodePlan, Tables, TokenSource
from kernels.backends import make_backend
from kernels.layout import BLOCK_TOKENS, UNIT_BYTES, CacheShape, Format, Tier

ALIGNMENT_BYTES = 64
"""Of all memory here, peers' and ours: a cache line, as torch's own allocator gives."""
WRONG = 0.05
"""Relative difference from torch's attention over the same blocks from which a kernel is wrong, not just less precise;
how precise it must be is for the kernels' tests."""


@dataclass(frozen=True)
class Case:
    """Sizes of one comparison; ``shape.layers`` are walked over in each pass."""

    shape: CacheShape
    rows: int
    context_tokens: int
    device: torch.device

    def __post_init__(self) -> None:
        if self.context_tokens < 2 * BLOCK_TOKENS:
            raise ValueError(
                f"context {self.context_tokens}: at least {2 * BLOCK_TOKENS} tokens, since the last block is always raw"
            )

    @property
    def scaling(self) -> float:
        """Factor on the scores."""
        return 1 / math.sqrt(self.shape.head_dim)

    @property
    def full_blocks(self) -> int:
        """Blocks of a table in the format under test: all but the last, which takes the step's token and is raw."""
        return -(-self.context_tokens // BLOCK_TOKENS) - 1

    @property
    def tables_per_layer(self) -> int:
        """Tables that one layer's attention reads."""
        return self.rows * self.shape.kv_heads

    @property
    def raw_bytes(self) -> int:
        """K and V of one layer in the model's dtype: what a peer reads."""
        shape = self.shape
        return 2 * self.tables_per_layer * self.context_tokens * shape.head_dim * shape.dtype.itemsize

    def block_bytes(self, fmt: Format) -> int:
        """Bytes of one layer's blocks that a decode step reads: contents of full blocks and kept rows of the last."""
        tail = self.context_tokens - self.full_blocks * BLOCK_TOKENS
        tail_bytes = self.shape.payload_bytes(Format.RAW) * tail // BLOCK_TOKENS
        return self.tables_per_layer * (self.full_blocks * self.shape.payload_bytes(fmt) + tail_bytes)


@dataclass(frozen=True)
class LayerData:
    """One layer's numbers. The last of the T tokens is the one that the decode step brings."""

    q: torch.Tensor  # [R, query_heads, D]
    k: torch.Tensor  # [R, H, T, D]
    v: torch.Tensor  # [R, H, T, D]


def empty(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory as the worker's arenas have it: in RAM numpy's, which asks for huge pages."""
    if device.type != "cpu":
        return torch.empty(size, dtype=dtype, device=device)
    count = math.prod(size) * dtype.itemsize
    memory = np.empty(count + ALIGNMENT_BYTES, np.uint8)
    first = -memory.ctypes.data % ALIGNMENT_BYTES
    return torch.from_numpy(memory[first : first + count]).view(dtype).view(size)


def make_data(case: Case) -> list[LayerData]:
    """Random numbers for every layer, each in memory of its own."""
    shape = case.shape
    generator = torch.Generator(case.device).manual_seed(0)

    def numbers(*size: int) -> torch.Tensor:
        return empty(size, shape.dtype, case.device).normal_(generator=generator)

    heads = (case.rows, shape.kv_heads, case.context_tokens, shape.head_dim)
    return [
        LayerData(numbers(case.rows, shape.query_heads, shape.head_dim), numbers(*heads), numbers(*heads))
        for _ in range(shape.layers)
    ]


class BlockCache:
    """One backend whose tables hold a case's tokens in blocks of one format.

    Blocks lie as growing requests get them (request, then block, then layer and head), so the blocks of a table are
    apart from each other. Each table is as long after a decode step as before it: a step can be repeated.

    Args:
        backend: a name that ``make_backend`` knows.
        case: the sizes.
        data: the tokens, a layer each.
        fmt: the format of full blocks.
        spare: formats for which ``transcode`` shall have room.

    Raises:
        ValueError, NotImplementedError, KeyError: from a backend that does not know the format or the device.
    """

    def __init__(
        self, backend: str, case: Case, data: list[LayerData], fmt: Format, spare: tuple[Format, ...] = ()
    ) -> None:
        shape, full = case.shape, case.full_blocks
        self.case, self.format = case, fmt
        units, raw_units = shape.block_units(fmt), shape.block_units(Format.RAW)
        size = (case.rows, full, shape.layers, shape.kv_heads)
        grid = np.arange(math.prod(size)).reshape(size).transpose(0, 2, 3, 1)  # [R, L, H, full]
        tails = np.arange(case.rows * shape.layers * shape.kv_heads).reshape(grid.shape[:3])
        scratch = np.arange(case.tables_per_layer * full).reshape(case.rows, shape.kv_heads, full)
        after_full = grid.size * units
        after_tails = after_full + tails.size * raw_units
        after_scratch = after_tails + (0 if fmt is Format.RAW else scratch.size * raw_units)
        end = after_scratch + grid.size * max((shape.block_units(other) for other in spare), default=0)
        if end > np.iinfo(np.int32).max:
            raise ValueError(f"{end * UNIT_BYTES} bytes of blocks: more than an arena can address")
        self._grid, self._spare = grid, after_scratch
        self._home = (grid * units).astype(np.int32)
        self._scratch = (after_tails + scratch * raw_units).astype(np.int32)  # [R, H, full]
        self.tables = Tables.allocate(case.rows, shape, case.context_tokens)
        self.tables.address[..., :full] = self._home
        self.tables.address[..., full] = after_full + tails * raw_units
        self.tables.length[:] = case.context_tokens
        self.tables.position[..., : case.context_tokens] = np.arange(case.context_tokens)
        arenas = (
            empty((end * UNIT_BYTES,), torch.uint8, case.device),
            torch.zeros(UNIT_BYTES, dtype=torch.uint8, pin_memory=case.device.type == "cuda"),
        )
        self.backend: Backend = make_backend(backend, shape, arenas, self.tables)
        self._slots: I32 = np.arange(case.rows, dtype=np.int32)
        self._data = data
        self._steps = [(layer.q, layer.k[:, :, -1].contiguous(), layer.v[:, :, -1].contiguous()) for layer in data]
        for number, layer in enumerate(data):
            self._fill(number, layer)
        self._plan: DecodePlan = self.backend.plan(self._slots)

    def _fill(self, layer: int, data: LayerData) -> None:
        """Writes one layer's tokens as raw blocks, and transcodes the full ones into their places."""
        full, tables = self.case.full_blocks, self.tables
        if self.format is not Format.RAW:
            tables.address[:, layer, :, :full] = self._scratch
        for slot in range(self.case.rows):
            self.backend.write(slot, layer, 0, data.k[slot], data.v[slot])
        if self.format is Format.RAW:
            return
        blocks = self.backend.encode(self._source(slice(layer, layer + 1), full), self.format)
        self.backend.store(Tier.DEVICE, self._home[:, layer].reshape(-1), blocks)
        tables.address[:, layer, :, :full] = self._home[:, layer]
        tables.format[:, layer, :, :full] = self.format

    def _source(self, layers: slice, blocks: int) -> TokenSource:
        """All tokens of the first blocks of these layers' tables: R * layers * H * blocks blocks, in that order."""
        tables = self.tables
        token = np.arange(blocks * BLOCK_TOKENS).reshape(blocks, BLOCK_TOKENS)

        def each(values: np.ndarray) -> np.ndarray:
            return np.repeat(values[:, layers, :, :blocks].reshape(-1, 1), BLOCK_TOKENS, 1)

        there = each(tables.address).reshape(-1, blocks, BLOCK_TOKENS)
        kept = np.where(token < self.case.context_tokens, there, -1)
        address = kept.reshape(-1, BLOCK_TOKENS).astype(np.int32)
        row = np.tile(np.arange(BLOCK_TOKENS, dtype=np.uint8), (len(address), 1))
        return TokenSource(address, each(tables.format), each(tables.tier), row)

    def plan(self) -> None:
        """Plans the next decode step over all rows."""
        self._plan = self.backend.plan(self._slots)

    def step(self) -> None:
        """The planned decode step: the attention of every layer."""
        for layer in range(self.case.shape.layers):
            self.attend(layer)

    def attend(self, layer: int) -> torch.Tensor:
        """The planned decode step's attention of one layer: [R, query_heads, D]."""
        q, k, v = self._steps[layer]
        return self.backend.decode(self._plan, layer, q, k, v, self.case.scaling)

    def transcode(self, fmt: Format) -> None:
        """Builds all full blocks anew in another format where there is room beside them, as a switch does."""
        places = self._spare + self._grid.reshape(-1) * self.case.shape.block_units(fmt)
        source = self._source(slice(None), self.case.full_blocks)
        self.backend.transcode(source, fmt, Tier.DEVICE, places.astype(np.int32))

    def difference(self) -> float:
        """Relative difference of the first layer's attention from torch's over the raw numbers: what the format costs.

        Raises:
            RuntimeError: if it is not the attention over what ``read`` finds in these same blocks.
        """
        self.plan()
        found = self.attend(0).float()
        case, q = self.case, self._data[0].q
        size = (case.rows, case.shape.kv_heads, -1, case.shape.head_dim)
        stored = self.backend.read(self._source(slice(0, 1), case.full_blocks + 1))
        k, v = (part.to(case.device).view(size)[:, :, : case.context_tokens] for part in stored)
        apart = _relative(found, packed_attention(q, k, v).float())
        if not apart < WRONG:  # also for NaN
            raise RuntimeError(f"attention over {self.format.name.lower()} blocks is {apart:.3g} off torch's")
        return _relative(found, packed_attention(q, self._data[0].k, self._data[0].v).float())


def packed_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """torch's attention with the queries of a group as rows of their KV head: [R, query_heads, D]."""
    queries = q.view(len(q), k.shape[1], -1, q.shape[-1])  # [R, H, G, D]
    return functional.scaled_dot_product_attention(queries, k, v).view(q.shape)


def grouped_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """torch's attention with one row a query head, grouped by torch itself: [R, query_heads, D]."""
    return functional.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]


def _relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())
