"""How a block lies in memory: the byte layout every backend reads and writes.

A block holds the keys and values of up to 32 tokens (``BLOCK_TOKENS``) of one KV head of one layer. Its address is its
first byte's offset in a tier's arena, counted in units of 256 bytes (``UNIT_BYTES``), so an int32 reaches 512 GiB.
D is head_dim, G = ceil(D / 32) the number of value groups.

=======  ==========================================================================================================
format   bytes, in this order
=======  ==========================================================================================================
raw      K [32, D] then V [32, D] in the model's dtype
int8     K codes uint8 [32, D], V codes uint8 [32, D], K scale f16 [D], K zero f16 [D], V scale f16 [32, G],
         V zero f16 [32, G]
int4     as int8, but codes packed two to a byte: byte j of a token holds channel j in its low and channel
         j + D/2 in its high nibble, so K codes are uint8 [32, D/2] and V codes uint8 [32, D/2]
int2     as int8, but codes packed four to a byte: with P = ceil(D / 4), byte j of a token holds channel
         j + i P in bits 2 i and 2 i + 1, so K codes are uint8 [32, P] and V codes uint8 [32, P]
fp8      K codes uint8 [32, D], V codes uint8 [32, D], K scale f16 [D], V scale f16 [32, G]
=======  ==========================================================================================================

Integers are asymmetric: ``x ~ code * scale + zero``, with keys grouped per channel over the block's 32 tokens and
values per token over 32 channels (KIVI, arXiv 2402.02750). A scale of 0 marks a constant group. The codes of fp8 are
e4m3 numbers, of 4 exponent and 3 mantissa bits and without infinities (arXiv 2209.05433), in the same groups:
``x ~ code * scale``, and a group's greatest magnitude becomes the greatest code, 448. Only raw blocks may be partly
filled; the tail block of every table is raw.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import IntEnum

import torch

BLOCK_TOKENS = 32
UNIT_BYTES = 256
GROUP = 32


class Format(IntEnum):
    """How a block is stored. The number is what block tables hold."""

    RAW = 0
    INT8 = 1
    INT4 = 2
    INT2 = 3
    FP8 = 4

    @property
    def bits(self) -> int:
        """Bits of a code.

        Raises:
            KeyError: raw blocks have none.
        """
        return _CODE_BITS[self]

    @property
    def has_zeros(self) -> bool:
        """Whether groups have a zero beside their scale."""
        return self in (Format.INT8, Format.INT4, Format.INT2)


class ForeignFormat(int):
    """A format that kernels do not read. Its number is ``len(Format)`` or more; who defines it knows what it takes."""

    name: str

    def payload_bytes(self, shape: CacheShape) -> int:
        """Bytes of a block's contents."""
        raise NotImplementedError


BlockFormat = Format | ForeignFormat
_CODE_BITS = {Format.INT8: 8, Format.INT4: 4, Format.INT2: 2, Format.FP8: 8}


class Tier(IntEnum):
    """Where a block lives. The number is what block tables hold."""

    DEVICE = 0
    HOST = 1
    DISK = 2


MEMORY_TIERS = (Tier.DEVICE, Tier.HOST)
"""The tiers that are arenas in memory, which kernels read. A block whose table says anything else is not read."""


@dataclass(frozen=True)
class CacheShape:
    """Dimensions of a model's cache.

    Raises:
        ValueError: for a dtype or head_dim that the formats cannot store.
    """

    layers: int
    kv_heads: int
    query_heads: int
    head_dim: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"dtype {self.dtype}: raw blocks hold float32, float16 or bfloat16")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim}: packed formats need an even number of channels")
        if self.query_heads % self.kv_heads:
            raise ValueError(f"query_heads {self.query_heads}: must be a multiple of kv_heads {self.kv_heads}")

    @property
    def value_groups(self) -> int:
        """G, the number of quantisation groups of one token's values."""
        return math.ceil(self.head_dim / GROUP)

    @property
    def queries_per_kv_head(self) -> int:
        """Size of the query group that reads one KV head."""
        return self.query_heads // self.kv_heads

    def payload_bytes(self, fmt: BlockFormat) -> int:
        """Bytes of a block's contents, before rounding up to whole units."""
        if isinstance(fmt, ForeignFormat):
            return fmt.payload_bytes(self)
        d, g = self.head_dim, self.value_groups
        if fmt is Format.RAW:
            return 2 * BLOCK_TOKENS * d * self.dtype.itemsize
        constants = 2 * (d + BLOCK_TOKENS * g)  # float16, one for each group
        return 2 * BLOCK_TOKENS * self.code_bytes(fmt) + constants * (2 if fmt.has_zeros else 1)

    def code_bytes(self, fmt: Format) -> int:
        """Bytes of one token's codes of keys, or of values."""
        return math.ceil(self.head_dim * fmt.bits / 8)

    def block_units(self, fmt: BlockFormat) -> int:
        """Units of 256 bytes that a block takes in an arena."""
        return math.ceil(self.payload_bytes(fmt) / UNIT_BYTES)

    def block_bytes(self, fmt: BlockFormat) -> int:
        """Bytes that a block takes in an arena."""
        return self.block_units(fmt) * UNIT_BYTES

    def block_bytes_16bit(self, fmt: BlockFormat) -> int:
        """``block_bytes`` as it would be if the model's dtype had 16 bits."""
        return (self if self.dtype.itemsize == 2 else replace(self, dtype=torch.bfloat16)).block_bytes(fmt)
