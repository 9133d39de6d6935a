"""KeyDiff: keys that are unlike the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from workers.stages.base import LayerView, Share, budgets, shadow


@dataclass(frozen=True)
class KeyDiff(Share):
    """The tokens whose keys point away from the mean direction of the head's keys. Query-agnostic.

    The mean is that of the keys that are there, each of length 1: it moves as tokens come and go. The paper's window of
    recent tokens is the last block.

    Source: Park et al., KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference, arXiv
    2504.15364.
    """

    name: ClassVar[str] = "keydiff"
    summary: ClassVar[str] = "Tokens whose keys are least like the head's mean key."
    budgets: str = budgets()
    shadow: bool = shadow()

    def score(self, layer: LayerView) -> torch.Tensor:
        """Minus the cosine of the key and the mean of all keys' directions."""
        keys, _ = layer.read()
        there = layer.valid[..., None]
        direction = F.normalize(keys.float(), dim=-1).masked_fill(~there, 0.0)  # [H, T, D]
        mean = direction.sum(dim=1, keepdim=True) / there.sum(dim=1, keepdim=True)
        return -F.cosine_similarity(direction, mean, dim=-1)
