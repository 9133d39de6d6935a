"""Moving blocks on a GPU: gathering, transcoding, compacting, copying, and writing new tokens.

Programs of ``read_tokens`` and ``encode_blocks`` make one block each, of 32 tokens that may lie anywhere: ``source``
is int32 [2, N, 32], unit offsets (-1: no token) and then format + 256 * tier + 65536 * row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_blocks import (
    FP8,
    INT4,
    INT8,
    RAW,
    TOKENS,
    UNIT,
    block_base,
    dequantised_tokens,
    narrow,
    raw_tokens,
)
from kernels.triton_quantise import store_fp8, store_integers

COPY_WORDS = tl.constexpr(1024)  # of 4 bytes, that a program copies at once


@triton.jit
def _source(source, n, blocks, device, host):
    """First bytes, rows, formats and presence, each [32, 1], of block n's tokens; and whether they are one block."""
    token = tl.arange(0, TOKENS)
    address = tl.load(source + n * TOKENS + token)
    what = tl.load(source + (blocks + n) * TOKENS + token)
    first, first_what = tl.load(source + n * TOKENS), tl.load(source + (blocks + n) * TOKENS)
    same = (address == first) & (what == first_what + 65536 * token) & (address >= 0)
    base = block_base(tl.maximum(address, 0), (what >> 8) & 255, device, host)
    whole = tl.min(same.to(tl.int32), 0)
    return base[:, None], (what >> 16)[:, None], (what & 255)[:, None], (address >= 0)[:, None], whole


@triton.jit
def _as_stored(
    base,
    row,
    fmt,
    ok,
    DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
):
    """K and V [32, W] in the model's dtype, as integers: raw numbers keep every bit."""
    raw = ok & (fmt == RAW)
    k_raw, v_raw = raw_tokens(base, row, raw, BITS, D, W)
    k, v = dequantised_tokens(base, row, fmt, ok, D, W)
    k = tl.where(raw, k_raw, narrow(k, DTYPE).to(BITS, bitcast=True))
    v = tl.where(raw, v_raw, narrow(v, DTYPE).to(BITS, bitcast=True))
    return k, v


@triton.jit(do_not_specialize=("blocks",))
def read_tokens(
    source,
    blocks,
    device,
    host,
    keys,
    values,
    DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
):
    """Gathers tokens to ``keys`` and ``values`` [N, 32, D], integers BITS as wide as DTYPE."""
    n = tl.program_id(0)
    base, row, fmt, ok, _ = _source(source, n, blocks, device, host)
    k, v = _as_stored(base, row, fmt, ok, DTYPE, BITS, D, W)
    channel = tl.arange(0, W)[None, :]
    at = (n.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]) * D + channel
    inside = ok | (channel < D)
    inside = inside & (channel < D)
    tl.store(keys + at, k, mask=inside)
    tl.store(values + at, v, mask=inside)


@triton.jit(do_not_specialize=("blocks",))
def encode_blocks(
    source,
    blocks,
    device,
    host,
    into,
    places,
    FMT: tl.constexpr,
    PAYLOAD: tl.constexpr,
    UNITS: tl.constexpr,
    DTYPE: tl.constexpr,
    BITS: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
):
    """Builds blocks of FMT, of PAYLOAD bytes and zeros up to whole UNITS.

    They go to ``into`` uint8 [N, 256 * UNITS]; with ``places`` int32 [N], to those unit offsets of an arena ``into``.
    A block whose tokens are one block of that format, in order, is copied byte for byte.
    """
    n = tl.program_id(0)
    base, row, fmt, ok, whole = _source(source, n, blocks, device, host)
    unit = n * UNITS if places is None else tl.load(places + n)
    block = into + unit.to(tl.int64) * UNIT
    what = tl.load(source + (blocks + n) * TOKENS)
    if (whole == 1) & ((what & 255) == FMT):
        from_block = block_base(tl.load(source + n * TOKENS), what >> 8, device, host)
        for start in range(0, UNITS * UNIT // 4, COPY_WORDS):
            _copy_words(from_block, block, start, UNITS)
    else:
        if FMT == RAW:
            k, v = _as_stored(base, row, fmt, ok, DTYPE, BITS, D, W)
            channel = tl.arange(0, W)[None, :]
            at = block.to(tl.pointer_type(BITS)) + tl.arange(0, TOKENS)[:, None] * D + channel
            inside = (row >= 0) & (channel < D)
            tl.store(at, k, mask=inside)
            tl.store(at + TOKENS * D, v, mask=inside)
        else:
            raw = ok & (fmt == RAW)
            k_raw, v_raw = raw_tokens(base, row, raw, DTYPE, D, W)
            k, v = dequantised_tokens(base, row, fmt, ok, D, W)
            k, v = tl.where(raw, k_raw.to(tl.float32), k), tl.where(raw, v_raw.to(tl.float32), v)
            if FMT == FP8:
                store_fp8(block, k, v, D, W)
            else:
                store_integers(block, k, v, 1 if FMT == INT8 else 2 if FMT == INT4 else 4, D, W)
        padding = PAYLOAD + tl.arange(0, UNIT)
        tl.store(block + padding, tl.zeros([UNIT], tl.uint8), mask=padding < UNITS * UNIT)


@triton.jit
def _copy_words(source, into, start, UNITS: tl.constexpr):
    """Copies COPY_WORDS words of a block from word ``start`` on."""
    word = start + tl.arange(0, COPY_WORDS)
    inside = word < UNITS * (UNIT // 4)
    numbers = tl.load(source.to(tl.pointer_type(tl.int32)) + word, mask=inside)
    tl.store(into.to(tl.pointer_type(tl.int32)) + word, numbers, mask=inside)


@triton.jit
def copy_blocks(arena, address, blocks, UNITS: tl.constexpr, LOAD: tl.constexpr):
    """Copies part program_id(1) of block program_id(0) between ``blocks`` [N, 256 * UNITS] and an arena."""
    n = tl.program_id(0)
    start = tl.program_id(1) * COPY_WORDS
    there = arena + tl.load(address + n).to(tl.int64) * UNIT
    here = blocks + n.to(tl.int64) * (UNITS * UNIT)
    if LOAD:
        _copy_words(there, here, start, UNITS)
    else:
        _copy_words(here, there, start, UNITS)


@triton.jit(do_not_specialize=("start", "count", "heads"))
def write_tokens(
    arena,
    address,
    start,
    count,
    k,
    v,
    heads,
    D: tl.constexpr,
    W: tl.constexpr,
):
    """Writes k, v [H, count, D] as kept tokens from ``start`` on, one block of one head a program.

    ``address`` int32 [blocks, H] is of the blocks that hold them; numbers are integers as wide as the model's dtype.
    """
    b, head = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, W)[None, :]
    row = tl.arange(0, TOKENS)[:, None]
    number = (start // TOKENS + b) * TOKENS + row - start
    inside = (number >= 0) & (number < count) & (channel < D)
    at = (head.to(tl.int64) * count + number) * D + channel
    block = arena + tl.load(address + b * heads + head).to(tl.int64) * UNIT
    into = block.to(k.dtype) + row * D + channel
    tl.store(into, tl.load(k + at, mask=inside), mask=inside)
    tl.store(into + TOKENS * D, tl.load(v + at, mask=inside), mask=inside)
