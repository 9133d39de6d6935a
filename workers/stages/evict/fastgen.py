"""FastGen: each head by the cheapest rule that keeps what it attends to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from kernels.layout import BLOCK_TOKENS
from kvpilot.bounds import Bounds
from workers.stages.base import Evictor, LayerView, parameter, shadow
from workers.stages.budgets import PER_HEAD

SINKS = 4


@dataclass(frozen=True)
class FastGen(Evictor):
    """Once, after the prompt or at a switch: each head keeps the tokens of the first of these rules that recovers the
    share ``recovered`` of its attention.

    1. special: the first 4 tokens;
    2. and local: the last tokens, the share ``local`` of all;
    3. special and frequency: the tokens that received most attention in all, the share ``frequent`` of all;
    4. special, frequency and local;
    5. full.

    The last 32 tokens stay by any rule. Attention is that of the prompt's last 32 queries, their mean; of a query group
    the head that loses most counts. The paper takes the attention map of the whole prompt. Its first rules keep the
    model's special tokens and punctuation: an evictor sees no token ids here, so sinks stand for them. It goes on
    applying the rules while decoding; here generated tokens all stay.

    Source: Ge et al., Model Tells You What to Discard: Adaptive KV Cache Compression for LLMs, arXiv 2310.01801.
    Query-aware.
    """

    name: ClassVar[str] = "fastgen"
    summary: ClassVar[str] = (
        "Each head by the cheapest of five rules that keeps what it attends to, chosen once (FastGen)."
    )
    evicts_while_decoding: ClassVar[bool] = False
    needs_prompt_mass: ClassVar[bool] = True
    recovered: float = parameter(0.95, Bounds(above=0, most=1), "share of attention")
    local: float = parameter(0.3, Bounds(least=0, most=1), "share of all tokens seen", minor=True)
    frequent: float = parameter(0.3, Bounds(least=0, most=1), "share of all tokens seen", minor=True)
    shadow: bool = shadow()

    @property
    def rule(self) -> str:
        """Each head its own number."""
        return PER_HEAD

    def budget(self, seen: int) -> int:
        """All: what the most demanding heads keep."""
        return max(seen, SINKS + BLOCK_TOKENS)

    def protected(self, seen: int) -> tuple[int, int]:
        """What every rule keeps."""
        return SINKS, BLOCK_TOKENS

    def head_budget_of(self, layer: LayerView) -> torch.Tensor:
        """How many tokens its rule keeps."""
        return self._kept(layer).sum(dim=1)

    def score(self, layer: LayerView) -> torch.Tensor:
        """1 for tokens that the head's rule keeps, 0 for others."""
        return self._kept(layer).float()

    def _kept(self, layer: LayerView) -> torch.Tensor:
        """What each head's rule keeps: bool [H, T]."""
        kept = self._rules(layer)  # [5, H, T], from cheap to dear
        paid = layer.attention(BLOCK_TOKENS).mean(dim=2)  # [H, G, T]
        found = torch.einsum("rht,hgt->rhg", kept.float(), paid).amin(dim=2)  # [5, H]
        found[-1] = torch.inf
        first = (found >= self.recovered).int().argmax(dim=0)  # [H]
        return kept[first, torch.arange(kept.shape[1], device=first.device)]

    def _rules(self, layer: LayerView) -> torch.Tensor:
        special = layer.valid & ((layer.position < SINKS) | (layer.position >= layer.seen - BLOCK_TOKENS))
        local = special | (layer.valid & (layer.position >= layer.seen - math.ceil(self.local * layer.seen)))
        count = min(math.ceil(self.frequent * layer.seen), layer.mass.shape[1])
        order = layer.mass.masked_fill(~layer.valid, -1.0).argsort(dim=1, descending=True, stable=True)[:, :count]
        frequency = special | (torch.zeros_like(special).scatter(1, order, True) & layer.valid)
        return torch.stack((special, local, frequency, frequency | local, layer.valid))
