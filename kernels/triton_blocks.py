"""Reading blocks inside Triton kernels: a function for each format, shared by attention and conversion.

Each takes ``base``, the first byte of a block: one pointer if all 32 tokens lie in one block, or pointers [32, 1] if
each lies in its own. ``row`` [32, 1] says which of its block's tokens each is, ``ok`` [32, 1] which to read at all;
the rest is zero. ``base_ok`` is ``ok``, or all ones [1, 1] for a single base. D is head_dim, W >= D a power of two.

The interpreter's casts to bfloat16 are wrong; ``narrow`` rounds by integer arithmetic, alike on a GPU.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from kernels import layout

TOKENS = tl.constexpr(layout.BLOCK_TOKENS)
UNIT = tl.constexpr(layout.UNIT_BYTES)
GROUP = tl.constexpr(layout.GROUP)
RAW = tl.constexpr(int(layout.Format.RAW))
INT8 = tl.constexpr(int(layout.Format.INT8))
INT4 = tl.constexpr(int(layout.Format.INT4))


@triton.jit
def block_base(address: Any, tier: Any, device: Any, host: Any) -> Any:
    """First bytes of the blocks at these unit offsets of these tiers' arenas."""
    return tl.where(tier == 0, device, host) + address.to(tl.int64) * UNIT


@triton.jit
def narrow(x: Any, DTYPE: tl.constexpr) -> Any:  # noqa: N803
    """float32 rounded to the nearest ``DTYPE``, ties to even."""
    if DTYPE == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        high = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, high, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def groups_to_channels(x: Any, W: tl.constexpr) -> Any:  # noqa: N803
    """One number a group of 32 channels [32, groups] as one a channel [32, W]."""
    groups: tl.constexpr = x.shape[1]
    wide = tl.broadcast_to(tl.expand_dims(x, 2), [TOKENS, groups, W // groups])
    return tl.reshape(wide, [TOKENS, W])


@triton.jit
def raw_tokens(base: Any, row: Any, ok: Any, DTYPE: tl.constexpr, D: tl.constexpr, W: tl.constexpr) -> Any:  # noqa: N803
    """K and V [32, W] as stored."""
    channel = tl.arange(0, W)[None, :]
    at = base.to(tl.pointer_type(DTYPE)) + row * D + channel
    inside = ok & (channel < D)
    return tl.load(at, mask=inside, other=0), tl.load(at + TOKENS * D, mask=inside, other=0)


@triton.jit
def integer_tokens(
    base: Any,
    row: Any,
    ok: Any,
    base_ok: Any,
    PER_BYTE: tl.constexpr,  # noqa: N803
    D: tl.constexpr,  # noqa: N803
    W: tl.constexpr,  # noqa: N803
) -> Any:
    """K and V float32 [32, W] of blocks with codes, scales and zeros; byte j of a token holds channels j, j + D/n, ..."""
    row_bytes: tl.constexpr = D // PER_BYTE
    bits: tl.constexpr = 8 // PER_BYTE
    channel = tl.arange(0, W)[None, :]
    inside = channel < D
    at = base + row * row_bytes + channel % row_bytes
    k_code = tl.load(at, mask=ok & inside, other=0)
    v_code = tl.load(at + TOKENS * row_bytes, mask=ok & inside, other=0)
    if PER_BYTE > 1:
        shift = (channel // row_bytes * bits).to(tl.uint8)
        k_code = (k_code >> shift) & ((1 << bits) - 1)
        v_code = (v_code >> shift) & ((1 << bits) - 1)
    scales = (base + 2 * TOKENS * row_bytes).to(tl.pointer_type(tl.float16))
    k_scale, k_zero = _channel_pair(scales, base_ok & inside, D, W)
    v_scale, v_zero = _group_pair(scales + 2 * D, row, ok, D, W)
    return k_code.to(tl.float32) * k_scale + k_zero, v_code.to(tl.float32) * v_scale + v_zero


@triton.jit
def _channel_pair(at: Any, ok: Any, D: tl.constexpr, W: tl.constexpr) -> Any:  # noqa: N803
    """Two float16 [D] behind one another, as float32 [1 or 32, W]."""
    channel = tl.arange(0, W)[None, :]
    first = tl.load(at + channel, mask=ok, other=0).to(tl.float32)
    return first, tl.load(at + D + channel, mask=ok, other=0).to(tl.float32)


@triton.jit
def _group_pair(at: Any, row: Any, ok: Any, D: tl.constexpr, W: tl.constexpr) -> Any:  # noqa: N803
    """Rows of two float16 [32, G] behind one another, as float32 [32, W]."""
    groups: tl.constexpr = (D + GROUP - 1) // GROUP
    columns: tl.constexpr = (W + GROUP - 1) // GROUP
    group = tl.arange(0, columns)[None, :]
    inside = ok & (group < groups)
    first = tl.load(at + row * groups + group, mask=inside, other=0).to(tl.float32)
    second = tl.load(at + (TOKENS + row) * groups + group, mask=inside, other=0).to(tl.float32)
    return groups_to_channels(first, W), groups_to_channels(second, W)


@triton.jit
def block_tokens(
    base: Any,
    fmt: Any,
    tokens: Any,
    DTYPE: tl.constexpr,  # noqa: N803
    INTO: tl.constexpr,  # noqa: N803
    D: tl.constexpr,  # noqa: N803
    W: tl.constexpr,  # noqa: N803
) -> Any:
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
    else:
        k, v = integer_tokens(base, row, ok, one, 2, D, W)
        k, v = k.to(INTO), v.to(INTO)
    return k, v
