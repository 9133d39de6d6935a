"""Dilated: the further back, the fewer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from workers.stages.base import Evictor, LayerView, shadow, whole_blocks


@dataclass(frozen=True)
class Dilated(Evictor):
    """The last ``recent`` tokens, then every second of as many, every fourth of twice as many, and so on.

    Of the tokens that are ``recent`` * 2 ** i to ``recent`` * 2 ** (i + 1) back, those stay whose position is a
    multiple of 2 ** (i + 1): half of ``recent`` from every doubling, so that the cache grows with the logarithm of the
    text. What a doubling drops, no later one wants.

    Source: the dilated attention of Ding et al., LongNet: Scaling Transformers to 1,000,000,000 Tokens, arXiv
    2307.02486, as a rule for what to keep.
    """

    name: ClassVar[str] = "dilated"
    summary: ClassVar[str] = "Recent tokens densely, older ones at intervals that double."
    alike: ClassVar[bool] = True
    recent: int = whole_blocks(256)
    shadow: bool = shadow()

    def _kept(self, position: torch.Tensor, seen: int) -> torch.Tensor:
        """Which positions stay."""
        age = seen - 1 - position
        distance, interval = self.recent, 2  # of the doubling that is looked at
        kept = age < distance
        while distance < seen:
            kept |= (age >= distance) & (age < 2 * distance) & (position % interval == 0)
            distance, interval = 2 * distance, 2 * interval
        return kept

    def budget(self, seen: int) -> int:
        """As many as the rule keeps of ``seen``."""
        return int(self._kept(torch.arange(seen), seen).sum())

    def protected(self, seen: int) -> tuple[int, int]:
        """The last ``recent``."""
        return 0, self.recent

    def score(self, layer: LayerView) -> torch.Tensor:
        """1 for what the rule keeps; 0 for what it drops."""
        return self._kept(layer.position, layer.seen).float()
