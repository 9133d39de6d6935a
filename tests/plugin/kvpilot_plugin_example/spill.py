"""A number of blocks on the device, the others on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kernels.layout import BLOCK_TOKENS
from kvpilot.bounds import Bounds
from workers.stages.base import Placer, parameter


@dataclass(frozen=True)
class Spill(Placer):
    """The last ``blocks`` blocks on the device, older ones on the host: what ``host`` does, counted in blocks."""

    name: ClassVar[str] = "spill"
    summary: ClassVar[str] = "Blocks beyond a number of recent ones on the host tier."
    blocks: int = parameter(8, Bounds(least=1), "blocks of 32 tokens")

    def device_tokens(self) -> int:
        """So many blocks' tokens."""
        return self.blocks * BLOCK_TOKENS
