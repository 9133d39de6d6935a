"""Older blocks in files, compressed on the way out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kernels.layout import BlockFormat, CacheShape, Format, Tier
from kvpilot.bounds import Bounds
from workers.stages.base import Ages, LayerPlace, Lossy, Placer, parameter, shadow, whole_blocks
from workers.stages.compress.coarse import Coarse


@dataclass(frozen=True)
class Swap(Lossy, Placer):
    """Blocks older than the last ``recent`` tokens live on the disk tier, quantised and entropy-coded on the way out.

    They go as ``disk``'s do, but as codes (``workers.stages.compress.coarse``) that take about ``bits`` bits each in
    the files, and two thirds of a bit more with constants and the coder's tables, a whole one at 2; with 8 they go as
    ``int8``, in which an entropy coder finds nothing.
    What reads the files decodes them, so that attention finds blocks of int8 in the staging area, at int8's size.
    Where the pipeline has a codec, blocks keep its format, and this is ``disk``.

    Source: Liu et al., CacheGen: KV Cache Compression and Streaming for Fast Large Language Model Serving, arXiv
    2310.07240: quantisation with steps by the numbers' spread, then entropy coding. Deviations: a Huffman code of each
    block of 32 tokens of a head, so that single blocks can be read, instead of arithmetic coding by the distributions
    of whole layers and channels; steps of a block's keys and of each token's values instead of a layer's. Left out,
    because on SmolLM2-135M they made it worse: differences to an anchor token, and longer steps in later layers.
    """

    name: ClassVar[str] = "swap"
    tier: ClassVar[Tier] = Tier.DISK
    summary: ClassVar[str] = "Older blocks on the disk tier, quantised and entropy-coded on the way out."
    recent: int = whole_blocks(256)
    bits: int = parameter(4, Bounds(choices=(2, 3, 4, 5, 6, 8)))
    shadow: bool = shadow()

    def device_tokens(self) -> int:
        """``recent``."""
        return self.recent

    def ages(self, layer: LayerPlace) -> Ages:
        """That of ``bits``, for what is on disk."""
        return ((self.recent, self._format),)

    def largest(self, shape: CacheShape) -> BlockFormat:
        """That of ``bits``; raw blocks, which are larger, are on the device."""
        return self._format

    @property
    def _format(self) -> BlockFormat:
        return Format.INT8 if self.bits == 8 else Coarse(self.bits).format

    def refuses(self, shape: CacheShape) -> str | None:
        """Heads that leave a value group nearly empty would store more scales than codes."""
        if shape.head_dim < 16:
            return f"head_dim {shape.head_dim} is below 16: scales and zero points would outweigh the codes"
        return None
