"""TOVA: what the current token looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kernels.layout import BLOCK_TOKENS
from workers.stages.base import Evictor, LayerView, shadow, size


@dataclass(frozen=True)
class Tova(Evictor):
    """The ``size`` tokens that the current query pays most attention to, in the mean over all of a layer's heads.

    All heads of a layer keep the same tokens. Evicts once per 32 generated tokens instead of at every step: a head
    holds up to 31 more.

    Source: Oren et al., Transformers are Multi-State RNNs, arXiv 2401.06104. Query-aware.
    """

    name: ClassVar[str] = "tova"
    summary: ClassVar[str] = "A fixed number of tokens: those the current query attends to, over all heads."
    size: int = size()
    shadow: bool = shadow()

    def budget(self, seen: int) -> int:
        """``size``."""
        return self.size

    def protected(self, seen: int) -> tuple[int, int]:
        """The last block."""
        return 0, BLOCK_TOKENS

    def score(self, layer: LayerView) -> torch.Tensor:
        """The last query's attention, its mean over the layer's heads for each of them."""
        shares = layer.attention(1)  # [H, G, 1, T]
        by_token = torch.zeros(layer.seen).scatter_add_(
            0, layer.position[layer.valid].long(), shares.mean(dim=(1, 2))[layer.valid].cpu()
        )  # heads may hold other tokens, from an earlier pipeline
        return by_token[layer.position.long().clamp(0, layer.seen - 1)] / len(layer.position)
