"""Four bits a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kernels.layout import Format
from workers.stages.base import Codec, shadow


@dataclass(frozen=True)
class Nibble(Codec):
    """All but the last block at 4 bits: what ``kivi(bits=4)`` does."""

    name: ClassVar[str] = "nibble"
    summary: ClassVar[str] = "Older blocks at 4 bits."
    shadow: bool = shadow()

    @property
    def format(self) -> Format:
        """int4."""
        return Format.INT4
