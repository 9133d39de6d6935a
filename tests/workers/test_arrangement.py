"""Restyling and regrouping tables, against the same thing done token by token in plain Python.

A table is a list of blocks, a block a list of tokens; nothing here is vectorised.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.api import Tables, TokenSource
from kernels.layout import BLOCK_TOKENS, MEMORY_TIERS, CacheShape, Format, Tier
from workers.cache.arrangement import BUILD, Arrangement, blocks_of, regroup, restyle, tokens_of
from workers.cache.style import Style

LAYERS, HEADS, SLOT = 2, 2, 1
SHAPE = CacheShape(LAYERS, HEADS, HEADS, 16, torch.float32)
HEAD_INDEX = list(itertools.product(range(LAYERS), range(HEADS)))
MOST_TOKENS = 200
fixed = settings(derandomize=True, max_examples=40, deadline=None, database=None)


@dataclass(frozen=True)
class Token:
    """One kept token: its original position and where it lies."""

    position: int
    address: int
    format: int
    tier: int
    row: int
    mass: float
    votes: float


Table = list[Token]


def make_tables(lengths: list[int], seed: int) -> Tables:
    """Tables of the given lengths in slot 1: random positions, formats, tiers and places; rubbish beyond the ends."""
    rng = np.random.default_rng(seed)
    tables = Tables.allocate(2, SHAPE, MOST_TOKENS)
    for name in ("address", "format", "tier", "position"):
        getattr(tables, name)[:] = rng.integers(0, 2, getattr(tables, name).shape)
    tables.address[:] = rng.permutation(tables.address.size).reshape(tables.address.shape) * 10
    tables.mass[:], tables.votes[:] = rng.random(tables.mass.shape), rng.random(tables.votes.shape)
    seen = max(lengths) + int(rng.integers(0, 50))
    for (layer, head), length in zip(HEAD_INDEX, lengths, strict=True):
        tables.length[SLOT, layer, head] = length
        positions = sorted(rng.choice(seen, length, replace=False).tolist())
        tables.position[SLOT, layer, head, :length] = positions
        full = length // BLOCK_TOKENS
        tables.format[SLOT, layer, head, :full] = rng.integers(0, len(Format), full)
        tables.format[SLOT, layer, head, full:] = Format.RAW
        tables.tier[SLOT, layer, head, full:] = Tier.DEVICE
    return tables


def table_of(tables: Tables, layer: int, head: int) -> Table:
    """A table read off token by token."""
    found = []
    for index in range(int(tables.length[SLOT, layer, head])):
        block = index // BLOCK_TOKENS
        where = (SLOT, layer, head)
        found.append(
            Token(
                position=int(tables.position[where][index]),
                address=int(tables.address[where][block]),
                format=int(tables.format[where][block]),
                tier=int(tables.tier[where][block]),
                row=index % BLOCK_TOKENS,
                mass=float(tables.mass[where][index]),
                votes=float(tables.votes[where][index]),
            )
        )
    return found


def blocks_in(table: Table) -> list[Table]:
    return [table[start : start + BLOCK_TOKENS] for start in range(0, len(table), BLOCK_TOKENS)]


def wanted_style(
    table: Table, block: int, residual: int | None, fmt: Format, device_tokens: int | None
) -> tuple[Format, Tier]:
    """What a block should be: a look at each of its tokens' distance from the end, 1 for the last token."""
    tokens = blocks_in(table)[block]
    distances = [len(table) - (block * BLOCK_TOKENS + place) for place in range(len(tokens))]
    full = len(tokens) == BLOCK_TOKENS
    coded = residual is not None and full and all(distance > residual for distance in distances)
    away = device_tokens is not None and full and all(distance > device_tokens for distance in distances)
    return (fmt if coded else Format.RAW), (Tier.HOST if away else Tier.DEVICE)


def styles(residual: int | None, fmt: Format, device_tokens: int | None) -> list[Style]:
    """The same for all layers."""
    formats = () if residual is None else ((residual, fmt),)
    return [Style(formats, () if device_tokens is None else ((device_tokens, Tier.HOST),))] * SHAPE.layers


class Sources:
    """The rows of an arrangement's source, taken one after the other."""

    def __init__(self, arrangement: Arrangement) -> None:
        self._source, self._position, self._next = arrangement.source, arrangement.source_position, 0

    def take(self) -> tuple[list[tuple[int, int, int, int]], list[int]]:
        """The next block's tokens (address, format, tier, row), and their positions."""
        source, place = self._source, self._next
        self._next += 1
        columns = (source.address, source.format, source.tier, source.row)
        return list(zip(*(column[place].tolist() for column in columns), strict=True)), self._position[place].tolist()

    def check_empty(self) -> None:
        assert self._next == len(self._source.address) == len(self._position)


def check_build(sources: Sources, tokens: Table) -> None:
    """The next source is exactly these tokens, padded with tokens of nowhere."""
    got, positions = sources.take()
    missing = BLOCK_TOKENS - len(tokens)
    assert got[: len(tokens)] == [(token.address, token.format, token.tier, token.row) for token in tokens]
    assert [address for address, *_ in got[len(tokens) :]] == [BUILD] * missing
    assert positions == [token.position for token in tokens] + [-1] * missing


lengths = st.lists(st.integers(1, 130), min_size=4, max_size=4) | st.integers(1, 130).map(lambda n: [n] * 4)
residuals = st.none() | st.just(BLOCK_TOKENS) | st.integers(32, 100)
formats = st.sampled_from(Format)
device = st.none() | st.integers(0, 150)
seeds = st.integers(0, 1000)


@fixed
@given(lengths=lengths, residual=residuals, fmt=formats, device_tokens=device, seed=seeds)
def test_restyle_changes_the_blocks_that_are_not_as_wanted(lengths, residual, fmt, device_tokens, seed) -> None:
    tables = make_tables(lengths, seed)
    now, count = blocks_of(tables, SLOT), max(lengths)
    result = restyle(now, tables.position[SLOT, :, :, :count], styles(residual, fmt, device_tokens))
    sources = Sources(result)
    assert result.moved is None
    assert (result.blocks.length == now.length).all()
    for layer, head in HEAD_INDEX:
        table = table_of(tables, layer, head)
        for block, tokens in enumerate(blocks_in(table)):
            want = wanted_style(table, block, residual, fmt, device_tokens)
            assert (result.blocks.format[layer, head, block], result.blocks.tier[layer, head, block]) == want
            address = result.blocks.address[layer, head, block]
            if want == (tokens[0].format, tokens[0].tier):
                assert address == tokens[0].address
            else:
                assert address == BUILD
                check_build(sources, tokens)
    sources.check_empty()


@fixed
@given(lengths=lengths, residual=residuals, fmt=formats, device_tokens=device, seed=seeds, share=st.floats(0, 1))
def test_regroup_keeps_the_marked_tokens_in_order(lengths, residual, fmt, device_tokens, seed, share) -> None:
    tables = make_tables(lengths, seed)
    tokens = tokens_of(tables, SLOT)
    rng = np.random.default_rng(seed)
    keep = tokens.valid & (rng.random(tokens.valid.shape) < share)
    keep[:, :, : BLOCK_TOKENS * int(rng.integers(0, 3))] |= bool(rng.integers(0, 2))  # whole blocks that can be reused
    keep &= tokens.valid
    keep[:, :, 0] = True
    result = regroup(tokens, keep, styles(residual, fmt, device_tokens))
    sources = Sources(result)
    assert result.moved is not None
    for layer, head in HEAD_INDEX:
        old = table_of(tables, layer, head)
        new = [token for index, token in enumerate(old) if keep[layer, head, index]]
        assert result.blocks.length[layer, head] == len(new)
        moved, valid = result.moved, result.moved.valid[layer, head]
        assert valid.tolist() == [True] * len(new) + [False] * (len(valid) - len(new))
        assert moved.position[layer, head][valid].tolist() == [token.position for token in new]
        assert moved.mass[layer, head][valid].tolist() == [token.mass for token in new]
        assert moved.votes[layer, head][valid].tolist() == [token.votes for token in new]
        for block, members in enumerate(blocks_in(new)):
            want = wanted_style(new, block, residual, fmt, device_tokens)
            assert (result.blocks.format[layer, head, block], result.blocks.tier[layer, head, block]) == want
            there = {(token.address, token.format, token.tier) for token in members}
            as_it_is = len(there) == 1 and [token.row for token in members] == list(range(BLOCK_TOKENS))
            address = result.blocks.address[layer, head, block]
            if as_it_is and there == {(address, *want)}:
                continue
            assert address == BUILD
            assert not (as_it_is and (members[0].format, members[0].tier) == want)
            check_build(sources, members)
    sources.check_empty()


@fixed
@given(lengths=lengths, seed=seeds)
def test_reading_tables_block_by_block_and_token_by_token(lengths, seed) -> None:
    tables = make_tables(lengths, seed)
    blocks, tokens = blocks_of(tables, SLOT), tokens_of(tables, SLOT)
    for layer, head in HEAD_INDEX:
        table = table_of(tables, layer, head)
        valid = tokens.valid[layer, head]
        for name in ("position", "address", "format", "tier", "row", "mass", "votes"):
            got = getattr(tokens, name)[layer, head][valid].tolist()
            assert got == [getattr(token, name) for token in table]
        assert blocks.valid[layer, head].sum() == len(blocks_in(table))
        assert blocks.full[layer, head].sum() == sum(len(block) == BLOCK_TOKENS for block in blocks_in(table))
        on = {tier: [block[0].address for block in blocks_in(table) if block[0].tier == tier] for tier in MEMORY_TIERS}
        for tier in MEMORY_TIERS:
            assert (
                blocks.address[layer, head][blocks.valid[layer, head] & (blocks.tier[layer, head] == tier)].tolist()
                == on[tier]
            )
    everywhere = [address for tier in MEMORY_TIERS for address in blocks.on(tier).tolist()]
    assert sorted(everywhere) == sorted(
        {t.address for layer, head in HEAD_INDEX for t in table_of(tables, layer, head)}
    )


def test_what_is_read_is_a_copy() -> None:
    tables = make_tables([40, 70, 33, 64], 0)
    blocks, tokens = blocks_of(tables, SLOT), tokens_of(tables, SLOT)
    address, position = blocks.address.copy(), tokens.position.copy()
    for name in ("address", "format", "tier", "length", "position", "mass", "votes"):
        getattr(tables, name)[:] = 0
    assert (blocks.address == address).all()
    assert (tokens.position == position).all()
    assert blocks.length.tolist() == [[40, 70], [33, 64]]


def test_regrouping_everything_touches_nothing_but_the_partly_filled_blocks() -> None:
    tables = make_tables([40, 70, 33, 64], 1)
    tables.format[SLOT], tables.tier[SLOT] = Format.RAW, Tier.DEVICE
    tokens = tokens_of(tables, SLOT)
    result = regroup(tokens, tokens.valid, [Style()] * SHAPE.layers)
    built = (result.blocks.address == BUILD) & result.blocks.valid
    assert (built == result.blocks.valid & ~result.blocks.full).all()
    assert isinstance(result.source, TokenSource)
    assert len(result.source.address) == 3


@pytest.mark.parametrize(
    ("length", "want"),
    [  # one table's formats and tiers, oldest block first: residual 32, 64 tokens on the device
        (31, [("RAW", "DEVICE")]),
        (63, [("RAW", "DEVICE")] * 2),
        (64, [("INT4", "DEVICE"), ("RAW", "DEVICE")]),
        (95, [("INT4", "DEVICE"), ("RAW", "DEVICE"), ("RAW", "DEVICE")]),
        (96, [("INT4", "HOST"), ("INT4", "DEVICE"), ("RAW", "DEVICE")]),
    ],
)
def test_styles_follow_the_distance_from_the_end(length: int, want: list[tuple[str, str]]) -> None:
    tables = make_tables([length] * 4, 2)
    result = restyle(blocks_of(tables, SLOT), tables.position[SLOT, :, :, :length], styles(32, Format.INT4, 64))
    got = zip(result.blocks.format[0, 0], result.blocks.tier[0, 0], strict=True)
    assert [(Format(fmt).name, Tier(tier).name) for fmt, tier in got] == want


def test_blocks_pass_from_format_to_format_as_they_age() -> None:
    tables = make_tables([200] * 4, 2)
    style = Style(((40, Format.INT8), (100, Format.INT4)))
    result = restyle(blocks_of(tables, SLOT), tables.position[SLOT, :, :, :200], [style] * SHAPE.layers)
    # 168, 136, 104, 72, 40 and 8 tokens are behind the full blocks; the last block is not full
    assert [Format(fmt).name for fmt in result.blocks.format[0, 0]] == ["INT4"] * 3 + ["INT8"] * 2 + ["RAW"] * 2


def test_each_layer_has_formats_and_places_of_its_own() -> None:
    tables = make_tables([200] * 4, 2)
    near, far = Style(((40, Format.INT8),), ((100, Tier.HOST),)), Style((), ((40, Tier.HOST), (136, Tier.DISK)))
    result = restyle(blocks_of(tables, SLOT), tables.position[SLOT, :, :, :200], [near, far])
    assert [Format(fmt).name for fmt in result.blocks.format[0, 1]] == ["INT8"] * 5 + ["RAW"] * 2
    assert [Tier(tier).name for tier in result.blocks.tier[0, 1]] == ["HOST"] * 3 + ["DEVICE"] * 4
    assert [Format(fmt).name for fmt in result.blocks.format[1, 1]] == ["RAW"] * 7
    assert [Tier(tier).name for tier in result.blocks.tier[1, 1]] == ["DISK"] * 2 + ["HOST"] * 3 + ["DEVICE"] * 2
