"""HashEvict: keys whose hash is near the query's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvpilot.bounds import Bounds
from workers.stages.base import LayerView, Share, budgets, parameter, shadow


@dataclass(frozen=True)
class HashEvict(Share):
    """Drops the keys whose SimHash is furthest from the current query's, before any attention is computed.

    A hash is the signs of ``bits`` random projections, the same for keys and queries and for all heads of a layer; the
    distance is the number of unlike signs, in the mean over the query group. The paper protects the first tokens too;
    here they must earn their place. Evicts once per 32 generated tokens.

    Source: Liu et al., HashEvict: A Pre-Attention KV Cache Eviction Strategy using Locality-Sensitive Hashing, arXiv
    2412.16187. Query-aware.
    """

    name: ClassVar[str] = "hashevict"
    summary: ClassVar[str] = "Tokens whose keys have a locality-sensitive hash near the current query's."
    bits: int = parameter(16, Bounds(least=4, most=64), "random projections", minor=True)
    budgets: str = budgets()
    shadow: bool = shadow()

    def score(self, layer: LayerView) -> torch.Tensor:
        """Minus the Hamming distance."""
        keys, _ = layer.read()
        heads, _, dim = keys.shape
        planes = torch.randn(dim, self.bits, generator=torch.Generator().manual_seed(layer.index)).to(keys.device)
        queries, _ = layer.queries(1)
        asked = (queries[:, -1] @ planes > 0).view(heads, -1, 1, self.bits)  # [H, G, 1, bits]
        stored = (keys.float() @ planes > 0)[:, None]  # [H, 1, T, bits]
        return -(asked != stored).float().sum(dim=-1).mean(dim=1)
