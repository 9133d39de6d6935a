"""NACL: what the end of the prompt needs, and a random part of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kernels.layout import BLOCK_TOKENS
from kvpilot.bounds import Bounds
from workers.stages.base import LayerView, Share, parameter, shadow

CERTAIN = 1e3  # above every score of a token that is drawn


@dataclass(frozen=True)
class NaCL(Share):
    """Once, after the prompt or at a switch: the tokens that the prompt's last 32 look at, and others by lot.

    The last queries are the proxy tokens that stand for what a generation will ask. A token's score is the attention
    they pay it, summed over them, the mean over the query group. Of what stays beside the proxies, the share ``drawn``
    is drawn without replacement with the softmax of the scores as odds, so that no bias of the proxies costs a token
    every chance; lots depend on ``seed``, layer, head and position alone.

    Source: Chen et al., NACL: A General and Effective KV Cache Eviction Framework for LLMs at Inference Time, arXiv
    2408.03675. Query-aware.
    """

    name: ClassVar[str] = "nacl"
    summary: ClassVar[str] = "Tokens that the prompt's end attends to, and some of the others by lot; chosen once."
    evicts_while_decoding: ClassVar[bool] = False
    drawn: float = parameter(0.3, Bounds(least=0, most=1), "share of what stays", minor=True)
    seed: int = parameter(0, Bounds(least=0), minor=True)
    shadow: bool = shadow()

    def score(self, layer: LayerView) -> torch.Tensor:
        """The proxies' attention plus CERTAIN for the best; the same plus Gumbel noise for the others."""
        score = layer.attention(BLOCK_TOKENS).mean(dim=1).sum(dim=1)  # [H, T]
        old = layer.valid & (layer.position < layer.seen - BLOCK_TOKENS)
        ranked = score.masked_fill(~old, -1.0)
        certain = round((1 - self.drawn) * (self.budget(layer.seen) - BLOCK_TOKENS))
        best = ranked.argsort(dim=1, descending=True, stable=True)[:, :certain]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer.index)
        uniform = torch.rand(layer.seen, len(score), generator=generator).clamp(min=1e-12).to(score.device)
        noise = -(-uniform.log()).log().mT.gather(1, layer.position.long().clamp(0, layer.seen - 1))
        # The largest sums of log odds and Gumbel noise are a draw without replacement.
        return (score + noise).scatter(1, best, CERTAIN + ranked.gather(1, best))
