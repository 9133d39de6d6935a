"""Attention in parts: over some tiers, beside their memory, and over states of fixed size, all merged by ``decode``."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.api import VOTE_DECAY
from kernels.backends import make_backend
from kernels.layout import BLOCK_TOKENS, MEMORY_TIERS, CacheShape, Format, Tier
from kernels.partials import Partial, merge

ALL_FORMATS, ALL_TIERS = tuple(Format), MEMORY_TIERS
SHAPE = CacheShape(2, 2, 6, 64, torch.float32)
KEPT = np.array([[[140, 63], [0, 97]], [[10, 1], [70, 200]], [[64, 32], [31, 129]]])
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # the output's own rounding


def rows(*slots):
    return np.array(slots, np.int32)


class State:
    """A fixed-size state's answer to queries [R, query heads, D]: what linear attention sums up, in float64."""

    def __init__(self, shape, seed):
        g = torch.Generator().manual_seed(seed)
        self.numerator = torch.randn(shape, generator=g, dtype=torch.float64) * 20
        self.denominator = torch.rand(shape[:2], generator=g, dtype=torch.float64) * 20 + 0.1

    def partial(self):
        return Partial((self.numerator / self.denominator[..., None]).float(), self.denominator.log().float())


def plain(world, slot, layer, q, scaling, tiers=ALL_TIERS, states=(), row=0):
    """Output, lse, and each head's shares [G, kept] of the tokens on these tiers and one row of these states, for
    q [query heads, D]: sum(exp(score) v) + numerators over sum(exp(score)) + denominators, in float64."""
    numerators = sum((state.numerator[row] for state in states), torch.zeros_like(q, dtype=torch.float64))
    denominators = sum((state.denominator[row] for state in states), torch.zeros(len(q), dtype=torch.float64))
    group, shares, totals = world.shape.queries_per_kv_head, [], []
    for head, queries in enumerate(q.double().split(group)):
        keys, values = world.kv[slot, layer, head]
        of_head = slice(head * group, (head + 1) * group)
        tier = world.tables.tier[slot, layer, head].repeat(BLOCK_TOKENS)[: len(keys)]
        known = world.tables.format[slot, layer, head].repeat(BLOCK_TOKENS)[: len(keys)] < len(Format)
        powers = torch.exp(queries @ keys.T * scaling) * torch.from_numpy(np.isin(tier, tiers) & known)
        total = powers.sum(1) + denominators[of_head]
        numerators[of_head] += powers @ values
        shares.append(powers / total[:, None])
        totals.append(total)
    total = torch.cat(totals)
    return torch.where(total[:, None] > 0, numerators / total[:, None], 0.0), total.log(), shares


def check_step(world, slots, tiers, parts_of, states=(), read=ALL_TIERS, seed=0):
    """Decodes a token in all layers over the blocks of some tiers, with what ``parts_of(layer, q)`` and the states
    give, and compares with the plain computation over the blocks of all the tiers ``read`` and the states."""
    shape, tables, scaling = world.shape, world.tables, world.shape.head_dim**-0.5
    before = tables.mass.copy(), tables.votes.astype(np.float32)
    steps = [world.step(slots, seed + layer) for layer in range(shape.layers)]
    parts = [[*parts_of(layer, q), *(state.partial() for state in states)] for layer, (q, _, _) in enumerate(steps)]
    plan = world.backend.plan(rows(*slots), tiers)
    expected = {}
    for layer, (q, k, v) in enumerate(steps):
        lse = torch.empty(q.shape[:2], device=q.device)
        output = world.backend.decode(plan, layer, q, k, v, scaling, parts[layer], lse)
        world.extend(slots, layer, k, v)
        for row, slot in enumerate(slots):
            wanted, wanted_lse, shares = plain(world, slot, layer, q[row], scaling, read, states, row)
            torch.testing.assert_close(lse[row].double(), wanted_lse, rtol=1e-6, atol=1e-4)
            torch.testing.assert_close(output[row].double(), wanted, rtol=0, atol=TOLERANCE[shape.dtype])
            expected.update({(layer, row, head): share for head, share in enumerate(shares)})
    world.backend.finish(plan)
    world.backend.settle(plan.slots)
    for (layer, row, head), share in expected.items():
        at, kept = (slots[row], layer, head), share.shape[1]
        here = np.isin(tables.tier[at].repeat(BLOCK_TOKENS)[:kept], tiers)
        received = np.where(here, share.sum(0).numpy(), 0)
        np.testing.assert_allclose(tables.mass[at][:kept], before[0][at][:kept] + received, atol=2e-5)
        np.testing.assert_array_equal(tables.mass[at][kept:], before[0][at][kept:])
        votes = before[1][at][:kept] * VOTE_DECAY + received
        np.testing.assert_allclose(tables.votes[at][:kept], votes, rtol=1e-3, atol=1e-5)
        blocks = np.pad(received, (0, -kept % BLOCK_TOKENS)).reshape(-1, BLOCK_TOKENS).sum(1) / len(share)
        np.testing.assert_allclose(plan.block_mass[layer, row, head, : len(blocks)], blocks, atol=1e-5)
        unread = np.isin(tables.tier[at][: len(blocks)], tiers, invert=True)
        assert not plan.block_mass[layer, row, head, : len(blocks)][unread].any()


def attended(backend, slots, tiers, scaling):
    """What a backend finds on these tiers, for ``check_step``."""
    return lambda layer, q: [backend.attend(backend.plan(rows(*slots), tiers, appends=False), layer, q, scaling)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_device_and_host_apart(make_world, dtype):
    shape = CacheShape(2, 2, 6, 64, dtype)
    world = make_world(shape, KEPT, ALL_FORMATS, ALL_TIERS)
    check_step(world, [2, 0], (Tier.DEVICE,), attended(world.backend, [2, 0], (Tier.HOST,), 0.125))


def test_what_is_not_read_fades(make_world):
    """Votes of tokens that a step leaves out fade as others do, whenever they are settled."""
    world = make_world(SHAPE, KEPT, ALL_FORMATS, ALL_TIERS)
    q, k, v = world.step([0])
    for tiers in (ALL_TIERS, (Tier.DEVICE,), (Tier.DEVICE,)):
        world.backend.decode(world.backend.plan(rows(0), tiers), 0, q, k, v, 0.125)  # the same token thrice
    world.backend.settle(rows(0))
    world.extend([0], 0, k, v)
    assert (world.tables.tier[0, 0] == Tier.HOST).any()
    shares = plain(world, 0, 0, q[0], 0.125)[2]
    for head, share in enumerate(shares):
        received, kept = share.sum(0).numpy(), share.shape[1]
        on_host = world.tables.tier[0, 0, head].repeat(BLOCK_TOKENS)[:kept] == Tier.HOST
        mass, votes = world.tables.mass[0, 0, head, :kept], world.tables.votes[0, 0, head, :kept]
        np.testing.assert_allclose(mass[on_host], received[on_host], atol=1e-5)
        np.testing.assert_allclose(votes[on_host], received[on_host] * VOTE_DECAY**2, rtol=2e-3, atol=1e-5)
        assert (mass[~on_host] > received[~on_host]).all()


def test_near_data(make_world):
    """The host's blocks are attended by a backend on the host, which has no device arena, through the same tables."""
    world = make_world(SHAPE, KEPT, ALL_FORMATS, ALL_TIERS)
    nowhere = torch.empty(0, dtype=torch.uint8)
    near = make_backend("cpu", SHAPE, (nowhere, world.backend.arenas[Tier.HOST]), world.tables)
    check_step(world, [2, 0], (Tier.DEVICE,), attended(near, [2, 0], (Tier.HOST,), 0.125))


@pytest.mark.parametrize("count", [1, 3])
def test_states_of_fixed_size(make_world, count):
    world = make_world(SHAPE, KEPT, ALL_FORMATS, ALL_TIERS)
    states = [State((3, 6, 64), seed) for seed in range(count)]
    check_step(world, [1, 2, 0], ALL_TIERS, lambda layer, q: [], states)


def test_attend_changes_nothing(make_world):
    """Parts over each tier merge to that over both; no token is written, no mass added."""
    world = make_world(SHAPE, KEPT, ALL_FORMATS, ALL_TIERS)
    backend, tables = world.backend, world.tables
    tables.length -= 1  # no step is on its way
    q, _, _ = world.step([0, 2])
    before = [arena.clone() for arena in backend.arenas]
    parts = {}
    for tiers in (ALL_TIERS, (Tier.DEVICE,), (Tier.HOST,)):
        plan = backend.plan(rows(0, 2), tiers, appends=False)
        parts[tiers] = backend.attend(plan, 1, q, 0.125)
        for row, slot in enumerate([0, 2]):
            output, lse, _ = plain(world, slot, 1, q[row], 0.125, tiers)
            torch.testing.assert_close(parts[tiers].output[row].double(), output, rtol=0, atol=1e-5)
            torch.testing.assert_close(parts[tiers].lse[row].double(), lse, rtol=1e-6, atol=1e-5)
        backend.finish(plan)
        assert not plan.block_mass.any()
    merged = merge([parts[Tier.HOST,], parts[Tier.DEVICE,]])
    torch.testing.assert_close(merged.output, parts[ALL_TIERS].output, rtol=0, atol=1e-5)
    torch.testing.assert_close(merged.lse, parts[ALL_TIERS].lse, rtol=1e-6, atol=1e-5)
    backend.settle(rows(0, 2))
    assert not tables.mass.any()
    assert not tables.votes.any()
    assert all(torch.equal(*both) for both in zip(before, backend.arenas, strict=True))


def test_nothing_there(make_world):
    """Empty tables, and tables without a block on the tier, in one batch with others; merging them changes no bit."""
    world = make_world(SHAPE, KEPT, ALL_FORMATS)
    backend = world.backend
    q, k, v = world.step([0, 1, 2])
    nothing = backend.attend(backend.plan(rows(0, 1, 2), (Tier.HOST,), appends=False), 0, q, 0.125)
    length = world.tables.length.copy()
    world.tables.length[1] = 0
    mixed = backend.attend(backend.plan(rows(0, 1), (Tier.DEVICE,), appends=False), 0, q[:2], 0.125)
    alone = backend.attend(backend.plan(rows(1), appends=False), 0, q[1:2], 0.125)
    world.tables.length[:] = length
    for output, lse in ((nothing.output, nothing.lse), (mixed.output[1], mixed.lse[1]), (alone.output, alone.lse)):
        assert (output == 0).all()
        assert (lse == -torch.inf).all()

    results = []
    for partials in ([], [nothing], [nothing, nothing]):
        world.tables.mass[:] = 0
        plan = backend.plan(rows(0, 1, 2))
        output = backend.decode(plan, 0, q, k, v, 0.125, partials)
        backend.finish(plan)
        backend.settle(plan.slots)
        results.append((output.numpy(), world.tables.mass.copy(), plan.block_mass))
    for other in results[1:]:
        assert all(np.array_equal(*both) for both in zip(other, results[0], strict=True))


@pytest.mark.parametrize("lse", [-1e4, -200.0, 200.0, 1e4])
def test_one_part_that_is_all(make_world, lse):
    """Where one side has all the weight, the result is that side's and nothing overflows."""
    world = make_world(SHAPE, KEPT, ALL_FORMATS, ALL_TIERS)
    q, k, v = world.step([0])
    part = Partial(torch.randn(q.shape), torch.full(q.shape[:2], lse))
    output = world.backend.decode(world.backend.plan(rows(0)), 0, q, k, v, 0.125, [part])
    world.backend.settle(rows(0))
    world.extend([0], 0, k, v)
    here, _, shares = plain(world, 0, 0, q[0], 0.125)
    torch.testing.assert_close(output[0].double(), part.output[0].double() if lse > 0 else here, rtol=0, atol=1e-5)
    received = shares[0].sum(0) * (lse < 0)
    np.testing.assert_allclose(world.tables.mass[0, 0, 0, : len(received)], received, atol=2e-5)


def test_neighbours_change_nothing(name, make_world):
    """With partials and tiers left out, too, a request's output is the same, bit for bit, in any batch."""
    shape, kept = CacheShape(1, 2, 6, 64, torch.float32), np.array([[[1500, 700]], [[31, 5]], [[900, 1100]]])
    if name == "triton":  # the interpreter is slow, and splits are shorter
        kept //= 3
    states = State((3, 6, 64), 1).partial()

    def run(slots):
        world = make_world(shape, kept, ALL_FORMATS, ALL_TIERS)
        q, k, v = world.step(slots)
        host = world.backend.attend(world.backend.plan(rows(*slots), (Tier.HOST,), appends=False), 0, q, 0.125)
        parts = [host, Partial(states.output[slots], states.lse[slots])]
        plan = world.backend.plan(rows(*slots), (Tier.DEVICE,))
        output = world.backend.decode(plan, 0, q, k, v, 0.125, parts)
        world.backend.settle(plan.slots)
        mass = world.tables.mass
        return {slot: (output[row], host.output[row], host.lse[row], mass[slot]) for row, slot in enumerate(slots)}

    together = run([2, 0, 1])
    for slot in range(3):
        alone = run([slot])[slot]
        assert all(np.array_equal(*both) for both in zip(together[slot], alone, strict=True))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 9),
    head_dim=st.integers(1, 40).map(lambda half: 2 * half),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    formats=st.sets(st.sampled_from(Format), min_size=1).map(tuple),
    tiers=st.sets(st.sampled_from(MEMORY_TIERS), min_size=1).map(tuple),
    read=st.sampled_from([(Tier.DEVICE,), ALL_TIERS]),
    host=st.booleans(),
    states=st.integers(0, 3),
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=3),
    unwritten=st.sampled_from([float("nan"), float("inf")]),
    seed=st.integers(0, 1000),
)
def test_any_parts(
    make_world, kv_heads, group, head_dim, dtype, formats, tiers, read, host, states, lengths, unwritten, seed
):
    shape, slots = CacheShape(1, kv_heads, kv_heads * group, head_dim, dtype), list(range(len(lengths)))
    spread = np.random.default_rng(seed).integers(0, 70, (len(lengths), 1, kv_heads))
    kept = np.array(lengths)[:, None, None] + spread
    world = make_world(shape, kept, formats, tiers, seed, unwritten)
    host = host and Tier.HOST not in read
    parts_of = attended(world.backend, slots, (Tier.HOST,), head_dim**-0.5) if host else lambda layer, q: []
    given_states = [State((len(slots), shape.query_heads, head_dim), seed + i) for i in range(states)]
    seen = (*read, Tier.HOST) if host else read
    check_step(world, slots, read, parts_of, given_states, seen, seed)


def test_merge():
    g = torch.Generator().manual_seed(0)
    lse = torch.tensor([0.0, 1.0, -1.0, 1e8, 1e8, -1e30, 3e38, -torch.inf, -torch.inf])
    other = torch.tensor([0.0, -1.0, 30.0, 1e8, -1e8, 1e30, -3e38, 2.0, -torch.inf])
    parts = [Partial(torch.randn(len(lse), 1, 8, generator=g), x[:, None]) for x in (lse, other)]
    merged = merge(parts)
    most = torch.maximum(lse, other).double()
    powers = [torch.where(x == -torch.inf, 0.0, (x.double() - most).exp()) for x in (lse, other)]
    wanted = sum(power[:, None, None] * part.output.double() for power, part in zip(powers, parts, strict=True))
    total = powers[0] + powers[1]
    wanted[:-1] /= total[:-1, None, None]
    torch.testing.assert_close(merged.output.double(), wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(merged.lse[:, 0].double(), most + total.log(), rtol=1e-6, atol=1e-6)
    assert not merged.output[-1].any()


@given(st.lists(st.floats(-100, 100, width=32) | st.just(-float("inf")), min_size=3, max_size=6))
def test_merge_in_any_grouping(lses):
    g = torch.Generator().manual_seed(1)
    parts = [Partial(torch.randn(1, 1, 4, generator=g), torch.tensor([[lse]])) for lse in lses]
    whole, grouped = merge(parts), merge([merge(parts[1:]), parts[0]])
    torch.testing.assert_close(whole.output, grouped.output, rtol=0, atol=1e-4)
    torch.testing.assert_close(whole.lse, grouped.lse, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("output", "lse", "message"),
    [
        (torch.zeros(1, 2, 4, dtype=torch.float16), torch.zeros(1, 2), "output: torch.float16"),
        (torch.zeros(1, 2, 4), torch.zeros(1, 2).double(), "lse: torch.float64"),
        (torch.zeros(2, 4), torch.zeros(1, 2), r"output: torch.float32 \(2, 4\), must be float32 with 3 dimensions"),
        (torch.zeros(1, 2, 4), torch.zeros(1, 3), r"lse: \(1, 3\), must be \(1, 2\)"),
    ],
)
def test_partial_refuses(output, lse, message):
    with pytest.raises(ValueError, match=message):
        Partial(output, lse)


def test_merge_refuses_nothing():
    with pytest.raises(ValueError, match="parts: got none"):
        merge([])


@pytest.mark.parametrize("size", [(1, 6, 64), (2, 2, 64), (2, 6, 32)])
def test_decode_refuses_partials_of_other_queries(make_world, size):
    world = make_world(SHAPE, KEPT)
    part = Partial(torch.zeros(size), torch.zeros(size[:2]))
    with pytest.raises(ValueError, match=r"partials: output of shape .*, must be q's \(2, 6, 64\)"):
        world.backend.decode(world.backend.plan(rows(0, 1)), 0, *world.step([0, 1]), 0.125, [part])


def test_plans_are_for_one_or_the_other(make_world):
    world = make_world(SHAPE, KEPT)
    q, k, v = world.step([0])
    with pytest.raises(ValueError, match="plan: appends nothing"):
        world.backend.decode(world.backend.plan(rows(0), appends=False), 0, q, k, v, 0.125)
    with pytest.raises(ValueError, match="appends=False"):
        world.backend.attend(world.backend.plan(rows(0)), 0, q, 0.125)


def test_tables_may_change_between_layers(make_world):
    """Blocks on disk, or of a format that kernels do not know, are not read; nor is what a table no longer names."""
    world = make_world(SHAPE, KEPT, ALL_FORMATS, ALL_TIERS, unwritten=float("inf"))
    tables, slots, scaling = world.tables, (0, 1, 2), 0.125
    plan = world.backend.plan(rows(*slots), changing=True)
    for layer in range(SHAPE.layers):
        long = tables.length[:, layer] > 2 * BLOCK_TOKENS  # the first two blocks are not the tail
        tables.tier[:, layer, :, 0][long] = Tier.DISK
        tables.address[:, layer, :, 0][long] = 2**31 - 1  # means nothing to a kernel
        tables.format[:, layer, :, 1][long] = 9
        world.backend.refresh(plan, layer)
        q, k, v = world.step(slots, layer)
        out = world.backend.decode(plan, layer, q, k, v, scaling)
        world.extend(slots, layer, k, v)
        for row, slot in enumerate(slots):
            expected, _, _ = plain(world, slot, layer, q[row], scaling)
            torch.testing.assert_close(out[row].double(), expected, rtol=0, atol=1e-5)
    world.backend.finish(plan)
    unread = (tables.tier == Tier.DISK) | (tables.format == 9)
    assert unread.sum() == 2 * 6
    blocks = plan.block_mass.shape[3]
    assert not plan.block_mass[unread.swapaxes(0, 1)[..., :blocks]].any()


def test_plan_refuses_tiers(make_world):
    backend = make_world(SHAPE, KEPT).backend
    with pytest.raises(ValueError, match="must read DEVICE"):
        backend.plan(rows(0), (Tier.HOST,))
    with pytest.raises(ValueError, match="tiers: got 7, must be of"):
        backend.plan(rows(0), (7,), appends=False)
