"""Decode attention's work on one block: score its keys, raise the scores, weigh its values.

G is the number of queries per KV head, W is head_dim D rounded up to a multiple of CHANNELS.
"""

from __future__ import annotations

import numpy as np

from kernels.cpu_blocks import codes_bytes, codes_per_byte, load_key, load_value, value_scales
from kernels.cpu_jit import Array, Float, fast_jit, jit
from kernels.cpu_memory import BF16, F32, FP8, float_of, load_f16, load_f32, store_f32
from kernels.cpu_tiles import (
    CHANNELS,
    FOLDED_GROUPS,
    FP8_STEP,
    LANES,
    TILE_QUERIES,
    TILE_TOKENS,
    WIDE_CHANNELS,
    fold_tile,
    score_tile,
    weigh_tile,
)
from kernels.layout import BLOCK_TOKENS, GROUP

SPLIT_BLOCKS = 16
"""Blocks in a split, the work item of decode attention: a table's tokens are always cut alike."""

SPLIT_TOKENS = SPLIT_BLOCKS * BLOCK_TOKENS
NOTHING = np.float32(-1e30)  # score of a token that is not there


@jit
def _tiled(kind: int, d: int) -> bool:
    """Whether the tiles can read a block where it lies."""
    return d % max(CHANNELS, LANES * codes_per_byte(kind)) == 0


@jit
def _unpack(kind: int, block: int, rows: int, d: int, values: bool, unpacked: Array) -> int:
    """K or V of a block as float32 in unpacked [32, W], for head_dims that the tiles cannot read where they lie."""
    for t in range(rows):
        if values:
            load_value(kind, block, d, t, unpacked[t].ctypes.data)
        else:
            load_key(kind, block, d, t, unpacked[t].ctypes.data)
        for c in range(d, unpacked.shape[1]):
            unpacked[t, c] = 0
    return int(unpacked.ctypes.data)


@jit
def score_block(
    kind: int, block: int, tokens: int, d: int, q: Array, scores: Array, at: int, scratch: Array, ahead: int
) -> None:
    """Scores of one block's tokens, into scores [G, SPLIT_TOKENS] from column ``at`` on.

    q [G, W] is scaled and has zeros after the first D channels; scratch is [36, W]. Scores after the last token's
    are garbage. ``ahead`` is the address of what is wanted next, fetched into cache meanwhile.
    """
    group, width = q.shape
    quads = (tokens + TILE_TOKENS - 1) // TILE_TOKENS
    keys, stride = block, codes_bytes(kind, d)
    scales = block + 2 * BLOCK_TOKENS * stride
    if not _tiled(kind, d):
        keys = _unpack(kind, block, quads * TILE_TOKENS, d, False, scratch)
        kind, stride = F32, 4 * width
    for g in range(0, group, TILE_QUERIES):
        score_tile(
            kind,
            min(TILE_QUERIES, group - g),
            keys,
            stride,
            quads,
            width,
            q.ctypes.data + 4 * g * width,
            4 * width,
            scores.ctypes.data + 4 * (g * SPLIT_TOKENS + at),
            4 * SPLIT_TOKENS,
            scales,
            scratch.ctypes.data + 4 * BLOCK_TOKENS * width,
            ahead if g == 0 else keys,
        )


@jit
def weigh_block(
    kind: int, block: int, tokens: int, d: int, weights: Array, at: int, sums: Array, scratch: Array, ahead: int
) -> None:
    """Adds to sums [G, W] one block's values, weighted by weights [G, SPLIT_TOKENS] from column ``at`` on."""
    group, width = sums.shape
    groups = (d + GROUP - 1) // GROUP
    stride = codes_bytes(kind, d)
    values = block + BLOCK_TOKENS * stride
    scales = values + BLOCK_TOKENS * stride + value_scales(kind, d)
    if not _tiled(kind, d):
        values = _unpack(kind, block, tokens, d, True, scratch)
        kind, stride = F32, 4 * width
    channels = WIDE_CHANNELS if width % WIDE_CHANNELS == 0 else CHANNELS
    folded, folded_stride = scratch.ctypes.data, 4 * (BLOCK_TOKENS * groups + max(LANES, groups))
    for g in range(0, group, TILE_QUERIES):
        queries = min(TILE_QUERIES, group - g)
        weight, weight_stride = weights.ctypes.data + 4 * (g * SPLIT_TOKENS + at), 4 * SPLIT_TOKENS
        if kind > BF16:
            _fold(kind, queries, groups, scales, weight, weight_stride, folded, folded_stride)
            weight, weight_stride = folded, folded_stride
        for tile in range(width // channels):
            weigh_tile(
                kind,
                queries,
                values,
                stride,
                tokens,
                width,
                tile * channels // codes_per_byte(kind),
                weight,
                weight_stride,
                sums.ctypes.data + 4 * g * width,
                4 * width,
                ahead if g == 0 and tile == 0 else values,
            )


@jit
def _fold(
    kind: int,
    queries: int,
    groups: int,
    scales: int,
    weights: int,
    weight_stride: int,
    folded: int,
    folded_stride: int,
) -> None:
    """``fold_tile`` for any number of value groups."""
    if groups in FOLDED_GROUPS:
        fold_tile(kind, queries, groups, scales, weights, weight_stride, folded, folded_stride)
        return
    step = np.float32(FP8_STEP if kind == FP8 else 1.0)
    for g in range(queries):
        row, into = weights + g * weight_stride, folded + g * folded_stride
        for group in range(groups):
            base = np.float32(0.0)
            for t in range(BLOCK_TOKENS):
                at = t * groups + group
                store_f32(into, at, load_f32(row, t) * load_f16(scales, at) * step)
                if kind != FP8:
                    base += load_f32(row, t) * load_f16(scales, BLOCK_TOKENS * groups + at)
            store_f32(into, BLOCK_TOKENS * groups + group, base)


@fast_jit
def power(x: np.float32) -> Float:
    """2 ** x for x <= 0 to 2 units in the last place, in a form that LLVM can do many of at once."""
    x = max(x, np.float32(-126.0))
    whole = np.rint(x)
    r = (x - whole) * np.float32(0.6931471805599453)  # e ** r by its series; |r| <= ln(2) / 2
    y = np.float32(1 / 5040)
    y = y * r + np.float32(1 / 720)
    y = y * r + np.float32(1 / 120)
    y = y * r + np.float32(1 / 24)
    y = y * r + np.float32(1 / 6)
    y = y * r + np.float32(1 / 2)
    y = y * r + np.float32(1.0)
    y = y * r + np.float32(1.0)
    return y * float_of((np.int32(whole) + np.int32(127)) << np.int32(23))


@fast_jit
def raise_block(scores: Array, b: int, tokens: int, highest: Array, total: Array, sums: Array) -> None:
    """Turns the scores of a split's block b into 2 ** (score - highest[g, b]), and adds them to total [G].

    highest [G, SPLIT_BLOCKS] is each query's highest score up to and with block b. Where it rises, what total and
    sums [G, W] hold of earlier blocks shrinks.
    """
    for g in range(len(total)):
        of_block = scores[g, b * BLOCK_TOKENS : (b + 1) * BLOCK_TOKENS]
        for t in range(tokens, BLOCK_TOKENS):
            of_block[t] = NOTHING
        most = of_block[0]
        for t in range(BLOCK_TOKENS):
            most = max(most, of_block[t])
        if b > 0:
            before = highest[g, b - 1]
            if most > before:
                shrink = power(before - most)
                total[g] *= shrink
                for c in range(sums.shape[1]):
                    sums[g, c] *= shrink
            most = max(most, before)
        highest[g, b] = most
        added = np.float32(0.0)
        for t in range(BLOCK_TOKENS):
            of_block[t] = power(of_block[t] - most)
            added += of_block[t]
        total[g] += added
