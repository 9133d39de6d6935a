"""Value norms: what a token would add if it were attended to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kernels.layout import BLOCK_TOKENS
from workers.stages.base import LayerView, Share, budgets, shadow


@dataclass(frozen=True)
class VNorm(Share):
    """The tokens with the longest values, and the first four, whose values are short though much attention goes there.

    Source: the observation of Guo et al., Attention Score is not All You Need for Token Importance Indicator in KV
    Cache Reduction: Value Also Matters, arXiv 2406.12335, without the attention.
    """

    name: ClassVar[str] = "vnorm"
    summary: ClassVar[str] = "Tokens with the longest values, and the first four."
    budgets: str = budgets()
    shadow: bool = shadow()

    def protected(self, seen: int) -> tuple[int, int]:
        """The first four tokens and the last block."""
        return 4, BLOCK_TOKENS

    def score(self, layer: LayerView) -> torch.Tensor:
        """The value's length."""
        _, values = layer.read()
        lengths: torch.Tensor = values.float().norm(dim=-1)
        return lengths
