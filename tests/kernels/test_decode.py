"""Decode attention, against attention over contiguous keys and values in float64."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.api import VOTE_DECAY
from kernels.cpu_attend_block import SPLIT_TOKENS
from kernels.layout import BLOCK_TOKENS, MEMORY_TIERS, CacheShape, Format, Tier

ALL_FORMATS, ALL_TIERS = tuple(Format), MEMORY_TIERS
UNWRITTEN = pytest.mark.parametrize("unwritten", [float("nan"), float("inf")], ids=str)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # the output's own rounding


def check_step(world, slots, seed=0):
    """Runs a step on every layer and compares outputs, masses, votes and block masses with the plain computation."""
    shape, tables = world.shape, world.tables
    scaling = shape.head_dim**-0.5
    before = tables.mass.copy(), tables.votes.astype(np.float32)
    plan, expected = world.backend.plan(np.array(slots, np.int32)), {}
    for layer in range(shape.layers):
        q, k, v = world.step(slots, seed + layer)
        output = world.backend.decode(plan, layer, q, k, v, scaling)
        world.extend(slots, layer, k, v)
        assert output.dtype is q.dtype
        assert output.shape == q.shape
        for row, slot in enumerate(slots):
            wanted, shares = world.attention(slot, layer, q[row], scaling)
            torch.testing.assert_close(output[row].double(), wanted, rtol=0, atol=TOLERANCE[shape.dtype])
            expected.update({(layer, row, head): share for head, share in enumerate(shares)})

    world.backend.finish(plan)
    world.backend.settle(plan.slots)
    for (layer, row, head), share in expected.items():
        received = share.sum(0).numpy()
        kept, at = len(received), (slots[row], layer, head)
        np.testing.assert_allclose(tables.mass[at][:kept], before[0][at][:kept] + received, atol=2e-5)
        np.testing.assert_array_equal(tables.mass[at][kept:], before[0][at][kept:])
        votes = before[1][at][:kept] * VOTE_DECAY + received
        np.testing.assert_allclose(tables.votes[at][:kept], votes, rtol=1e-3, atol=1e-5)
        np.testing.assert_array_equal(tables.votes[at][kept:], before[1][at][kept:])
        blocks = np.pad(received, (0, -kept % BLOCK_TOKENS)).reshape(-1, BLOCK_TOKENS).sum(1) / len(share)
        np.testing.assert_allclose(plan.block_mass[layer, row, head, : len(blocks)], blocks, atol=1e-5)
        assert not plan.block_mass[layer, row, head, len(blocks) :].any()


@UNWRITTEN
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize(("kv_heads", "query_heads"), [(2, 2), (2, 6), (1, 7), (2, 16)])
def test_mixed_formats_and_tiers(name, make_world, unwritten, dtype, head_dim, kv_heads, query_heads):
    case = head_dim // 16 + query_heads + dtype.itemsize + 3 * (unwritten == np.inf)
    if name == "triton" and case % 6:
        pytest.skip("the interpreter is slow: a sixth will do")
    shape = CacheShape(2, kv_heads, query_heads, head_dim, dtype)
    kept = np.random.default_rng(head_dim).integers(0, 180, (3, 2, kv_heads))
    check_step(make_world(shape, kept, ALL_FORMATS, ALL_TIERS, unwritten=unwritten), [2, 0])


@pytest.mark.parametrize("kept", [0, 1, 30, 31, 32, 33, SPLIT_TOKENS - 1, SPLIT_TOKENS, 2 * SPLIT_TOKENS + 65])
def test_lengths(make_world, kept):
    shape = CacheShape(1, 1, 3, 64, torch.float32)
    check_step(make_world(shape, np.full((1, 1, 1), kept), ALL_FORMATS, ALL_TIERS), [0])


@UNWRITTEN
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_heads_of_any_length(make_world, unwritten, dtype):
    """Evictors leave heads of one layer of their own lengths, down to the new token alone; some tails hold just it."""
    kept = np.array([[[0, 64, 31, 77]], [[32, 0, 1, 0]]])
    check_step(make_world(CacheShape(1, 4, 12, 32, dtype), kept, ALL_FORMATS, ALL_TIERS, unwritten=unwritten), [0, 1])


@pytest.mark.parametrize("head_dim", [2, 6, 36, 48, 96])
def test_odd_head_dims(make_world, head_dim):
    shape = CacheShape(1, 2, 6, head_dim, torch.float32)
    check_step(make_world(shape, np.array([[[97, 40]]]), ALL_FORMATS, ALL_TIERS), [0])


@UNWRITTEN
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 9),
    head_dim=st.integers(1, 40).map(lambda half: 2 * half),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    formats=st.sets(st.sampled_from(Format), min_size=1).map(tuple),
    tiers=st.sets(st.sampled_from(MEMORY_TIERS), min_size=1).map(tuple),
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
)
def test_any_shape(make_world, unwritten, kv_heads, group, head_dim, dtype, formats, tiers, lengths, seed):
    shape = CacheShape(1, kv_heads, kv_heads * group, head_dim, dtype)
    spread = np.random.default_rng(seed).integers(0, 70, (len(lengths), 1, kv_heads))
    world = make_world(shape, np.array(lengths)[:, None, None] + spread, formats, tiers, seed, unwritten)
    check_step(world, list(range(len(lengths))), seed)


def test_steps_add_up(make_world):
    world = make_world(CacheShape(1, 2, 4, 64, torch.float32), np.array([[[40, 63]], [[10, 1]]]))
    for seed in range(4):  # crosses into a new block
        check_step(world, [0, 1], seed)
        world.tables.length += 1


def test_scores_of_any_size(make_world):
    """Softmax neither overflows nor loses the one token that matters."""
    world = make_world(CacheShape(1, 1, 2, 64, torch.float32), np.array([[[600]]]))
    q, k, v = world.step([0])
    output = world.backend.decode(world.backend.plan(np.array([0], np.int32)), 0, q, k, v, 100.0)
    world.backend.settle(np.array([0], np.int32))
    world.extend([0], 0, k, v)
    expected, shares = world.attention(0, 0, q[0], 100.0)
    torch.testing.assert_close(output[0].double(), expected, rtol=0, atol=2e-3)
    np.testing.assert_allclose(world.tables.mass[0, 0, 0, :601], shares[0].sum(0), atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_neighbours_change_nothing(name, make_world, dtype):
    """A request's output is the same, bit for bit, alone and in any batch."""
    shape = CacheShape(1, 2, 6, 64, dtype)
    kept = np.array([[[1500, 700]], [[31, 5]], [[900, 2000]], [[64, 513]]])
    if name == "triton":  # the interpreter is slow, and splits are shorter
        kept //= 3

    def run(slots):
        world = make_world(shape, kept, ALL_FORMATS, ALL_TIERS)
        plan, tables = world.backend.plan(np.array(slots, np.int32)), world.tables
        output = world.backend.decode(plan, 0, *world.step(slots), 0.125)
        world.backend.finish(plan)
        world.backend.settle(plan.slots)
        return {
            slot: (output[row].float(), tables.mass[slot], tables.votes[slot], plan.block_mass[0, row, :, :1])
            for row, slot in enumerate(slots)
        }

    alone = {slot: run([slot])[slot] for slot in range(4)}
    for slots in ([0, 1, 2, 3], [3, 0], [2, 1, 0]):
        for slot, results in run(slots).items():
            assert results[1].any()
            for together, single in zip(results, alone[slot], strict=True):
                np.testing.assert_array_equal(np.asarray(together), np.asarray(single))


@pytest.mark.parametrize("fmt", Format)
def test_tier_changes_nothing(make_world, fmt):
    shape, kept = CacheShape(1, 2, 6, 64, torch.float32), np.array([[[700, 64]]])

    def run(tier):
        world = make_world(shape, kept, (fmt,), (tier,))
        return world.backend.decode(world.backend.plan(np.array([0], np.int32)), 0, *world.step([0]), 0.125)

    assert torch.equal(run(Tier.DEVICE), run(Tier.HOST))


def test_strided_queries(make_world):
    """Queries arrive as a slice of a longer projection."""
    world = make_world(CacheShape(1, 2, 4, 64, torch.float32), np.array([[[40, 63]]]))
    q, k, v = world.step([0])
    plan = world.backend.plan(np.array([0], np.int32))
    expected = world.backend.decode(plan, 0, q.clone(), k.clone(), v.clone(), 0.125)
    wide = torch.cat([q, k, v], 1).mT.contiguous().mT
    assert torch.equal(world.backend.decode(plan, 0, *wide.split([4, 2, 2], 1), 0.125), expected)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tables: tables.length.fill(0), "length 0"),
        (lambda tables: tables.format.fill(Format.INT8), "tail block"),
        (lambda tables: tables.tier.fill(Tier.HOST), "tail block"),
        (lambda tables: tables.length.fill(1000), "length 1000"),
    ],
)
def test_plan_refuses(make_world, spoil, message):
    world = make_world(CacheShape(1, 1, 1, 64, torch.float32), np.array([[[40]]]))
    spoil(world.tables)
    with pytest.raises(ValueError, match=message):
        world.backend.plan(np.array([0], np.int32))


def test_plan_refuses_a_slot_twice(make_world):
    world = make_world(CacheShape(1, 1, 1, 64, torch.float32), np.array([[[40]]]))
    with pytest.raises(ValueError, match="once"):
        world.backend.plan(np.array([0, 0], np.int32))
