"""Reading, writing and transcoding blocks."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.api import TokenSource
from kernels.layout import BLOCK_TOKENS, MEMORY_TIERS, CacheShape, Format, Tier

FP32 = CacheShape(1, 1, 1, 64, torch.float32)
LEVELS = {Format.INT8: 255, Format.INT4: 15, Format.INT2: 3}
ZERO_WITHIN = {Format.INT8: 0.02, Format.INT4: 0.3, Format.INT2: 1.5}  # of normal numbers: half a step
QUANTISED = [fmt for fmt in Format if fmt is not Format.RAW]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def bits(x):
    return x.contiguous().view(torch.uint8)


def raw_world(make_world, shape, k, v):
    """A world with K, V [32, D] as its only full block."""
    world = make_world(shape, np.full((1, 1, 1), BLOCK_TOKENS))
    world.backend.write(0, 0, 0, k[None], v[None])
    return world


def whole(world, tokens=BLOCK_TOKENS):
    return world.source(0, 0, 0, list(range(tokens)))


@pytest.mark.parametrize("head_dim", [2, 16, 64, 80, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", QUANTISED, ids=str)
def test_round_trip_error(make_world, unpack_block, fmt, dtype, head_dim):
    """Each number comes back within half a step of its group, float16's rounding of the step included.

    The steps of fp8 are an eighth of the power of 2 below the number, and 1/512 of the group's scale at least.
    """
    shape = CacheShape(1, 1, 1, head_dim, dtype)
    k, v = (torch.randn(2, BLOCK_TOKENS, head_dim) * 3 + 1).to(dtype)
    world = raw_world(make_world, shape, k, v)
    block = world.backend.encode(whole(world), fmt)
    assert block.shape == (1, shape.block_bytes(fmt))
    assert not block[0, shape.payload_bytes(fmt) :].any()
    k_back, v_back = map(torch.from_numpy, unpack_block(shape, fmt, block[0]))
    k, v = k.double(), v.double()

    def check(back, x, low, high):
        if fmt is Format.FP8:
            scale = torch.maximum(low.abs(), high.abs()) / 448 * (1 + 2**-9) + 1e-7
            assert ((back - x).abs() <= torch.maximum(x.abs() * 2**-4, scale * 2**-10) * (1 + 1e-6)).all()
            return
        step = (high - low) * (1 + 2**-9) / LEVELS[fmt] + 2**-10 * low.abs() / LEVELS[fmt] + 1e-6
        assert ((back - x).abs() <= step / 2 + 1e-6 * x.abs()).all()

    check(k_back, k, k.amin(0), k.amax(0))  # a group per channel
    for start in range(0, head_dim, 32):  # a group per token and 32 channels
        group = slice(start, start + 32)
        least, most = v[:, group].amin(1, True), v[:, group].amax(1, True)
        check(v_back[:, group], v[:, group], least, most)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fmt=st.sampled_from(QUANTISED),
    dtype=st.sampled_from(DTYPES),
    head_dim=st.integers(1, 50).map(lambda half: 2 * half),
    offset=st.sampled_from([0.0, 1e-7, 1.0, -300.0, 7e4]),
    spread=st.sampled_from([0.0, 1e-8, 1e-3, 1.0, 1e3, 1e5]),
    specials=st.sets(st.sampled_from([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 65504.0, 6e-8])),
    seed=st.integers(0, 1000),
)
def test_backends_agree_on_every_byte(names, make_any_world, fmt, dtype, head_dim, offset, spread, specials, seed):
    rng = np.random.default_rng(seed)
    numbers = offset + spread * rng.standard_normal((2, BLOCK_TOKENS, head_dim))
    for special in specials:
        numbers[rng.random(numbers.shape) < 0.05] = special
    k, v = torch.from_numpy(numbers).to(dtype)
    shape = CacheShape(1, 1, 1, head_dim, dtype)
    order = rng.permutation(BLOCK_TOKENS).astype(np.uint8)[None]
    results = []
    for name in names:
        world = raw_world(lambda *args, name=name: make_any_world(name, *args), shape, k, v)
        block = world.backend.encode(whole(world), fmt)
        world.backend.store(Tier.HOST, np.zeros(1, np.int32), block)
        address, formats, tier = (np.full((1, BLOCK_TOKENS), x, np.uint8) for x in (0, fmt, Tier.HOST))
        source = TokenSource(address.astype(np.int32), formats, tier, order)
        again = [world.backend.encode(source, other) for other in Format]
        results.append([block, *map(bits, world.backend.read(source)), *again])
    for reference, *others in zip(*results, strict=True):
        for other in others:
            assert torch.equal(reference, other)


@pytest.mark.parametrize("fmt", list(LEVELS), ids=str)
def test_what_float16_cannot_hold(make_world, unpack_block, fmt):
    """Too great numbers are clamped, NaN counts as 0, a constant group comes back as its float16."""
    k = torch.randn(BLOCK_TOKENS, 64)
    k[:, 0], k[:, 1], k[:, 2] = 1e6, torch.linspace(-1e6, 1e6, BLOCK_TOKENS), torch.nan
    k[:, 3], k[:, 4] = 0.1, 50017.0
    k[5, 5] = torch.nan
    world = raw_world(make_world, FP32, k, k)
    back, _ = unpack_block(FP32, fmt, world.backend.encode(whole(world), fmt)[0])
    assert np.isfinite(back).all()
    assert (back[:, 0] == 65504).all()
    assert back[:, 1].min() == -65504
    assert abs(back[:, 1].max() - 65504) <= 64
    assert (back[:, 2] == 0).all()
    assert (back[:, 3] == np.float16(0.1)).all()
    assert (back[:, 4] == np.float16(50017.0)).all()
    assert abs(back[5, 5]) <= ZERO_WITHIN[fmt]


def test_what_fp8_cannot_hold(make_world, unpack_block):
    """As above; and no code means NaN, whatever it is made of."""
    k = torch.randn(BLOCK_TOKENS, 64)
    k[:, 0], k[:, 1], k[:, 2], k[:, 3] = 1e6, torch.linspace(-1e6, 1e6, BLOCK_TOKENS), torch.nan, 0.0
    k[5, 5], k[6, 6], k[7, 7] = torch.nan, torch.inf, -torch.inf
    world = raw_world(make_world, FP32, k, k)
    back, values = unpack_block(FP32, Format.FP8, world.backend.encode(whole(world), Format.FP8)[0])
    assert np.isfinite(back).all()
    assert np.isfinite(values).all()
    assert (abs(back[:, 0] - 65504) <= 448 / 2).all()
    assert abs(back[:, 1].min() + 65504) <= 448 / 2
    assert (back[:, 2:4] == 0).all()
    assert back[5, 5] == 0
    assert (back[6, 6], back[7, 7]) == (-back[7, 7], -back[6, 6])


def test_fp8_keeps_its_own_numbers(make_world, unpack_block):
    """All 254 e4m3 numbers come back as they are from groups whose scale is 1, ties go to the even code."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(0.0)
    x = torch.full((BLOCK_TOKENS, 64), 448.0)
    x[:16, :16] = numbers.view(16, 16)
    x[16, :2] = torch.tensor([17.0, 19.0])  # between 16 and 18, 18 and 20
    world = raw_world(make_world, FP32, x, x)
    for back in unpack_block(FP32, Format.FP8, world.backend.encode(whole(world), Format.FP8)[0]):
        assert back[16, :2].tolist() == [16.0, 20.0]
        assert np.array_equal(back[:16], x[:16].double().numpy())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_raw_is_bit_exact(make_world, dtype):
    """Any bits survive: NaNs with their payloads, negative zeros, subnormals."""
    shape = CacheShape(1, 1, 1, 64, dtype)
    noise = torch.randint(0, 256, (2, BLOCK_TOKENS, 64 * dtype.itemsize), dtype=torch.uint8)
    k, v = noise.view(dtype)
    world = raw_world(make_world, shape, k, v)
    order = torch.randperm(BLOCK_TOKENS)
    source = world.source(0, 0, 0, order.tolist())
    got_k, got_v = world.backend.read(source)
    assert torch.equal(bits(got_k[0]), noise[0, order])
    assert torch.equal(bits(got_v[0]), noise[1, order])
    block = world.backend.encode(source, Format.RAW)
    assert torch.equal(block[0, : noise.nbytes], noise[:, order].flatten())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_read_gathers_from_anywhere(make_world, dtype):
    """Tokens in any order, from blocks of all formats and tiers."""
    shape = CacheShape(1, 2, 2, 80, dtype)
    world = make_world(shape, np.full((1, 1, 2), 300), tuple(Format), MEMORY_TIERS)
    tokens = np.random.default_rng(0).permutation(300)[:75].tolist()
    for head in range(2):
        keys, values = world.backend.read(world.source(0, 0, head, tokens))
        assert keys.shape == values.shape == (3, BLOCK_TOKENS, 80)
        for got, stored in zip((keys, values), world.kv[0, 0, head], strict=True):
            flat = got.flatten(0, 1)
            exact = torch.finfo(dtype).eps / 2 if dtype is not torch.float32 else 1e-6
            torch.testing.assert_close(flat[:75].double(), stored[tokens], rtol=exact, atol=1e-6)
            assert not flat[75:].any()


@pytest.mark.parametrize("fmt", Format)
def test_encode_pads_with_zeros(make_world, unpack_block, fmt):
    world = raw_world(make_world, FP32, *torch.randn(2, BLOCK_TOKENS, 64))
    block = world.backend.encode(whole(world, tokens=20), fmt)
    for part, stored in zip(unpack_block(FP32, fmt, block[0]), world.backend.read(whole(world)), strict=True):
        assert np.abs(part[20:]).max() <= ZERO_WITHIN.get(fmt, 0)
        within = 0.3 if fmt is Format.FP8 else ZERO_WITHIN.get(fmt, 0)
        assert np.abs(part[:20] - stored[0, :20].numpy()).max() <= within


@pytest.mark.parametrize("fmt", Format)
def test_transcoding_puts_blocks_where_they_are_to_lie(make_world, fmt):
    """What ``encode`` gives, and not a byte beside it."""
    world = make_world(FP32, np.full((1, 1, 1), 96), (Format.RAW, Format.INT4))  # all blocks on the device
    places = world.tables.address[0, 0, 0]
    for tier, address in ((Tier.HOST, places[[2, 0, 1]]), (Tier.DEVICE, places[4:])):  # the last one is nobody's
        source = world.source(0, 0, 0, list(range(7, 7 + 32 * len(address) - 5)))
        before = world.backend.arenas[tier].clone()
        world.backend.transcode(source, fmt, tier, address)
        blocks = world.backend.encode(source, fmt)
        assert torch.equal(world.backend.load(tier, address, fmt), blocks)
        world.backend.store(tier, address, torch.full_like(blocks, 0xFF))  # as all memory was
        assert torch.equal(world.backend.arenas[tier], before)


@pytest.mark.parametrize("fmt", Format)
def test_encode_to_the_same_format_changes_nothing(make_world, fmt):
    """Quantising twice does not lose twice."""
    world = make_world(FP32, np.full((1, 1, 1), 96), (fmt,), MEMORY_TIERS)
    blocks = world.backend.encode(world.source(0, 0, 0, list(range(96))), fmt)
    for b in range(3):
        stored = world.backend.load(world.tables.tier[0, 0, 0, b], world.tables.address[0, 0, 0, b : b + 1], fmt)
        size = FP32.payload_bytes(fmt)
        assert torch.equal(blocks[b, :size], stored[0, :size])


def test_encode_of_nothing(make_world):
    world = make_world(FP32, np.full((1, 1, 1), 3))
    nothing = world.source(0, 0, 0, [])
    for fmt in Format:
        assert world.backend.encode(nothing, fmt).shape == (0, FP32.block_bytes(fmt))
    assert world.backend.read(nothing)[0].shape == (0, BLOCK_TOKENS, 64)


@pytest.mark.parametrize("fmt", Format)
@pytest.mark.parametrize("tier", MEMORY_TIERS)
def test_store_and_load(make_world, fmt, tier):
    world = make_world(FP32, np.full((1, 1, 1), 100))
    arena = world.backend.arenas[tier]
    units = FP32.block_units(fmt)
    address = np.array([3 * units, 0, units], np.int32)
    before = arena.clone()
    blocks = torch.randint(0, 256, (3, FP32.block_bytes(fmt)), dtype=torch.uint8)
    world.backend.store(tier, address, blocks)
    assert torch.equal(world.backend.load(tier, address, fmt), blocks)
    untouched = torch.ones(len(arena), dtype=torch.bool)
    for at in address:
        untouched[at * 256 : (at + units) * 256] = False
    assert torch.equal(arena[untouched], before[untouched])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("start", "count"), [(0, 1), (0, 100), (31, 2), (32, 32), (40, 57), (63, 65)])
def test_write(make_world, dtype, start, count):
    """Tokens land in their blocks, and nothing else changes."""
    shape = CacheShape(1, 2, 2, 16, dtype)
    world = make_world(shape, np.full((1, 1, 2), 130))
    k, v = torch.randn(2, 2, count, 16).to(dtype)
    world.backend.write(0, 0, start, k, v)
    for head in range(2):
        keys, values = world.backend.read(world.source(0, 0, head, list(range(130))))
        for got, wrote, old in zip((keys, values), (k, v), world.kv[0, 0, head], strict=True):
            expected = old.to(dtype)
            expected[start : start + count] = wrote[head, : 130 - start]
            assert torch.equal(got.flatten(0, 1)[:130], expected)


def test_write_refuses_what_is_not_raw(make_world):
    world = make_world(FP32, np.full((1, 1, 1), 100), (Format.INT8,))
    with pytest.raises(ValueError, match="raw device blocks"):
        world.backend.write(0, 0, 60, *torch.zeros(2, 1, 10, 64))
    world.backend.write(0, 0, 96, *torch.zeros(2, 1, 10, 64))
    with pytest.raises(ValueError, match="tables hold"):
        world.backend.write(0, 0, 120, *torch.zeros(2, 1, 100, 64))
