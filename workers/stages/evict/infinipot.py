"""InfiniPot: a pot of fixed size, boiled down whenever it is full."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kernels.layout import BLOCK_TOKENS
from kvpilot.bounds import Bounds
from workers.stages.base import Fixed, LayerView, parameter, shadow

ALL_QUERIES = 1 << 20


@dataclass(frozen=True)
class InfiniPot(Fixed):
    """Never more than ``size`` tokens, already while the prompt comes: when there are as many, ``keep`` of them stay.

    So the prompt is computed over what is left of it, in a fixed memory, however long it is. What stays is chosen by
    two measures, each divided by its largest value: what the queries of a catalyst prompt pay a token (it asks what
    will matter, is run behind the pot, and leaves nothing in it; the mean over its queries, the sum over the KV head's
    query group), and the token's novelty, its surprise -log p given what was there when it came. ``novelty`` is the
    latter's weight. Tokens whose surprise is not known, because a request was switched to infinipot later, count as the
    mean of the others; where there is no tokenizer, the last queries stand in for the catalyst prompt.

    The last 32 tokens stay. ``size`` is rounded down to whole blocks, and so is what stays. Positions are those of the
    text; the paper numbers the pot's tokens anew, so as to pass the trained context. How the two measures are weighted
    is ours. After a switch back to ``full`` all tokens are there, as they were computed over the pot.

    Source: Kim et al., InfiniPot: Infinite Context Processing on Memory-Constrained LLMs, arXiv 2410.01518.
    Query-agnostic.
    """

    name: ClassVar[str] = "infinipot"
    summary: ClassVar[str] = "A fixed number of tokens from the prompt's first on: telling and surprising ones."
    evicts_while_prefilling: ClassVar[bool] = True
    keep: float = parameter(0.5, Bounds(above=0, most=1), "share of a full pot that stays", minor=True)
    novelty: float = parameter(0.5, Bounds(least=0, most=1), "share of novelty in the score", minor=True)
    shadow: bool = shadow()

    @property
    def _pot(self) -> int:
        return self.size // BLOCK_TOKENS * BLOCK_TOKENS

    @property
    def _interval(self) -> int:
        """Tokens that a pot takes up from one boiling down to the next."""
        stay = int(self.keep * self._pot) // BLOCK_TOKENS * BLOCK_TOKENS
        return self._pot - max(BLOCK_TOKENS, min(stay, self._pot - BLOCK_TOKENS))

    def budget(self, seen: int) -> int:
        """What is in the pot after so many tokens."""
        over = seen - self._pot
        return seen if over < 0 else self._pot - self._interval + over % self._interval

    def next_eviction(self, seen: int) -> int:
        """When the pot is full next."""
        over = seen - self._pot
        return self._pot if over < 0 else seen + self._interval - over % self._interval

    def score(self, layer: LayerView) -> torch.Tensor:
        """The catalyst prompt's attention and novelty, weighted."""
        paid = layer.attention(ALL_QUERIES).mean(dim=2).sum(dim=1)  # [H, T]
        known = layer.valid & ~layer.novelty.isnan()
        mean = layer.novelty[known].mean() if known.any() else torch.zeros((), device=known.device)
        novelty = torch.where(known, layer.novelty, mean).masked_fill(~layer.valid, 0.0)
        weighted = ((1 - self.novelty, paid), (self.novelty, novelty))
        parts = [weight * part / part.amax(dim=1, keepdim=True).clamp(min=1e-12) for weight, part in weighted]
        return parts[0] + parts[1]
