"""Scissorhands: tokens that are looked at again and again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kernels.layout import BLOCK_TOKENS
from workers.stages.base import LayerView, Share, shadow


@dataclass(frozen=True)
class Scissorhands(Share):
    """Drops the tokens that most of the last 32 queries paid less than an even share.

    A query pays a token little if it pays it less than 1 / t of its attention, t being the kept tokens that it sees;
    heads of a query group count together. The paper's history window is longer, its rule the same: what was of no
    importance lately stays so. Evicts once per 32 generated tokens.

    Source: Liu et al., Scissorhands: Exploiting the Persistence of Importance Hypothesis for LLM KV Cache Compression
    at Test Time, arXiv 2305.17118. Query-aware.
    """

    name: ClassVar[str] = "scissorhands"
    summary: ClassVar[str] = "Tokens that the last 32 queries repeatedly attended to more than evenly."
    shadow: bool = shadow()

    def score(self, layer: LayerView) -> torch.Tensor:
        """Minus the number of queries, of all heads of the group, that paid little."""
        shares = layer.attention(BLOCK_TOKENS)  # [H, G, n, T]
        _, asked_at = layer.queries(BLOCK_TOKENS)
        seen = layer.visible(asked_at).sum(dim=-1)[:, None, :, None]  # [H, 1, n, 1] tokens
        return -(shares * seen < 1).float().sum(dim=(1, 2))
