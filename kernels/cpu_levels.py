"""Attention over blocks whose numbers are codes of a table's levels, times a length for each token, on the CPU.

A block: codes of keys and of values, ``bits`` each (3 or 4), packed without gaps in rows of ceil(D * bits / 8) bytes,
the lowest bits first, uint8 [32, row] each; then the lengths of keys and of values, float16 [32] each. So
``turboquant`` stores them, rotated; queries must be too.

Codes are turned into numbers two at a time, by a table of all pairs of levels.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from kernels.cpu_attend_block import SPLIT_BLOCKS, SPLIT_TOKENS, power, raise_block, score_block, weigh_block
from kernels.cpu_jit import Array, jit
from kernels.cpu_memory import F32, load_f16, load_u8
from kernels.cpu_threads import parallel_for
from kernels.cpu_tiles import CHANNELS, TILE_QUERIES
from kernels.layout import BLOCK_TOKENS

LN_2 = np.float32(0.6931471805599453)


@jit
def _spread_levels(block: int, bits: int, d: int, pairs: Array, into: Array) -> None:
    """Keys and values of a block, uint64 [64, W / 2], two float32 each, without their lengths."""
    row, mask = (d * bits + 7) // 8, (1 << 2 * bits) - 1
    for t in range(2 * BLOCK_TOKENS):
        codes = block + t * row
        if bits == 4:
            for p in range(d // 2):
                into[t, p] = pairs[load_u8(codes, p)]
        else:
            for p in range(d // 2):
                bit = 2 * bits * p
                word = load_u8(codes, bit >> 3) | load_u8(codes, (bit >> 3) + 1) << 8
                into[t, p] = pairs[word >> (bit & 7) & mask]


@jit
def _attend_run(
    i: int,
    runs: Array,
    memory: Array,
    head: Array,
    bits: int,
    d: int,
    q: Array,
    pairs: Array,
    score: Array,
    highest: Array,
    total: Array,
    sums: Array,
) -> None:
    """Some consecutive blocks of one head, at most SPLIT_BLOCKS."""
    first, end = runs[i], runs[i + 1]
    group, width = sums.shape[1:]
    scores = np.empty((group, SPLIT_TOKENS), np.float32)
    most = np.empty((group, SPLIT_BLOCKS), np.float32)
    numbers = np.zeros((2 * BLOCK_TOKENS, width // 2), np.uint64)
    scratch = np.empty((BLOCK_TOKENS + TILE_QUERIES, width), np.float32)
    address, row = numbers.ctypes.data, (d * bits + 7) // 8
    total[i], sums[i] = 0, 0
    for n in range(first, end):
        b, lengths = n - first, memory[n] + 2 * BLOCK_TOKENS * row
        at = b * BLOCK_TOKENS
        _spread_levels(memory[n], bits, d, pairs, numbers)
        score_block(F32, address, BLOCK_TOKENS, width, q[head[n]], scores, at, scratch, address)
        for g in range(group):
            for t in range(BLOCK_TOKENS):
                scores[g, at + t] *= load_f16(lengths, t)
                score[n, g, t] = scores[g, at + t] * LN_2
        raise_block(scores, b, BLOCK_TOKENS, most, total[i], sums[i])
        for g in range(group):
            for t in range(BLOCK_TOKENS):
                scores[g, at + t] *= load_f16(lengths, BLOCK_TOKENS + t)
        weigh_block(F32, address, BLOCK_TOKENS, width, scores, at, sums[i], scratch, address)
    highest[i] = most[:, end - first - 1]


@jit
def _merge_head(h: int, runs_of: Array, highest: Array, total: Array, sums: Array, output: Array, lse: Array) -> None:
    """One head's output and lse from those of its runs."""
    first, end = runs_of[h], runs_of[h + 1]
    for g in range(lse.shape[1]):
        output[h, g], lse[h, g] = 0, -np.inf
        if first == end:
            continue
        most = highest[first:end, g].max()
        whole = np.float32(0.0)
        for s in range(first, end):
            whole += power(highest[s, g] - most) * total[s, g]
        for s in range(first, end):
            factor = power(highest[s, g] - most) / whole
            for c in range(output.shape[2]):
                output[h, g, c] += factor * sums[s, g, c]
        lse[h, g] = (most + np.log2(whole)) * LN_2


@jit
def _attend(
    team: tuple[int, int, int],
    runs: Array,
    runs_of: Array,
    memory: Array,
    head: Array,
    bits: int,
    d: int,
    q: Array,
    pairs: Array,
    score: Array,
    work: Any,
    output: Array,
    lse: Array,
) -> None:
    highest, total, sums = work
    first_pass = runs, memory, head, bits, d, q, pairs, score, highest, total, sums
    parallel_for(team, _attend_run, len(runs) - 1, first_pass)
    parallel_for(team, _merge_head, len(lse), (runs_of, highest, total, sums, output, lse))


def attend_levels(
    team: tuple[int, int, int], memory: Array, head: Array, bits: int, q: Array, pairs: Array
) -> tuple[Array, Array, Array]:
    """Attention over N blocks.

    Args:
        team: ``kernels.cpu_threads.team()``.
        memory: int64 [N] where each block begins.
        head: int64 [N] its KV head, rising.
        bits: of a code.
        q: float32 [H, G, D], scaled by the factor on scores and by log2(e).
        pairs: uint64 [4 ** bits] two float32 levels each, that of the low code first.

    Returns:
        Output float32 [H, G, D], lse [H, G], and natural scores [N, G, 32].
    """
    heads, group, d = q.shape
    width = -(-d // CHANNELS) * CHANNELS
    padded = np.zeros((heads, group, width), np.float32)
    padded[..., :d] = q
    starts = np.searchsorted(head, np.arange(heads + 1))  # [H + 1]
    each = [np.arange(a, b, SPLIT_BLOCKS) for a, b in pairwise(starts.tolist())]
    runs = np.concatenate([*each, [len(head)]]).astype(np.int64)
    runs_of = np.concatenate([[0], np.cumsum([len(part) for part in each])]).astype(np.int64)
    sizes = (len(runs) - 1, group)
    work = np.empty(sizes, np.float32), np.empty(sizes, np.float32), np.empty((*sizes, width), np.float32)
    output, lse = np.empty((heads, group, d), np.float32), np.empty((heads, group), np.float32)
    score = np.empty((len(head), group, BLOCK_TOKENS), np.float32)
    _attend(team, runs, runs_of, memory, head, bits, d, padded, pairs, score, work, output, lse)
    return output, lse, score
