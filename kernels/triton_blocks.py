"""Reading blocks inside Triton kernels: a function for each format, shared by attention and conversion.

Each takes ``base``, the first byte of a block: one pointer if all 32 tokens lie in one block, or pointers [32, 1] if
each lies in its own. ``row`` [32, 1] says which of its block's tokens each is, ``ok`` [32, 1] which to read at all;
the rest is zero. ``base_ok`` is ``ok``, or all ones [1, 1] for a single base. D is head_dim, W >= D a power of two.

The interpreter's casts to bfloat16 are wrong; ``narrow`` rounds by integer arithmetic, alike on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels import layout

TOKENS = tl.constexpr(layout.BLOCK_TOKENS)
UNIT = tl.constexpr(layout.UNIT_BYTES)
GROUP = tl.constexpr(layout.GROUP)
RAW = tl.constexpr(int(layout.Format.RAW))
INT8 = tl.constexpr(int(layout.Format.INT8))
INT4 = tl.constexpr(int(layout.Format.INT4))
INT2 = tl.constexpr(int(layout.Format.INT2))
FP8 = tl.constexpr(int(layout.Format.FP8))


@triton.jit
def block_base(address, tier, device, host):
    """First bytes of the blocks at these unit offsets of these tiers' arenas."""
    return tl.where(tier == 0, device, host) + address.to(tl.int64) * UNIT


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """float32 rounded to the nearest ``DTYPE``, ties to even."""
    if tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        high = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, high, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def groups_to_channels(x, W: tl.constexpr):
    """One number a group of 32 channels [32, groups] as one a channel [32, W]."""
    groups: tl.constexpr = x.shape[1]
    wide = tl.broadcast_to(tl.expand_dims(x, 2), [TOKENS, groups, W // groups])
    return tl.reshape(wide, [TOKENS, W])


@triton.jit
def raw_tokens(base, row, ok, DTYPE: tl.constexpr, D: tl.constexpr, W: tl.constexpr):
    """K and V [32, W] as stored."""
    channel = tl.arange(0, W)[None, :]
    at = base.to(tl.pointer_type(DTYPE)) + row * D + channel
    inside = ok & (channel < D)
    return tl.load(at, mask=inside, other=0), tl.load(at + TOKENS * D, mask=inside, other=0)


@triton.jit
def integer_tokens(
    base,
    row,
    ok,
    base_ok,
    PER_BYTE: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
):
    """K and V float32 [32, W] of a format of integers, ``PER_BYTE`` to a byte: code * scale + zero."""
    row_bytes: tl.constexpr = (D + PER_BYTE - 1) // PER_BYTE
    bits: tl.constexpr = 8 // PER_BYTE
    channel = tl.arange(0, W)[None, :]
    inside = channel < D
    at = base + row * row_bytes + channel % row_bytes  # neighbours of a warp share bytes: nothing is fetched twice
    k_code = tl.load(at, mask=ok & inside, other=0)
    v_code = tl.load(at + TOKENS * row_bytes, mask=ok & inside, other=0)
    if PER_BYTE > 1:
        shift = (channel // row_bytes * bits).to(tl.uint8)
        k_code = (k_code >> shift) & ((1 << bits) - 1)
        v_code = (v_code >> shift) & ((1 << bits) - 1)
    constants = (base + 2 * TOKENS * row_bytes).to(tl.pointer_type(tl.float16))
    k_scale = tl.load(constants + channel, mask=base_ok & inside, other=0).to(tl.float32)
    k_zero = tl.load(constants + D + channel, mask=base_ok & inside, other=0).to(tl.float32)
    v_scale = _value_constants(constants + 2 * D, row, ok, D, W)
    v_zero = _value_constants(constants + 2 * D, row + TOKENS, ok, D, W)
    return k_code.to(tl.float32) * k_scale + k_zero, v_code.to(tl.float32) * v_scale + v_zero


@triton.jit
def fp8_tokens(base, row, ok, base_ok, D: tl.constexpr, W: tl.constexpr):
    """K and V float32 [32, W] of fp8 blocks: decode(code) * scale."""
    channel = tl.arange(0, W)[None, :]
    inside = channel < D
    at = base + row * D + channel
    k_code = tl.load(at, mask=ok & inside, other=0)
    v_code = tl.load(at + TOKENS * D, mask=ok & inside, other=0)
    constants = (base + 2 * TOKENS * D).to(tl.pointer_type(tl.float16))
    k_scale = tl.load(constants + channel, mask=base_ok & inside, other=0).to(tl.float32)
    v_scale = _value_constants(constants + D, row, ok, D, W)
    return decode_e4m3(k_code) * k_scale, decode_e4m3(v_code) * v_scale


@triton.jit
def decode_e4m3(code):
    """float32 of e4m3 codes by their bits, which needs no hardware for them: float16 with another exponent bias."""
    wide = code.to(tl.int16)
    half = ((wide & 128) << 8 | (wide & 127) << 7).to(tl.float16, bitcast=True)
    return half.to(tl.float32) * 256.0


@triton.jit
def _value_constants(at, row, ok, D: tl.constexpr, W: tl.constexpr):
    """Rows of float16 [.., G] as float32 [32, W], a group's number for each of its channels."""
    groups: tl.constexpr = (D + GROUP - 1) // GROUP
    columns: tl.constexpr = (W + GROUP - 1) // GROUP
    group = tl.arange(0, columns)[None, :]
    numbers = tl.load(at + row * groups + group, mask=ok & (group < groups), other=0)
    return groups_to_channels(numbers.to(tl.float32), W)


@triton.jit
def block_tokens(
    base,
    fmt,
    tokens,
    DTYPE: tl.constexpr,
    INTO: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
):
    """K and V [32, W] in ``INTO`` of the first ``tokens`` tokens of one block of any format."""
    row = tl.arange(0, TOKENS)[:, None]
    ok = row < tokens
    one = tl.full([1, 1], 1, tl.int1)
    if fmt == RAW:
        k, v = raw_tokens(base, row, ok, DTYPE, D, W)
        k, v = k.to(INTO), v.to(INTO)
    elif fmt == INT8:
        k, v = integer_tokens(base, row, ok, one, 1, D, W)
        k, v = k.to(INTO), v.to(INTO)
    elif fmt == INT4:
        k, v = integer_tokens(base, row, ok, one, 2, D, W)
        k, v = k.to(INTO), v.to(INTO)
    elif fmt == INT2:
        k, v = integer_tokens(base, row, ok, one, 4, D, W)
        k, v = k.to(INTO), v.to(INTO)
    else:
        k, v = fp8_tokens(base, row, ok, one, D, W)
        k, v = k.to(INTO), v.to(INTO)
    return k, v


@triton.jit
def dequantised_tokens(base, row, fmt, ok, D: tl.constexpr, W: tl.constexpr):
    """K and V float32 [32, W] of tokens of many blocks [32, 1]; zeros where a block is raw."""
    k = tl.zeros([TOKENS, W], tl.float32)
    v = tl.zeros([TOKENS, W], tl.float32)
    for per_byte in tl.static_range(3):
        chosen = ok & (fmt == INT8 + per_byte)  # int8, int4, int2
        if tl.max(tl.max(chosen.to(tl.int32), 0), 0) > 0:
            k_here, v_here = integer_tokens(base, row, chosen, chosen, 1 << per_byte, D, W)
            k, v = tl.where(chosen, k_here, k), tl.where(chosen, v_here, v)
    chosen = ok & (fmt == FP8)
    if tl.max(tl.max(chosen.to(tl.int32), 0), 0) > 0:
        k_here, v_here = fp8_tokens(base, row, chosen, chosen, D, W)
        k, v = tl.where(chosen, k_here, k), tl.where(chosen, v_here, v)
    return k, v
