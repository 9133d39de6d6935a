"""What stages share that keep heavy hitters, by some score, and as many recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kernels.layout import BLOCK_TOKENS
from workers.stages.base import LayerView, Share


@dataclass(frozen=True)
class HeavyHitters(Share):
    """Half the budget to the tokens of highest score, by default the attention they received so far; half to the last.

    Attention is summed over all past queries and the KV head's query group.
    """

    needs_prompt_mass: ClassVar[bool] = True

    def protected(self, seen: int) -> tuple[int, int]:
        """The recent half."""
        return 0, max(BLOCK_TOKENS, self.budget(seen) // 2)

    def score(self, layer: LayerView) -> torch.Tensor:
        """Accumulated attention."""
        return layer.mass
