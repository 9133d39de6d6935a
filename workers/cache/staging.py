"""Where a request's blocks of one tier pass through a faster one: layer by layer in decode steps.

A staging area is two slots of the faster tier's arena, each with room for the slower tier's blocks of any one layer.
While a layer is attended to from one, the next layer's blocks are brought to the other (``workers.cache.movers``), and
after the last layer the first one's for the next step. So an area costs the request two layers of the faster tier,
which are taken with the first block that needs it and given back with the last, and nothing has to be found room for
during a step. Blocks on disk pass through the host, where all else that reads them has them in pieces; blocks on the
host pass through the device where the pipeline wants it so, since kernels can read them in place as well. Some of
these may be made again there from what the layer was given (``workers.cache.inputs``): that is brought first, to their
places, and they are made of it while the other blocks come.

Block tables say where blocks live, but for the time in which a kernel reads their layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from kernels.api import I32, U8, Tables, TokenSource
from kernels.layout import BlockFormat, CacheShape, Format, Tier
from kernels.partials import Partial
from workers.cache.arena import Lot
from workers.cache.arrangement import Blocks, pick
from workers.cache.formats import as_read, format_of, formats
from workers.cache.inputs import Remaking
from workers.cache.movers import Move, Mover, Waitable
from workers.cache.recalls import Recalls

SLOTS = 2
I64 = npt.NDArray[np.int64]
Need = dict[BlockFormat, int]
"""Blocks that a slot has room for, by format."""


class DamagedCacheError(Exception):
    """Blocks on disk are not what was written, and no exact copy is there: the tokens must be computed again."""


@dataclass
class _Away:
    """The N blocks of one layer that live on the slower tier, in the order of their addresses."""

    head: I64
    index: I64
    address: I32
    format: U8
    row: I32
    """Of which row's inputs each is made again; -1: it is copied."""

    @property
    def made(self) -> I64:
        """Which are made again."""
        return np.flatnonzero(self.row >= 0)


@dataclass
class _Slot:
    """Half of the area. ``layer`` is whose blocks it holds, or will once ``arriving`` is done; None: nobody's."""

    layer: int | None = None
    address: I32 = field(default_factory=lambda: np.zeros(0, np.int32))  # of the layer's blocks, in their order
    arriving: Move | None = None
    inputs: Move | None = None  # what blocks are yet to be made of
    pieces: I32 = field(default_factory=lambda: np.zeros(0, np.int32))  # where that comes to
    reading: Waitable | None = None
    """Kernels that read it."""

    def quiet(self) -> None:
        """Waits until nobody is at it."""
        for work in (self.inputs, self.arriving, self.reading):
            if work:
                work.wait()
        self.inputs = self.arriving = self.reading = None


def needed(blocks: Blocks, source: Tier) -> Need:
    """What a slot must have room for: of each format as many as the layer with most has on a tier."""
    away = blocks.valid & (blocks.tier == source)
    counts = {fmt: int((away & (blocks.format == fmt)).sum(axis=(1, 2)).max(initial=0)) for fmt in formats()}
    return {fmt: count for fmt, count in counts.items() if count}


def staging_bytes(shape: CacheShape, need: Need) -> tuple[int, int]:
    """Bytes of an area with room for that, and as if the model's dtype had 16 bits."""
    sizes = (shape.block_bytes, shape.block_bytes_16bit)
    return tuple(SLOTS * sum(count * of(fmt) for fmt, count in need.items()) for of in sizes)  # type: ignore[return-value]


class Staging:
    """One request's staging area, and its reader of what lives on a tier (``workers.cache.reading.Reader``).

    Args:
        mover: brings blocks from that tier, to the arena that the area is in.
        tables: block tables.
        slot: the request's.
        recalls: is added to.
        recover: builds the block of (layer, head, index) in that format at an address of the arena from an exact copy;
            False: there is none.
    """

    def __init__(
        self,
        mover: Mover,
        tables: Tables,
        slot: int,
        recalls: Recalls,
        recover: Callable[[tuple[int, int, int], BlockFormat, int], bool],
    ) -> None:
        self.damaged = False
        """Whether something is gone that there is no exact copy of."""
        self._mover = mover
        self._arena = mover.target
        self._tables = tables
        self._slot = slot
        self._recalls = recalls
        self._recover = recover
        self._lots: dict[BlockFormat, Lot] = {}
        self._area: dict[BlockFormat, I32] = {}  # addresses: equal parts for the slots
        self._layers: list[_Away] = []
        self._remaking: Remaking | None = None
        self._slots = [_Slot() for _ in range(SLOTS)]

    # -- size ----------------------------------------------------------------------------------------------------------

    @property
    def tier(self) -> Tier:
        """That of the area."""
        return self._arena.tier

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes of the area, and as if the model's dtype had 16 bits."""
        return staging_bytes(self._arena.shape, {fmt: len(area) // SLOTS for fmt, area in self._area.items()})

    def missing(self, need: Need) -> list[tuple[Lot | None, BlockFormat, int]]:
        """What the area lacks of the arena's memory."""
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
            lot = self._lots[fmt] = lot or self._arena.open_lot(fmt)
            self._area[fmt] = np.concatenate([self._area.get(fmt, _NONE), self._arena.allocate(lot, count)])
        for fmt in list(self._area):
            self._area[fmt] = np.sort(self._area[fmt][: SLOTS * need.get(fmt, 0)])

    def moved(self, now: Callable[[I32], I32]) -> None:
        """Blocks of the area's tier have moved, after :meth:`quiet`; ``now`` says where to."""
        self._area = {fmt: np.sort(now(area)) for fmt, area in self._area.items()}

    def follow(self, blocks: Blocks, remaking: Remaking | None = None) -> None:
        """Takes note of the request's tables, which others have just changed, and of which blocks are made again."""
        self.quiet()
        self._layers, self._remaking = [], remaking
        for layer in range(len(blocks.length)):
            head, index = np.nonzero(blocks.valid[layer] & (blocks.tier[layer] == self._mover.source))
            order = np.argsort(blocks.address[layer, head, index])  # what lies together comes together
            head, index = head[order], index[order]
            address, kinds = blocks.address[layer, head, index], blocks.format[layer, head, index]
            row = remaking.row[layer, head, index] if remaking else np.full(len(head), -1, np.int32)
            self._layers.append(_Away(head, index, address, kinds, row))

    def close(self) -> None:
        """Gives the area back."""
        self.quiet()
        self._arena.release(self.surplus({}))
        self.resize({})

    def quiet(self) -> None:
        """Waits for what is being brought, and forgets all that was."""
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
        if len(blocks.address) and not self.damaged:
            here = self._slot_of(layer) or self._read_ahead(layer, self._slots[0])
            if here.inputs:
                self._look_ahead(layer, here)  # the way there is not to be empty meanwhile
                self._make(here, here.inputs, layer)
            self._arrive(here, layer)
            if not self.damaged:
                self._show(layer, here.address, self.tier, as_read(blocks.format))
            self._look_ahead(layer, here)
        return None

    def after(self, layer: int) -> None:
        """See ``workers.cache.reading.Reader``."""
        blocks = self._layers[layer]
        self._show(layer, blocks.address, self._mover.source, blocks.format)
        if here := self._slot_of(layer):
            here.reading = self._mover.readers()

    def _show(self, layer: int, address: I32, tier: Tier, fmt: U8) -> None:
        blocks = self._layers[layer]
        self._tables.address[self._slot, layer, blocks.head, blocks.index] = address
        self._tables.tier[self._slot, layer, blocks.head, blocks.index] = tier
        self._tables.format[self._slot, layer, blocks.head, blocks.index] = fmt

    def _slot_of(self, layer: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.layer == layer), None)

    def _look_ahead(self, layer: int, here: _Slot) -> None:
        """Starts to bring the next layer that has blocks away, the first one behind the last."""
        count = len(self._layers)
        following = ((layer + step) % count for step in range(1, count))
        ahead = next((other for other in following if len(self._layers[other].address)), None)
        if ahead is not None and not self._slot_of(ahead):
            self._read_ahead(ahead, next(slot for slot in self._slots if slot is not here))

    def _read_ahead(self, layer: int, slot: _Slot) -> _Slot:
        """Starts to bring a layer's blocks to a slot that no kernel reads."""
        slot.quiet()
        blocks, first = self._layers[layer], self._slots.index(slot)
        slot.layer, slot.address = layer, np.zeros(len(blocks.address), np.int32)
        for fmt in np.unique(blocks.format):
            mine = np.flatnonzero(blocks.format == fmt)
            slot.address[mine] = self._half(format_of(int(fmt)), first)[: len(mine)]
        copied = np.flatnonzero(blocks.row < 0)
        if self._remaking and len(copied) < len(blocks.row):
            pieces = self._remaking.inputs.address(layer, np.unique(blocks.row[blocks.made]))
            beyond = self._half(Format.RAW, first)[int((blocks.format == Format.RAW).sum()) :]
            slot.pieces = np.concatenate([slot.address[blocks.made], beyond])[: len(pieces)]
            slot.inputs = self._mover.move(pieces, np.full(len(pieces), Format.RAW, np.uint8), slot.pieces)
        slot.arriving = self._mover.move(blocks.address[copied], blocks.format[copied], slot.address[copied])
        return slot

    def _half(self, fmt: BlockFormat, slot: int) -> I32:
        """A slot's part of the area, of a format."""
        part: I32 = np.split(self._area[fmt], SLOTS)[slot]
        return part

    def _make(self, slot: _Slot, inputs: Move, layer: int) -> None:
        """Makes blocks of what has been brought for them, in their places."""
        assert self._remaking is not None
        inputs.result()
        slot.inputs = None
        blocks, made = self._layers[layer], self._layers[layer].made
        self._remaking.inputs.make(layer, blocks.head[made], blocks.row[made], slot.pieces, slot.address[made])
        self._count(np.full(len(slot.pieces), Format.RAW, np.uint8))

    def _arrive(self, slot: _Slot, layer: int) -> None:
        count = len(slot.address)
        if slot.arriving is None:
            self._recalls.note_asked(self._mover.source, there=count)
            return
        if slot.arriving.done():
            self._recalls.note_asked(self._mover.source, ahead=count)
        else:
            self._recalls.note_asked(self._mover.source, waited=count)
        damaged, slot.arriving = slot.arriving.result(), None
        blocks = self._layers[layer]
        self._count(blocks.format[blocks.row < 0])
        for place in damaged:
            where = (layer, int(blocks.head[place]), int(blocks.index[place]))
            self._repair(where, int(blocks.address[place]), int(blocks.format[place]), int(slot.address[place]))

    # -- anything else that reads --------------------------------------------------------------------------------------

    def pieces(self, source: TokenSource) -> Iterator[TokenSource]:
        """The same tokens piece by piece, N blocks in all, each piece to be used before the next is asked for: what
        lives on the tier is named where it has been brought to.

        Raises:
            DamagedCacheError: something is not what was written, and there is no exact copy of it.
        """
        self.quiet()
        start, count = 0, sum(map(len, self._area.values()))
        while start < len(source.address):
            piece = pick(source, np.arange(start, min(start + count, len(source.address))))
            piece.tier[piece.address < 0] = Tier.DEVICE
            away = piece.tier == self._mover.source
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
            piece.tier[away] = self.tier
            yield piece
            start += len(piece.address)

    def _bring(self, number: I32, kinds: U8, address: I32) -> None:
        for place in self._mover.move(number, kinds, address).result() if len(number) else ():
            name = int(number[place])
            self._repair(self._where(name), name, int(kinds[place]), int(address[place]))
        self._count(kinds)
        if self.damaged:
            raise DamagedCacheError("blocks on disk are damaged and there is no exact copy of them")

    def _where(self, number: int) -> tuple[int, int, int]:
        """Layer, head and place in its table of a block."""
        for layer, blocks in enumerate(self._layers):
            for place in np.flatnonzero(blocks.address == number):
                return layer, int(blocks.head[place]), int(blocks.index[place])
        raise KeyError(number)

    # -- both ----------------------------------------------------------------------------------------------------------

    def _repair(self, where: tuple[int, int, int], number: int, kind: int, address: int) -> None:
        """Builds a damaged block anew, in its place in the area, and writes it so that it is found whole next time."""
        if not self._recover(where, format_of(kind), address):
            self.damaged = True
            return
        if nbytes := self._mover.mend(number, kind, address):
            self._recalls.note_moved(self.tier, self._mover.source, nbytes)

    def _count(self, kinds: U8) -> None:
        sizes = np.array([self._arena.shape.block_bytes(fmt) for fmt in formats()])
        self._recalls.note_moved(self._mover.source, self.tier, int(sizes[kinds].sum()))


_NONE = np.zeros(0, np.int32)
