"""One tier's memory: a byte arena of fixed size, cut into pages that any format can use.

A tier holds blocks of several sizes under one budget. So the arena is cut into equal pages; a page holds blocks of one
*lot*, and a lot is blocks of one format that belong together (a row of raw blocks over all layers and heads, or all of
a request's int4 blocks). A page goes back to the arena when its last block is released, so what one request gives up
in one format another can use in any. The arena is allocated once: the budget cannot be exceeded.

Behind its budget an arena may have *regions*: whole pages that hold something else, such as weights of the model, until
they are lent. A lent region's pages count in the budget and are used after all others; when the region is taken back,
blocks that lie there move to other pages, whole pages at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from kernels.api import I32
from kernels.layout import UNIT_BYTES, BlockFormat, CacheShape, Format, Tier

_EMPTY = np.zeros(0, np.int32)
_ALIGNMENT = 64
"""As torch's own memory: what is computed from numbers in an arena does not depend on where they lie."""


class TierFullError(Exception):
    """A tier cannot hold what was asked for; nothing was changed."""

    def __init__(self, tier: Tier, needed_bytes: int, free_bytes: int) -> None:
        super().__init__(f"{tier.name.lower()} tier: {needed_bytes} bytes needed, {free_bytes} free")
        self.tier = tier
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


def format_word(fmt: BlockFormat) -> str:
    """A format in one word; of a stage that encodes its blocks itself, the stage's name."""
    return fmt.name.lower().partition("(")[0]


@dataclass(eq=False)
class Lot:
    """Blocks of one format that share pages."""

    id: int
    format: BlockFormat
    free: I32 = field(default_factory=lambda: _EMPTY)
    """Addresses on the lot's pages that hold no block."""
    borrowed: bool = False
    """Owned by a prefix or a shadow: block tables may refer to its blocks, but never release them."""
    pages: int = 0


@dataclass(frozen=True)
class Region:
    """Pages behind an arena's budget."""

    first: int
    pages: int

    @property
    def end(self) -> int:
        """The page behind it."""
        return self.first + self.pages


class Guests(Protocol):
    """Who has pages of an arena only for as long as nobody else needs them."""

    @property
    def yielding_bytes(self) -> int:
        """Bytes of pages that :meth:`give_up` can release."""
        ...

    def give_up(self, nbytes: int) -> None:
        """Releases so many bytes, or all there are."""
        ...


def page_blocks(shape: CacheShape) -> int:
    """Raw blocks per page: a divisor of a row's blocks near 10, so that rows waste nothing, else 8."""
    row = shape.layers * shape.kv_heads
    return next((n for n in (10, 9, 8, 12, 11, 7, 6, 5, 4) if row % n == 0), 8)


class Arena:
    """The memory of one tier and who has which of its pages.

    Args:
        tier: which.
        budget_bytes: rounded down to whole pages.
        shape: the model's cache dimensions.
        device: where the memory is.
        beyond: bytes of each region behind the budget, rounded up to whole pages.
    """

    def __init__(
        self, tier: Tier, budget_bytes: int, shape: CacheShape, device: torch.device, beyond: Sequence[int] = ()
    ) -> None:
        self.tier = tier
        self.shape = shape
        self.page_units = page_blocks(shape) * shape.block_units(Format.RAW)
        self.page_bytes = self.page_units * UNIT_BYTES
        pages = budget_bytes // self.page_bytes
        if pages < 2 and tier is Tier.DEVICE:
            raise ValueError(
                f"{tier.name.lower()} budget of {budget_bytes} bytes: at least {2 * self.page_bytes} are needed"
            )
        self.budget_bytes = pages * self.page_bytes
        """Its own and what is lent to it."""
        self.regions: list[Region] = []
        end = pages
        for nbytes in beyond:
            self.regions.append(Region(end, -(-nbytes // self.page_bytes)))
            end = self.regions[-1].end
        self.data = _memory(end * self.page_bytes, device)
        self._own_pages = pages
        self._free_pages = np.arange(pages - 1, -1, -1, dtype=np.int32)  # a stack; its top is at the end
        self._page_blocks_used = np.zeros(end, np.int32)
        self._page_lot = np.zeros(end, np.int32)
        self._lent: set[Region] = set()
        self._lots: dict[int, Lot] = {}
        self._next_lot = 1
        self.guests: list[Guests] = []
        """Asked for room, one after the other, before anybody is refused it."""

    @property
    def free_bytes(self) -> int:
        """Bytes of pages that belong to nobody."""
        return len(self._free_pages) * self.page_bytes

    @property
    def guest_bytes(self) -> int:
        """Bytes of pages that guests give up when they are needed."""
        return sum(guests.yielding_bytes for guests in self.guests)

    @property
    def room_bytes(self) -> int:
        """Bytes of pages that can be had: free ones and those of guests."""
        return self.free_bytes + self.guest_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of pages that belong to a lot."""
        return self.budget_bytes - self.free_bytes

    def bytes_by_format(self) -> Counter[str]:
        """Bytes of pages that belong to a lot, by the name of its format; a coded format counts by its stage."""
        found: Counter[str] = Counter()
        for lot in self._lots.values():
            found[format_word(lot.format)] += lot.pages * self.page_bytes
        return found

    @property
    def most_bytes(self) -> int:
        """The budget with all regions lent."""
        return len(self.data)

    # -- regions -------------------------------------------------------------------------------------------------------

    def region_bytes(self, region: Region) -> int:
        """Bytes of its pages."""
        return region.pages * self.page_bytes

    def memory(self, region: Region) -> torch.Tensor:
        """Its bytes, uint8: anybody's while it is not lent."""
        return self.data[region.first * self.page_bytes : region.end * self.page_bytes]

    def lend(self, region: Region) -> None:
        """Adds a region's pages to the budget; what they hold is lost. It must not be lent yet."""
        assert region in self.regions
        assert region not in self._lent
        fresh = np.arange(region.end - 1, region.first - 1, -1, dtype=np.int32)
        self._free_pages = np.concatenate([fresh, self._free_pages])
        self.budget_bytes += self.region_bytes(region)
        self._lent.add(region)

    def take_back(self, region: Region) -> Callable[[I32], I32]:
        """Takes a lent region's pages out of the budget; blocks on them move to free pages elsewhere.

        Returns:
            What says where the blocks at some addresses are now. Whoever keeps addresses must ask it.

        Raises:
            TierFullError: too few free pages elsewhere; nothing has moved.
        """
        assert region in self._lent
        elsewhere = self._free_pages[(self._free_pages < region.first) | (self._free_pages >= region.end)]
        inside = np.arange(region.first, region.end, dtype=np.int32)
        held = inside[self._page_lot[inside] != 0]
        if len(held) > len(elsewhere):
            raise TierFullError(self.tier, len(held) * self.page_bytes, len(elsewhere) * self.page_bytes)
        split = len(elsewhere) - len(held)
        into, by_page = elsewhere[split:][::-1], self.data.view(-1, self.page_bytes)
        for page, other in zip(held.tolist(), into.tolist(), strict=True):  # no copy of all of them in between
            by_page[other].copy_(by_page[page])
        place = np.arange(len(self._page_lot), dtype=np.int32)
        place[held] = into
        for books in (self._page_lot, self._page_blocks_used):
            books[into], books[held] = books[held], 0

        def now(addresses: I32) -> I32:
            page = np.clip(addresses // self.page_units, 0, len(place) - 1)
            return np.asarray(addresses + (place[page] - page) * self.page_units, np.int32)

        for lot in np.unique(self._page_lot[into]).tolist():
            self._lots[lot].free = now(self._lots[lot].free)
        self._free_pages = elsewhere[:split]
        self.budget_bytes -= self.region_bytes(region)
        self._lent.remove(region)
        return now

    # -- lots ----------------------------------------------------------------------------------------------------------

    def open_lot(self, fmt: BlockFormat, borrowed: bool = False) -> Lot:
        """Starts an empty lot, which takes pages as it needs them."""
        self._next_lot += 1
        return Lot(self._next_lot - 1, fmt, borrowed=borrowed)

    def close_lot(self, lot: Lot) -> None:
        """Gives back all pages of a lot, whatever they hold."""
        pages = np.flatnonzero(self._page_lot == lot.id).astype(np.int32)
        lot.free = _EMPTY
        self._return_pages(lot, pages)

    def pages_needed(self, lot: Lot | None, fmt: BlockFormat, blocks: int) -> int:
        """Pages a lot (or a new one) must take to hold so many more blocks."""
        missing = max(0, blocks - (len(lot.free) if lot else 0))
        return -(-missing // self._blocks_per_page(fmt))

    def allocate(self, lot: Lot, blocks: int) -> I32:
        """Addresses [blocks] for new blocks of a lot.

        Raises:
            TierFullError: too few free pages; nothing was taken.
        """
        pages_needed = self.pages_needed(lot, lot.format, blocks)
        self._ask_guests(pages_needed - len(self._free_pages))
        if pages_needed > len(self._free_pages):
            raise TierFullError(self.tier, pages_needed * self.page_bytes, self.free_bytes)
        if pages_needed:
            split = len(self._free_pages) - pages_needed
            pages = self._free_pages[split:][::-1]
            self._free_pages = self._free_pages[:split]
            self._page_lot[pages] = lot.id
            self._lots[lot.id] = lot
            lot.pages += pages_needed
            within = np.arange(self._blocks_per_page(lot.format), dtype=np.int32) * self.shape.block_units(lot.format)
            fresh = (pages[:, None] * self.page_units + within).reshape(-1)
            lot.free = np.concatenate([lot.free, fresh]).astype(np.int32)
        taken, lot.free = lot.free[:blocks], lot.free[blocks:]
        np.add.at(self._page_blocks_used, taken // self.page_units, 1)
        return taken

    def release(self, addresses: I32) -> None:
        """Gives back blocks. Those that a prefix or a shadow owns stay."""
        addresses = self.owned(addresses)
        pages = addresses // self.page_units
        np.subtract.at(self._page_blocks_used, pages, 1)
        lots = self._page_lot[pages]
        for lot_id in np.unique(lots):
            lot = self._lots[int(lot_id)]
            mine = pages[lots == lot_id]
            emptied = np.unique(mine[self._page_blocks_used[mine] == 0])
            free = np.concatenate([lot.free, addresses[lots == lot_id]])
            lot.free = free[~np.isin(free // self.page_units, emptied)]
            self._return_pages(lot, emptied)

    def owned(self, addresses: I32) -> I32:
        """Those of the addresses whose lot is not borrowed."""
        if not len(addresses):
            return addresses
        lots, inverse = np.unique(self._page_lot[addresses // self.page_units], return_inverse=True)
        keep = np.array([not self._lots[int(lot)].borrowed for lot in lots])
        return np.asarray(addresses[keep[inverse]], np.int32)

    def among(self, addresses: I32, lots: Iterable[Lot]) -> npt.NDArray[np.bool_]:
        """[N] which of the blocks are in one of these lots."""
        return np.isin(self._page_lot[addresses // self.page_units], [lot.id for lot in lots])

    def lots_of(self, addresses: I32) -> list[Lot]:
        """The lots these blocks belong to."""
        return [self._lots[int(lot)] for lot in np.unique(self._page_lot[addresses // self.page_units])]

    def pages_freed_by(self, addresses: I32) -> int:
        """Pages that :meth:`release` of these addresses would return to the arena."""
        pages, counts = np.unique(self.owned(addresses) // self.page_units, return_counts=True)
        return int((self._page_blocks_used[pages] == counts).sum())

    def require(self, released: I32, wanted: Iterable[tuple[Lot | None, BlockFormat, int]]) -> None:
        """Checks that, once ``released`` is given back, the ``wanted`` (lot or a new one, format, blocks) fit.

        Raises:
            TierFullError: they do not.
        """
        shrinking = {lot.id for lot in self.lots_of(released)}  # what they have free now may go with their pages
        needed = sum(
            self.pages_needed(None if lot and lot.id in shrinking else lot, fmt, blocks) for lot, fmt, blocks in wanted
        )
        freed = self.pages_freed_by(released)
        self._ask_guests(needed - freed - len(self._free_pages))
        available = len(self._free_pages) + freed
        if needed > available:
            raise TierFullError(self.tier, needed * self.page_bytes, available * self.page_bytes)

    def has_room(self, wanted: Iterable[tuple[Lot | None, BlockFormat, int]]) -> bool:
        """Whether the ``wanted`` (lot or a new one, format, blocks) fit while nothing is given back."""
        return sum(self.pages_needed(lot, fmt, blocks) for lot, fmt, blocks in wanted) <= len(self._free_pages)

    def _ask_guests(self, pages: int) -> None:
        """Has guests release so many pages."""
        wanted = len(self._free_pages) + pages
        for guests in self.guests:
            if len(self._free_pages) < wanted:
                guests.give_up((wanted - len(self._free_pages)) * self.page_bytes)

    def _blocks_per_page(self, fmt: BlockFormat) -> int:
        return self.page_units // self.shape.block_units(fmt)

    def _return_pages(self, lot: Lot, pages: I32) -> None:
        lot.pages -= len(pages)
        if lot.pages == 0:
            self._lots.pop(lot.id, None)
        self._page_blocks_used[pages] = 0
        self._page_lot[pages] = 0
        own = pages < self._own_pages
        self._free_pages = np.concatenate([pages[~own], self._free_pages, pages[own][::-1]]).astype(np.int32)


def _memory(size: int, device: torch.device) -> torch.Tensor:
    """Flat bytes. In RAM: pinned where a GPU is there to copy from it, else numpy's, which asks for huge pages."""
    if device.type != "cpu":
        return torch.empty(size, dtype=torch.uint8, device=device)
    if torch.cuda.is_available():
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    memory.fill(0)  # has the system back every page now: at their first use they would stall a request's switch
    start = -memory.ctypes.data % _ALIGNMENT
    return torch.from_numpy(memory[start : start + size])
