"""The inner loops of decode attention as LLVM vector code: queries times keys, weights times values, masses.

Numba's own loops leave these far from what the machine can do: the sums over channels of several queries and tokens
must stay in registers together. So the loops are generated here as LLVM IR, one variant for each kind of storage and
number of queries, on vectors of 16 float32, which LLVM maps to whatever vectors the machine has.

Addresses and strides are in bytes. Whole vectors are read: D must be a multiple of CHANNELS.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from kernels.cpu_jit import intrinsic
from kernels.cpu_memory import BF16, BYTE, F16, F32, FLOAT, FP8, HALF, INT, INT2, INT4, INT8, SHORT
from kernels.layout import BLOCK_TOKENS

LANES = 16
TILE_QUERIES = 4  # most queries a tile takes at once; with TILE_TOKENS, 16 sums and 8 operands fill 24 of 32 registers
TILE_TOKENS = 4
QUERIES = range(1, TILE_QUERIES + 1)
TILE_VECTORS = (2, 4)  # vectors of value channels at once: the more, the fewer times a weight is loaded
CHANNELS = LANES * TILE_VECTORS[0]
WIDE_CHANNELS = LANES * TILE_VECTORS[1]
LINE_BYTES = 64

_cgutils: Any = cgutils
LONG = ir.IntType(64)
VECTOR = ir.VectorType(FLOAT, LANES)
KINDS = (F32, F16, BF16, INT8, INT4, INT2, FP8)
VECTOR_BYTES = {F32: 64, F16: 32, BF16: 32, INT8: 16, INT4: 16, INT2: 16, FP8: 16}  # bytes that hold PARTS vectors
PARTS = dict.fromkeys(KINDS, 1) | {INT4: 2, INT2: 4}
CODES = (INT8, INT4, INT2, FP8)
ZEROS = (INT8, INT4, INT2)  # kinds whose groups have a zero beside their scale
FOLDED_GROUPS = (1, 2, 4, 8)  # numbers of value groups that fold_tile does
FP8_STEP = 256.0  # an e4m3 is this times the float16 with its exponent and mantissa bits


def _long(number: int) -> ir.Constant:
    return ir.Constant(LONG, number)


def _add(builder: ir.IRBuilder, address: ir.Value, *offsets: ir.Value | int) -> ir.Value:
    for offset in offsets:
        address = builder.add(address, _long(offset) if isinstance(offset, int) else offset)
    return address


def _load(builder: ir.IRBuilder, address: ir.Value, element: ir.Type, lanes: int = LANES) -> ir.Value:
    stored = ir.VectorType(element, lanes)
    return builder.load(builder.inttoptr(address, stored.as_pointer()), align=1)


def _store(builder: ir.IRBuilder, vector: ir.Value, address: ir.Value) -> None:
    builder.store(vector, builder.inttoptr(address, vector.type.as_pointer()), align=1)


def _splat(builder: ir.IRBuilder, number: ir.Value, lanes: int = LANES) -> ir.Value:
    vector = ir.VectorType(number.type, lanes)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), number, ir.Constant(INT, 0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(INT, lanes), [0] * lanes))


def _multiply_add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))  # fused where there is an FMA


def _load_numbers(builder: ir.IRBuilder, kind: int, address: ir.Value) -> list[ir.Value]:
    """The float32 vectors in ``VECTOR_BYTES[kind]`` bytes: one, or that of the lowest bits of each byte and the next.

    Those of FP8 are too small by ``FP8_STEP``.
    """
    ints = ir.VectorType(INT, LANES)
    if kind == F32:
        return [_load(builder, address, FLOAT)]
    if kind == F16:
        return [builder.fpext(_load(builder, address, HALF), VECTOR)]
    if kind == BF16:
        wide = builder.zext(_load(builder, address, SHORT), ints)
        return [builder.bitcast(builder.shl(wide, ir.Constant(ints, [16] * LANES)), VECTOR)]
    if kind == FP8:
        shorts = ir.VectorType(SHORT, LANES)
        signed = builder.sext(_load(builder, address, BYTE), shorts)
        moved = builder.shl(signed, ir.Constant(shorts, [7] * LANES))
        half = builder.and_(moved, ir.Constant(shorts, [0xBF80] * LANES))  # the sign, copied one place too low, goes
        return [builder.fpext(builder.bitcast(half, ir.VectorType(HALF, LANES)), VECTOR)]
    codes = builder.zext(_load(builder, address, BYTE), ints)
    bits, numbers = 8 // PARTS[kind], []
    for part in range(PARTS[kind]):
        code = builder.lshr(codes, ir.Constant(ints, [part * bits] * LANES)) if part else codes
        if part + 1 < PARTS[kind]:
            code = builder.and_(code, ir.Constant(ints, [(1 << bits) - 1] * LANES))
        numbers.append(builder.sitofp(code, VECTOR))  # codes are not negative, and signed conversion is the faster one
    return numbers


def _sum_lanes(builder: ir.IRBuilder, vectors: list[ir.Value]) -> ir.Value:
    """The sums of four vectors' lanes, as a vector of four."""

    def shuffled_sum(a: ir.Value, b: ir.Value, left: list[int], right: list[int]) -> ir.Value:
        masks = (ir.Constant(ir.VectorType(INT, len(lanes)), lanes) for lanes in (left, right))
        return builder.fadd(*(builder.shuffle_vector(a, b, mask) for mask in masks))

    quarters = range(0, LANES, 4)  # registers shuffle cheapest within 128 bits
    interleave = [[q + lane for q in quarters for lane in (i, i + LANES, i + 1, i + 1 + LANES)] for i in (0, 2)]
    combine = [[q + lane for q in quarters for lane in (i, i + 1, i + LANES, i + 1 + LANES)] for i in (0, 2)]
    pairs = [shuffled_sum(a, b, *interleave) for a, b in (vectors[:2], vectors[2:])]
    lanes = shuffled_sum(*pairs, *combine)
    lanes = shuffled_sum(lanes, lanes, list(range(8)), list(range(8, 16)))
    return shuffled_sum(lanes, lanes, list(range(4)), list(range(4, 8)))


def _prefetch(builder: ir.IRBuilder, address: ir.Value, size: ir.Value) -> None:
    """Asks for the cache lines of ``size`` bytes (more than 0) from ``address`` on."""
    pointer = BYTE.as_pointer()
    signature = ir.FunctionType(ir.VoidType(), [pointer, INT, INT, INT])
    ask = _cgutils.get_or_insert_function(builder.module, signature, "llvm.prefetch.p0")
    with _loop(builder, builder.sdiv(_add(builder, size, LINE_BYTES - 1), _long(LINE_BYTES))) as line:
        at = builder.inttoptr(_add(builder, address, builder.mul(line, _long(LINE_BYTES))), pointer)
        builder.call(
            ask, [at, *(ir.Constant(INT, flag) for flag in (0, 2, 1))]
        )  # to read; L2 has more misses under way than L1; data


@contextmanager
def _loop(builder: ir.IRBuilder, count: ir.Value) -> Iterator[ir.Value]:
    """Runs the body for 0 .. count - 1; count is at least 1."""
    start, body, end = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("done")
    builder.branch(body)
    builder.position_at_end(body)
    index = builder.phi(LONG)
    index.add_incoming(_long(0), start)
    yield index
    following = builder.add(index, _long(1))
    index.add_incoming(following, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, count), body, end)
    builder.position_at_end(end)


class _Sums:
    """Vectors summed up over a loop's rounds in registers."""

    def __init__(self, builder: ir.IRBuilder, initial: list[ir.Value]) -> None:
        self._builder = builder
        with builder.goto_entry_block():
            self._slots = [builder.alloca(VECTOR) for _ in initial]  # LLVM turns these into registers
        for slot, vector in zip(self._slots, initial, strict=True):
            builder.store(vector, slot)

    def add_product(self, i: int, a: ir.Value, b: ir.Value) -> None:
        total = self._builder.load(self._slots[i])
        self._builder.store(_multiply_add(self._builder, a, b, total), self._slots[i])

    def vectors(self) -> list[ir.Value]:
        return [self._builder.load(slot) for slot in self._slots]


def _for_each_variant(
    builder: ir.IRBuilder, generate: Callable[..., None], *choices: tuple[ir.Value, Sequence[int]]
) -> None:
    """Code that switches to the variant for some numbers known when it runs, each one of those it may be."""
    end = builder.append_basic_block("end")
    number: ir.Value = _long(0)
    for value, possible in choices:
        number = builder.add(builder.mul(number, _long(max(possible) + 1)), value)
    switch = builder.switch(number, end)
    for given in itertools.product(*(possible for _, possible in choices)):
        of_variant = 0
        for one, (_, possible) in zip(given, choices, strict=True):
            of_variant = of_variant * (max(possible) + 1) + one
        block = builder.append_basic_block("variant_" + "_".join(map(str, given)))
        switch.add_case(_long(of_variant), block)
        builder.position_at_end(block)
        generate(*given)
        builder.branch(end)
    builder.position_at_end(end)


def _intrinsic(arguments: int, generate: Callable[..., None]) -> Any:
    """A Numba function of int64 arguments, without result, whose code ``generate(builder, *arguments)`` emits."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        generate(builder, *args)
        return context.get_dummy_value()

    return types.void(*[types.int64] * arguments), emit


@intrinsic
def prefetch(typing: Any, address: Any, size: Any) -> Any:
    """``prefetch(address, size)``: asks for that many bytes."""
    return _intrinsic(2, _prefetch)


@intrinsic
def score_tile(
    typing: Any,
    kind: Any,
    queries: Any,
    keys: Any,
    key_stride: Any,
    quads: Any,
    d: Any,
    q: Any,
    q_stride: Any,
    scores: Any,
    score_stride: Any,
    scales: Any,
    scaled: Any,
    ahead: Any,
) -> Any:
    """Stores float32 scores[g, t] = sum over channels of q[g] * keys[t], for tokens t of ``quads`` * TILE_TOKENS.

    ``queries`` float32 rows of D lie at ``q``, rows of ``kind`` at ``keys``, each with its stride; ``score_stride`` is
    that from one query's scores to the next's. Meanwhile the rows at ``ahead`` are brought into the cache.
    """

    def generate(builder: ir.IRBuilder, kind: Any, queries: Any, *rest: Any) -> None:
        keys, key_stride, quads, d, q, q_stride, scores, score_stride, scales, scaled, ahead = rest

        def scale_queries(kind: int, queries: int) -> ir.Value | None:
            """sum q * (code * scale + zero) = sum (q * scale) * code + sum q * zero: returns the latter sums."""
            sums = _Sums(builder, [ir.Constant(VECTOR, [0.0] * LANES)] * TILE_QUERIES)
            with _loop(builder, builder.sdiv(d, _long(LANES))) as i:
                at = _add(builder, scales, builder.mul(i, _long(2 * LANES)))
                [scale] = _load_numbers(builder, F16, at)
                if kind == FP8:
                    scale = builder.fmul(scale, ir.Constant(VECTOR, [FP8_STEP] * LANES))
                for g in range(queries):
                    offset = _add(builder, builder.mul(i, _long(4 * LANES)), builder.mul(q_stride, _long(g)))
                    query = _load(builder, _add(builder, q, offset), FLOAT)
                    _store(builder, builder.fmul(query, scale), _add(builder, scaled, offset))
                    if kind in ZEROS:
                        [zero] = _load_numbers(builder, F16, _add(builder, at, builder.mul(d, _long(2))))
                        sums.add_product(g, query, zero)
            return _sum_lanes(builder, sums.vectors()) if kind in ZEROS else None

        def variant(kind: int, queries: int) -> None:
            vectors = PARTS[kind]
            constants = scale_queries(kind, queries) if kind > BF16 else None
            at_queries = scaled if kind > BF16 else q
            rounds = builder.sdiv(d, _long(LANES * vectors))
            quad_bytes = builder.mul(key_stride, _long(TILE_TOKENS))
            part_bytes = builder.mul(d, _long(4 // vectors))  # of D / vectors float32
            with _loop(builder, quads) as quad:
                token = builder.mul(quad, _long(TILE_TOKENS))
                first = _add(builder, keys, builder.mul(token, key_stride))
                _prefetch(builder, _add(builder, ahead, builder.mul(token, key_stride)), quad_bytes)
                rows = [_add(builder, first, builder.mul(key_stride, _long(t))) for t in range(TILE_TOKENS)]
                sums = _Sums(builder, [ir.Constant(VECTOR, [0.0] * LANES)] * (queries * TILE_TOKENS))
                with _loop(builder, rounds) as i:
                    offset = builder.mul(i, _long(VECTOR_BYTES[kind]))
                    numbers = [_load_numbers(builder, kind, _add(builder, row, offset)) for row in rows]
                    channel = _add(builder, at_queries, builder.mul(i, _long(4 * LANES)))
                    for part in range(vectors):
                        for g in range(queries):
                            at = _add(builder, channel, builder.mul(q_stride, _long(g)))
                            query = _load(builder, _add(builder, at, builder.mul(part_bytes, _long(part))), FLOAT)
                            for t in range(TILE_TOKENS):
                                sums.add_product(g * TILE_TOKENS + t, query, numbers[t][part])
                into = _add(builder, scores, builder.mul(token, _long(4)))
                totals = sums.vectors()
                for g in range(queries):
                    four = _sum_lanes(builder, totals[g * TILE_TOKENS : (g + 1) * TILE_TOKENS])
                    if constants is not None:
                        repeat = ir.Constant(ir.VectorType(INT, TILE_TOKENS), [g] * TILE_TOKENS)
                        four = builder.fadd(four, builder.shuffle_vector(constants, constants, repeat))
                    _store(builder, four, _add(builder, into, builder.mul(score_stride, _long(g))))

        _for_each_variant(builder, variant, (kind, KINDS), (queries, QUERIES))

    return _intrinsic(13, generate)


@intrinsic
def fold_tile(
    typing: Any,
    kind: Any,
    queries: Any,
    groups: Any,
    scales: Any,
    weights: Any,
    weight_stride: Any,
    folded: Any,
    folded_stride: Any,
) -> Any:
    """Multiplies a block's constants into its tokens' weights, so that values can be weighed as the codes they are.

    sum over t of weights[t] * (code[t] * scale[t] + zero[t]) is that of folded[t] * code[t], and a base. Reads float32
    weights[g, 32] and the values' constants at ``scales`` as the block has them, with so many value groups (one of
    FOLDED_GROUPS); stores float32 folded[g, 32, groups], and after those of each query a base for each group.
    """

    def generate(builder: ir.IRBuilder, kind: Any, queries: Any, groups: Any, *rest: Any) -> None:
        scales, weights, weight_stride, folded, folded_stride = rest

        def variant(kind: int, queries: int, groups: int) -> None:
            tokens = LANES // groups
            repeat = ir.Constant(ir.VectorType(INT, LANES), [lane // groups for lane in range(LANES)])
            zeros = _add(builder, scales, 2 * BLOCK_TOKENS * groups)
            sums = _Sums(builder, [ir.Constant(VECTOR, [0.0] * LANES)] * queries)
            with _loop(builder, _long(BLOCK_TOKENS // tokens)) as i:
                constants = builder.mul(i, _long(2 * LANES))
                [scale] = _load_numbers(builder, F16, _add(builder, scales, constants))
                if kind == FP8:
                    scale = builder.fmul(scale, ir.Constant(VECTOR, [FP8_STEP] * LANES))
                for g in range(queries):
                    row = _add(builder, weights, builder.mul(weight_stride, _long(g)))
                    few = _load(builder, _add(builder, row, builder.mul(i, _long(4 * tokens))), FLOAT, tokens)
                    weight = builder.shuffle_vector(few, few, repeat)
                    into = _add(builder, folded, builder.mul(folded_stride, _long(g)), builder.mul(i, _long(4 * LANES)))
                    _store(builder, builder.fmul(weight, scale), into)
                    if kind in ZEROS:
                        [zero] = _load_numbers(builder, F16, _add(builder, zeros, constants))
                        sums.add_product(g, weight, zero)
            for g, base in enumerate(sums.vectors()):
                distance = LANES // 2
                while distance >= groups:  # lanes of the same group are so far apart
                    turned = [(lane + distance) % LANES for lane in range(LANES)]
                    turn = ir.Constant(ir.VectorType(INT, LANES), turned)
                    base = builder.fadd(base, builder.shuffle_vector(base, base, turn))
                    distance //= 2
                after = builder.add(builder.mul(folded_stride, _long(g)), _long(4 * BLOCK_TOKENS * groups))
                _store(builder, base, _add(builder, folded, after))

        _for_each_variant(builder, variant, (kind, CODES), (queries, QUERIES), (groups, FOLDED_GROUPS))

    return _intrinsic(8, generate)


@intrinsic
def weigh_tile(
    typing: Any,
    kind: Any,
    queries: Any,
    values: Any,
    value_stride: Any,
    tokens: Any,
    d: Any,
    channel: Any,
    weights: Any,
    weight_stride: Any,
    sums: Any,
    sum_stride: Any,
    ahead: Any,
) -> Any:
    """Adds to float32 sums[g] the ``tokens`` rows of ``kind`` at ``values``, each times float32 weights[g, t].

    Covers WIDE_CHANNELS channels from ``channel`` on where D is a multiple of that, else CHANNELS. Of INT4 these are
    half of them from ``channel`` and half from ``channel + D / 2`` on, of INT2 a quarter from each
    ``channel + i D / 4``. Codes are weighed as such, with what ``fold_tile`` made of all 32 tokens' weights. Meanwhile
    as many rows at ``ahead`` are fetched into cache.
    """

    def generate(builder: ir.IRBuilder, kind: Any, queries: Any, *rest: Any) -> None:
        values, value_stride, tokens, d, channel, weights, weight_stride, sums, sum_stride, ahead = rest
        group_stride = builder.mul(builder.sdiv(builder.add(d, _long(31)), _long(32)), _long(4))

        def variant(kind: int, queries: int, wide: int) -> None:
            parts = PARTS[kind]
            loads = max(1, TILE_VECTORS[wide] // parts)
            channels = [
                _add(builder, channel, LANES * i, builder.mul(builder.sdiv(d, _long(parts)), _long(part)))
                for i in range(loads)
                for part in range(parts)
            ]
            first = _add(builder, values, builder.mul(builder.sdiv(channel, _long(LANES)), _long(VECTOR_BYTES[kind])))
            into = [
                _add(builder, sums, builder.mul(sum_stride, _long(g)), builder.mul(c, _long(4)))
                for g in range(queries)
                for c in channels
            ]
            initial = [_load(builder, address, FLOAT) for address in into]
            of_group = [_long(0)]
            if kind in CODES:
                of_group = [builder.mul(builder.sdiv(c, _long(32)), _long(4)) for c in channels]
                if parts == 1:  # neighbours share a group
                    of_group = of_group[::2]
            each = len(channels) // len(of_group)  # adjacent channels that a weight is for
            if kind in ZEROS:
                bases = _add(builder, weights, builder.mul(group_stride, _long(BLOCK_TOKENS)))
                for g in range(queries):
                    for i, group in enumerate(of_group):
                        at = _add(builder, bases, builder.mul(weight_stride, _long(g)), group)
                        base = _splat(builder, _scalar(builder, at))
                        for n in range(i * each, (i + 1) * each):
                            total = g * len(channels) + n
                            initial[total] = builder.fadd(initial[total], base)
            totals = _Sums(builder, initial)
            with _loop(builder, tokens) as t:
                row = _add(builder, first, builder.mul(t, value_stride))
                _prefetch(builder, _add(builder, ahead, builder.mul(t, value_stride)), value_stride)
                numbers = [
                    vector
                    for i in range(loads)
                    for vector in _load_numbers(builder, kind, _add(builder, row, i * VECTOR_BYTES[kind]))
                ]
                of_token = builder.mul(t, group_stride if kind in CODES else _long(4))
                for g in range(queries):
                    for i, group in enumerate(of_group):
                        at = _add(builder, weights, builder.mul(weight_stride, _long(g)), of_token, group)
                        weight = _splat(builder, _scalar(builder, at))
                        for n in range(i * each, (i + 1) * each):
                            totals.add_product(g * len(numbers) + n, weight, numbers[n])
            for vector, address in zip(totals.vectors(), into, strict=True):
                _store(builder, vector, address)

        rest_of_d = builder.srem(d, _long(WIDE_CHANNELS))
        wide = builder.zext(builder.icmp_signed("==", rest_of_d, _long(0)), LONG)
        _for_each_variant(builder, variant, (kind, KINDS), (queries, QUERIES), (wide, (0, 1)))

    return _intrinsic(12, generate)


@intrinsic
def spread_tile(
    typing: Any, queries: Any, scores: Any, score_stride: Any, shares: Any, share_stride: Any, into: Any
) -> Any:
    """Stores one block's float32 into[t] = sum over queries of scores[g, t] * shares[g]."""

    def generate(builder: ir.IRBuilder, queries: Any, *rest: Any) -> None:
        scores, score_stride, shares, share_stride, into = rest
        offsets = range(0, 4 * BLOCK_TOKENS, 4 * LANES)
        sums = _Sums(builder, [ir.Constant(VECTOR, [0.0] * LANES)] * len(offsets))
        with _loop(builder, queries) as g:
            share = _splat(builder, _scalar(builder, _add(builder, shares, builder.mul(g, share_stride))))
            row = _add(builder, scores, builder.mul(g, score_stride))
            for i, offset in enumerate(offsets):
                sums.add_product(i, share, _load(builder, _add(builder, row, offset), FLOAT))
        for vector, offset in zip(sums.vectors(), offsets, strict=True):
            _store(builder, vector, _add(builder, into, offset))

    return _intrinsic(6, generate)


def _scalar(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.load(builder.inttoptr(address, FLOAT.as_pointer()), align=4)
