"""Scoring: what the model expects behind known tokens, over keys and values that are only read; and how far two such
answers are apart."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

from kernels.api import I32
from workers.cache.recall import SelectiveReader
from workers.engine.attention import causal
from workers.engine.guessing import QueryGuesser


class Context(Protocol):
    """Keys and values of the tokens before."""

    tokens: int
    """Of the longest table."""
    length: I32
    """[layers, kv_heads] tokens there are."""
    position: I32
    """[layers, kv_heads, tokens] original positions; not defined beyond ``length``."""
    selective: SelectiveReader | None
    """What says which of them a query reads; None: all."""

    def read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer, each [kv_heads, tokens, head_dim]; zeros beyond ``length``."""
        ...


class ScoringAttention:
    """A run of known tokens behind a cache that is only read: nothing is written, counted or kept of it.

    Args:
        context: what the request keeps.
        guesser: where what is read goes by guessed queries: who guesses them.
    """

    def __init__(self, context: Context, guesser: QueryGuesser | None = None) -> None:
        self._context = context
        self.queries: list[torch.Tensor] = []
        """Those of each layer that has attended, [query_heads, S, D]."""
        self._guesser = guesser
        self._guess: torch.Tensor | None = None  # of the next layer's queries
        self._mask: torch.Tensor | None = None  # of all layers, where every table is of one length
        self._uneven = bool((context.length != context.tokens).any())

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
        """See :class:`Attend`; B is 1, S the number of tokens."""
        self.queries.append(q[0])
        before = self._context.read(layer)
        if self._context.selective:
            before = self._context.selective.as_read(layer, before[0]), before[1]
        k, v = (torch.cat([old[None], new], dim=2) for old, new in zip(before, (k, v), strict=True))
        if self._mask is None or self._uneven:
            self._mask = self._seen(layer, q)
        mask = self._mask
        if self._context.selective:
            asked: torch.Tensor | None = q[0]
            if self._guesser:
                ahead = self._guesser.next_queries(layer)
                asked, self._guess = self._guess, ahead[0] if ahead is not None else None
            read = self._context.selective.visible(layer, asked, k[0], scaling)
            if read is not None:
                mask = mask & read.repeat_interleave(q.shape[1] // len(read), dim=0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2)

    def _seen(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """bool [queries, T] or [query_heads, queries, T]: everything kept, and among the new tokens those before."""
        kept, queries = self._context.tokens, q.shape[2]
        mask = causal(queries, kept + queries, q.device)
        if not self._uneven:
            return mask
        length = torch.from_numpy(self._context.length[layer]).to(q.device)  # [kv_heads]
        there = torch.arange(kept, device=q.device) < length[:, None]
        there = F.pad(there, (0, queries), value=True)  # [kv_heads, T]
        return (mask & there[:, None]).repeat_interleave(q.shape[1] // len(length), dim=0)


def divergences(exact: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(exact || other) of each row, nats, [N]; from log-probabilities [N, V]. Never below 0."""
    # A token that the exact distribution rules out contributes nothing, whatever the other says of it.
    terms = torch.where(exact == -torch.inf, 0.0, exact.exp() * (exact - other))
    return terms.sum(dim=-1).clamp(min=0.0)
