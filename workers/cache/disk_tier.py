"""The disk tier as block tables see it: every block has a number, which is its address there.

A batch of blocks (``workers.cache.disk``) is what a page is in an arena: one lot, one format, and it goes when its last
block is released. A full block never changes, so it is written once, for as long as its table wants it there; one that
turns out to be damaged, and was made anew elsewhere, is written again. Blocks of formats made for it are packed in
files: what each of them takes there is known once it is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch

from kernels.api import I32, U8
from kernels.layout import BlockFormat, CacheShape, Format, Tier
from workers.cache.arena import Lot, TierFullError, format_word
from workers.cache.disk import Batch, DiskFullError, DiskStore, Packing, Part
from workers.cache.formats import CodedFormat
from workers.cache.packed import CodePacking

WRITE_BYTES = 4 << 20
"""Most bytes of a batch: long enough for the disk, and short enough to wait for in memory."""
WRITES_AT_ONCE = 2
_NONE = -1


@dataclass
class _File:
    """A batch whose blocks have numbers."""

    batch: Batch
    lot: Lot
    numbers: I32
    live: int


class DiskTier:
    """Numbered blocks in the files of a store. Used by the engine thread alone.

    Args:
        store: the files.
        shape: the cache's dimensions.
    """

    tier = Tier.DISK

    def __init__(self, store: DiskStore, shape: CacheShape) -> None:
        self.store = store
        self.shape = shape
        self.make_room: Callable[[int], object] = lambda nbytes: False
        """Frees so many bytes of what others keep in the store, as far as it gives way; false: it does not."""
        self._files: dict[int, _File] = {}  # by the id of their lot
        self._next_lot = 1
        self._lot_of: I32 = np.zeros(0, np.int32)  # of each number; _NONE: it is free
        self._place: I32 = np.zeros(0, np.int32)  # within the batch
        self._stored: I32 = np.zeros(0, np.int32)  # bytes in the batch's file
        self._free: list[int] = []
        self._rewritten: dict[int, Batch] = {}  # of blocks that were damaged, each a batch of its own

    @property
    def budget_bytes(self) -> int:
        """Most bytes of files."""
        return self.store.budget_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of files, of whoever shares the store."""
        return self.store.used_bytes

    def bytes_by_format(self) -> Counter[str]:
        """Bytes of files by the name of their blocks' format; parked sessions' are raw."""
        found: Counter[str] = Counter()
        for file in self._files.values():
            found[format_word(file.lot.format)] += file.batch.nbytes
        if rest := self.used_bytes - found.total():
            found[format_word(Format.RAW)] += rest
        return found

    @property
    def free_bytes(self) -> int:
        """What is left of the budget."""
        return self.store.free_bytes

    def require(self, released: I32, wanted: Iterable[tuple[Lot | None, BlockFormat, int]]) -> None:
        """Checks that the ``wanted`` (lot, format, blocks) fit beside what is ``released`` only when they are written,
        at the most that they can take.

        Raises:
            TierFullError: they do not.
        """
        needed = sum(blocks * self.shape.block_bytes(fmt) for _, fmt, blocks in wanted)
        if needed > self.free_bytes:
            self.make_room(needed)
        if needed > self.free_bytes:
            raise TierFullError(Tier.DISK, needed, self.free_bytes)

    def write(self, pieces: Iterable[torch.Tensor], fmt: BlockFormat) -> I32:
        """Writes blocks, given in pieces uint8 [n, block_bytes] that are made as they are needed; waits for the files.

        Returns:
            The blocks' numbers.

        Raises:
            TierFullError: the budget or the file system has no room; nothing was stored.
        """
        batches: list[Batch] = []
        try:
            for piece in pieces:
                if len(batches) >= WRITES_AT_ONCE:
                    batches[-WRITES_AT_ONCE].written.result()
                batches.append(self._write(piece.cpu().numpy(), self._packing(fmt)))
            for batch in batches:
                batch.written.result()
        except BaseException as error:
            for batch in batches:
                batch.written.exception()  # its file may be under way
                self.store.free(batch)
            if isinstance(error, DiskFullError):
                raise TierFullError(Tier.DISK, error.needed_bytes, self.free_bytes) from error
            raise
        numbers = [self._enter(batch, fmt) for batch in batches]
        return np.concatenate(numbers) if numbers else np.zeros(0, np.int32)

    def _write(self, blocks: U8, packing: Packing | None) -> Batch:
        try:
            return self.store.write(blocks, packing)
        except DiskFullError as full:
            if not self.make_room(full.needed_bytes):
                raise
        return self.store.write(blocks, packing)

    def _packing(self, fmt: BlockFormat) -> Packing | None:
        """How blocks of a format are packed in files: those made for it are, others would hardly become smaller."""
        return CodePacking(self.shape) if isinstance(fmt, CodedFormat) and fmt.codec.plain else None

    def stored_bytes(self, numbers: I32 | int) -> I32:
        """What each of these blocks takes in its file."""
        return np.asarray(self._stored[numbers], np.int32)

    def read(self, numbers: I32, into: list[U8]) -> Future[list[int]]:
        """Starts to read blocks into rows [block_bytes] of memory, which nobody else may touch until it is done.

        Returns:
            Places, among ``numbers``, of those whose bytes are not those that were written.
        """
        lots, parts = self._lot_of[numbers], []
        anew = np.isin(numbers, list(self._rewritten))
        for place in np.flatnonzero(anew).tolist():
            parts.append(Part(self._rewritten[int(numbers[place])], np.zeros(1, np.int32), [into[place]], [place]))
        order = np.flatnonzero(~anew)
        order = order[np.argsort(lots[order], kind="stable")]
        for mine in np.split(order, np.flatnonzero(np.diff(lots[order])) + 1):
            if len(mine):
                batch = self._files[int(lots[mine[0]])].batch
                parts.append(Part(batch, self._place[numbers[mine]], [into[place] for place in mine], mine.tolist()))
        return self.store.read_into(parts)

    def rewrite(self, number: int, block: U8) -> bool:
        """Writes a block [block_bytes] again, to a file of its own, because what is under its number is damaged; waits
        for it. The number stays. False: there is no room; the damaged one stays.
        """
        try:
            batch = self._write(block[None], self._packing(self._files[int(self._lot_of[number])].lot.format))
            batch.written.result()
        except DiskFullError:
            return False
        self._drop_rewritten(number)
        self._rewritten[number], self._stored[number] = batch, batch.sizes[0]
        return True

    def _drop_rewritten(self, number: int) -> None:
        if batch := self._rewritten.pop(number, None):
            self.store.free(batch)

    def release(self, numbers: I32) -> None:
        """Gives back blocks; those that are lent to forks stay."""
        numbers = self.owned(numbers)
        for number in set(self._rewritten).intersection(numbers.tolist()):
            self._drop_rewritten(number)
        for lot, count in zip(*np.unique(self._lot_of[numbers], return_counts=True), strict=True):
            file = self._files[int(lot)]
            file.live -= int(count)
            if not file.live:
                self._lot_of[file.numbers] = _NONE
                self._free += file.numbers.tolist()
                del self._files[int(lot)]
                self.store.free(file.batch)

    def owned(self, numbers: I32) -> I32:
        """Those of the blocks that are not lent to forks."""
        lent = [lot for lot, file in self._files.items() if file.lot.borrowed]
        return np.asarray(numbers[~np.isin(self._lot_of[numbers], lent)], np.int32)

    def lots_of(self, numbers: I32) -> list[Lot]:
        """The lots these blocks belong to."""
        return [self._files[int(lot)].lot for lot in np.unique(self._lot_of[numbers])]

    def _enter(self, batch: Batch, fmt: BlockFormat) -> I32:
        """Numbers for the blocks of a batch."""
        if len(self._free) < batch.blocks:
            known = len(self._lot_of)
            more = max(batch.blocks, known)
            self._lot_of = np.concatenate([self._lot_of, np.full(more, _NONE, np.int32)])
            self._place, self._stored = (np.pad(of_number, (0, more)) for of_number in (self._place, self._stored))
            self._free = [*range(known + more - 1, known - 1, -1), *self._free]
        numbers = np.array([self._free.pop() for _ in range(batch.blocks)], np.int32)
        lot = Lot(self._next_lot, fmt)
        self._next_lot += 1
        self._files[lot.id] = _File(batch, lot, numbers, batch.blocks)
        self._lot_of[numbers], self._place[numbers] = lot.id, np.arange(batch.blocks)
        self._stored[numbers] = batch.sizes
        return numbers
