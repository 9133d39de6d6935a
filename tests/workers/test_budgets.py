"""How what is kept is shared out over layers and heads, against rules written out token by token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.stages.budgets import ADA, PER_HEAD, PYRAMID, RULES, UNIFORM, best, free_tokens

fixed = settings(derandomize=True, max_examples=100, deadline=None, database=None)


@fixed
@given(layers=st.integers(2, 40), free=st.integers(0, 500), room=st.integers(0, 500))
def test_a_pyramid_falls_linearly_and_adds_up_to_what_uniform_keeps(layers: int, free: int, room: int) -> None:
    most = free + room
    shares = [free_tokens(PYRAMID, layer, layers, free, most) for layer in range(layers)]
    assert abs(sum(shares) - layers * free) <= layers / 2
    assert shares == sorted(shares, reverse=True)
    assert shares[0] <= most
    first = min(2 * free - free / 20, most) if room else free
    steps = [first + (2 * free - 2 * first) * layer / (layers - 1) for layer in range(layers)]
    assert np.abs(np.array(shares) - steps).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("rule", [UNIFORM, ADA])
def test_other_rules_give_every_layer_the_same(rule: str) -> None:
    assert [free_tokens(rule, layer, 4, 100, 400) for layer in range(4)] == [100] * 4


def test_one_layer_has_no_slope() -> None:
    assert free_tokens(PYRAMID, 0, 1, 100, 400) == 100


@st.composite
def cases(draw) -> tuple:
    """Scores with many ties, some tables shorter than others, the first and last tokens protected."""
    heads, tokens = draw(st.integers(1, 4)), draw(st.integers(4, 30))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    lengths = rng.integers(4, tokens + 1, heads) if draw(st.booleans()) else np.full(heads, tokens)
    index = np.arange(tokens)
    valid = index < lengths[:, None]
    protected = valid & ((index < 1) | (index >= lengths[:, None] - 2))
    return rng.integers(0, 4, (heads, tokens)).astype(float), protected, valid, draw(st.integers(0, tokens))


@fixed
@given(case=cases(), rule=st.sampled_from((*RULES, PER_HEAD)))
def test_what_stays_is_what_the_rule_says(case: tuple, rule: str) -> None:
    score, protected, valid, free = case
    if rule == PER_HEAD:
        free = np.arange(len(score)) * 7 % (free + 1)  # another number for each head
    keep = best(rule, score, protected, valid, 3, free)
    ranked = [
        sorted(np.flatnonzero(valid[head]), key=lambda token: (protected[head, token], score[head, token], token))[::-1]
        for head in range(len(score))
    ]
    own = np.broadcast_to(free // 5 if rule == ADA else free, len(score))
    wanted = {(head, token) for head in range(len(score)) for token in ranked[head][: 3 + own[head]]}
    if rule == ADA:
        rest = [(head, token) for head in range(len(score)) for token in ranked[head][3 + own[head] :]]
        rest.sort(key=lambda place: (score[place], place[1], place[0]))
        wanted |= set(rest[::-1][: len(score) * (free - own[0])])
    assert set(zip(*np.nonzero(keep), strict=True)) == wanted
    assert keep[protected].all()
    assert not keep[~valid].any()


def test_ada_gives_to_the_head_that_needs_it_and_leaves_a_floor_to_the_other() -> None:
    score = np.stack([np.arange(100.0) + 1000, np.arange(100.0)])
    keep = best(ADA, score, np.zeros((2, 100), bool), np.ones((2, 100), bool), 0, 20)
    assert keep.sum(axis=1).tolist() == [36, 4]
    assert keep[1, -4:].all()
