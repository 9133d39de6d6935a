"""Q-Hitter: attended to, and good to quantise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from kernels.layout import GROUP
from workers.stages.base import LayerView, budgets, shadow
from workers.stages.evict.heavy import HeavyHitters

STEPS = 15
"""Between the ends of a group at 4 bits."""


@dataclass(frozen=True)
class QHitter(HeavyHitters):
    """H2O's choice, weighed by how well a token bears 4 bits: so that what stays can be quantised, for a codec behind.

    A token's robustness is 1 / (1 + e), e being the error of its key and value, rounded to 4 bits in groups of 32
    channels, in per cent of their length. The score is attention so far, as a share of the head's largest, times that.
    The recent half of the budget stays, as with H2O.

    Source: Zhang et al., Q-Hitter: A Better Token Oracle for Efficient LLM Inference via Sparse-Quantized KV Cache,
    MLSys 2024. How the two are put together is ours; there, too, a token must do well in both. Query-aware.
    """

    name: ClassVar[str] = "qhitter"
    summary: ClassVar[str] = "Tokens that received most attention and lose least at 4 bits, and the most recent ones."
    budgets: str = budgets()
    shadow: bool = shadow()

    def score(self, layer: LayerView) -> torch.Tensor:
        """Attention times robustness."""
        mass = layer.mass.masked_fill(~layer.valid, 0.0)
        share = mass / mass.amax(dim=1, keepdim=True).clamp(min=1e-12)
        numbers = [part.float() for part in layer.read()]  # K and V, each [H, T, D]
        length = torch.cat(numbers, dim=-1).norm(dim=-1)
        lost = torch.cat([part - _rounded(part) for part in numbers], dim=-1).norm(dim=-1)
        error = 100 * lost / length.clamp(min=1e-12)
        score: torch.Tensor = share / (1 + error.masked_fill(~layer.valid, 0.0))
        return score


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """x [H, T, D] as 4 bits in groups of 32 channels would have it; the last group may be smaller."""
    heads, tokens, d = x.shape
    padded = F.pad(x, (0, -d % GROUP), mode="replicate").view(heads, tokens, -1, GROUP)  # a copy is in the range
    low, high = padded.amin(-1, keepdim=True), padded.amax(-1, keepdim=True)
    step = ((high - low) / STEPS).clamp(min=1e-12)
    near: torch.Tensor = ((padded - low) / step).round() * step + low
    return near.flatten(2)[..., :d]
