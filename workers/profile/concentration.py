"""How concentrated a layer's attention is: what queries pay to the few tokens that they pay most to.

Source: the dense preference of Yao et al., TailorKV, arXiv 2505.19586, which is 1 less this. Here the number of tokens
is a share of the text's, so that it means the same for texts of any length.
"""

from __future__ import annotations

import math

import torch

from kernels.layout import CacheShape
from workers.profile.retrieval import attention

ASKING_TOKENS = 64
"""Last tokens of a text, whose queries are looked at."""
TOP_SHARE = 1 / 16
"""Of the text's tokens: those that a query pays most to."""


class Concentration:
    """Takes texts in, layer by layer."""

    def __init__(self, shape: CacheShape, device: torch.device) -> None:
        self._paid = torch.zeros(shape.layers, dtype=torch.float64, device=device)
        self._queries = [0] * shape.layers

    def add(self, layer: int, queries: torch.Tensor, keys: torch.Tensor, scaling: float) -> None:
        """Takes in a whole text's queries [Q, n, D] and keys [H, n, D], rotated."""
        end = queries.shape[1]
        asked = torch.arange(max(0, end - ASKING_TOKENS), end, device=queries.device)
        most = attention(queries, keys, asked, scaling).topk(math.ceil(TOP_SHARE * end)).values  # [Q, asked, k]
        self._paid[layer] += most.sum().double()
        self._queries[layer] += most.shape[0] * most.shape[1]

    def tensors(self) -> dict[str, torch.Tensor]:
        """``concentration``, as ``workers.profile.profile`` lists it."""
        return {"concentration": (self._paid / torch.tensor(self._queries, device=self._paid.device)).float()}
