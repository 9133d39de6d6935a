"""The CPU backend: checks and host decisions in Python, everything else in Numba (``kernels.cpu_*``)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from kernels import cpu_memory
from kernels.api import F32, I32, U8, VOTE_DECAY, DecodePlan, Tables, TokenSource
from kernels.checks import check_arenas, check_attend, check_decode, check_plan, check_write
from kernels.cpu_attend import attend
from kernels.cpu_attend_block import SPLIT_BLOCKS, SPLIT_TOKENS
from kernels.cpu_convert import encode_blocks, load_blocks, read_tokens, store_blocks, write_tokens
from kernels.cpu_levels import attend_levels
from kernels.cpu_threads import team
from kernels.cpu_tiles import CHANNELS
from kernels.layout import BLOCK_TOKENS, MEMORY_TIERS, UNIT_BYTES, BlockFormat, CacheShape, Format, Tier
from kernels.partials import LOG2_E, Partial, stack

I64 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
_NO_TOKENS = np.empty((0, 0, 0), np.uint8)
_NO_PARTIALS = np.empty((0, 0, 0, 0), np.float32), np.empty((0, 0, 0), np.float32)
RAW_KINDS = {torch.float32: cpu_memory.F32, torch.float16: cpu_memory.F16, torch.bfloat16: cpu_memory.BF16}


@dataclass
class CpuPlan(DecodePlan):
    """A decode step with its work items: splits of tables."""

    items: list[I32] = field(default_factory=list)  # a layer: [I, 4] row, head, split, number of the table's first item
    reads: Mask = field(default_factory=lambda: np.zeros(len(Tier), np.bool_))  # [tiers]


class CpuBackend:
    """Numba kernels over arenas in RAM. One caller at a time per backend; results do not depend on thread count."""

    def __init__(self, shape: CacheShape, arenas: tuple[torch.Tensor, ...], tables: Tables) -> None:
        check_arenas(shape, arenas)
        for arena in arenas:
            if arena.device.type != "cpu":
                raise ValueError(f"arena on {arena.device}: the cpu backend reads arenas in RAM only")
        self.shape = shape
        self.arenas = arenas
        self.tables = tables
        self._kind = RAW_KINDS[shape.dtype]
        self._bases = np.array([*(arena.data_ptr() for arena in arenas), 0], np.int64)  # no block is read on disk
        self._votes = tables.votes.view(np.uint16)
        self._workspace = _Workspace(shape)

    def warm_up(self) -> None:
        """Compiles all kernels, or loads them from Numba's cache: half a minute once a machine, then a second."""
        shape = CacheShape(1, 1, 1, 2, self.shape.dtype)
        arenas = tuple(torch.zeros(shape.block_bytes(Format.RAW), dtype=torch.uint8) for _ in self.arenas)
        backend = CpuBackend(shape, arenas, Tables.allocate(1, shape, 1))
        one = torch.zeros(1, 1, 2)
        backend.write(0, 0, 0, one, one)
        backend.tables.length[:] = 1
        backend.decode(backend.plan(np.zeros(1, np.int32)), 0, one, one, one, 1.0)
        zeros = np.zeros((1, BLOCK_TOKENS), np.uint8)
        source = TokenSource(zeros.astype(np.int32), zeros, zeros, zeros)
        backend.read(source)
        backend.store(0, source.address[0, :1], backend.encode(source, Format.RAW))
        backend.load(0, source.address[0, :1], Format.RAW)
        block = np.zeros(UNIT_BYTES, np.uint8)
        query, pairs, first = np.zeros((1, 1, 2), np.float32), np.zeros(256, np.uint64), np.zeros(1, np.int64)
        attend_levels(team(), block.ctypes.data + first, first, 4, query, pairs)

    def plan(
        self, slots: I32, tiers: Collection[Tier] = MEMORY_TIERS, *, appends: bool = True, changing: bool = False
    ) -> CpuPlan:
        """See ``kernels.api.Backend.plan``."""
        check_plan(self.tables, slots, tiers, appends)
        length = self.tables.length[slots].swapaxes(0, 1)  # [L, R, H]
        layers, rows, heads = length.shape
        blocks = -(-int(length.max(initial=0)) // BLOCK_TOKENS)
        splits = -(-length.reshape(layers, -1) // SPLIT_TOKENS)  # [L, R * H]
        end = splits.cumsum(1)
        first = np.repeat((end - splits).ravel(), splits.ravel())  # [all items]
        table = np.repeat(np.tile(np.arange(rows * heads), layers), splits.ravel())
        layer_end = end[:, -1].cumsum()
        item = np.arange(len(table)) - np.repeat(layer_end - end[:, -1], end[:, -1])  # number within its layer
        items = np.stack([table // heads, table % heads, item - first, first], 1).astype(np.int32)
        self._workspace.reserve(int(end[:, -1].max()))
        return CpuPlan(
            slots=np.ascontiguousarray(slots, np.int32),
            tiers=tuple(tiers),
            appends=appends,
            block_mass=np.zeros((layers, rows, heads, blocks), np.float32),
            items=np.split(items, layer_end[:-1]),
            reads=np.array([tier in tiers for tier in Tier]),
        )

    def refresh(self, plan: DecodePlan, layer: int) -> None:
        """Nothing to do: the tables are read as they are."""

    def decode(
        self,
        plan: DecodePlan,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scaling: float,
        partials: Sequence[Partial] = (),
        lse: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See ``kernels.api.Backend.decode``."""
        check_decode(plan, q, partials)
        output, sums = torch.empty(q.shape), np.empty(q.shape[:2], np.float32) if lse is None else lse.numpy()
        self._attend(plan, layer, q, self._bytes(k), self._bytes(v), scaling, partials, output, sums)
        return output.to(q.dtype)

    def attend(self, plan: DecodePlan, layer: int, q: torch.Tensor, scaling: float) -> Partial:
        """See ``kernels.api.Backend.attend``. The arena of a tier that the plan does not read may be of no bytes."""
        check_attend(plan)
        output, lse = torch.zeros(q.shape), np.full(q.shape[:2], -np.inf, np.float32)
        self._attend(plan, layer, q, _NO_TOKENS, _NO_TOKENS, scaling, (), output, lse)
        return Partial(output, torch.from_numpy(lse))

    def _attend(
        self,
        plan: DecodePlan,
        layer: int,
        q: torch.Tensor,
        k: U8,
        v: U8,
        scaling: float,
        partials: Sequence[Partial],
        output: torch.Tensor,
        lse: F32,
    ) -> None:
        """Fills output and lse where the plan reads anything, and does what an appending plan does to the tables."""
        if not isinstance(plan, CpuPlan):
            raise TypeError(f"plan: got {type(plan).__name__}, must come from this backend's plan()")
        tables, work = self.tables, self._workspace
        outputs, lses = _NO_PARTIALS
        if partials:
            outputs, lses = (x.numpy() for x in stack(partials, output.device))
        attend(
            team(),
            self._bases,
            self._kind,
            layer,
            np.float32(scaling * LOG2_E),
            np.float32(VOTE_DECAY),
            plan.reads,
            plan.appends,
            tables.address,
            tables.format,
            tables.tier,
            tables.length,
            tables.mass,
            self._votes,
            plan.slots,
            plan.items[layer],
            q.to(torch.float32).contiguous().numpy(),
            k,
            v,
            outputs,
            lses,
            output.numpy(),
            lse,
            plan.block_mass[layer],
            work.scores,
            work.highest,
            work.total,
            work.sums,
        )

    def finish(self, plan: DecodePlan) -> None:
        """Nothing to do: ``decode`` has filled the masses."""

    def settle(self, slots: I32) -> None:
        """Nothing to do: ``decode`` has added to the tables."""

    def write(self, slot: int, layer: int, start: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """See ``kernels.api.Backend.write``."""
        check_write(self.tables, slot, layer, start, k.shape[1])
        address = self.tables.address[slot, layer]
        write_tokens(team(), int(self._bases[0]), address, start, self._bytes(k), self._bytes(v))

    def read(self, source: TokenSource) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``kernels.api.Backend.read``."""
        size = (*source.address.shape, self.shape.head_dim)
        keys, values = torch.empty(size, dtype=self.shape.dtype), torch.empty(size, dtype=self.shape.dtype)
        into = self._bytes(keys), self._bytes(values)
        read_tokens(team(), self._bases, self._kind, self.shape.head_dim, *_arrays(source), *into)
        return keys, values

    def encode(self, source: TokenSource, fmt: Format) -> torch.Tensor:
        """See ``kernels.api.Backend.encode``.

        A block whose tokens are one block of the wanted format, in order, is copied byte for byte.
        """
        size = self.shape.block_bytes(fmt)
        blocks = torch.empty((len(source.address), size), dtype=torch.uint8)
        self._encode_to(source, fmt, blocks.data_ptr() + size * np.arange(len(blocks)))
        return blocks

    def transcode(self, source: TokenSource, fmt: Format, tier: int, address: I32) -> None:
        """See ``kernels.api.Backend.transcode``."""
        self._encode_to(source, fmt, self._bases[tier] + address.astype(np.int64) * UNIT_BYTES)

    def _encode_to(self, source: TokenSource, fmt: Format, into: I64) -> None:
        """Builds blocks at memory addresses ``into`` [N]."""
        size = self.shape.block_bytes(fmt)
        team_, shape = team(), self.shape
        encode_blocks(team_, self._bases, self._kind, shape.head_dim, int(fmt), *_arrays(source), into, size)

    def store(self, tier: int, address: I32, blocks: torch.Tensor) -> None:
        """See ``kernels.api.Backend.store``."""
        store_blocks(
            team(), int(self._bases[tier]), np.require(address, np.int32, ["C", "W"]), blocks.contiguous().numpy()
        )

    def load(self, tier: int, address: I32, fmt: BlockFormat) -> torch.Tensor:
        """See ``kernels.api.Backend.load``."""
        blocks = torch.empty((len(address), self.shape.block_bytes(fmt)), dtype=torch.uint8)
        load_blocks(team(), int(self._bases[tier]), np.require(address, np.int32, ["C", "W"]), blocks.numpy())
        return blocks

    def _bytes(self, x: torch.Tensor) -> U8:
        """Numbers [..., D] as bytes of the model's dtype [..., bytes of D numbers]."""
        numbers: U8 = x.to(self.shape.dtype).contiguous().view(torch.uint8).numpy()
        return numbers


class _Workspace:
    """Scratch of one layer's decode, reused by all layers and steps."""

    def __init__(self, shape: CacheShape) -> None:
        self._shape = shape
        self.reserve(1)

    def reserve(self, items: int) -> None:
        """Makes room for this many work items."""
        if hasattr(self, "highest") and items <= len(self.highest):
            return
        group = self._shape.queries_per_kv_head
        width = -(-self._shape.head_dim // CHANNELS) * CHANNELS
        self.scores: F32 = np.empty((items, group, SPLIT_TOKENS), np.float32)
        self.highest: F32 = np.empty((items, group, SPLIT_BLOCKS), np.float32)
        self.total: F32 = np.empty((items, group), np.float32)
        self.sums: F32 = np.empty((items, group, width), np.float32)


def _arrays(source: TokenSource) -> tuple[I32, U8, U8, U8]:
    """The source's arrays as the one type that the kernels are compiled for."""
    return (
        np.require(source.address, np.int32, ["C", "W"]),
        np.require(source.format, np.uint8, ["C", "W"]),
        np.require(source.tier, np.uint8, ["C", "W"]),
        np.require(source.row, np.uint8, ["C", "W"]),
    )
