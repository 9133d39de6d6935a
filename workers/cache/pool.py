"""A request's pool of recalled blocks: copies on the device of blocks that live on the host."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kernels.api import I32, Backend, Tables
from kernels.layout import BlockFormat, CacheShape, Tier
from workers.cache.arena import Arena
from workers.cache.arrangement import Mask
from workers.cache.formats import format_of, formats
from workers.cache.recalls import Recalls

I64 = npt.NDArray[np.int64]
SHARE_OF_FREE = 2
"""A pool takes at most one of so many free pages each time it grows: it only saves time."""


class RecallPool:
    """As many places for each head of each layer; the block in one that was not read for longest makes way first.

    Args:
        arena, backend: of the device, and what copies.
        shape: the cache's dimensions.
        fmt: the largest format a place can hold.
        recalls: is added to.
    """

    def __init__(self, arena: Arena, backend: Backend, shape: CacheShape, fmt: BlockFormat, recalls: Recalls) -> None:
        self._arena = arena
        self._backend = backend
        self._shape = shape
        self._recalls = recalls
        self.format = fmt
        self._lot = arena.open_lot(fmt)
        heads = (shape.layers, shape.kv_heads)
        self._address: I32 = np.zeros((*heads, 0), np.int32)
        self._holds: I32 = np.zeros((*heads, 0), np.int32)  # place in the table of the block held, -1: none
        self._used: I64 = np.zeros((*heads, 0), np.int64)  # when it was last read
        self._fresh: Mask = np.zeros((*heads, 0), bool)  # whether it was fetched ahead and not read yet
        self._fits = np.array([shape.block_units(other) <= shape.block_units(fmt) for other in formats()])
        self._clock = 0

    @property
    def places(self) -> int:
        """Places of each head."""
        return int(self._address.shape[2])

    @property
    def blocks(self) -> int:
        """Places of all heads."""
        return int(self._address.size)

    @property
    def nbytes(self) -> int:
        """Bytes of its pages."""
        return self._lot.pages * self._arena.page_bytes

    def resize(self, places: int) -> None:
        """Makes room for so many blocks a head, or as many as the device can spare; it never shrinks."""
        heads, budget_pages = self._address.shape[:2], self._arena.free_bytes // self._arena.page_bytes // SHARE_OF_FREE
        more, row = places - self.places, self._shape.layers * self._shape.kv_heads
        while more > 0 and self._arena.pages_needed(self._lot, self.format, more * row) > budget_pages:
            more -= 1
        if more <= 0:
            return
        address = self._arena.allocate(self._lot, more * row).reshape(*heads, more)
        self._address = np.concatenate([self._address, address], axis=2)
        self._holds = np.concatenate([self._holds, np.full(address.shape, -1, np.int32)], axis=2)
        self._used = np.concatenate([self._used, np.full(address.shape, -1, np.int64)], axis=2)
        self._fresh = np.concatenate([self._fresh, np.zeros(address.shape, bool)], axis=2)

    def close(self) -> None:
        """Gives its memory back; there are no places left."""
        self._arena.close_lot(self._lot)
        self._address, self._holds = self._address[:, :, :0], self._holds[:, :, :0]
        self._used, self._fresh = self._used[:, :, :0], self._fresh[:, :, :0]

    def moved(self, now: Callable[[I32], I32]) -> None:
        """Blocks of the device have moved; ``now`` says where to."""
        self._address = now(self._address)

    def forget(self, known: I32) -> None:
        """Forgets all but the first ``known`` [L, H] blocks of each table."""
        self._holds[self._holds >= known[..., None]] = -1

    def bring(self, tables: Tables, slot: int, layer: int, wanted: Mask, ahead: bool = False) -> I32:
        """Copies blocks of a layer to the device, as far as they are not there and there is room.

        Args:
            tables, slot, layer: whose.
            wanted: [H, B] blocks on the host.
            ahead: whether no query has asked for them yet.

        Returns:
            [H, B] address on the device of what is wanted, -1 where it is not there.
        """
        self._clock += 1
        there = foreseen = 0
        found = np.full(wanted.shape, -1, np.int32)
        fetch: list[tuple[int, int, int]] = []  # head, place, block
        holds, used, fresh = self._holds[layer], self._used[layer], self._fresh[layer]
        for head in range(len(wanted)):
            place = np.full(wanted.shape[1], -1, np.int32)
            inside = np.flatnonzero((holds[head] >= 0) & (holds[head] < wanted.shape[1]))
            place[holds[head, inside]] = inside
            mine = place[wanted[head] & (place >= 0)]
            used[head, mine] = self._clock
            if not ahead:
                there += len(mine)
                foreseen += int(fresh[head, mine].sum())
                fresh[head, mine] = False
            missing = np.flatnonzero(wanted[head] & (place < 0))
            free = np.argsort(used[head], kind="stable")
            free = free[used[head, free] < self._clock][: len(missing)]
            missing = missing[: len(free)]
            missing = missing[self._fits[tables.format[slot, layer, head, missing]]]
            free = free[: len(missing)]
            holds[head, free], used[head, free], fresh[head, free] = missing, self._clock, ahead
            fetch += zip([head] * len(free), free.tolist(), missing.tolist(), strict=True)
            place[missing] = free
            come = wanted[head] & (place >= 0)
            found[head, come] = self._address[layer, head, place[come]]
        self._fetch(tables, slot, layer, np.array(fetch, np.int64).reshape(-1, 3))
        if not ahead:
            here = {"there": there - foreseen, "ahead": foreseen, "waited": len(fetch)}
            self._recalls.note_asked(Tier.HOST, **here, in_place=int((wanted & (found < 0)).sum()))
        return found

    def _fetch(self, tables: Tables, slot: int, layer: int, what: I64) -> None:
        head, place, block = what.T
        formats = tables.format[slot, layer, head, block]
        source, target = tables.address[slot, layer, head, block], self._address[layer, head, place]
        for fmt in np.unique(formats):
            these = formats == fmt
            packed = self._backend.load(Tier.HOST, source[these], format_of(int(fmt)))
            self._backend.store(Tier.DEVICE, target[these], packed)
            self._recalls.note_moved(Tier.HOST, Tier.DEVICE, packed.nbytes)
