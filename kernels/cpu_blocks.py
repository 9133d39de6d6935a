"""Blocks to float32 and back, one at a time, on the CPU: the byte layout is ``kernels.layout``'s."""

from __future__ import annotations

import numpy as np

from kernels.cpu_jit import Array, Float, jit
from kernels.cpu_memory import (
    BF16,
    F16,
    F32,
    INT8,
    copy_bytes,
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
    return d if kind == INT8 else d // 2


@jit
def scales_bytes(d: int) -> int:
    """Bytes of the scales and zeros of keys and values, at the end of a quantised block."""
    return 4 * d + 4 * BLOCK_TOKENS * ((d + GROUP - 1) // GROUP)


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
    """Spreads one token's INT8 or INT4 codes [D] to float32."""
    if kind == INT8:
        for c in range(d):
            store_f32(into, c, np.float32(load_u8(address, c)))
    else:
        for c in range(d // 2):
            store_f32(into, c, np.float32(load_u8(address, c) & 15))
        for c in range(d // 2):
            store_f32(into, d // 2 + c, np.float32(load_u8(address, c) >> 4))


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
        number = load_f32(into, c) * load_f16(scale, c) + load_f16(scale, d + c)
        store_f32(into, c, number)


@jit
def load_value(kind: int, block: int, d: int, row: int, into: int) -> None:
    """One token's values as float32 [D]."""
    address = block + (BLOCK_TOKENS + row) * codes_bytes(kind, d)
    if kind <= BF16:
        load_raw(kind, address, d, into)
        return
    load_codes(kind, address, d, into)
    groups = (d + GROUP - 1) // GROUP
    scales = block + 2 * BLOCK_TOKENS * codes_bytes(kind, d) + 4 * d
    for group in range(groups):
        scale = load_f16(scales, row * groups + group)
        zero = load_f16(scales, (BLOCK_TOKENS + row) * groups + group)
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
    """Rounded outwards, so that codes 0..levels cover the whole group; a constant group has scale 0."""
    if high > low:
        zero = _floor_half(low)
        return _ceil_half((high - zero) / np.float32(levels)), zero
    return np.float32(0.0), float_of_half(half_of(low))


@jit
def _store_codes(kind: int, x: Array, scale: Array, zero: Array, into: int) -> None:
    """Codes of one token x [D], with the scale and zero of each channel [D]. A scale of 0 is given as infinity."""
    d = len(x)
    levels = np.float32(255 if kind == INT8 else 15)
    code = np.empty(d, np.uint8)
    for c in range(d):
        exact = np.rint((x[c] - zero[c]) / scale[c])
        code[c] = np.uint8(np.int32(min(max(exact, np.float32(0.0)), levels)))
    if kind == INT8:
        copy_bytes(into, code.ctypes.data, d)
    else:
        for c in range(d // 2):
            store_u8(into, c, np.int32(code[c]) | np.int32(code[d // 2 + c]) << 4)


@jit
def quantise(kind: int, keys: Array, values: Array, block: int) -> None:
    """Writes K, V [32, D] as an INT8 or INT4 block. Numbers that float16 cannot hold are clamped, NaN counts as 0."""
    tokens, d = keys.shape
    groups = (d + GROUP - 1) // GROUP
    levels = 255 if kind == INT8 else 15
    for x in (keys, values):
        flat = x.reshape(-1)
        for i in range(len(flat)):
            number = flat[i] if flat[i] == flat[i] else np.float32(0.0)
            flat[i] = min(max(number, -HALF_MAX), HALF_MAX)

    row_bytes = codes_bytes(kind, d)
    scales = block + 2 * tokens * row_bytes
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
        _store_codes(kind, keys[t], scale, zero, block + t * row_bytes)

    scales += 4 * d
    for t in range(tokens):
        for group in range(groups):
            first, end = group * GROUP, min(d, (group + 1) * GROUP)
            least = most = values[t, first]
            for c in range(first + 1, end):
                least = min(least, values[t, c])
                most = max(most, values[t, c])
            step, base = _scale_and_zero(least, most, levels)
            store_f16(scales, t * groups + group, step)
            store_f16(scales, (tokens + t) * groups + group, base)
            scale[first:end] = step if step > 0 else np.float32(np.inf)
            zero[first:end] = base
        _store_codes(kind, values[t], scale, zero, block + (tokens + t) * row_bytes)
