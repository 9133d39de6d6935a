"""TailorKV's first half: layers with spread attention are quantised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kernels.layout import BlockFormat, CacheShape, Format
from kvpilot.bounds import Bounds
from workers.stages.base import Ages, Codec, LayerPlace, parameter, shadow
from workers.stages.compress.kivi import Kivi
from workers.stages.tailored import NEEDS, concentration, is_dense


@dataclass(frozen=True)
class QuantDense(Codec):
    """``kivi`` in dense layers, whose queries look at so many tokens that single ones hardly count; others stay raw.

    Dense is a layer whose queries pay less than ``threshold`` to the sixteenth of the tokens that they pay most to, by
    the model's profile.

    Source: Yao et al., TailorKV, arXiv 2505.19586: 1 bit in groups of 64 there, 2 or more in groups of 32 here.
    """

    name: ClassVar[str] = "quantdense"
    summary: ClassVar[str] = "In layers whose attention is spread, older blocks as integers, as kivi's (TailorKV)."
    needs: ClassVar[tuple[str, ...]] = NEEDS
    bits: int = parameter(2, Bounds(choices=(2, 4, 8)))
    threshold: float = concentration()
    shadow: bool = shadow()

    @property
    def format(self) -> Format:
        """Of dense layers."""
        return Kivi(self.bits).format

    def ages(self, layer: LayerPlace) -> Ages:
        """None in sparse layers."""
        return self.by_age() if is_dense(layer, self.threshold) else ()

    def largest(self, shape: CacheShape) -> BlockFormat:
        """Raw: what sparse layers have."""
        return Format.RAW

    def refuses(self, shape: CacheShape) -> str | None:
        """What ``kivi`` refuses."""
        return Kivi(self.bits).refuses(shape)
