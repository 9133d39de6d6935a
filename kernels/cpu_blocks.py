"""Blocks to float32 and back, one at a time, on the CPU: the byte layout is ``kernels.layout``'s."""

from __future__ import annotations

import numpy as np

from kernels.cpu_jit import Array, Float, fast_jit, jit
from kernels.cpu_memory import (
    BF16,
    F16,
    F32,
    FP8,
    INT2,
    INT4,
    INT8,
    bits_of,
    copy_bytes,
    float_of,
    float_of_half,
    half_of,
    load_bf16,
    load_f16,
    load_f32,
    load_u8,
    store_bf16,
    store_f16,
    store_f32,
    store_u8,
)
from kernels.layout import BLOCK_TOKENS, GROUP

HALF_MAX = np.float32(65504.0)  # largest finite float16, the type of scales and zeros
FP8_MAX = np.float32(448.0)  # largest finite e4m3
_FP8_BIAS = np.float32(2.0**120)  # makes a float32 with an e4m3's exponent and mantissa bits the number that they mean
_FP8_LEAST_NORMAL = np.float32(2.0**-6)
_NO_ZERO = np.float32(-0.0)  # adds nothing, not even a sign


@jit
def kind_of(fmt: int, raw_kind: int) -> int:
    """How a block of a format keeps its numbers."""
    return raw_kind if fmt == 0 else INT8 + fmt - 1


@jit
def codes_bytes(kind: int, d: int) -> int:
    """Bytes of one token's keys (or values) in a block."""
    if kind == F32:
        return 4 * d
    if kind <= BF16:
        return 2 * d
    per_byte = codes_per_byte(kind)
    return (d + per_byte - 1) // per_byte


@jit
def codes_per_byte(kind: int) -> int:
    """Codes that share a byte of a quantised block."""
    return 2 if kind == INT4 else 4 if kind == INT2 else 1


@jit
def value_scales(kind: int, d: int) -> int:
    """Where the scales of the values begin, counted in bytes from those of the keys."""
    return 2 * d if kind == FP8 else 4 * d


@jit
def scales_bytes(kind: int, d: int) -> int:
    """Bytes of the scales and zeros of keys and values, at the end of a quantised block."""
    return value_scales(kind, d) // d * (d + BLOCK_TOKENS * ((d + GROUP - 1) // GROUP))


@jit
def load_raw(kind: int, address: int, count: int, into: int) -> None:
    """Widens ``count`` adjacent F32, F16 or BF16 numbers to float32."""
    if kind == F32:
        copy_bytes(into, address, 4 * count)
    elif kind == F16:
        for i in range(count):
            store_f32(into, i, load_f16(address, i))
    else:
        for i in range(count):
            store_f32(into, i, load_bf16(address, i))


@jit
def store_raw(kind: int, source: int, count: int, into: int) -> None:
    """Narrows ``count`` adjacent float32 numbers to F32, F16 or BF16."""
    if kind == F32:
        copy_bytes(into, source, 4 * count)
    elif kind == F16:
        for i in range(count):
            store_f16(into, i, load_f32(source, i))
    else:
        for i in range(count):
            store_bf16(into, i, load_f32(source, i))


@jit
def load_codes(kind: int, address: int, d: int, into: int) -> None:
    """Spreads one token's quantised codes [D] to float32."""
    if kind == INT8:
        for c in range(d):
            store_f32(into, c, np.float32(load_u8(address, c)))
    elif kind == FP8:
        for c in range(d):
            code = load_u8(address, c)
            number = float_of((code & 127) << 20) * _FP8_BIAS
            store_f32(into, c, -number if code & 128 else number)
    else:
        width = codes_bytes(kind, d)
        bits = 8 // codes_per_byte(kind)
        for part in range(codes_per_byte(kind)):
            for c in range(min(width, d - part * width)):
                code = load_u8(address, c) >> part * bits & (1 << bits) - 1
                store_f32(into, part * width + c, np.float32(code))


@jit
def load_key(kind: int, block: int, d: int, row: int, into: int) -> None:
    """One token's keys as float32 [D]."""
    address = block + row * codes_bytes(kind, d)
    if kind <= BF16:
        load_raw(kind, address, d, into)
        return
    load_codes(kind, address, d, into)
    scale = block + 2 * BLOCK_TOKENS * codes_bytes(kind, d)
    for c in range(d):
        zero = _NO_ZERO if kind == FP8 else load_f16(scale, d + c)
        store_f32(into, c, load_f32(into, c) * load_f16(scale, c) + zero)


@jit
def load_value(kind: int, block: int, d: int, row: int, into: int) -> None:
    """One token's values as float32 [D]."""
    address = block + (BLOCK_TOKENS + row) * codes_bytes(kind, d)
    if kind <= BF16:
        load_raw(kind, address, d, into)
        return
    load_codes(kind, address, d, into)
    groups = (d + GROUP - 1) // GROUP
    scales = block + 2 * BLOCK_TOKENS * codes_bytes(kind, d) + value_scales(kind, d)
    for group in range(groups):
        scale = load_f16(scales, row * groups + group)
        zero = _NO_ZERO if kind == FP8 else load_f16(scales, (BLOCK_TOKENS + row) * groups + group)
        for c in range(group * GROUP, min(d, (group + 1) * GROUP)):
            store_f32(into, c, load_f32(into, c) * scale + zero)


@jit
def _floor_half(x: np.float32) -> Float:
    """The greatest float16 that is not above x."""
    bits = half_of(x)
    if float_of_half(bits) > x:
        # float16 counts away from zero in either sign; the step below +0 is the least negative number
        bits = 0x8001 if bits == 0 else bits + 1 if bits >= 0x8000 else bits - 1
    return float_of_half(bits)


@jit
def _ceil_half(x: np.float32) -> Float:
    """The least float16 that is not below x, which is not negative."""
    bits = half_of(x)
    if float_of_half(bits) < x:
        bits += 1
    return float_of_half(bits)


@jit
def _scale_and_zero(low: np.float32, high: np.float32, levels: int) -> tuple[np.float32, np.float32]:
    """Rounded outwards, so that codes 0..levels cover the whole group; a constant group has scale 0. low is not -0."""
    if high > low:
        zero = _floor_half(low)
        return _ceil_half((high - zero) / np.float32(levels)), zero
    return np.float32(0.0), float_of_half(half_of(low))


@jit
def levels_of(kind: int) -> int:
    """The greatest code of integers."""
    return (1 << 8 // codes_per_byte(kind)) - 1


@jit
def _store_codes(kind: int, x: Array, scale: Array, zero: Array, code: Array, into: int) -> None:
    """Codes of one token x [D], with the scale and zero of each channel [D]. A scale of 0 is given as infinity.

    code is scratch, uint8 [D rounded up to whole bytes of codes].
    """
    d, levels = len(x), np.float32(levels_of(kind))
    for c in range(d):
        exact = np.rint((x[c] - zero[c]) / scale[c])
        code[c] = np.uint8(np.int32(min(max(exact, np.float32(0.0)), levels)))
    if kind == INT8:
        copy_bytes(into, code.ctypes.data, d)
    elif kind == INT4:
        width = len(code) // 2
        for c in range(width):
            store_u8(into, c, np.int32(code[c] | code[width + c] << 4))
    else:
        width = len(code) // 4
        for c in range(width):
            low, high = code[c] | code[width + c] << 2, code[2 * width + c] | code[3 * width + c] << 2
            store_u8(into, c, np.int32(low | high << 4))


@jit
def quantise(kind: int, keys: Array, values: Array, block: int) -> None:
    """Writes K, V [32, D] as a quantised block. Numbers that float16 cannot hold are clamped, NaN counts as 0."""
    for x in (keys, values):
        flat = x.reshape(-1)
        for i in range(len(flat)):
            number = flat[i] if flat[i] == flat[i] else np.float32(0.0)
            flat[i] = min(max(number, -HALF_MAX), HALF_MAX) + np.float32(0.0)  # -0 becomes +0
    if kind == FP8:
        _quantise_fp8(keys, values, block)
    else:
        _quantise_integers(kind, keys, values, block)


@fast_jit
def _range(x: Array) -> tuple[np.float32, np.float32]:
    """Least and greatest of finite numbers without -0, among which no order of comparing makes a difference."""
    low, high = x[0], x[0]
    for number in x:
        low = min(low, number)
        high = max(high, number)
    return low, high


@jit
def _quantise_integers(kind: int, keys: Array, values: Array, block: int) -> None:
    tokens, d = keys.shape
    groups = (d + GROUP - 1) // GROUP
    levels = levels_of(kind)
    row_bytes = codes_bytes(kind, d)
    scales = block + 2 * tokens * row_bytes
    code = np.zeros(row_bytes * codes_per_byte(kind), np.uint8)
    low, high = keys[0].copy(), keys[0].copy()
    for t in range(1, tokens):
        for c in range(d):
            low[c] = min(low[c], keys[t, c])
            high[c] = max(high[c], keys[t, c])
    scale, zero = np.empty(d, np.float32), np.empty(d, np.float32)
    for c in range(d):
        step, zero[c] = _scale_and_zero(low[c], high[c], levels)
        store_f16(scales, c, step)
        store_f16(scales, d + c, zero[c])
        scale[c] = step if step > 0 else np.float32(np.inf)
    for t in range(tokens):
        _store_codes(kind, keys[t], scale, zero, code, block + t * row_bytes)

    scales += 4 * d
    for t in range(tokens):
        for group in range(groups):
            first, end = group * GROUP, min(d, (group + 1) * GROUP)
            least, most = _range(values[t, first:end])
            step, base = _scale_and_zero(least, most, levels)
            store_f16(scales, t * groups + group, step)
            store_f16(scales, (tokens + t) * groups + group, base)
            scale[first:end] = step if step > 0 else np.float32(np.inf)
            zero[first:end] = base
        _store_codes(kind, values[t], scale, zero, code, block + (tokens + t) * row_bytes)


@jit
def _quantise_fp8(keys: Array, values: Array, block: int) -> None:
    tokens, d = keys.shape
    groups = (d + GROUP - 1) // GROUP
    scales = block + 2 * tokens * d
    scale = np.zeros(d, np.float32)
    for t in range(tokens):
        for c in range(d):
            scale[c] = max(scale[c], abs(keys[t, c]))
    for c in range(d):
        scale[c] = _ceil_half(scale[c] / FP8_MAX)
        store_f16(scales, c, scale[c])
    for t in range(tokens):
        _store_fp8(keys[t], scale, block + t * d)
    for t in range(tokens):
        for group in range(groups):
            first, end = group * GROUP, min(d, (group + 1) * GROUP)
            most = np.float32(0.0)
            for c in range(first, end):
                most = max(most, abs(values[t, c]))
            scale[first:end] = _ceil_half(most / FP8_MAX)
            store_f16(scales, d + t * groups + group, scale[first])
        _store_fp8(values[t], scale, block + (tokens + t) * d)


@jit
def _store_fp8(x: Array, scale: Array, into: int) -> None:
    """The e4m3 numbers nearest to x / scale [D], ties to even; 0 where the scale is."""
    for c in range(len(x)):
        exact = x[c] / scale[c] if scale[c] > 0 else x[c]
        size = min(abs(exact), FP8_MAX)
        if size < _FP8_LEAST_NORMAL:
            code = np.int32(np.rint(size * np.float32(2.0**9)))
        else:
            bits = bits_of(size)
            code = ((bits + 0x7FFFF + (bits >> 20 & 1)) >> 20) - (120 << 3)
        store_u8(into, c, code | 128 if bits_of(exact) < 0 else code)
