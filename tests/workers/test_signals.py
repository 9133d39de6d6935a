"""Signals against plain loops, on block masses and tables made by hand."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.api import DecodePlan, Tables
from kernels.layout import BLOCK_TOKENS, CacheShape
from kvpilot.v1 import policy_pb2
from models.features import DEPTHS, HORIZONS_TOKENS, KEPT_SHARES
from workers.signals import FAR_HORIZONS_TOKENS, SAMPLE_EVERY, SINK_TOKENS, SignalMeter, prompt_statistics

SHAPE = CacheShape(layers=2, kv_heads=2, query_heads=4, head_dim=16, dtype=torch.float32)
HEAD_INDEX = list(itertools.product(range(SHAPE.layers), range(SHAPE.kv_heads)))
SLOT, ROW = 1, 2
Positions = dict[tuple[int, int], list[int]]
fixed = settings(derandomize=True, max_examples=40, deadline=None, database=None)


def make_tables(positions: Positions) -> Tables:
    """Tables that keep these positions; beyond their ends lies what an earlier, longer life has left."""
    tables = Tables.allocate(2, SHAPE, max(map(len, positions.values())) + 64)
    tables.position[:] = np.arange(tables.position.shape[-1])
    for (layer, head), kept in positions.items():
        tables.length[SLOT, layer, head] = len(kept)
        tables.position[SLOT, layer, head, : len(kept)] = kept
    return tables


def make_plan(positions: Positions, seed: int = 0) -> DecodePlan:
    """Shares of the blocks that exist, summing to 1 for each head; other rows hold rubbish."""
    rng = np.random.default_rng(seed)
    width = max(math.ceil(len(kept) / BLOCK_TOKENS) for kept in positions.values()) + 1  # another row is longer
    mass = rng.random((SHAPE.layers, 3, SHAPE.kv_heads, width)).astype(np.float32)
    for (layer, head), kept in positions.items():
        blocks = math.ceil(len(kept) / BLOCK_TOKENS)
        shares = rng.dirichlet(np.full(blocks, 0.5))
        mass[layer, ROW, head] = [*shares, *[0.0] * (width - blocks)]
    return DecodePlan(np.array([5, 0, SLOT], np.int32), block_mass=mass)


def look(meter: SignalMeter, positions: Positions, seed: int = 0, times: int = SAMPLE_EVERY) -> DecodePlan:
    plan, tables = make_plan(positions, seed), make_tables(positions)
    for _ in range(times):
        meter.note_attention(plan, ROW, tables)
    return plan


def everywhere(kept: list[int]) -> Positions:
    return dict.fromkeys(HEAD_INDEX, kept)


def plain_signals(plan: DecodePlan, positions: Positions) -> dict[str, object]:
    """Every signal by loops over layers, heads, blocks and tokens."""
    seen = max(kept[-1] for kept in positions.values()) + 1
    far: list[list[float]] = [[] for _ in FAR_HORIZONS_TOKENS]
    sinks, entropies = [], []
    most_blocks = max(math.ceil(len(kept) / BLOCK_TOKENS) for kept in positions.values())
    for (layer, head), kept in positions.items():
        blocks = [kept[start : start + BLOCK_TOKENS] for start in range(0, len(kept), BLOCK_TOKENS)]
        shares = plan.block_mass[layer, ROW, head].tolist()
        with_sinks = [any(position < SINK_TOKENS for position in block) for block in blocks]
        sinks.append(sum(share for share, sink in zip(shares, with_sinks, strict=False) if sink))
        for place, horizon in enumerate(FAR_HORIZONS_TOKENS):
            total = 0.0
            for block, share, sink in zip(blocks, shares, with_sinks, strict=False):
                wholly_older = len(block) == BLOCK_TOKENS and all(position < seen - horizon for position in block)
                total += share if wholly_older and not sink else 0.0
            far[place].append(total)
        entropies.append(-sum(share * math.log(share) for share in shares if share > 0))
    return {
        "far_mass": [np.mean(values) for values in far],
        "far_mass_max": [max(values) for values in far],
        "far_mass_worst_layer": [worst_layer(values, positions) for values in far],
        "far_mass_by_depth": [mean for quarter in range(4) for mean in of_quarter(far, positions, quarter)],
        "sink_mass": np.mean(sinks),
        "attention_entropy": np.mean(entropies) / math.log(most_blocks) if most_blocks > 1 else 0.0,
    }


def of_quarter(far: list[list[float]], positions: Positions, quarter: int) -> list[float]:
    """Means over one quarter of the layers, the first ones a layer longer where four do not divide their number."""
    layers = sorted({layer for layer, _ in positions})
    starts = [part * (len(layers) // 4) + min(part, len(layers) % 4) for part in range(5)]
    chosen = layers[starts[quarter] : starts[quarter + 1]] or layers
    return [
        float(np.mean([value for (layer, _), value in zip(positions, values, strict=True) if layer in chosen]))
        for values in far
    ]


def worst_layer(values: list[float], positions: Positions) -> float:
    """The largest mean over a layer's heads, of one value per (layer, head)."""
    layers: dict[int, list[float]] = {}
    for (layer, _), value in zip(positions, values, strict=True):
        layers.setdefault(layer, []).append(value)
    return max(sum(heads) / len(heads) for heads in layers.values())


def check(signals: policy_pb2.Signals, want: dict[str, object]) -> None:
    for name, value in want.items():
        got = getattr(signals, name)
        assert (list(got) if isinstance(value, list) else got) == pytest.approx(value, abs=1e-5), name


def test_one_head_by_hand() -> None:
    """160 tokens: of five blocks the first holds the sinks, the next three are older than 32 tokens, two than 64."""
    positions = everywhere(list(range(160)))
    plan = make_plan(positions)
    plan.block_mass[:, ROW, :, :5] = [0.4, 0.1, 0.2, 0.05, 0.25]
    meter = SignalMeter([])
    for _ in range(SAMPLE_EVERY):
        meter.note_attention(plan, ROW, make_tables(positions))
    signals = meter.take()
    assert signals.sink_mass == pytest.approx(0.4)
    assert list(signals.far_mass) == pytest.approx([0.35, 0.3, 0, 0, 0, 0], abs=1e-6)
    check(signals, plain_signals(plan, positions))


@pytest.mark.parametrize(
    ("kept", "far"),
    [  # which of the blocks count as far at a horizon of 32 and of 64 tokens
        (list(range(96)), ({1}, set())),  # block 1 ends at 63 = 95 - 32: just outside the last 32
        (list(range(97)), ({1}, set())),
        (list(range(127)), ({1}, set())),  # block 2 ends at 95, the last 32 start at 95
        (list(range(128)), ({1, 2}, {1})),
        ([*range(4), *range(200, 292)], ({1}, set())),  # evicted: block 0 holds the sinks, block 1 ends at 259
        ([*range(100, 164), *range(264, 296)], ({0, 1}, {0, 1})),  # no sinks kept
    ],
)
def test_far_blocks_are_wholly_older_than_the_horizon(kept: list[int], far: tuple[set, set]) -> None:
    meter, positions = SignalMeter([]), everywhere(kept)
    plan = look(meter, positions)
    signals = meter.take()
    for index in (0, 1):
        want = [
            sum(float(plan.block_mass[layer, ROW, head, block]) for block in far[index]) for layer, head in HEAD_INDEX
        ]
        assert signals.far_mass[index] == pytest.approx(np.mean(want), abs=1e-6)
        assert signals.far_mass_max[index] == pytest.approx(max(want), abs=1e-6)


def test_a_single_block_has_no_entropy() -> None:
    meter, positions = SignalMeter([]), everywhere(list(range(20)))
    look(meter, positions)
    signals = meter.take()
    assert signals.attention_entropy == 0.0
    assert signals.sink_mass == pytest.approx(1.0)
    assert list(signals.far_mass) == [0.0] * len(FAR_HORIZONS_TOKENS)


def test_even_attention_has_the_largest_entropy() -> None:
    positions = everywhere(list(range(256)))
    plan = make_plan(positions)
    plan.block_mass[:, ROW, :, :8] = 1 / 8
    meter = SignalMeter([])
    for _ in range(SAMPLE_EVERY):
        meter.note_attention(plan, ROW, make_tables(positions))
    assert meter.take().attention_entropy == pytest.approx(1.0)


@st.composite
def evicted(draw: st.DrawFn) -> Positions:
    """Tables of different lengths: some sinks, some tokens of the middle, and the last 32."""
    seen = draw(st.integers(40, 1500))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    positions = {}
    for key in HEAD_INDEX:
        middle = rng.permutation(np.arange(seen - 32))[: int(rng.integers(0, min(seen - 32, 200) + 1))]
        sinks = np.arange(int(rng.integers(0, 5)))
        positions[key] = sorted({*middle.tolist(), *sinks.tolist(), *range(seen - 32, seen)})
    return positions


@fixed
@given(positions=evicted(), seed=st.integers(0, 100))
def test_signals_of_evicted_tables_equal_plain_loops(positions: Positions, seed: int) -> None:
    meter = SignalMeter([])
    plan = look(meter, positions, seed)
    signals = meter.take()
    assert signals.steps == 1
    want = plain_signals(plan, positions)
    check(signals, want | {"far_mass_last": want["far_mass"]})


@pytest.mark.parametrize(
    "quarters",
    [
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 1, 2, 3],
        [0, 0, 1, 2, 3],
        [*[0] * 8, *[1] * 8, *[2] * 7, *[3] * 7],
    ],
    ids=len,
)
def test_far_mass_is_told_of_each_quarter_of_the_layers(quarters: list[int]) -> None:
    """A quarter without a layer, of a model that has fewer than four, tells the mean over all."""
    layers, blocks, row = len(quarters), 50, 0
    rng = np.random.default_rng(layers)
    tables = Tables.allocate(1, replace(SHAPE, layers=layers), blocks * BLOCK_TOKENS)
    tables.length[:] = blocks * BLOCK_TOKENS
    tables.position[:] = np.arange(tables.position.shape[-1])
    meter = SignalMeter([])
    far: dict[int, list[np.ndarray]] = {quarter: [] for quarter in range(DEPTHS)}
    for _ in range(3):
        mass = rng.dirichlet(np.full(blocks, 0.5), (layers, 1, SHAPE.kv_heads)).astype(np.float32)
        for _ in range(SAMPLE_EVERY):
            meter.note_attention(DecodePlan(np.array([0], np.int32), block_mass=mass), row, tables)
        for layer, quarter in enumerate(quarters):
            for head in range(SHAPE.kv_heads):
                by_block = mass[layer, row, head]
                far[quarter].append(
                    # Block 0 holds the sinks; of those behind it, the last `horizon` tokens' are not far.
                    np.array([by_block[1 : blocks - horizon // BLOCK_TOKENS].sum() for horizon in FAR_HORIZONS_TOKENS])
                )
    everything = np.mean([one for quarter in far.values() for one in quarter], axis=0)
    want = [np.mean(quarter, axis=0) if quarter else everything for quarter in far.values()]
    signals = meter.take()
    assert list(signals.far_mass) == pytest.approx(everything, abs=1e-5)
    assert list(signals.far_mass_by_depth) == pytest.approx(np.ravel(want), abs=1e-5)
    assert list(meter.take().far_mass_by_depth) == []


def test_one_step_in_four_is_looked_at_and_the_mean_is_told() -> None:
    meter, positions = SignalMeter([]), everywhere(list(range(200)))
    plans = [look(meter, positions, seed) for seed in range(3)]
    look(meter, positions, 7, times=SAMPLE_EVERY - 1)  # not yet
    signals = meter.take()
    assert signals.steps == 3
    each = [plain_signals(plan, positions) for plan in plans]
    check(
        signals,
        {
            "far_mass": np.mean([one["far_mass"] for one in each], axis=0).tolist(),
            "far_mass_max": np.mean([one["far_mass_max"] for one in each], axis=0).tolist(),
            "far_mass_worst_layer": np.mean([one["far_mass_worst_layer"] for one in each], axis=0).tolist(),
            "far_mass_by_depth": np.mean([one["far_mass_by_depth"] for one in each], axis=0).tolist(),
            "far_mass_last": each[-1]["far_mass"],
            "sink_mass": np.mean([one["sink_mass"] for one in each]),
            "attention_entropy": np.mean([one["attention_entropy"] for one in each]),
        },
    )
    empty = meter.take()
    assert empty.steps == 0
    assert list(empty.far_mass) == list(empty.far_mass_last) == list(empty.far_mass_worst_layer) == []
    plan = look(meter, positions, 8, times=1)  # the fourth step since the last look
    check(meter.take(), plain_signals(plan, positions))


def test_the_feature_schema_knows_every_horizon() -> None:
    assert set(FAR_HORIZONS_TOKENS) <= set(HORIZONS_TOKENS)


# -- votes -----------------------------------------------------------------------------------------------------------


def make_votes(positions: Positions, seed: int = 0) -> Tables:
    """Tables with votes, many of them equal or zero, and rubbish beyond their ends."""
    rng, tables = np.random.default_rng(seed), make_tables(positions)
    tables.votes[:] = rng.choice([0.0, 0.125, 1.0, 7.0], tables.votes.shape) * rng.random(tables.votes.shape)
    return tables


def plain_dropped(votes: list[float], seen: int, share: float) -> float:
    """Share of a head's votes outside its best tokens, one by one."""
    may_stay = math.ceil(share * seen)
    dropped = sorted(votes, reverse=True)[may_stay:]
    return sum(dropped) / sum(votes) if dropped and sum(votes) else 0.0


@fixed
@given(positions=evicted(), seed=st.integers(0, 100))
def test_dropped_votes_of_evicted_tables_equal_plain_loops(positions: Positions, seed: int) -> None:
    tables, seen = make_votes(positions, seed), positions[0, 0][-1] + 1
    before = tables.votes.copy()
    meter = SignalMeter([])
    meter.note_votes(tables, SLOT, seen)
    signals = meter.take()
    for place, share in enumerate(KEPT_SHARES):
        each = [
            plain_dropped(tables.votes[SLOT, layer, head, : len(kept)].astype(float).tolist(), seen, share)
            for (layer, head), kept in positions.items()
        ]
        assert signals.dropped_votes[place] == pytest.approx(np.mean(each), abs=1e-5)
        assert signals.dropped_votes_max[place] == pytest.approx(max(each), abs=1e-5)
    assert np.array_equal(tables.votes, before)


def test_votes_by_hand() -> None:
    """64 tokens seen: 8, 16, 32 and 48 may stay. Head (0, 0) voted evenly, (0, 1) for one token, (1, 0) for none, and
    (1, 1) holds 8 tokens only."""
    positions = everywhere(list(range(64)))
    positions[1, 1] = list(range(56, 64))
    tables = make_tables(positions)
    tables.votes[SLOT, 0, 0, :64] = 2.0
    tables.votes[SLOT, 0, 1, 5] = 3.0
    tables.votes[SLOT, 1, 1] = 1.0  # also beyond the end
    meter = SignalMeter([])
    meter.note_votes(tables, SLOT, 64)
    signals = meter.take()
    assert list(signals.dropped_votes_max) == pytest.approx([7 / 8, 3 / 4, 1 / 2, 1 / 4])
    assert list(signals.dropped_votes) == pytest.approx([7 / 32, 3 / 16, 1 / 8, 1 / 16])
    assert list(meter.take().dropped_votes) == []  # not looked at again


@fixed
@given(positions=evicted(), seed=st.integers(0, 100))
def test_far_votes_of_evicted_tables_equal_plain_loops(positions: Positions, seed: int) -> None:
    tables, seen = make_votes(positions, seed), positions[0, 0][-1] + 1
    meter = SignalMeter([])
    meter.note_votes(tables, SLOT, seen)
    signals = meter.take()
    layers = max(layer for layer, _ in positions) + 1
    far: dict[int, list[list[float]]] = {layer: [] for layer in range(layers)}
    for (layer, head), kept in positions.items():
        votes = tables.votes[SLOT, layer, head, : len(kept)].astype(float).tolist()
        total = sum(votes)
        blocks = [range(first, first + BLOCK_TOKENS) for first in range(0, len(kept) - BLOCK_TOKENS + 1, BLOCK_TOKENS)]
        beyond = [
            sum(
                votes[i]
                for block in blocks
                if kept[block[0]] >= SINK_TOKENS and kept[block[-1]] < seen - h
                for i in block
            )
            for h in FAR_HORIZONS_TOKENS
        ]
        far[layer].append([part / total if total else 0.0 for part in beyond])
    heads = np.array([head for layer in far.values() for head in layer])
    assert signals.far_votes == pytest.approx(heads.mean(axis=0), abs=1e-5)
    assert signals.far_votes_max == pytest.approx(heads.max(axis=0), abs=1e-5)
    assert len(signals.far_votes_by_depth) == DEPTHS * len(FAR_HORIZONS_TOKENS)
    first = np.array(far[0]).mean(axis=0)
    assert signals.far_votes_by_depth[: len(FAR_HORIZONS_TOKENS)] == pytest.approx(first, abs=1e-5)


def test_nothing_is_dropped_where_everything_may_stay() -> None:
    meter = SignalMeter([])
    meter.note_votes(make_votes(everywhere([5])), SLOT, 1)
    assert list(meter.take().dropped_votes_max) == [0.0] * len(KEPT_SHARES)


# -- what the sampler says -------------------------------------------------------------------------------------------


def test_entropy_and_certainty_are_means_since_the_last_report() -> None:
    meter = SignalMeter([1, 2, 3])
    for token, entropy, top1, surprise in ((5, 1.0, 0.5, 0.7), (6, 2.0, 0.25, 3.1), (7, 0.0, 1.0, 0.0)):
        meter.note_choice(token, entropy, top1, surprise)
    signals = meter.take()
    assert signals.next_token_entropy == pytest.approx(1.0)
    assert signals.next_token_entropy_max == pytest.approx(2.0)
    assert signals.top1_probability == pytest.approx(1.75 / 3)
    assert signals.surprise == pytest.approx(3.8 / 3)
    meter.note_choice(8, 0.5, 0.75, 0.25)
    signals = meter.take()
    assert signals.next_token_entropy == signals.next_token_entropy_max == pytest.approx(0.5)
    assert signals.surprise == pytest.approx(0.25)
    assert meter.take().surprise == 0.0  # nothing came since


def plain_distances(text: list[int]) -> list[int]:
    """Of each of the last 32 tokens: how far back the three-token sequence it ends was last seen; 0 for never."""
    distances = []
    for end in range(1, len(text) + 1):
        starts = [start for start in range(end - 3) if text[start : start + 3] == text[end - 3 : end]]
        distances.append(end - 3 - starts[-1] if end >= 3 and starts else 0)
    return distances[-32:]


@fixed
@given(
    prompt=st.lists(st.integers(0, 3), max_size=60),
    generated=st.lists(st.integers(0, 3), max_size=60),
    reports=st.sets(st.integers(0, 60)),
)
def test_repeats_equal_a_plain_search(prompt: list[int], generated: list[int], reports: set[int]) -> None:
    meter = SignalMeter(prompt)
    for count, token in enumerate(generated, start=1):
        meter.note_choice(token, 0.0, 1.0, 0.0)
        if count in reports:  # a report does not shorten the window
            meter.take()
    signals, distances = meter.take(), plain_distances(prompt + generated)
    if not distances:
        return
    assert signals.repeat_rate == pytest.approx(sum(map(bool, distances)) / len(distances))
    for horizon, share in zip(FAR_HORIZONS_TOKENS, signals.repeat_beyond, strict=True):
        assert share == pytest.approx(sum(distance > horizon for distance in distances) / len(distances))
    assert signals.copied_from_tokens == distances[-1]
    run = 0
    while run < len(distances) and distances[-1 - run] == distances[-1] != 0:
        run += 1
    assert signals.copied_tokens == run


def test_a_copy_from_far_back() -> None:
    text = list(range(100, 400))
    meter = SignalMeter(text)
    for token in text[50:60]:
        meter.note_choice(token, 0.0, 1.0, 0.0)
    signals = meter.take()
    assert (signals.copied_tokens, signals.copied_from_tokens) == (8, 250)  # the first two end no 3-gram seen before
    assert list(signals.repeat_beyond) == pytest.approx([8 / 32] * 3 + [0.0] * 3)  # of the horizons up to 128


def test_a_loop_is_seen_as_such() -> None:
    meter = SignalMeter([1, 2, 3])
    for token in [1, 2, 3] * 20:
        meter.note_choice(token, 0.0, 1.0, 0.0)
    assert meter.take().repeat_rate == 1.0
    fresh = SignalMeter([1, 2, 3] * 20)
    assert fresh.take().repeat_rate == 1.0  # the prompt's last tokens count
    for token in range(100, 140):
        fresh.note_choice(token, 0.0, 1.0, 0.0)
    assert fresh.take().repeat_rate == 0.0


# -- prompts ---------------------------------------------------------------------------------------------------------


def test_a_prompt_by_hand() -> None:
    """Of the six 3-grams of 1 2 3 1 2 3 1 2 the last three occurred before."""
    statistics = prompt_statistics([1, 2, 3, 1, 2, 3, 1, 2], turns=4)
    assert statistics.distinct_share == pytest.approx(3 / 8)
    assert statistics.repeated_share == pytest.approx(3 / 6)
    assert statistics.unigram_entropy == pytest.approx(-(6 / 8 * math.log(3 / 8) + 2 / 8 * math.log(2 / 8)))
    assert statistics.turns == 4


def test_prompts_that_are_too_short_for_a_3_gram() -> None:
    assert prompt_statistics([9]) == policy_pb2.PromptStatistics(distinct_share=1.0, turns=1)
    assert prompt_statistics([9, 9]).repeated_share == 0.0
    with pytest.raises(ValueError, match="0 tokens"):
        prompt_statistics([])


@fixed
@given(tokens=st.lists(st.sampled_from([0, 1, 2, 49_151, 2**31 - 1]), min_size=1, max_size=200))
def test_prompt_statistics_equal_plain_loops(tokens: list[int]) -> None:
    statistics = prompt_statistics(tokens)
    grams = [tuple(tokens[start : start + 3]) for start in range(len(tokens) - 2)]
    repeated = sum(gram in grams[:index] for index, gram in enumerate(grams))
    shares = [tokens.count(token) / len(tokens) for token in set(tokens)]
    assert statistics.distinct_share == pytest.approx(len(set(tokens)) / len(tokens))
    assert statistics.repeated_share == pytest.approx(repeated / len(grams) if grams else 0.0)
    assert statistics.unigram_entropy == pytest.approx(-sum(share * math.log(share) for share in shares), abs=1e-12)
    assert statistics.turns == 1
