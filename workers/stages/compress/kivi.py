"""KIVI: keys quantised per channel, values per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kernels.layout import CacheShape, Format
from kvpilot.bounds import Bounds
from workers.stages.base import Codec, parameter, shadow

_FORMATS = {2: Format.INT2, 4: Format.INT4, 8: Format.INT8}


@dataclass(frozen=True)
class Kivi(Codec):
    """Asymmetric integers in groups of 32: keys along tokens for each channel, values along channels for each token.

    The last 32 tokens stay raw, and up to 31 more until their block is full.

    Source: Liu et al., KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, arXiv 2402.02750.
    """

    name: ClassVar[str] = "kivi"
    summary: ClassVar[str] = (
        "Older blocks as 2-, 4- or 8-bit integers: keys per channel, values per token, groups of 32."
    )
    bits: int = parameter(4, Bounds(choices=tuple(_FORMATS)))
    shadow: bool = shadow()

    @property
    def format(self) -> Format:
        """By ``bits``."""
        return _FORMATS[self.bits]

    def refuses(self, shape: CacheShape) -> str | None:
        """Heads that leave a value group nearly empty would store more scales than codes."""
        if shape.head_dim < 16:
            return f"head_dim {shape.head_dim} is below 16: scales and zero points would outweigh the codes"
        return None
