"""Key norms: small keys get much attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from kernels.layout import BLOCK_TOKENS
from workers.stages.base import Evictor, LayerView, budgets, shadow, share


@dataclass(frozen=True)
class KNorm(Evictor):
    """The tokens whose keys are shortest. Needs no attention: query-agnostic, and a baseline.

    Source: Devoto et al., A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression, arXiv 2406.11430.
    """

    name: ClassVar[str] = "knorm"
    summary: ClassVar[str] = "Tokens with the shortest keys."
    keep: float = share(0.5)
    budgets: str = budgets()
    shadow: bool = shadow()

    def budget(self, seen: int) -> int:
        """The share ``keep`` of all tokens seen, at least two blocks."""
        return max(2 * BLOCK_TOKENS, math.ceil(self.keep * seen))

    def protected(self, seen: int) -> tuple[int, int]:
        """The last block."""
        return 0, BLOCK_TOKENS

    def score(self, layer: LayerView) -> torch.Tensor:
        """Minus the key's length."""
        keys, _ = layer.read()
        lengths: torch.Tensor = keys.float().norm(dim=-1)
        return -lengths
