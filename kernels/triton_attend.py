"""Decode attention over block tables on a GPU: one launch over splits, one that merges them.

A program of ``attend_splits`` walks over the blocks of one split of one table with a running maximum, for all query
heads that read the table (flash decoding). It leaves every token's score, and the split's maximum, total and weighted
values. ``merge_splits`` knows the whole table: some of its programs turn scores into probabilities and add them to
the masses, the others merge outputs. Partial results from elsewhere are merged like further splits. Scores are in
base 2.

N stands for a table's number in the batch, row * H + head. What a step's plan holds (``kernels.triton_plan``), a layer:
items int32 [I, 4] (N, first block, blocks, place of the first block among the layer's entries), spans int32 [N, 2]
(first item, items), length int32 [N], address int32 [E] and kind uint8 [E] of each block (format + 16 * tier; or
UNREAD).
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_blocks import TOKENS, block_base, block_tokens, narrow
from kernels.triton_plan import UNREAD_KIND

UNREAD = tl.constexpr(UNREAD_KIND)
NOTHING = tl.constexpr(-1e30)  # the highest score where there is none; finite, as -inf would make NaN of a difference
LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
MERGE_BLOCKS = tl.constexpr(4)  # blocks whose masses are worked out at once
MERGE_SPLITS = tl.constexpr(16)  # splits that are merged at once

_PLAN = ("items", "spans", "length", "address", "kind")


@triton.jit(do_not_specialize_on_alignment=_PLAN, do_not_specialize=("scaling", "q_row", "k_row", "v_row"))
def attend_splits(
    q,
    k,
    v,
    q_row,
    k_row,
    v_row,
    scaling,
    device,
    host,
    items,
    length,
    address,
    kind,
    scores,
    highest,
    total,
    sums,
    DTYPE: tl.constexpr,
    DOT: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    ALL: tl.constexpr,
):
    """The first pass over one split. If it holds the table's last token, that token's K and V are written first.

    Args:
        q: [R, H * G, D]; k, v: [R, H, D] in DTYPE, or None to write nothing. Rows are ``*_row`` numbers apart.
        scaling: factor on the scores, times log2(e).
        device, host: the arenas' first bytes.
        items, length, address, kind: the layer's part of the plan.
        scores: float32 [E, G, 32].
        highest, total: float32 [I, G].
        sums: float32 [I, G, D].
        DTYPE: of raw blocks. DOT: what products are taken in.
        H, G, D: KV heads, query heads a KV head, head_dim. M >= G, W >= D: rounded up to powers of two.
        ALL: whether no block is UNREAD.
    """
    item = tl.program_id(0)
    table = tl.load(items + 4 * item)
    if table < 0:
        return
    first, count, at = tl.load(items + 4 * item + 1), tl.load(items + 4 * item + 2), tl.load(items + 4 * item + 3)
    kept = tl.load(length + table)
    row, head = table // H, table % H
    channel, query, token = tl.arange(0, W), tl.arange(0, M), tl.arange(0, TOKENS)

    if k is not None:
        last = kept - 1
        if first + count == last // TOKENS + 1:
            kind_of_tail = tl.load(kind + at + count - 1)
            tail = block_base(tl.load(address + at + count - 1), kind_of_tail // 16, device, host)
            into = tail.to(tl.pointer_type(DTYPE)) + last % TOKENS * D + channel
            inside = channel < D
            new = row.to(tl.int64)
            tl.store(into, tl.load(k + new * k_row + head * D + channel, mask=inside), mask=inside)
            tl.store(into + TOKENS * D, tl.load(v + new * v_row + head * D + channel, mask=inside), mask=inside)
            tl.debug_barrier()  # other threads of this program read it below

    real = query < G
    queries = q + row.to(tl.int64) * q_row + (head * G + query[:, None]) * D + channel[None, :]
    queries = tl.load(queries, mask=real[:, None] & (channel < D)[None, :], other=0).to(DOT)  # [M, W]
    most = tl.full([M], NOTHING, tl.float32)
    whole = tl.zeros([M], tl.float32)
    weighted = tl.zeros([M, W], tl.float32)
    where, what = tl.load(address + at), tl.load(kind + at)
    for i in range(count):
        base, is_read, fmt = block_base(where, what // 16, device, host), ALL or what != UNREAD, what % 16
        following = at + tl.minimum(i + 1, count - 1)  # known before it is needed
        where, what = tl.load(address + following), tl.load(kind + following)
        if is_read:
            tokens = kept - (first + i) * TOKENS
            keys, values = block_tokens(base, fmt, tokens, DTYPE, DOT, D, W)
            score = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scaling  # [M, 32]
            score = tl.where(token[None, :] < tokens, score, float("-inf"))
            into = scores + (at + i).to(tl.int64) * (G * TOKENS) + query[:, None] * TOKENS + token[None, :]
            tl.store(into, score, mask=real[:, None])
            raised = tl.maximum(most, tl.max(score, 1))
            powers = tl.exp2(score - raised[:, None])
            shrink = tl.exp2(most - raised)
            whole = whole * shrink + tl.sum(powers, 1)
            weighted = weighted * shrink[:, None] + tl.dot(powers.to(DOT), values, input_precision="ieee")
            most = raised
        else:
            into = scores + (at + i).to(tl.int64) * (G * TOKENS) + query[:, None] * TOKENS + token[None, :]
            tl.store(into, tl.full([M, TOKENS], float("-inf"), tl.float32), mask=real[:, None])

    tl.store(highest + item * G + query, most, mask=real)
    tl.store(total + item * G + query, whole, mask=real)
    into = sums + item.to(tl.int64) * (G * D) + query[:, None] * D + channel[None, :]
    tl.store(into, weighted, mask=real[:, None] & (channel < D)[None, :])


@triton.jit(
    do_not_specialize_on_alignment=(*_PLAN, "slots"), do_not_specialize=("decay", "layer", "item_programs", "rows")
)
def merge_splits(
    output,
    lse,
    outputs,
    lses,
    rows,
    block_mass,
    received,
    voted,
    steps,
    decay,
    layer,
    item_programs,
    slots,
    items,
    spans,
    length,
    scores,
    highest,
    total,
    sums,
    DTYPE: tl.constexpr,
    L: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    T: tl.constexpr,
    P: tl.constexpr,
):
    """The second pass: a program for each split's masses (``item_programs``), then one for each row's query heads.

    Args:
        output: [R, H * G, D] in DTYPE.
        lse: float32 [R, H * G], or None if nobody wants it.
        outputs, lses: float32 [P, R, H * G, D] and [P, R, H * G], partial results to merge; None if P is 0.
        rows: R.
        block_mass: float32 [E], each block's share of attention, mean over the query group.
        received, voted: float32 [S, L, H, T], to which each token's share is added; ``voted`` fades by ``decay``.
        steps: int32 [S, L, H], counted up.
        slots: int32 [R].
        scores, highest, total, sums: what ``attend_splits`` left.
    """
    program = tl.program_id(0)
    if program < item_programs:
        if tl.load(items + 4 * program) >= 0:
            _spread_masses(
                items + 4 * program,
                block_mass,
                received,
                voted,
                steps,
                decay,
                layer,
                slots,
                spans,
                length,
                scores,
                highest,
                total,
                lses,
                rows,
                L,
                H,
                G,
                M,
                T,
                P,
            )
    else:
        at = program - item_programs
        _merge_output(at, output, lse, outputs, lses, rows, spans, highest, total, sums, DTYPE, H, G, D, W, P)


@triton.jit
def _spread_masses(
    item,
    block_mass,
    received,
    voted,
    steps,
    decay,
    layer,
    slots,
    spans,
    length,
    scores,
    highest,
    total,
    lses,
    rows,
    L: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    T: tl.constexpr,
    P: tl.constexpr,
):
    """Adds the shares of one split's tokens to the masses."""
    table, first, count, at = tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    query = tl.arange(0, M)
    most, whole = _totals(table, query, spans, highest, total, lses, rows, H, G, M, P)  # [M]
    slot = tl.load(slots + table // H).to(tl.int64)
    kept = tl.load(length + table)
    place = (slot * L + layer) * H + table % H
    if first == 0:
        tl.store(steps + place, tl.load(steps + place) + 1)
    block, token = tl.arange(0, MERGE_BLOCKS), tl.arange(0, TOKENS)
    for start in range(0, count, MERGE_BLOCKS):
        b = start + block
        score = scores + (at + b).to(tl.int64)[:, None, None] * (G * TOKENS)
        score += query[None, :, None] * TOKENS + token[None, None, :]
        inside = (b < count)[:, None, None] & (query < G)[None, :, None]
        score = tl.load(score, mask=inside, other=float("-inf"))  # [blocks, M, 32]
        share = tl.exp2(score - most[None, :, None]) / whole[None, :, None]
        share = tl.sum(tl.where(inside, share, 0.0), 1)  # [blocks, 32]
        tl.store(block_mass + at + b, tl.sum(share, 1) / G, mask=b < count)
        t = (first + b)[:, None] * TOKENS + token[None, :]
        counted = (b < count)[:, None] & (t < kept)
        into = received + place * T + t
        tl.store(into, tl.load(into, mask=counted, other=0.0) + share, mask=counted)
        into = voted + place * T + t
        tl.store(into, tl.load(into, mask=counted, other=0.0) * decay + share, mask=counted)


@triton.jit
def _merge_output(
    at,
    output,
    lse,
    outputs,
    lses,
    rows,
    spans,
    highest,
    total,
    sums,
    DTYPE: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
):
    """The output of one query head of one row, ``at`` = row * H * G + query head; zeros where there are no tokens."""
    table, query = at // G, at % G  # a table's query heads are adjacent
    most, whole = _totals(table, query + tl.arange(0, 1), spans, highest, total, lses, rows, H, G, 1, P)  # [1]
    is_empty = whole == 0.0
    whole = tl.where(is_empty, 1.0, whole)
    if lse is not None:
        tl.store(lse + at + tl.arange(0, 1), tl.where(is_empty, float("-inf"), (most + tl.log2(whole)) * LN_2))
    start, splits = tl.load(spans + 2 * table), tl.load(spans + 2 * table + 1)
    channel, split = tl.arange(0, W), tl.arange(0, MERGE_SPLITS)
    merged = tl.zeros([W], tl.float32)
    for s in range(0, splits, MERGE_SPLITS):
        here = s + split < splits
        number = start + s + split
        factor = tl.load(highest + number * G + query, mask=here, other=float("-inf"))
        factor = tl.where(here, tl.exp2(factor - most) / whole, 0.0)
        part = sums + (number.to(tl.int64) * G + query)[:, None] * D + channel[None, :]
        part = tl.load(part, mask=here[:, None] & (channel < D)[None, :], other=0.0)  # [splits, W]
        merged += tl.sum(factor[:, None] * part, 0)
    for p in tl.static_range(P):
        place = p * rows.to(tl.int64) * (H * G) + at
        factor = tl.exp2(tl.load(lses + place) * LOG2_E - most) / whole
        merged += factor * tl.load(outputs + place * D + channel, mask=channel < D, other=0.0)
    tl.store(output + at.to(tl.int64) * D + channel, narrow(merged, DTYPE), mask=channel < D)


@triton.jit
def _totals(
    table,
    query,
    spans,
    highest,
    total,
    lses,
    rows,
    H: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    P: tl.constexpr,
):
    """Maximum and total [M] of the scores of these of a table's query heads, over all its splits and the partials."""
    start, splits = tl.load(spans + 2 * table), tl.load(spans + 2 * table + 1)
    split, real = tl.arange(0, MERGE_SPLITS), query < G
    most = tl.full([M], NOTHING, tl.float32)
    whole = tl.zeros([M], tl.float32)
    for s in range(0, splits, MERGE_SPLITS):
        here = (s + split < splits)[:, None] & real[None, :]
        number = (start + s + split)[:, None] * G + query[None, :]
        high = tl.load(highest + number, mask=here, other=float("-inf"))  # [splits, M]
        amount = tl.load(total + number, mask=here, other=0.0)
        raised = tl.where(real, tl.maximum(most, tl.max(high, 0)), 0.0)
        amount = tl.where(here, amount * tl.exp2(high - raised[None, :]), 0.0)
        whole = whole * tl.exp2(most - raised) + tl.sum(amount, 0)
        most = raised
    for p in tl.static_range(P):
        place = (p * rows.to(tl.int64) * H + table) * G + query
        high = tl.load(lses + place, mask=real, other=float("-inf")) * LOG2_E
        raised = tl.maximum(most, high)
        whole = whole * tl.exp2(most - raised) + tl.exp2(high - raised)
        most = raised
    return most, tl.where(real, whole, 1.0)
