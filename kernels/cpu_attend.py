"""Decode attention over block tables on the CPU: split-K in two passes.

A table's tokens are cut into splits of SPLIT_BLOCKS blocks, whatever else is in the batch, so that a request's output
depends on nothing but itself, and one long request still keeps all threads busy. The first pass walks over each
split's blocks with a running maximum and leaves 2 ** (score - maximum so far) of every token, their total and the
weighted values; the second knows the table's totals, merges the outputs, and turns the powers into probabilities
with one factor a block, without raising them again. Partial results from elsewhere are merged like further splits.

A block on a tier that is not read keeps its place in its split, as one whose tokens have powers of 0.

Scores are in base 2 throughout: queries come scaled by log2(e).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels import partials
from kernels.cpu_attend_block import (
    NOTHING,
    SPLIT_BLOCKS,
    SPLIT_TOKENS,
    power,
    raise_block,
    score_block,
    weigh_block,
)
from kernels.cpu_blocks import codes_bytes, kind_of, scales_bytes
from kernels.cpu_jit import Array, fast_jit, jit
from kernels.cpu_memory import BF16, copy_bytes, float_of_half, half_of, load_f32
from kernels.cpu_threads import parallel_for
from kernels.cpu_tiles import TILE_QUERIES, prefetch, spread_tile
from kernels.layout import BLOCK_TOKENS, UNIT_BYTES, Format

Arrays = Any  # tuples of arrays
FORMATS = len(Format)
LOG2_E, LN_2 = np.float32(partials.LOG2_E), np.float32(1 / partials.LOG2_E)


@jit
def _locate(bases: Array, raw_kind: int, tables: Arrays, table: tuple[int, int, int], b: int) -> tuple[int, int]:
    """Where block b of a table starts, and how it keeps its numbers."""
    address, fmt, tier = tables
    slot, layer, head = table
    block = bases[tier[slot, layer, head, b]] + np.int64(address[slot, layer, head, b]) * UNIT_BYTES
    return block, kind_of(fmt[slot, layer, head, b], raw_kind)


@jit
def _skip_block(scores: Array, b: int, highest: Array) -> None:
    """What ``raise_block`` leaves of a block that is not read."""
    for g in range(len(scores)):
        scores[g, b * BLOCK_TOKENS : (b + 1) * BLOCK_TOKENS] = 0
        highest[g, b] = highest[g, b - 1] if b > 0 else NOTHING


@jit
def _attend_split(
    i: int,
    bases: Array,
    raw_kind: int,
    layer: int,
    scaling: np.float32,
    reads: Array,
    appends: bool,
    tables: Arrays,
    length: Array,
    slots: Array,
    items: Array,
    q: Array,
    k: Array,
    v: Array,
    workspace: Arrays,
) -> None:
    """The first pass over one split. If it holds a token to append, the last, its K and V are written first."""
    scores, highest, total, sums = workspace
    group, width = sums.shape[1:]
    d, row_bytes = q.shape[2], k.shape[2]
    row, head, split = items[i, 0], items[i, 1], items[i, 2]
    table = slots[row], layer, head
    kept = length[table]
    tail = (kept - 1) // BLOCK_TOKENS
    first, end = split * SPLIT_BLOCKS, min((split + 1) * SPLIT_BLOCKS, tail + 1)
    if appends and end == tail + 1:
        block, _ = _locate(bases, raw_kind, tables, table, tail)
        into = block + (kept - 1) % BLOCK_TOKENS * row_bytes
        copy_bytes(into, k[row, head].ctypes.data, row_bytes)
        copy_bytes(into + BLOCK_TOKENS * row_bytes, v[row, head].ctypes.data, row_bytes)

    scaled = np.zeros((group, width), np.float32)
    for g in range(group):
        for c in range(d):
            scaled[g, c] = q[row, head * group + g, c] * scaling
    scratch = np.empty((BLOCK_TOKENS + TILE_QUERIES, width), np.float32)
    total[i], sums[i] = 0, 0
    following, next_kind = _locate(bases, raw_kind, tables, table, first)
    for b in range(first, end):
        block, kind = following, next_kind
        # wherever it lies: to fetch ahead does not fail where there is no memory
        following, next_kind = _locate(bases, raw_kind, tables, table, min(b + 1, tail))
        if not reads[tables[2][slots[row], layer, head, b]] or tables[1][slots[row], layer, head, b] >= FORMATS:
            _skip_block(scores[i], b - first, highest[i])
            continue
        tokens, at = min(BLOCK_TOKENS, kept - b * BLOCK_TOKENS), (b - first) * BLOCK_TOKENS
        values = block + BLOCK_TOKENS * codes_bytes(kind, d)
        if next_kind > BF16:
            prefetch(following + 2 * BLOCK_TOKENS * codes_bytes(next_kind, d), scales_bytes(next_kind, d))
        score_block(kind, block, tokens, d, scaled, scores[i], at, scratch, values)
        raise_block(scores[i], b - first, tokens, highest[i], total[i], sums[i])
        weigh_block(kind, block, tokens, d, scores[i], at, sums[i], scratch, following)
    for b in range(end - first, SPLIT_BLOCKS):
        for g in range(group):
            highest[i, g, b] = highest[i, g, end - first - 1]


@fast_jit
def _spread(
    scores: Array, share: Array, tokens: int, decay: np.float32, mass: Array, votes: Array, means: Array
) -> None:
    """Adds a split's probabilities to the tables' masses [tokens]; each block's mean over G goes to ``means`` [blocks].

    A probability is scores [G, SPLIT_TOKENS] times its block's share [G, SPLIT_BLOCKS].
    """
    blocks = (tokens + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    group = len(scores)
    received = np.empty(SPLIT_TOKENS, np.float32)
    for b in range(blocks):
        powers, into = scores.ctypes.data + 4 * b * BLOCK_TOKENS, received.ctypes.data + 4 * b * BLOCK_TOKENS
        spread_tile(group, powers, 4 * SPLIT_TOKENS, share.ctypes.data + 4 * b, 4 * SPLIT_BLOCKS, into)
        summed = np.float32(0.0)
        for t in range(BLOCK_TOKENS):
            summed += load_f32(into, t)
        means[b] = summed / np.float32(group)
    for t in range(tokens):
        mass[t] += received[t]
    for t in range(tokens):
        votes[t] = np.uint16(half_of(float_of_half(np.int32(votes[t])) * decay + received[t]))


@jit
def _merge_split(
    i: int,
    layer: int,
    decay: np.float32,
    appends: bool,
    added_to: Arrays,
    items: Array,
    outputs: Array,
    lses: Array,
    output: Array,
    lse: Array,
    block_mass: Array,
    workspace: Arrays,
) -> None:
    """The second pass over one split: its share of the table's masses; a table's first split also makes its output."""
    length, mass, votes, slots = added_to
    scores, highest, total, sums = workspace
    group, d = sums.shape[1], output.shape[2]
    row, head, split, start = items[i, 0], items[i, 1], items[i, 2], items[i, 3]
    table = slots[row], layer, head
    kept = length[table]
    stop = start + (kept + SPLIT_TOKENS - 1) // SPLIT_TOKENS
    share = np.empty((group, SPLIT_BLOCKS), np.float32)
    parts = len(outputs)
    for g in range(group):
        query = head * group + g
        most = highest[start, g, -1]
        for s in range(start, stop):
            most = max(most, highest[s, g, -1])
        for p in range(parts):
            most = max(most, lses[p, row, query] * LOG2_E)
        whole = np.float32(0.0)
        for s in range(start, stop):
            whole += power(highest[s, g, -1] - most) * total[s, g]
        for p in range(parts):
            whole += power(lses[p, row, query] * LOG2_E - most)
        if whole == 0:  # no block of the table is read
            continue
        for b in range(SPLIT_BLOCKS):
            share[g, b] = power(highest[i, g, b] - most) / whole
        if split == 0:
            merged = output[row, query]
            for c in range(d):
                merged[c] = 0
            for s in range(start, stop):
                factor = power(highest[s, g, -1] - most) / whole
                for c in range(d):
                    merged[c] += factor * sums[s, g, c]
            for p in range(parts):
                factor = power(lses[p, row, query] * LOG2_E - most) / whole
                for c in range(d):
                    merged[c] += factor * outputs[p, row, query, c]
            lse[row, query] = (most + np.log2(whole)) * LN_2
    if not appends:
        return
    first, end = split * SPLIT_TOKENS, min((split + 1) * SPLIT_TOKENS, kept)
    means = block_mass[row, head, split * SPLIT_BLOCKS :]
    _spread(scores[i], share, end - first, decay, mass[table][first:end], votes[table][first:end], means)


@jit
def attend(
    team: tuple[int, int, int],
    bases: Array,
    raw_kind: int,
    layer: int,
    scaling: np.float32,
    decay: np.float32,
    reads: Array,
    appends: bool,
    address: Array,
    fmt: Array,
    tier: Array,
    length: Array,
    mass: Array,
    votes: Array,
    slots: Array,
    items: Array,
    q: Array,
    k: Array,
    v: Array,
    outputs: Array,
    lses: Array,
    output: Array,
    lse: Array,
    block_mass: Array,
    scores: Array,
    highest: Array,
    total: Array,
    sums: Array,
) -> None:
    """One layer's ``kernels.api.Backend.decode``, or ``attend`` where nothing ``appends``: then k, v, mass and votes go
    unused. Tables are whole: [S, L, H, ...].

    Args:
        team: ``kernels.cpu_threads.team()``.
        scaling: factor on the scores, times log2(e).
        reads: bool [tiers].
        votes: the tables' float16 as uint16.
        items: [I, 4] row, head, split, and the number of the table's first item; a table's splits are adjacent.
        q, output, lse: float32 [R, query heads, D], and [R, query heads]. Results stay what they were where no token of
            a table is read.
        k, v: uint8 [R, H, bytes of D numbers].
        outputs, lses: float32 [P, R, query heads, D] and [P, R, query heads], of P partial results.
        block_mass: [R, H, B'] of this layer.
        scores, highest, total, sums: workspace, at least [I, G, SPLIT_TOKENS], [I, G, SPLIT_BLOCKS], [I, G], [I, G, W].
    """
    workspace = scores, highest, total, sums
    tables = address, fmt, tier
    first_pass = bases, raw_kind, layer, scaling, reads, appends, tables, length, slots, items, q, k, v, workspace
    parallel_for(team, _attend_split, len(items), first_pass)
    added_to = length, mass, votes, slots
    second_pass = layer, decay, appends, added_to, items, outputs, lses, output, lse, block_mass, workspace
    parallel_for(team, _merge_split, len(items), second_pass)
