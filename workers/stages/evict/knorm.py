"""Key norms: small keys get much attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from workers.stages.base import LayerView, Share, budgets, shadow


@dataclass(frozen=True)
class KNorm(Share):
    """The tokens whose keys are shortest. Needs no attention: query-agnostic, and a baseline.

    Source: Devoto et al., A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression, arXiv 2406.11430.
    """

    name: ClassVar[str] = "knorm"
    summary: ClassVar[str] = "Tokens with the shortest keys."
    budgets: str = budgets()
    shadow: bool = shadow()

    def score(self, layer: LayerView) -> torch.Tensor:
        """Minus the key's length."""
        keys, _ = layer.read()
        lengths: torch.Tensor = keys.float().norm(dim=-1)
        return -lengths
