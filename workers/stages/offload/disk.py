"""Older blocks in files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from kernels.layout import Tier
from workers.stages.base import LossClass, Placer, whole_blocks


@dataclass(frozen=True)
class Disk(Placer):
    """Blocks older than the last ``recent`` tokens live on the disk tier, each with a checksum.

    They are written once. In each layer of a decode step they pass through a staging area on the host tier, two layers
    of the request in size, where attention reads them; the next layer's are read meanwhile. Nothing is dropped or
    rounded: the logits are those of the same blocks on the device, bit for bit. A block that comes back damaged is made
    anew, from an exact copy or from the request's tokens.

    Source: the placement of Sheng et al., FlexGen, arXiv 2303.06865, without its compression.
    """

    name: ClassVar[str] = "disk"
    tier: ClassVar[Tier] = Tier.DISK
    summary: ClassVar[str] = "Older blocks on the disk tier, read layer by layer ahead of attention."
    recent: int = whole_blocks(256)

    @property
    def loss_class(self) -> LossClass:
        """Exact."""
        return LossClass.EXACT

    def device_tokens(self) -> int:
        """``recent``."""
        return self.recent

    def with_device_tokens(self, recent: int, seen: int) -> Disk:
        """So many."""
        return replace(self, recent=recent)
