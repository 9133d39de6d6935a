"""Moving and transcoding many blocks on the CPU, spread over the threads."""

from __future__ import annotations

import numpy as np

from kernels.cpu_blocks import codes_bytes, kind_of, load_key, load_value, quantise, scales_bytes, store_raw
from kernels.cpu_jit import Array, jit
from kernels.cpu_memory import BF16, clear_bytes, copy_bytes
from kernels.cpu_threads import parallel_for
from kernels.layout import BLOCK_TOKENS, UNIT_BYTES


@jit
def _copy_token(kind: int, block: int, row: int, raw_kind: int, d: int, scratch: Array, keys: int, values: int) -> None:
    """One token's K and V in the model's dtype to addresses ``keys`` and ``values``; raw: bit for bit."""
    raw_bytes = codes_bytes(raw_kind, d)
    if kind <= BF16:
        copy_bytes(keys, block + row * raw_bytes, raw_bytes)
        copy_bytes(values, block + (BLOCK_TOKENS + row) * raw_bytes, raw_bytes)
    else:
        load_key(kind, block, d, row, scratch.ctypes.data)
        store_raw(raw_kind, scratch.ctypes.data, d, keys)
        load_value(kind, block, d, row, scratch.ctypes.data)
        store_raw(raw_kind, scratch.ctypes.data, d, values)


@jit
def _read_block(
    n: int,
    bases: Array,
    raw_kind: int,
    d: int,
    address: Array,
    fmt: Array,
    tier: Array,
    row: Array,
    keys: Array,
    values: Array,
) -> None:
    scratch = np.empty(d, np.float32)
    for t in range(BLOCK_TOKENS):
        if address[n, t] < 0:
            keys[n, t], values[n, t] = 0, 0
            continue
        block = bases[tier[n, t]] + np.int64(address[n, t]) * UNIT_BYTES
        kind, into = kind_of(fmt[n, t], raw_kind), keys[n, t].ctypes.data
        _copy_token(kind, block, int(row[n, t]), raw_kind, d, scratch, into, values[n, t].ctypes.data)


@jit
def read_tokens(
    team: tuple[int, int, int],
    bases: Array,
    raw_kind: int,
    d: int,
    address: Array,
    fmt: Array,
    tier: Array,
    row: Array,
    keys: Array,
    values: Array,
) -> None:
    """Tokens [N, 32] into keys and values uint8 [N, 32, bytes of D numbers], in the model's dtype."""
    parallel_for(team, _read_block, len(address), (bases, raw_kind, d, address, fmt, tier, row, keys, values))


@jit
def _is_one_block(fmt: int, address: Array, formats: Array, tier: Array, row: Array) -> bool:
    """Whether 32 tokens are the 32 rows, in order, of one block that already has format number ``fmt``."""
    for t in range(BLOCK_TOKENS):
        if address[t] != address[0] or tier[t] != tier[0] or row[t] != t or formats[t] != fmt:
            return False
    return bool(address[0] >= 0)


@jit
def _encode_block(
    n: int,
    bases: Array,
    raw_kind: int,
    d: int,
    to: int,
    address: Array,
    fmt: Array,
    tier: Array,
    row: Array,
    places: Array,
    size: int,
) -> None:
    kind, into = kind_of(to, raw_kind), places[n]
    payload = 2 * BLOCK_TOKENS * codes_bytes(kind, d) + (scales_bytes(kind, d) if kind > BF16 else 0)
    clear_bytes(into + payload, size - payload)
    if _is_one_block(to, address[n], fmt[n], tier[n], row[n]):
        copy_bytes(into, bases[tier[n, 0]] + np.int64(address[n, 0]) * UNIT_BYTES, payload)
        return
    keys = np.zeros((BLOCK_TOKENS, d), np.float32)
    values = np.zeros((BLOCK_TOKENS, d), np.float32)
    row_bytes = codes_bytes(raw_kind, d)
    if kind <= BF16:
        clear_bytes(into, payload)
    for t in range(BLOCK_TOKENS):
        if address[n, t] < 0:
            continue
        block, at = bases[tier[n, t]] + np.int64(address[n, t]) * UNIT_BYTES, int(row[n, t])
        source = kind_of(fmt[n, t], raw_kind)
        if kind <= BF16:
            into_key, into_value = into + t * row_bytes, into + (BLOCK_TOKENS + t) * row_bytes
            _copy_token(source, block, at, raw_kind, d, keys[0], into_key, into_value)
        else:
            load_key(source, block, d, at, keys[t].ctypes.data)
            load_value(source, block, d, at, values[t].ctypes.data)
    if kind > BF16:
        quantise(kind, keys, values, into)


@jit
def encode_blocks(
    team: tuple[int, int, int],
    bases: Array,
    raw_kind: int,
    d: int,
    to: int,
    address: Array,
    fmt: Array,
    tier: Array,
    row: Array,
    places: Array,
    size: int,
) -> None:
    """Tokens [N, 32] into blocks of format number ``to``, of ``size`` bytes, at memory addresses ``places`` [N]."""
    parallel_for(team, _encode_block, len(address), (bases, raw_kind, d, to, address, fmt, tier, row, places, size))


@jit
def _write_block(item: int, base: int, address: Array, start: int, keys: Array, values: Array) -> None:
    heads, count, row_bytes = keys.shape
    head, b = item % heads, start // BLOCK_TOKENS + item // heads
    block = base + np.int64(address[head, b]) * UNIT_BYTES
    for token in range(max(start, b * BLOCK_TOKENS), min(start + count, (b + 1) * BLOCK_TOKENS)):
        into = block + token % BLOCK_TOKENS * row_bytes
        copy_bytes(into, keys[head, token - start].ctypes.data, row_bytes)
        copy_bytes(into + BLOCK_TOKENS * row_bytes, values[head, token - start].ctypes.data, row_bytes)


@jit
def write_tokens(team: tuple[int, int, int], base: int, address: Array, start: int, keys: Array, values: Array) -> None:
    """keys, values uint8 [H, N, row bytes] into raw blocks: token start + i of table h's blocks address [H, B]."""
    heads, count = keys.shape[:2]
    blocks = (start + count + BLOCK_TOKENS - 1) // BLOCK_TOKENS - start // BLOCK_TOKENS
    parallel_for(team, _write_block, heads * blocks, (base, address, start, keys, values))


@jit
def _store_block(n: int, base: int, address: Array, blocks: Array) -> None:
    copy_bytes(base + np.int64(address[n]) * UNIT_BYTES, blocks[n].ctypes.data, blocks.shape[1])


@jit
def store_blocks(team: tuple[int, int, int], base: int, address: Array, blocks: Array) -> None:
    """Copies blocks uint8 [N, block bytes] to their unit offsets [N]."""
    parallel_for(team, _store_block, len(address), (base, address, blocks))


@jit
def _load_block(n: int, base: int, address: Array, blocks: Array) -> None:
    copy_bytes(blocks[n].ctypes.data, base + np.int64(address[n]) * UNIT_BYTES, blocks.shape[1])


@jit
def load_blocks(team: tuple[int, int, int], base: int, address: Array, blocks: Array) -> None:
    """Copies blocks at unit offsets [N] into uint8 [N, block bytes]."""
    parallel_for(team, _load_block, len(address), (base, address, blocks))
