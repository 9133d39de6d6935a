"""Older blocks in host memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from workers.stages.base import Placer, whole_blocks


@dataclass(frozen=True)
class Host(Placer):
    """Blocks older than the last ``recent`` tokens live on the host tier; attention reads them there.

    Nothing is dropped or rounded: the logits are those of the same blocks on the device, bit for bit.

    Source: the placement of Sheng et al., FlexGen, arXiv 2303.06865, without its compression.
    """

    name: ClassVar[str] = "host"
    summary: ClassVar[str] = "Older blocks on the host tier, in whatever format they have."
    recent: int = whole_blocks(256)

    def device_tokens(self) -> int:
        """``recent``."""
        return self.recent
