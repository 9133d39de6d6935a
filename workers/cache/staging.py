"""Where a request's blocks on disk pass through the host tier: layer by layer in decode steps, in pieces elsewhere.

A staging area is two slots of the host's arena, each with room for the disk blocks of any one layer. While a layer is
attended to from one, the next layer's blocks are read into the other, on the store's threads, and after the last layer
the first one's for the next step. So disk costs the request two layers of host memory, which are taken with its first
block on disk and given back with its last, and nothing has to be found room for during a step.

Block tables name blocks on disk by number, but for the time in which a kernel reads their layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from kernels.api import I32, U8, Tables, TokenSource
from kernels.layout import UNIT_BYTES, BlockFormat, CacheShape, Tier
from kernels.partials import Partial
from workers.cache.arena import Arena, Lot
from workers.cache.arrangement import Blocks, pick
from workers.cache.disk_tier import DiskTier
from workers.cache.formats import format_of, formats
from workers.cache.recalls import Recalls

SLOTS = 2
I64 = npt.NDArray[np.int64]
Need = dict[BlockFormat, int]
"""Blocks that a slot has room for, by format."""


class DamagedCacheError(Exception):
    """Blocks on disk are not what was written, and no exact copy is there: the tokens must be computed again."""


@dataclass
class _DiskBlocks:
    """The N disk blocks of one layer."""

    head: I64
    index: I64
    number: I32
    format: U8


@dataclass
class _Slot:
    """Half of the area. ``layer`` is whose blocks it holds, or will once ``arriving`` is done; None: nobody's."""

    layer: int | None = None
    address: I32 = field(default_factory=lambda: np.zeros(0, np.int32))  # of the layer's blocks, in their order
    arriving: Future[list[int]] | None = None
    reading: torch.cuda.Event | None = None
    """Comes when a GPU that reads it is done."""

    def quiet(self) -> None:
        """Waits until neither the disk's threads nor a GPU are at it."""
        if self.arriving:
            self.arriving.exception()
        if self.reading:
            self.reading.synchronize()
        self.arriving = self.reading = None


def needed(blocks: Blocks) -> Need:
    """What a slot must have room for: of each format as many as the layer with most has on disk."""
    away = blocks.valid & (blocks.tier == Tier.DISK)
    counts = {fmt: int((away & (blocks.format == fmt)).sum(axis=(1, 2)).max(initial=0)) for fmt in formats()}
    return {fmt: count for fmt, count in counts.items() if count}


def staging_bytes(shape: CacheShape, need: Need) -> int:
    """Bytes of an area with room for that."""
    return SLOTS * sum(count * shape.block_bytes(fmt) for fmt, count in need.items())


class Staging:
    """One request's staging area, and its reader of what is on disk (``workers.cache.reading.Reader``).

    Args:
        disk: the disk tier.
        host: the arena that the area is in.
        tables: block tables.
        slot: the request's.
        recalls: is added to.
        recover: builds the block of (layer, head, index) in that format at a host address from an exact copy; False:
            there is none.
        on_gpu: whether kernels run behind the caller's back.
    """

    def __init__(
        self,
        disk: DiskTier,
        host: Arena,
        tables: Tables,
        slot: int,
        recalls: Recalls,
        recover: Callable[[tuple[int, int, int], BlockFormat, int], bool],
        on_gpu: bool = False,
    ) -> None:
        self.damaged = False
        """Whether something is gone that there is no exact copy of."""
        self._disk = disk
        self._host = host
        self._memory: U8 = host.data.numpy()
        self._on_gpu = on_gpu
        self._tables = tables
        self._slot = slot
        self._recalls = recalls
        self._recover = recover
        self._lots: dict[BlockFormat, Lot] = {}
        self._area: dict[BlockFormat, I32] = {}  # addresses: of slot s every SLOTS-th from s on
        self._layers: list[_DiskBlocks] = []
        self._slots = [_Slot() for _ in range(SLOTS)]

    # -- size ----------------------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of the area."""
        return sum(len(area) * self._host.shape.block_bytes(fmt) for fmt, area in self._area.items())

    def missing(self, need: Need) -> list[tuple[Lot | None, BlockFormat, int]]:
        """What the area lacks of the host's memory."""
        more = {fmt: SLOTS * count - len(self._area.get(fmt, ())) for fmt, count in need.items()}
        return [(self._lots.get(fmt), fmt, count) for fmt, count in more.items() if count > 0]

    def surplus(self, need: Need) -> I32:
        """Addresses that the area has beyond what it needs."""
        rest = [area[SLOTS * need.get(fmt, 0) :] for fmt, area in self._area.items()]
        return np.concatenate(rest) if rest else np.zeros(0, np.int32)

    def resize(self, need: Need) -> None:
        """Takes what is missing. The surplus is given back by whoever asked for it."""
        self.quiet()
        for lot, fmt, count in self.missing(need):
            lot = self._lots[fmt] = lot or self._host.open_lot(fmt)
            self._area[fmt] = np.concatenate([self._area.get(fmt, _NONE), self._host.allocate(lot, count)])
        for fmt in list(self._area):
            self._area[fmt] = self._area[fmt][: SLOTS * need.get(fmt, 0)]

    def follow(self, blocks: Blocks) -> None:
        """Takes note of the request's tables, which others have just changed."""
        self.quiet()
        self._layers = []
        for layer in range(len(blocks.length)):
            head, index = np.nonzero(blocks.valid[layer] & (blocks.tier[layer] == Tier.DISK))
            numbers, kinds = blocks.address[layer, head, index], blocks.format[layer, head, index]
            self._layers.append(_DiskBlocks(head, index, numbers, kinds))

    def close(self) -> None:
        """Gives the area back."""
        self.quiet()
        self._host.release(self.surplus({}))
        self.resize({})

    def quiet(self) -> None:
        """Waits for what is being read, and forgets all that was."""
        for slot in self._slots:
            slot.quiet()
        self._slots = [_Slot() for _ in range(SLOTS)]

    # -- a decode step -------------------------------------------------------------------------------------------------

    def before(self, layer: int, q: torch.Tensor, scaling: float) -> Partial | None:
        """See ``workers.cache.reading.Reader``: the layer's blocks are where kernels read them.

        Where damage cannot be repaired, they are not, and the request is marked as damaged: others in the step must
        not suffer.
        """
        blocks = self._layers[layer]
        if len(blocks.number) and not self.damaged:
            here = self._slot_of(layer) or self._read_ahead(layer, self._slots[0])
            self._arrive(here, layer)
            if not self.damaged:
                self._show(layer, here.address, Tier.HOST)
            self._look_ahead(layer, here)
        return None

    def after(self, layer: int) -> None:
        """See ``workers.cache.reading.Reader``."""
        self._show(layer, self._layers[layer].number, Tier.DISK)
        here = self._slot_of(layer)
        if here and self._on_gpu:
            here.reading = torch.cuda.Event()  # type: ignore[no-untyped-call]
            here.reading.record()

    def _show(self, layer: int, address: I32, tier: Tier) -> None:
        blocks = self._layers[layer]
        self._tables.address[self._slot, layer, blocks.head, blocks.index] = address
        self._tables.tier[self._slot, layer, blocks.head, blocks.index] = tier

    def _slot_of(self, layer: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.layer == layer), None)

    def _look_ahead(self, layer: int, here: _Slot) -> None:
        """Starts to read the next layer that has blocks on disk, the first one behind the last."""
        count = len(self._layers)
        following = ((layer + step) % count for step in range(1, count))
        ahead = next((other for other in following if len(self._layers[other].number)), None)
        if ahead is not None and not self._slot_of(ahead):
            self._read_ahead(ahead, next(slot for slot in self._slots if slot is not here))

    def _read_ahead(self, layer: int, slot: _Slot) -> _Slot:
        """Starts to read a layer's blocks into a slot that no kernel reads."""
        slot.quiet()
        blocks, first = self._layers[layer], self._slots.index(slot)
        slot.layer, slot.address = layer, np.zeros(len(blocks.number), np.int32)
        for fmt in np.unique(blocks.format):
            mine = np.flatnonzero(blocks.format == fmt)
            slot.address[mine] = self._area[format_of(int(fmt))][first::SLOTS][: len(mine)]
        slot.arriving = self._disk.read(blocks.number, self._rows(slot.address, blocks.format))
        return slot

    def _arrive(self, slot: _Slot, layer: int) -> None:
        count = len(slot.address)
        if slot.arriving is None:
            self._recalls.note_asked(Tier.DISK, there=count)
            return
        if slot.arriving.done():
            self._recalls.note_asked(Tier.DISK, ahead=count)
        else:
            self._recalls.note_asked(Tier.DISK, waited=count)
        damaged, slot.arriving = slot.arriving.result(), None
        blocks = self._layers[layer]
        self._count(blocks.format)
        for place in damaged:
            where = (layer, int(blocks.head[place]), int(blocks.index[place]))
            self._repair(where, int(blocks.number[place]), int(blocks.format[place]), int(slot.address[place]))

    # -- anything else that reads --------------------------------------------------------------------------------------

    def pieces(self, source: TokenSource) -> Iterator[TokenSource]:
        """The same tokens piece by piece, N blocks in all, each piece to be used before the next is asked for: what is
        on disk is named where it has been brought to.

        Raises:
            DamagedCacheError: something is not what was written, and there is no exact copy of it.
        """
        self.quiet()
        start, count = 0, sum(map(len, self._area.values()))
        while start < len(source.address):
            piece = pick(source, np.arange(start, min(start + count, len(source.address))))
            piece.tier[piece.address < 0] = Tier.DEVICE
            away = piece.tier == Tier.DISK
            number, first = np.unique(piece.address[away], return_index=True)
            kinds = piece.format[away][first]
            if any(int((kinds == fmt).sum()) > len(area) for fmt, area in self._area.items()):
                count //= 2  # one block is of one head's, which all fit
                continue
            address = np.zeros(len(number), np.int32)
            for fmt, area in self._area.items():
                mine = np.flatnonzero(kinds == fmt)
                address[mine] = area[: len(mine)]
            self._bring(number, kinds, address)
            piece.address[away] = address[np.searchsorted(number, piece.address[away])]
            piece.tier[away] = Tier.HOST
            yield piece
            start += len(piece.address)

    def _bring(self, number: I32, kinds: U8, address: I32) -> None:
        for place in self._disk.read(number, self._rows(address, kinds)).result() if len(number) else ():
            name = int(number[place])
            self._repair(self._where(name), name, int(kinds[place]), int(address[place]))
        self._count(kinds)
        if self.damaged:
            raise DamagedCacheError("blocks on disk are damaged and there is no exact copy of them")

    def _where(self, number: int) -> tuple[int, int, int]:
        """Layer, head and place in its table of a block."""
        for layer, blocks in enumerate(self._layers):
            for place in np.flatnonzero(blocks.number == number):
                return layer, int(blocks.head[place]), int(blocks.index[place])
        raise KeyError(number)

    # -- both ----------------------------------------------------------------------------------------------------------

    def _repair(self, where: tuple[int, int, int], number: int, kind: int, address: int) -> None:
        """Builds a damaged block anew, in its place in the area, and writes it so that it is found whole next time."""
        if not self._recover(where, format_of(kind), address):
            self.damaged = True
            return
        if self._on_gpu:
            torch.cuda.synchronize()  # a kernel has built it
        (block,) = self._rows(np.array([address]), np.array([kind]))
        if self._disk.rewrite(number, block):
            self._recalls.note_moved(Tier.HOST, Tier.DISK, len(block))

    def _rows(self, address: I32, kinds: U8) -> list[U8]:
        """The bytes of these blocks in the area."""
        sizes = [self._host.shape.block_bytes(fmt) for fmt in formats()]
        starts = (address.astype(np.int64) * UNIT_BYTES).tolist()
        return [self._memory[start : start + sizes[fmt]] for start, fmt in zip(starts, kinds.tolist(), strict=True)]

    def _count(self, kinds: U8) -> None:
        sizes = np.array([self._host.shape.block_bytes(fmt) for fmt in formats()])
        self._recalls.note_moved(Tier.DISK, Tier.HOST, int(sizes[kinds].sum()))


_NONE = np.zeros(0, np.int32)
