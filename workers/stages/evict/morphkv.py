"""MorphKV: what the recent tokens look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kernels.layout import BLOCK_TOKENS
from kvpilot.bounds import Bounds
from workers.stages.base import Fixed, LayerView, parameter, shadow


@dataclass(frozen=True)
class MorphKV(Fixed):
    """The last 32 tokens, and of the older ones those that these look at: ``size`` in all, however long the text.

    Attention of the recent tokens' queries is summed, or its maximum taken (``fuse``), and summed over the query group.
    Evicts once per 32 generated tokens instead of at every step: a head holds up to 31 more.

    Source: Ghadia et al., Dialogue Without Limits: Constant-Sized KV Caches for Extended Responses in LLMs, arXiv
    2503.00979. Query-aware.
    """

    name: ClassVar[str] = "morphkv"
    summary: ClassVar[str] = "A fixed number of tokens: the recent ones, and those they attend to."
    fuse: str = parameter("sum", Bounds(choices=("sum", "max")))
    shadow: bool = shadow()

    def score(self, layer: LayerView) -> torch.Tensor:
        """The recent queries' attention, fused."""
        shares = layer.attention(BLOCK_TOKENS).sum(dim=1)  # [H, n, T]
        return shares.sum(dim=1) if self.fuse == "sum" else shares.amax(dim=1)
