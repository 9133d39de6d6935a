"""Backtests of eviction, against plain loops over the tokens of tables that grow step by step."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.api import Tables
from kernels.layout import CacheShape
from models.features import DEPTHS, F64, KEPT_SHARES
from tests.workers.backtest import SHARES, Head, Look
from workers.counting import count_votes, set_levels, sum_by_level
from workers.hindsight import HINDSIGHT_STEPS, RECENT_TOKENS, Hindsight
from workers.signals import SignalMeter, vote_signals, warm_up

SHAPE = CacheShape(layers=3, kv_heads=2, query_heads=4, head_dim=16, dtype=torch.float32)
HEADS: list[Head] = list(itertools.product(range(SHAPE.layers), range(SHAPE.kv_heads)))
SLOT = 1
COMPILED: tuple[Any, ...] = (count_votes, set_levels, sum_by_level)
fixed = settings(derandomize=True, max_examples=60, deadline=None, database=None)


class Request:
    """Tables as decoding fills them, garbage beyond their ends.

    Args:
        lengths: tokens that each head keeps.
        seen: tokens so far.
        room: most tokens.
    """

    def __init__(self, lengths: dict[Head, int], seen: int, seed: int = 0, room: int = 700) -> None:
        self.rng = np.random.default_rng(seed)
        self.tables = Tables.allocate(2, SHAPE, room)
        self.seen = seen
        self.tables.position[:] = np.arange(self.tables.position.shape[-1])
        for head, length in lengths.items():
            self.tables.length[SLOT, *head] = length
            self.tables.position[SLOT, *head, :length] = np.arange(seen - length, seen)
            self.tables.mass[SLOT, *head, :length] = self.rng.random(length) * 50
        self.vote()

    def vote(self) -> None:
        """Other votes, many of them equal or zero."""
        tables = self.tables
        tables.votes[:] = self.rng.choice([0.0, 0.125, 1.0, 7.0], tables.votes.shape)
        for head in HEADS:
            end = tables.length[SLOT, *head]
            tables.mass[SLOT, *head, end:] = self.rng.choice([np.nan, np.inf, -1e30, 1e30], tables.mass.shape[-1] - end)
            tables.votes[SLOT, *head, end:] = self.rng.choice([np.nan, np.inf, -5.0], tables.votes.shape[-1] - end)

    def decode(self, steps: int) -> None:
        """Every head gets a token a step, and spreads the attention of two query heads."""
        for _ in range(steps):
            for head in HEADS:
                end = int(self.tables.length[SLOT, *head])
                self.tables.position[SLOT, *head, end] = self.seen
                self.tables.mass[SLOT, *head, end] = 0
                self.tables.mass[SLOT, *head, : end + 1] += 2 * self.rng.dirichlet(np.full(end + 1, 0.3))
                self.tables.length[SLOT, *head] += 1
            self.seen += 1
        self.vote()

    def evict(self, head: Head, tokens: int) -> None:
        """Takes the first tokens of one table."""
        length = int(self.tables.length[SLOT, *head])
        for array in (self.tables.position, self.tables.mass, self.tables.votes):
            array[SLOT, *head, : length - tokens] = array[SLOT, *head, tokens:length].copy()
        self.tables.length[SLOT, *head] -= tokens

    def look(self, hindsight: Hindsight) -> F64 | None:
        return hindsight.look(self.tables, SLOT, self.seen, vote_signals(self.tables, SLOT, self.seen).least)

    def now(self) -> Look:
        return Look.at(self.tables, SLOT, self.seen)


def check(got: F64 | None, want: dict[Head, list[float]]) -> None:
    assert got is not None
    assert got.shape == (SHAPE.layers, SHAPE.kv_heads, len(KEPT_SHARES))
    for head, shares in want.items():
        assert got[head] == pytest.approx(shares, abs=1e-5), head


def everywhere(length: int) -> dict[Head, int]:
    return dict.fromkeys(HEADS, length)


def test_the_reference_knows_the_shares_and_what_is_recent() -> None:
    assert (SHARES, 64) == (KEPT_SHARES, RECENT_TOKENS)


def test_by_hand() -> None:
    """128 tokens, of which the first 64 can be dropped: 8 of them have 2 votes, 8 others 1, the rest none; 24 recent
    ones have 3. Then one step pays 1/4 to a token of 2 votes and to one of 1 vote, and 1/2 to one without."""
    request = Request(everywhere(128), 128)
    tables = request.tables
    tables.votes[SLOT, :, :, :128] = np.repeat([2, 1, 0, 3, 0], [8, 8, 48, 24, 40])
    hindsight = Hindsight()
    assert request.look(hindsight) is None
    tables.length[SLOT] += 1
    tables.mass[SLOT, :, :, 128] = 0
    tables.mass[SLOT, :, :, :128] += np.repeat([0, 0.25, 0, 0.25, 0, 0.5, 0], [3, 1, 4, 1, 10, 1, 108])
    request.seen += 1
    # Of the best 16 and 32 all have 3, and at least 2, votes. The best 64 and 96 have some without: ties, none dropped.
    check(request.look(hindsight), {head: [1.0, 0.75, 0.0, 0.0] for head in HEADS})


@fixed
@given(
    lengths=st.lists(st.integers(1, 300), min_size=len(HEADS), max_size=len(HEADS)),
    evicted=st.integers(0, 200),
    looks=st.lists(st.integers(0, 40), min_size=2, max_size=6),
    seed=st.integers(0, 1000),
)
def test_many_looks_equal_plain_loops(lengths: list[int], evicted: int, looks: list[int], seed: int) -> None:
    request = Request(dict(zip(HEADS, lengths, strict=True)), max(lengths) + evicted, seed)
    hindsight = Hindsight()
    assert request.look(hindsight) is None
    selection = request.now()
    for steps in looks:
        request.decode(steps)
        got, now = request.look(hindsight), request.now()
        since = now.seen - selection.seen
        if since:
            check(got, selection.missed(now))
        else:
            assert got is None
        if since >= 16:
            selection = now


def test_a_selection_serves_until_16_steps_have_passed() -> None:
    request, hindsight = Request(everywhere(200), 200), Hindsight()
    request.look(hindsight)
    first = request.now()
    for steps in (5, 10, HINDSIGHT_STEPS - 15):
        request.decode(steps)
        now = request.now()
        check(request.look(hindsight), first.missed(now))
    request.decode(1)
    later = request.now()
    got = request.look(hindsight)
    check(got, now.missed(later))
    assert first.missed(later)[0, 0] != pytest.approx(got[0, 0], abs=1e-3)


def test_looking_again_without_a_step_gives_nothing_and_changes_nothing() -> None:
    request, hindsight = Request(everywhere(200), 200), Hindsight()
    request.look(hindsight)
    first = request.now()
    request.vote()
    assert request.look(hindsight) is None
    request.decode(3)
    check(request.look(hindsight), first.missed(request.now()))


def test_the_last_64_tokens_are_never_dropped() -> None:
    request, hindsight = Request(everywhere(64), 600), Hindsight()
    request.look(hindsight)
    request.decode(20)
    assert request.look(hindsight).tolist() == np.zeros((SHAPE.layers, SHAPE.kv_heads, len(KEPT_SHARES))).tolist()


def test_what_lies_beyond_the_ends_does_not_matter() -> None:
    """The same request twice, on clean tables and on those that a longer request had."""
    found = []
    for clean in (True, False):
        request, hindsight = Request(dict(zip(HEADS, range(70, 300, 40), strict=True)), 400), Hindsight()
        for _ in range(3):
            if clean:
                for head in HEADS:
                    end = request.tables.length[SLOT, *head]
                    request.tables.mass[SLOT, *head, end:] = request.tables.votes[SLOT, *head, end:] = 0
            missed = request.look(hindsight)
            request.decode(20)
        found.append(missed)
    assert found[0].max() > 0
    assert np.array_equal(*found)


@pytest.mark.parametrize("evicted", [[HEADS[-1]], HEADS])
def test_nothing_is_told_over_an_eviction_or_a_restoration(evicted: list[Head]) -> None:
    request, hindsight = Request(everywhere(200), 200), Hindsight()
    request.look(hindsight)
    request.decode(20)
    before = {name: getattr(request.tables, name).copy() for name in ("position", "mass", "votes", "length")}
    for head in evicted:
        request.evict(head, 20)  # as many as have come
    assert request.look(hindsight) is None
    smaller = request.now()
    request.decode(5)
    check(request.look(hindsight), smaller.missed(request.now()))  # and a new selection was made at once
    for name, values in before.items():
        setattr(request.tables, name, values)
    request.seen -= 5
    assert request.look(hindsight) is None
    whole = request.now()
    request.decode(5)
    check(request.look(hindsight), whole.missed(request.now()))


@pytest.mark.parametrize("counted", ["fewer", "as many"])
def test_nothing_is_told_where_masses_were_counted_anew(counted: str) -> None:
    """A request that was preempted: the same tokens, but what was paid to them is counted from zero."""
    request, hindsight = Request(everywhere(200), 200), Hindsight()
    request.look(hindsight)
    request.decode(6)
    length = 206
    masses = request.tables.mass[SLOT, :, :, :length]
    if counted == "fewer":
        masses[:] = request.rng.random(masses.shape)
    else:
        masses[:] = masses[:, :, ::-1].copy()  # not a unit less in all
    assert request.look(hindsight) is None
    again = request.now()
    request.decode(4)
    check(request.look(hindsight), again.missed(request.now()))  # not against what was counted before


def test_nothing_is_told_where_other_tokens_are_kept() -> None:
    """Another evictor chose as many tokens as have been there, and one step came."""
    request, hindsight = Request(everywhere(200), 400), Hindsight()
    request.look(hindsight)
    request.decode(1)
    request.tables.position[SLOT, 0, 0, :100] -= 1
    request.tables.mass[SLOT, 0, 0, :100] = request.rng.random(100)
    assert request.look(hindsight) is None


def test_two_requests_in_one_slot_have_nothing_in_common() -> None:
    request, hindsight = Request(everywhere(200), 200), Hindsight()
    request.look(hindsight)
    request.decode(16)
    assert request.look(Hindsight()) is None
    assert request.look(hindsight) is not None


def test_signals_are_means_over_heads_the_largest_and_those_of_each_quarter() -> None:
    """Three layers: the first three quarters have one each, the last none of its own."""
    request, meter = Request(everywhere(250), 300), SignalMeter([])
    meter.note_votes(request.tables, SLOT, request.seen)
    first = request.now()
    signals = meter.take()
    assert list(signals.missed_votes) == list(signals.missed_votes_max) == list(signals.missed_votes_by_depth) == []
    assert len(signals.dropped_votes) == len(KEPT_SHARES)
    request.decode(16)
    meter.note_votes(request.tables, SLOT, request.seen)
    signals, missed = meter.take(), first.missed(request.now())
    every = list(missed.values())
    mean = np.mean(every, axis=0)
    assert mean[0] > mean[1] > mean[2] > 0
    assert list(signals.missed_votes) == pytest.approx(mean, abs=1e-5)
    assert list(signals.missed_votes_max) == pytest.approx(np.max(every, axis=0), abs=1e-5)
    layers = [np.mean([missed[layer, head] for head in range(SHAPE.kv_heads)], axis=0) for layer in range(3)]
    assert len(signals.missed_votes_by_depth) == DEPTHS * len(KEPT_SHARES)
    assert list(signals.missed_votes_by_depth) == pytest.approx([*np.ravel(layers), *mean], abs=1e-5)
    assert list(meter.take().missed_votes) == []  # not looked at again


def test_nothing_is_compiled_while_requests_decode() -> None:
    warm_up(SHAPE)
    before = [len(function.signatures) for function in COMPILED]
    request, hindsight = Request(everywhere(300), 300), Hindsight()
    for steps in (1, 1, HINDSIGHT_STEPS, 2):
        request.decode(steps)
        request.look(hindsight)
    assert [len(function.signatures) for function in COMPILED] == before
    assert all(before)
