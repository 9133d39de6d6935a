"""Aged: the older a block, the fewer its bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kernels.layout import BLOCK_TOKENS, CacheShape, Format
from kvpilot.bounds import Bounds
from workers.stages.base import Ages, Codec, parameter, shadow, whole_blocks


@dataclass(frozen=True)
class Aged(Codec):
    """The last ``raw`` tokens as they are, the ``int8`` before them at 8 bits, all older ones at 4.

    A block passes from one to the next as others come, from the exact copy where there is one. Groups are ``kivi``'s.

    Source: the mixed precision of Yang et al., No Token Left Behind (MiKV), arXiv 2402.18096, by age, not importance.
    """

    name: ClassVar[str] = "aged"
    summary: ClassVar[str] = "Recent tokens raw, older ones at 8 bits, the oldest at 4."
    raw: int = whole_blocks(128)
    int8: int = parameter(1024, Bounds(least=BLOCK_TOKENS), "tokens")
    shadow: bool = shadow()

    @property
    def format(self) -> Format:
        """int4."""
        return Format.INT4

    def by_age(self) -> Ages:
        """int8, then int4."""
        return (self.raw, Format.INT8), (self.raw + self.int8, Format.INT4)

    def refuses(self, shape: CacheShape) -> str | None:
        """Heads that leave a value group nearly empty would store more scales than codes."""
        if shape.head_dim < 16:
            return f"head_dim {shape.head_dim} is below 16: scales and zero points would outweigh the codes"
        return None
