"""FP8: keys and values as 8-bit floating-point numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kernels.layout import CacheShape, Format
from workers.stages.base import Codec, shadow


@dataclass(frozen=True)
class FP8(Codec):
    """e4m3 numbers with a float16 scale for each group, keys by channel over 32 tokens, values by token over 32
    channels.

    Scales are calibrated on the very numbers stored: a group's greatest magnitude becomes e4m3's greatest, 448. A scale
    of 1 for a whole tensor, as some systems have it, loses outliers. The last 32 tokens stay raw.

    Source: Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433.
    """

    name: ClassVar[str] = "fp8"
    summary: ClassVar[str] = "Older blocks as 8-bit floating-point numbers, scaled in groups of 32."
    shadow: bool = shadow()

    @property
    def format(self) -> Format:
        """FP8."""
        return Format.FP8

    def refuses(self, shape: CacheShape) -> str | None:
        """Heads that leave a value group nearly empty would store more scales than codes."""
        if shape.head_dim < 16:
            return f"head_dim {shape.head_dim} is below 16: scales would outweigh the codes"
        return None
