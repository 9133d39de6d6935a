"""TOVA: what the current token looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from workers.stages.base import Fixed, LayerView, shadow


@dataclass(frozen=True)
class Tova(Fixed):
    """The ``size`` tokens that the current query pays most attention to, in the mean over all of a layer's heads.

    All heads of a layer keep the same tokens; where an earlier pipeline left them different ones, a token counts as
    paid nothing by the heads that lack it. Evicts once per 32 generated tokens instead of at every step: a head holds
    up to 31 more.

    Source: Oren et al., Transformers are Multi-State RNNs, arXiv 2401.06104. Query-aware.
    """

    name: ClassVar[str] = "tova"
    summary: ClassVar[str] = "A fixed number of tokens: those the current query attends to, over all heads."
    shadow: bool = shadow()

    def score(self, layer: LayerView) -> torch.Tensor:
        """The last query's attention, its mean over the layer's heads for each of them."""
        shares = layer.attention(1).mean(dim=(1, 2))  # [H, T], 0 where there is no token
        position = layer.position.long().clamp(0, layer.seen - 1)
        by_position = shares.new_zeros(layer.seen).index_add(0, position.flatten(), shares.flatten())
        return by_position[position] / len(position)
