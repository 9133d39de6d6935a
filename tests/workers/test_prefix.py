"""Prompts shared between requests: what is found, in which order it is forgotten, and that nothing is left behind."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.api import TokenSource
from kernels.layout import BLOCK_TOKENS, CacheShape, Format, Tier
from workers.cache.arena import Arena
from workers.cache.kvcache import KVCache
from workers.cache.prefix import PrefixIndex, PrefixRow
from workers.cache.sequence_cache import Occasion, SequenceCache
from workers.stages.registry import build

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SHAPE = CacheShape(layers=2, kv_heads=2, query_heads=4, head_dim=16, dtype=torch.float32)
ROW = SHAPE.layers * SHAPE.kv_heads  # blocks of a row: one page
fixed = settings(derandomize=True, max_examples=40, deadline=None, database=None)


def tokens(rows: int, start: int = 0) -> list[int]:
    return list(range(start, start + rows * BLOCK_TOKENS))


# -- the index -------------------------------------------------------------------------------------------------------


class Shelf:
    """An index over an arena, and rows published on it."""

    def __init__(self, pages: int = 32) -> None:
        page_bytes = 4 * SHAPE.block_bytes(Format.RAW)
        self.arena = Arena(Tier.DEVICE, pages * page_bytes, SHAPE, torch.device("cpu"))
        self.index = PrefixIndex(self.arena, "model")

    def publish(self, token_ids: list[int], used: bool = False) -> list[PrefixRow]:
        """Publishes the rows of these tokens that are not known yet; users leave at once unless ``used``."""
        rows: list[PrefixRow] = []
        for name in self.index.names(token_ids, len(token_ids) // BLOCK_TOKENS):
            row = self.index.get(name)
            if row is None:
                lot = self.arena.open_lot(Format.RAW)
                address = self.arena.allocate(lot, ROW).reshape(SHAPE.layers, SHAPE.kv_heads)
                row = self.index.publish(name, rows[-1] if rows else None, address, lot)
                row.users = int(used)
            rows.append(row)
        return rows

    def known(self) -> set[bytes]:
        return set(self.index._rows)


def test_a_name_stands_for_all_tokens_up_to_its_row() -> None:
    index = Shelf().index
    names = index.names(tokens(4), 4)
    assert len(set(names)) == 4
    assert index.names(tokens(4), 2) == names[:2]
    assert index.names([*tokens(2), *tokens(2, 500)], 4)[:2] == names[:2]
    changed = tokens(4)
    changed[0] += 1
    assert not set(index.names(changed, 4)) & set(names)  # the first token is part of every name
    assert index.names([*tokens(1, 500), *tokens(1)], 2)[1] != names[0]  # the same row elsewhere


def test_names_differ_by_model() -> None:
    shelf = Shelf()
    other = PrefixIndex(shelf.arena, "another")
    assert not set(shelf.index.names(tokens(3), 3)) & set(other.names(tokens(3), 3))


def test_a_match_ends_where_the_tokens_part() -> None:
    shelf = Shelf()
    rows = shelf.publish(tokens(4))
    assert shelf.index.match(tokens(4), 4) == rows
    assert shelf.index.match([*tokens(2), *tokens(2, 900)], 4) == rows[:2]
    assert shelf.index.match(tokens(4), 3) == rows[:3]
    assert shelf.index.match(tokens(6), 6) == rows
    assert shelf.index.match(tokens(4, 1), 4) == []
    late = tokens(4)
    late[-1] = 999
    assert shelf.index.match(late, 4) == rows[:3]


def test_the_least_recently_used_goes_first_and_leaves_before_their_parents() -> None:
    shelf = Shelf()
    a, b = shelf.publish(tokens(2, 0)), shelf.publish(tokens(2, 500))
    shelf.index.match(tokens(2, 0), 2)  # now a is the more recent one
    order = []
    while len(shelf.index):
        before = shelf.known()
        assert shelf.index.drop(1) == shelf.arena.page_bytes
        (gone,) = before - shelf.known()
        order.append(gone)
    assert order == [b[1].name, b[0].name, a[1].name, a[0].name]
    assert shelf.arena.used_bytes == 0


def test_dropping_stops_when_enough_is_free() -> None:
    shelf = Shelf()
    shelf.publish(tokens(5))
    page = shelf.arena.page_bytes
    assert shelf.index.unused_bytes() == 5 * page
    assert shelf.index.drop(page + 1) == 2 * page
    assert shelf.index.drop(0) == 0
    assert shelf.index.match(tokens(5), 5) == shelf.publish(tokens(3))
    assert shelf.index.drop(1 << 40) == 3 * page
    assert shelf.index.drop(1) == 0


def test_rows_in_use_are_never_dropped() -> None:
    shelf = Shelf()
    shelf.publish(tokens(2, 500))
    used = shelf.publish(tokens(3), used=True)
    used[2].users = 0
    assert shelf.index.unused_bytes() == 3 * shelf.arena.page_bytes
    assert shelf.index.drop(1 << 40) == 3 * shelf.arena.page_bytes
    assert shelf.index.match(tokens(3), 3) == used[:2]


def test_a_withdrawn_row_is_found_no_more_and_can_be_released() -> None:
    shelf = Shelf()
    rows = shelf.publish(tokens(2), used=True)
    shelf.index.withdraw(rows[1])
    assert shelf.index.match(tokens(2), 2) == rows[:1]
    assert (rows[0].children, rows[1].users) == (0, 0)
    shelf.arena.release(rows[1].address.reshape(-1))
    assert shelf.arena.used_bytes == shelf.arena.page_bytes


prompts = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 4), st.integers(0, 2)), min_size=1, max_size=8
)  # common stem's rows, own rows, which family


@fixed
@given(prompts=prompts, drops=st.lists(st.integers(0, 5), max_size=8), uses=st.lists(st.booleans(), min_size=8))
def test_the_index_against_a_plain_dictionary(prompts, drops, uses) -> None:
    """Rows are known by all tokens up to their end; what is dropped was unused, and what is freed is counted."""
    shelf = Shelf(200)
    model: dict[tuple[int, ...], PrefixRow] = {}
    for place, ((stem, own, family), used) in enumerate(zip(prompts, uses, strict=False)):
        prompt = [*tokens(stem, 1000 * family), *tokens(own, 10_000 + 1000 * family)]
        beginnings = [tuple(prompt[:end]) for end in range(32, len(prompt) + 1, 32)]
        known = list(itertools.takewhile(model.__contains__, beginnings))
        assert shelf.index.match(prompt, len(beginnings)) == [model[key] for key in known]
        for key, row in zip(beginnings, shelf.publish(prompt), strict=True):
            assert model.setdefault(key, row) is row
            row.users += used  # from the start of the prompt on, as requests use rows
        if place < len(drops):
            unused = sum(not row.users for row in model.values())
            freed = shelf.index.drop(drops[place] * shelf.arena.page_bytes)
            assert freed == min(drops[place], unused) * shelf.arena.page_bytes
            left = {key: row for key, row in model.items() if row.name in shelf.known()}
            assert all(not row.users for key, row in model.items() if key not in left)
            reachable = [key for key in left if all(key[:end] in left for end in range(32, len(key), 32))]
            assert len(reachable) == len(left)  # nothing is kept that cannot be found
            model = left
        assert len(shelf.index) == len(model)
        assert shelf.arena.used_bytes == len(model) * shelf.arena.page_bytes


# -- through the cache -----------------------------------------------------------------------------------------------


def make_cache(device_pages: int = 64) -> KVCache:
    page_bytes = 4 * SHAPE.block_bytes(Format.RAW)
    return KVCache(SHAPE, device_pages * page_bytes, 64 * page_bytes, 4, 512, "m", torch.device("cpu"), "cpu")


def values(token_ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of tokens [layers, heads, N, D], a function of the token as in a model of one token's context."""
    base = torch.tensor(token_ids, dtype=torch.float32)[None, None, :, None]
    layer = torch.arange(SHAPE.layers)[:, None, None, None] * 0.25
    spread = torch.arange(SHAPE.head_dim) / 64 + torch.arange(SHAPE.kv_heads)[None, :, None, None] * 0.5
    return base + layer + spread, -(base + layer + spread)


def prefill(cache: KVCache, token_ids: list[int], publish: bool = True) -> SequenceCache:
    """Opens a cache, reuses what is there, computes the rest, and offers it."""
    seq = cache.open(len(token_ids) + 64)
    cache.reuse_prefix(seq, token_ids)
    grow(cache, seq, token_ids[seq.seen :])
    if publish:
        cache.publish(seq, token_ids)
    return seq


def grow(cache: KVCache, seq: SequenceCache, token_ids: list[int]) -> None:
    k, v = values(token_ids)
    start = int(cache.tables.length[seq.slot].flat[0])
    cache.reserve(seq, len(token_ids))
    cache.advance(seq, len(token_ids))
    for layer in range(SHAPE.layers):
        cache.backend.write(seq.slot, layer, start, k[layer], v[layer])


def content(cache: KVCache, seq: SequenceCache) -> torch.Tensor:
    """All K and V of an unevicted cache, read one table at a time: [layers, heads, 2, N, D]."""
    tables, slot, found = cache.tables, seq.slot, []
    for layer, head in itertools.product(range(SHAPE.layers), range(SHAPE.kv_heads)):
        length = int(tables.length[slot, layer, head])
        blocks = -(-length // BLOCK_TOKENS)
        spread = np.ones((blocks, BLOCK_TOKENS), np.int64)
        columns = (getattr(tables, name)[slot, layer, head, :blocks, None] for name in ("address", "format", "tier"))
        address, fmt, tier = ((column * spread).astype(column.dtype) for column in columns)
        row = np.broadcast_to(np.arange(BLOCK_TOKENS, dtype=np.uint8), spread.shape).copy()
        k, v = cache.backend.read(TokenSource(address, fmt, tier, row))
        found.append(torch.stack([part.reshape(-1, SHAPE.head_dim)[:length] for part in (k, v)]))
    return torch.stack(found).unflatten(0, (SHAPE.layers, SHAPE.kv_heads))


def expected_content(token_ids: list[int]) -> torch.Tensor:
    return torch.stack(values(token_ids), dim=2)


def test_a_later_request_starts_where_the_prompts_part() -> None:
    cache = make_cache()
    first = prefill(cache, tokens(4))
    used = cache.device.used_bytes
    other = [*tokens(3), *tokens(2, 900)]
    second = cache.open(len(other))
    assert cache.reuse_prefix(second, other) == 3 * BLOCK_TOKENS
    assert cache.device.used_bytes == used  # shared, not copied
    grow(cache, second, other[second.seen :])
    assert torch.equal(content(cache, first), expected_content(tokens(4)))
    assert torch.equal(content(cache, second), expected_content(other))


@pytest.mark.parametrize(("length", "reused"), [(33, 32), (64, 32), (65, 64), (32, 0), (1, 0)])
def test_the_last_token_is_left_to_compute(length: int, reused: int) -> None:
    cache = make_cache()
    prefill(cache, tokens(4))
    seq = cache.open(200)
    assert cache.reuse_prefix(seq, tokens(4)[:length]) == reused


@pytest.mark.parametrize("pipeline", ["kivi(bits=4)", "window(recent=32)", "kivi(bits=8, shadow=false)"])
def test_nothing_lossy_is_offered(pipeline: str) -> None:
    cache = make_cache()
    seq = prefill(cache, tokens(5), publish=False)
    cache.apply(seq, build(pipeline, SHAPE), Occasion.PROMPT)
    grown = tokens(6)
    if "window" not in pipeline:
        grow(cache, seq, grown[seq.seen :])
    cache.publish(seq, grown)
    assert len(cache.prefixes) == 0
    cache.apply(seq, build("full", SHAPE), Occasion.SWITCH)
    cache.publish(seq, grown)
    assert cache.prefixes.match(grown, 6)[5:] == []  # computed behind a lossy cache, though it is raw


def test_rows_of_the_host_tier_are_not_offered() -> None:
    cache = make_cache()
    seq = prefill(cache, tokens(5), publish=False)
    cache.apply(seq, build("host(recent=32)", SHAPE), Occasion.PROMPT)
    cache.publish(seq, tokens(5))
    assert len(cache.prefixes) == 0


def test_eviction_leaves_the_shared_rows_to_the_others() -> None:
    cache = make_cache()
    first, second = prefill(cache, tokens(5)), prefill(cache, [*tokens(5), 7])
    cache.apply(first, build("window(sinks=4, recent=32)", SHAPE), Occasion.SWITCH)
    assert first.prefix == []
    assert torch.equal(content(cache, second), expected_content([*tokens(5), 7]))
    third = prefill(cache, [*tokens(5), 8])
    assert torch.equal(content(cache, third), expected_content([*tokens(5), 8]))
    assert all(row.users == 2 for row in third.prefix)


def test_a_switch_takes_its_own_published_rows_back_where_room_is_short() -> None:
    cache = make_cache(device_pages=5)
    seq = prefill(cache, tokens(5))
    assert len(cache.prefixes) == 5
    assert cache.device.free_bytes == 0
    cache.apply(seq, build("kivi(bits=4)", SHAPE), Occasion.SWITCH)
    assert seq.prefix == []
    cache.close(seq)
    cache.prefixes.drop(1 << 40)
    assert cache.device.used_bytes == cache.host.used_bytes == 0


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("pipeline", ["full", "window(recent=32)", "kivi(bits=4)", "snapkv | int8 | host(recent=32)"])
def test_closing_in_any_order_leaves_nothing_behind(order: tuple[int, ...], pipeline: str) -> None:
    cache = make_cache()
    prompts = [tokens(4), [*tokens(4), *tokens(1, 300)], [*tokens(2), *tokens(2, 600), 1]]
    sequences = [prefill(cache, prompt) for prompt in prompts]
    cache.apply(sequences[1], build(pipeline, SHAPE), Occasion.SWITCH)
    for place in order:
        cache.close(sequences[place])
    assert cache.prefixes.unused_bytes() == cache.device.used_bytes
    assert all(row.users == 0 for row in cache.prefixes._rows.values())
    again = prefill(cache, [*tokens(4), 9])
    assert torch.equal(content(cache, again), expected_content([*tokens(4), 9]))
    cache.close(again)
    cache.prefixes.drop(1 << 40)
    assert cache.device.used_bytes == cache.host.used_bytes == 0


def test_room_that_was_reserved_but_never_filled_is_given_back() -> None:
    """A request may be preempted in the very step that made room for its next token."""
    cache = make_cache()
    seq = prefill(cache, tokens(2), publish=False)
    used = cache.device.used_bytes
    cache.reserve(seq, 1)
    cache.reserve(seq, 1)  # room that is there counts
    assert cache.device.used_bytes == used + cache.device.page_bytes
    cache.close(seq)
    assert cache.device.used_bytes == 0


@pytest.mark.parametrize("length", [96, 100, 127, 128])
@pytest.mark.parametrize("pipeline", ["window(sinks=0, recent=64)", "window(sinks=1, recent=63)", "h2o | kivi | host"])
def test_room_that_was_reserved_moves_along_when_tokens_are_evicted(length: int, pipeline: str) -> None:
    """Pressure may switch a request in the very step that made room for its next token."""
    cache = make_cache()
    token_ids = tokens(4)[:length]
    seq = prefill(cache, token_ids, publish=False)
    cache.reserve(seq, 1)
    cache.apply(seq, build(pipeline, SHAPE), Occasion.SWITCH)
    cache.advance(seq, 1)
    tables, slot = cache.tables, seq.slot
    tail = tables.address[slot, 0, :, (tables.length[slot, 0] - 1) // BLOCK_TOKENS].ravel()
    assert len(cache.device.owned(tail)) == len(tail)
    neighbour = prefill(cache, tokens(3, 700), publish=False)
    theirs = set(tables.address[neighbour.slot, :, :, :3].ravel().tolist())
    mine = [
        int(address)
        for layer, head in itertools.product(range(SHAPE.layers), range(SHAPE.kv_heads))
        for address, tier in zip(
            tables.address[slot, layer, head, : -(-int(tables.length[slot, layer, head]) // BLOCK_TOKENS)],
            tables.tier[slot, layer, head],
            strict=False,
        )
        if tier == Tier.DEVICE
    ]
    assert len(mine) == len(set(mine))
    assert not theirs & set(mine)
    cache.close(seq)
    cache.close(neighbour)
    assert cache.device.used_bytes == cache.host.used_bytes == 0
