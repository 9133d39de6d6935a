"""The host's part of a decode step on a GPU: work items, and one upload of all that the kernels need to know."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from kernels.api import I32, U8, DecodePlan, Tables
from kernels.layout import BLOCK_TOKENS, CacheShape, Format, Tier

LEAST_SPLIT_BLOCKS = 8
"""Shortest split, except a table's last: 256 tokens, against whose bytes a split's partial results weigh little."""

UNREAD_KIND = 0xFF
"""Kind of a block that the step does not read: of another tier, or of no format that kernels know."""

WAVES = 2
"""Programs per multiprocessor that a lone, long request should give."""

I64 = npt.NDArray[np.int64]


def split_blocks(blocks: I64, kv_heads: int, multiprocessors: int) -> I64:
    """Blocks per split of tables with this many blocks: a power of two that depends on nothing else in the batch."""
    most_splits = max(1, WAVES * multiprocessors // kv_heads)
    wanted = np.maximum(-(-blocks // most_splits), LEAST_SPLIT_BLOCKS)
    return np.int64(1) << np.ceil(np.log2(wanted)).astype(np.int64)


def bucket_size(n: int) -> int:
    """``n`` rounded up to four sizes per doubling, so that a captured graph serves many steps."""
    step = max(8, 1 << max(0, n.bit_length() - 3))
    return -(-max(n, 1) // step) * step


def kinds(fmt: U8, tier: U8, tiers: Collection[Tier]) -> U8:
    """What the kernels are told of blocks: format + 16 * tier, or UNREAD_KIND."""
    read = np.isin(tier, tuple(tiers)) & (fmt < len(Format))
    return np.where(read, fmt + 16 * tier, UNREAD_KIND).astype(np.uint8)


@dataclass(frozen=True)
class BucketKey:
    """Sizes that fix every buffer and grid of a step: steps with the same key may replay the same graph."""

    rows: int
    items: int  # of the layer with most
    entries: int  # blocks of the layer with most
    all_read: bool  # whether all blocks are


@dataclass(eq=False)
class TritonPlan(DecodePlan):
    """A decode step whose tables lie on the device, in the buffers of its bucket, until the next ``plan``."""

    bucket: Bucket = field(kw_only=True)
    serial: int = field(kw_only=True)  # of the bucket's plans
    blocks: I64 = field(kw_only=True)  # [L, R, H]


class Bucket:
    """Fixed buffers of decode steps of one size: staging on the host, and plan, workspace and block masses on the GPU.

    A layer's parts are lists over layers of tensors, made once: slicing per call would cost time in every layer.
    """

    def __init__(self, key: BucketKey, shape: CacheShape, device: torch.device) -> None:
        self.key = key
        self.serial = 0
        layers, tables, group = shape.layers, key.rows * shape.kv_heads, shape.queries_per_kv_head
        sizes: dict[str, tuple[int, ...]] = {
            "slots": (key.rows,),
            "length": (layers, tables),
            "spans": (layers, tables, 2),
            "items": (layers, key.items, 4),
            "address": (layers, key.entries),
        }
        ints = sum(int(np.prod(size)) for size in sizes.values())
        kinds = layers * key.entries
        pinned = device.type == "cuda"
        self._staging = torch.empty(4 * ints + kinds, dtype=torch.uint8, pin_memory=pinned)
        self._device = torch.empty_like(self._staging, device=device)
        self._uploaded = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]

        host: dict[str, npt.NDArray[np.int32]] = {}
        there: dict[str, torch.Tensor] = {}
        at = 0
        for name, size in sizes.items():
            end = at + 4 * int(np.prod(size))
            host[name] = self._staging[at:end].view(torch.int32).view(size).numpy()
            there[name] = self._device[at:end].view(torch.int32).view(size)
            at = end
        self._host = host
        self._host_kind = self._staging[at:].view(layers, key.entries).numpy()
        self.slots = there["slots"]
        self.length = list(there["length"])
        self.spans = list(there["spans"])
        self.items = list(there["items"])
        self.address = list(there["address"])
        self.kind = list(self._device[at:].view(layers, key.entries))
        self.block_masses = torch.zeros(layers, key.entries, dtype=torch.float32, device=device)
        self.block_mass = list(self.block_masses)

        def work(*size: int) -> torch.Tensor:
            return torch.empty(size, dtype=torch.float32, device=device)

        self.scores = work(key.entries, group, BLOCK_TOKENS)
        self.highest = work(key.items, group)
        self.total = work(key.items, group)
        self.sums = work(key.items, group, shape.head_dim)

    def upload(self, tables: Tables, slots: I32, kind: U8, real: npt.NDArray[np.bool_], work: Work) -> None:
        """Fills the staging buffer and starts its copy to the device.

        ``real`` [L, R, H, B'] says which entries of the slots' tables are blocks, ``kind`` has theirs in this order.
        """
        if self._uploaded is not None:
            self._uploaded.synchronize()  # the copy of the plan before
        host, rows = self._host, len(slots)
        layers, _, heads, most = *work.blocks.shape, int(work.blocks.max(initial=0))
        host["slots"][:] = -1
        host["slots"][:rows] = slots
        host["length"][:, : rows * heads] = tables.length[slots].swapaxes(0, 1).reshape(layers, -1)
        host["spans"][:] = 0
        host["spans"][:, : rows * heads] = work.spans
        host["items"][:] = -1
        host["items"][work.item_layer, work.item_number] = work.items

        used = np.arange(self.key.entries) < work.blocks.reshape(layers, -1).sum(1)[:, None]  # [L, E]
        host["address"][used] = tables.address[slots, :, :, :most].swapaxes(0, 1)[real]
        self._host_kind[used] = kind
        self._device.copy_(self._staging, non_blocking=True)
        if self._uploaded is not None:
            self._uploaded.record()
        self.serial += 1

    def refresh(self, tables: Tables, slots: I32, tiers: Collection[Tier], blocks: I64, layer: int) -> None:
        """Uploads a layer's addresses and kinds anew; ``blocks`` [R, H] as when the plan was made."""
        real = np.arange(int(blocks.max(initial=0))) < blocks[..., None]  # [R, H, B']
        most, used = real.shape[-1], int(blocks.sum())
        kind = kinds(tables.format[slots, layer, :, :most], tables.tier[slots, layer, :, :most], tiers)
        self.address[layer][:used].copy_(torch.from_numpy(tables.address[slots, layer, :, :most][real]))
        self.kind[layer][:used].copy_(torch.from_numpy(kind[real]))


@dataclass(frozen=True)
class Work:
    """The splits of one step's tables. A table's number is row * H + head; items count anew in each layer."""

    blocks: I64  # [L, R, H]
    spans: I64  # [L, R * H, 2] first item and number of items of each table
    item_layer: I64  # [all items]
    item_number: I64  # [all items] within the layer
    items: I64  # [all items, 4] table, first block, blocks, entry of the first block

    @staticmethod
    def of(length: I32, multiprocessors: int) -> Work:
        """The work of tables with these lengths [L, R, H]."""
        layers, _, heads = length.shape
        shaped = -(-length.astype(np.int64) // BLOCK_TOKENS)
        blocks = shaped.reshape(layers, -1)
        size = split_blocks(blocks, heads, multiprocessors)
        splits = -(-blocks // size)
        start = splits.cumsum(1) - splits
        entry = blocks.cumsum(1) - blocks

        def each(x: I64) -> I64:
            return np.repeat(x.ravel(), splits.ravel())

        table = each(np.broadcast_to(np.arange(blocks.shape[1]), blocks.shape))
        of_layer = splits.sum(1)
        number = np.arange(len(table)) - np.repeat(of_layer.cumsum() - of_layer, of_layer)
        first = (number - each(start)) * each(size)
        count = np.minimum(each(size), each(blocks) - first)
        return Work(
            blocks=shaped,
            spans=np.stack([start, splits], -1),
            item_layer=np.repeat(np.arange(layers), of_layer),
            item_number=number,
            items=np.stack([table, first, count, each(entry) + first], 1),
        )

    def key(self, all_read: bool = True) -> BucketKey:
        """The bucket that these fit, where all blocks are read or not."""
        rows = self.blocks.shape[1]
        return BucketKey(
            rows=1 << max(0, rows - 1).bit_length(),
            items=bucket_size(int(self.spans[..., 1].sum(1).max(initial=0))),
            entries=bucket_size(int(self.blocks.sum((1, 2)).max(initial=0))),
            all_read=all_read,
        )
