"""Quantising inside Triton kernels: the same scales, zeros and codes as ``kernels.reference``, by the same roundings.

K and V of a block are float32 tiles [32, W]; D channels are real, W >= D is a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_blocks import GROUP, TOKENS, groups_to_channels

HALF_MAX = tl.constexpr(65504.0)
FP8_MAX = tl.constexpr(448.0)
_ROUNDER = tl.constexpr(1.5 * 2.0**23)  # added and taken away, leaves a float32 below 2^22 rounded, ties to even


@triton.jit
def store_integers(
    block,
    k,
    v,
    PER_BYTE: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
):
    """Writes an int8, int4 or int2 block, ``PER_BYTE`` codes to a byte."""
    row_bytes: tl.constexpr = (D + PER_BYTE - 1) // PER_BYTE
    levels: tl.constexpr = (1 << (8 // PER_BYTE)) - 1
    groups: tl.constexpr = (D + GROUP - 1) // GROUP
    channel, row = tl.arange(0, W), tl.arange(0, TOKENS)[:, None]
    constants = (block + 2 * TOKENS * row_bytes).to(tl.pointer_type(tl.float16))

    k, v = _finite(k), _finite(v)
    k_scale, k_zero = _scale_and_zero(tl.min(k, 0), tl.max(k, 0), levels)
    tl.store(constants + channel, k_scale, mask=channel < D)
    tl.store(constants + D + channel, k_zero, mask=channel < D)
    code = _codes(k, k_scale.to(tl.float32)[None, :], k_zero.to(tl.float32)[None, :], levels)
    _store_codes(block, code, PER_BYTE, D, W)

    inside = (channel < D)[None, :]
    low = tl.min(_grouped(tl.where(inside, v, float("inf")), W), 2)
    high = tl.max(_grouped(tl.where(inside, v, float("-inf")), W), 2)
    v_scale, v_zero = _scale_and_zero(low, high, levels)  # [32, groups]
    group = tl.arange(0, v_scale.shape[1])[None, :]
    at = constants + 2 * D + row * groups + group
    tl.store(at, v_scale, mask=group < groups)
    tl.store(at + TOKENS * groups, v_zero, mask=group < groups)
    scale, zero = groups_to_channels(v_scale.to(tl.float32), W), groups_to_channels(v_zero.to(tl.float32), W)
    _store_codes(block + TOKENS * row_bytes, _codes(v, scale, zero, levels), PER_BYTE, D, W)


@triton.jit
def store_fp8(block, k, v, D: tl.constexpr, W: tl.constexpr):
    """Writes an fp8 block."""
    groups: tl.constexpr = (D + GROUP - 1) // GROUP
    channel, row = tl.arange(0, W), tl.arange(0, TOKENS)[:, None]
    constants = (block + 2 * TOKENS * D).to(tl.pointer_type(tl.float16))

    k, v = _finite(k), _finite(v)
    k_scale = _half_above(tl.div_rn(tl.max(tl.abs(k), 0), FP8_MAX))
    tl.store(constants + channel, k_scale, mask=channel < D)
    _store_codes(block, _e4m3(k, k_scale.to(tl.float32)[None, :]), 1, D, W)

    size = tl.where((channel < D)[None, :], tl.abs(v), 0.0)
    v_scale = _half_above(tl.div_rn(tl.max(_grouped(size, W), 2), FP8_MAX))  # [32, groups]
    group = tl.arange(0, v_scale.shape[1])[None, :]
    tl.store(constants + D + row * groups + group, v_scale, mask=group < groups)
    _store_codes(block + TOKENS * D, _e4m3(v, groups_to_channels(v_scale.to(tl.float32), W)), 1, D, W)


@triton.jit
def _finite(x):
    """What quantised formats can hold: NaN and -0 count as 0, and float16 scales end at +-65504."""
    x = tl.where((x < 0) | (x > 0), x, 0.0)
    x = tl.where(x > HALF_MAX, HALF_MAX, x)
    return tl.where(x < -HALF_MAX, -HALF_MAX, x)


@triton.jit
def _grouped(x, W: tl.constexpr):
    """[32, W] as [32, groups, channels of a group]."""
    columns: tl.constexpr = (W + GROUP - 1) // GROUP
    return tl.reshape(x, [TOKENS, columns, W // columns])


@triton.jit
def _rounded(x):
    return (x + _ROUNDER) - _ROUNDER


@triton.jit
def _half_above(x):
    """The least float16 that is not below x >= 0."""
    half = x.to(tl.float16)
    above = (half.to(tl.int16, bitcast=True) + 1).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.where(half.to(tl.float32) < x, above, half)


@triton.jit
def _scale_and_zero(low, high, LEVELS: tl.constexpr):
    """float16 scale and zero, rounded outwards so that codes 0..LEVELS cover the whole group. low is not -0."""
    zero = low.to(tl.float16)
    bits = zero.to(tl.int16, bitcast=True).to(tl.int32)
    below = (bits + tl.where(bits < 0, 1, -1)).to(tl.int16).to(tl.float16, bitcast=True)
    zero = tl.where((zero.to(tl.float32) > low) & (high > low), below, zero)
    scale = _half_above(tl.div_rn(high - zero.to(tl.float32), LEVELS * 1.0))
    return tl.where(high > low, scale, 0.0).to(tl.float16), zero


@triton.jit
def _codes(x, scale, zero, LEVELS: tl.constexpr):
    """int32 codes [32, W]; 0 where the scale is."""
    constant = scale == 0.0
    exact = tl.div_rn(x - zero, tl.where(constant, 1.0, scale))
    code = _rounded(tl.where(constant, 0.0, exact))
    return tl.minimum(tl.maximum(code, 0.0), LEVELS * 1.0).to(tl.int32)


@triton.jit
def _e4m3(x, scale):
    """int32 codes [32, W] of the e4m3 numbers nearest to x / scale, ties to even; x itself where the scale is 0."""
    exact = tl.div_rn(x, tl.where(scale == 0.0, 1.0, scale))
    size = tl.minimum(tl.abs(exact), FP8_MAX)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = _rounded(size * 512.0).to(tl.int32)
    code = tl.where(size < 0.015625, subnormal, normal)
    return tl.where(exact.to(tl.int32, bitcast=True) < 0, code | 128, code)


@triton.jit
def _store_codes(into, code, PER_BYTE: tl.constexpr, D: tl.constexpr, W: tl.constexpr):
    """Packs codes [32, W] and writes them as uint8 [32, ceil(D / PER_BYTE)]."""
    row_bytes: tl.constexpr = (D + PER_BYTE - 1) // PER_BYTE
    row = tl.arange(0, TOKENS)[:, None]
    if PER_BYTE == 1:
        channel = tl.arange(0, W)[None, :]
        tl.store(into + row * D + channel, code.to(tl.uint8), mask=(row >= 0) & (channel < D))
    else:
        width: tl.constexpr = triton.next_power_of_2(row_bytes)
        byte = tl.arange(0, width)[None, :]
        packed = tl.zeros([TOKENS, width], tl.int32)
        for part in tl.static_range(PER_BYTE):
            channel = part * row_bytes + byte
            index = tl.broadcast_to(tl.minimum(channel, W - 1), [TOKENS, width])
            here = tl.gather(code, index, 1)
            packed |= tl.where(channel < D, here, 0) << (part * (8 // PER_BYTE))
        tl.store(into + row * row_bytes + byte, packed.to(tl.uint8), mask=(row >= 0) & (byte < row_bytes))
