"""R-KV: important and not said before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from kernels.layout import BLOCK_TOKENS
from kvpilot.bounds import Bounds
from workers.stages.base import Fixed, LayerView, parameter, shadow

INTERVAL_TOKENS = 4 * BLOCK_TOKENS
OBSERVED_QUERIES = 8
SIMILAR = 0.5
ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class RKV(Fixed):
    """Every 128 tokens the ``size`` best by importance minus redundancy; for the long thoughts of reasoning models.

    Importance is the attention of the last 8 queries, the greatest within the query group and the mean over queries.
    Redundancy is how much a head's other keys resemble a key: the mean of their cosines, softmaxed over tokens. No key
    counts its likeness to the latest one that is like it (cosine over 0.5), so that of a set of near duplicates the
    latest is spared. The score is ``weight`` * importance - (1 - ``weight``) * redundancy. Comparing all keys takes
    time quadratic in the prompt, once. The threshold is that of the authors' code, which takes the greatest within the
    group before the softmax, and for each token the greatest importance among its neighbours; here they do not count.

    Source: Cai et al., R-KV: Redundancy-aware KV Cache Compression for Reasoning Models, arXiv 2505.24133. Query-aware.
    """

    name: ClassVar[str] = "rkv"
    summary: ClassVar[str] = "A fixed number of tokens: attended to lately, and unlike other keys."
    weight: float = parameter(0.1, Bounds(least=0, most=1), "share of importance in the score")
    shadow: bool = shadow()

    def budget(self, seen: int) -> int:
        """``size``, and what came since the last multiple of 128 tokens."""
        return self.size + seen % INTERVAL_TOKENS

    def protected(self, seen: int) -> tuple[int, int]:
        """The last block, and what came since the last multiple of 128 tokens."""
        return 0, max(BLOCK_TOKENS, seen % INTERVAL_TOKENS)

    def score(self, layer: LayerView) -> torch.Tensor:
        """Importance minus redundancy, weighted."""
        importance = layer.attention(OBSERVED_QUERIES).amax(dim=1).mean(dim=1)  # [H, T]
        keys, _ = layer.read()
        redundancy = torch.stack(
            [_redundancy(head[there], there) for head, there in zip(keys, layer.valid, strict=True)]
        )
        return self.weight * importance - (1 - self.weight) * redundancy


def _redundancy(keys: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """Of one head's n keys [n, D]: float32 [T], 0 where there is no token."""
    direction = F.normalize(keys.float(), dim=-1)
    index = torch.arange(len(direction), device=keys.device)
    likeness = direction.new_zeros(len(direction))
    for start in range(0, len(index), ROWS_AT_ONCE):
        own = index[start : start + ROWS_AT_ONCE]
        cosine = direction[own] @ direction.T  # [rows, n]
        cosine.scatter_(1, own[:, None], 0.0)
        latest = torch.where(cosine > SIMILAR, index, -1).amax(dim=1, keepdim=True)
        spared = cosine.gather(1, latest.clamp(min=0)).where(latest < 0, 0.0)  # what stays of that cosine
        likeness += cosine.scatter(1, latest.clamp(min=0), spared).sum(dim=0)
    redundancy = likeness.new_zeros(there.shape)
    redundancy[there] = (likeness / len(direction)).softmax(dim=0)
    return redundancy
