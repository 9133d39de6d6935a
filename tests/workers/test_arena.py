"""The arena against a plain-Python model of it: intervals of units, and which block is whose."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from kernels.layout import UNIT_BYTES, CacheShape, Format, Tier
from workers.cache.arena import Arena, Lot, TierFullError, page_blocks

SHAPES = (
    CacheShape(layers=2, kv_heads=2, query_heads=4, head_dim=16, dtype=torch.float32),
    CacheShape(layers=3, kv_heads=3, query_heads=9, head_dim=64, dtype=torch.bfloat16),
    CacheShape(layers=1, kv_heads=1, query_heads=1, head_dim=2, dtype=torch.float16),  # int4 is larger than raw
)
SHAPE = SHAPES[0]
NOTHING = np.zeros(0, np.int32)


def make_arena(pages: int, shape: CacheShape = SHAPE, tier: Tier = Tier.DEVICE) -> Arena:
    page_bytes = page_blocks(shape) * shape.block_bytes(Format.RAW)
    return Arena(tier, pages * page_bytes, shape, torch.device("cpu"))


def state(arena: Arena, *lots: Lot) -> tuple:
    """All there is to know, as plain values."""
    return (
        arena._free_pages.tolist(),
        arena._page_blocks_used.tolist(),
        arena._page_lot.tolist(),
        sorted(arena._lots),
        [(lot.free.tolist(), lot.pages, lot.borrowed) for lot in lots],
    )


def test_what_one_format_gives_up_another_can_use() -> None:
    arena = make_arena(2)
    raw, coded = arena.open_lot(Format.RAW), arena.open_lot(Format.INT4)
    blocks = arena.allocate(raw, 2 * page_blocks(SHAPE))
    assert arena.free_bytes == 0
    with pytest.raises(TierFullError) as full:
        arena.allocate(coded, 1)
    assert (full.value.tier, full.value.free_bytes) == (Tier.DEVICE, 0)
    assert full.value.needed_bytes == arena.page_bytes
    arena.release(blocks[: page_blocks(SHAPE)])
    arena.allocate(coded, 1)


def test_the_budget_is_cut_to_whole_pages_and_a_device_needs_two() -> None:
    page_bytes = make_arena(2).page_bytes
    arena = Arena(Tier.DEVICE, 3 * page_bytes - 1, SHAPE, torch.device("cpu"))
    assert arena.budget_bytes == len(arena.data) == 2 * page_bytes
    with pytest.raises(ValueError, match=f"device budget of {2 * page_bytes - 1} bytes: at least {2 * page_bytes}"):
        Arena(Tier.DEVICE, 2 * page_bytes - 1, SHAPE, torch.device("cpu"))
    nothing = Arena(Tier.HOST, 0, SHAPE, torch.device("cpu"))  # a worker may have no host tier
    with pytest.raises(TierFullError):
        nothing.allocate(nothing.open_lot(Format.RAW), 1)


@pytest.mark.parametrize("shape", [(30, 3), (2, 2), (1, 1), (7, 1), (5, 5), (13, 1), (24, 8), (32, 8)])
def test_a_row_of_blocks_wastes_no_page_where_a_divisor_exists(shape: tuple[int, int]) -> None:
    layers, heads = shape
    cache_shape = CacheShape(layers, heads, heads, 16, torch.float16)
    blocks, row = page_blocks(cache_shape), layers * heads
    divides = any(row % n == 0 for n in range(4, 13))
    assert (row % blocks == 0) == divides
    assert 4 <= blocks <= 12


def test_blocks_of_a_borrowed_lot_stay_until_it_is_closed() -> None:
    arena = make_arena(3)
    lent, own = arena.open_lot(Format.RAW), arena.open_lot(Format.RAW)
    borrowed, mine = arena.allocate(lent, 3), arena.allocate(own, 2)
    lent.borrowed = True
    everything = np.concatenate([borrowed, mine])
    assert arena.owned(everything).tolist() == mine.tolist()
    assert arena.pages_freed_by(everything) == 1
    arena.release(everything)
    assert arena.used_bytes == arena.page_bytes
    assert arena.lots_of(borrowed) == [lent]
    arena.close_lot(lent)
    assert arena.used_bytes == 0


def test_room_on_a_page_that_is_given_back_is_not_counted_twice() -> None:
    """The released block's page would serve the lot's free places or a new lot, not both."""
    arena = make_arena(2)
    lot, full = arena.open_lot(Format.RAW), arena.open_lot(Format.RAW)
    block = arena.allocate(lot, 1)
    arena.allocate(full, page_blocks(SHAPE))
    arena.require(block, [(lot, Format.RAW, 3)])
    arena.require(block, [(None, Format.INT4, 1)])
    with pytest.raises(TierFullError):
        arena.require(block, [(lot, Format.RAW, 3), (None, Format.INT4, 1)])


class ArenaMachine(RuleBasedStateMachine):
    """Random requests to an arena; the model is a set of unit intervals for each lot."""

    lots = Bundle("lots")

    @initialize(target=lots, shape=st.sampled_from(SHAPES), pages=st.integers(2, 7))
    def start(self, shape: CacheShape, pages: int) -> Lot:
        self.shape, self.pages = shape, pages
        self.arena = make_arena(pages, shape)
        self.live: dict[Lot, set[int]] = {}
        return self.open(Format.RAW)

    @rule(target=lots, fmt=st.sampled_from(Format))
    def open(self, fmt: Format) -> Lot:
        lot = self.arena.open_lot(fmt)
        self.live[lot] = set()
        return lot

    @rule(lot=lots, blocks=st.integers(0, 25))
    def allocate(self, lot: Lot, blocks: int) -> None:
        before = state(self.arena, *self.live)
        pages = self.arena.pages_needed(lot, lot.format, blocks)
        assert pages == self.least_pages(lot, blocks)
        if pages * self.arena.page_bytes > self.arena.free_bytes:
            with pytest.raises(TierFullError):
                self.arena.allocate(lot, blocks)
            assert state(self.arena, *self.live) == before
            return
        used = self.arena.used_bytes
        addresses = self.arena.allocate(lot, blocks)
        assert len(addresses) == len(set(addresses.tolist())) == blocks
        assert self.arena.used_bytes == used + pages * self.arena.page_bytes
        self.live[lot] |= set(addresses.tolist())

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        chosen = data.draw(self.some_blocks())
        used = self.arena.used_bytes
        freed = self.arena.pages_freed_by(chosen)
        assert self.arena.owned(chosen).tolist() == [address for address in chosen if not self.owner(address).borrowed]
        self.arena.release(chosen)
        assert used - self.arena.used_bytes == freed * self.arena.page_bytes
        for address in chosen.tolist():
            if not self.owner(address).borrowed:
                self.live[self.owner(address)].remove(address)

    @rule(data=st.data())
    def what_is_required_can_be_allocated(self, data: st.DataObject) -> None:
        released = data.draw(self.some_blocks())
        known = data.draw(st.lists(st.sampled_from(list(self.live)), max_size=3, unique=True)) if self.live else []
        fresh = data.draw(st.lists(st.sampled_from(Format), max_size=2))
        wanted = [(lot, lot.format, data.draw(st.integers(0, 15))) for lot in known]
        wanted += [(None, fmt, data.draw(st.integers(0, 15))) for fmt in fresh]
        before = state(self.arena, *self.live)
        try:
            self.arena.require(released, wanted)
        except TierFullError:
            assert state(self.arena, *self.live) == before
            return
        assert state(self.arena, *self.live) == before
        self.arena.release(released)
        for address in released.tolist():
            if not self.owner(address).borrowed:
                self.live[self.owner(address)].remove(address)
        for lot, fmt, blocks in wanted:
            target = lot or self.open(fmt)
            self.live[target] |= set(self.arena.allocate(target, blocks).tolist())  # never refused

    @rule(lot=lots)
    def lend(self, lot: Lot) -> None:
        assume(self.live.get(lot))
        lot.borrowed = not lot.borrowed

    @rule(lot=consumes(lots))
    def close(self, lot: Lot) -> None:
        used = self.arena.used_bytes
        pages = lot.pages
        self.arena.close_lot(lot)
        assert self.arena.used_bytes == used - pages * self.arena.page_bytes
        assert len(lot.free) == lot.pages == 0
        del self.live[lot]

    def some_blocks(self) -> st.SearchStrategy:
        everything = sorted(address for addresses in self.live.values() for address in addresses)
        if not everything:
            return st.just(NOTHING)
        chosen = st.lists(st.sampled_from(everything), unique=True, max_size=len(everything))
        return chosen.map(lambda addresses: np.array(addresses, np.int32))

    def owner(self, address: int) -> Lot:
        owners = [lot for lot, addresses in self.live.items() if address in addresses]
        return owners[0] if owners else Lot(0, Format.RAW)

    def least_pages(self, lot: Lot, blocks: int) -> int:
        """Pages to take, counted one block at a time."""
        per_page = self.arena.page_units // self.shape.block_units(lot.format)
        room, pages = lot.pages * per_page - len(self.live[lot]), 0
        for _ in range(blocks):
            if not room:
                room, pages = per_page, pages + 1
            room -= 1
        return pages

    @invariant()
    def no_two_blocks_overlap(self) -> None:
        units: set[int] = set()
        for lot, addresses in self.live.items():
            size = self.shape.block_units(lot.format)
            for address in addresses:
                mine = set(range(address, address + size))
                assert not units & mine
                assert min(mine) >= 0
                assert max(mine) < len(self.arena.data) // UNIT_BYTES
                assert address // self.arena.page_units == (address + size - 1) // self.arena.page_units
                units |= mine

    @invariant()
    def no_page_is_shared_or_held_for_nothing(self) -> None:
        pages = {
            lot: {address // self.arena.page_units for address in addresses} for lot, addresses in self.live.items()
        }
        taken = [page for owned in pages.values() for page in owned]
        assert len(taken) == len(set(taken))
        assert [lot.pages for lot in pages] == [len(owned) for owned in pages.values()]
        assert self.arena.used_bytes == len(taken) * self.arena.page_bytes
        assert self.arena.used_bytes + self.arena.free_bytes == self.arena.budget_bytes
        assert self.arena.budget_bytes == self.pages * self.arena.page_bytes

    def teardown(self) -> None:
        """Everything released: all pages are free, and nothing is remembered."""
        if not hasattr(self, "arena"):
            return
        for lot, addresses in self.live.items():
            lot.borrowed = False
            self.arena.release(np.array(sorted(addresses), np.int32))
        assert self.arena.free_bytes == self.arena.budget_bytes
        assert sorted(self.arena._free_pages.tolist()) == list(range(self.pages))
        assert not self.arena._lots


def test_the_arena_keeps_its_books() -> None:
    run_state_machine_as_test(
        ArenaMachine,
        settings=settings(derandomize=True, max_examples=60, stateful_step_count=30, deadline=None, database=None),
    )
