"""kvpilot's attention function, which transformers' model code calls in every layer.

The model runs without a cache of its own: keys and values go to the block tables here. A forward pass is either one
decode step of R requests, ``[R, 1]``, or one chunk of one prompt, ``[1, N]``; which one is said by the
:class:`Attend` object that the runner passes through the model as an extra keyword argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from kernels.api import F32, DecodePlan
from kernels.layout import CacheShape
from workers.cache.context import CacheContext
from workers.cache.kvcache import KVCache
from workers.cache.reading import StepReading
from workers.cache.recent import RECENT_QUERIES
from workers.stages.evict.snapkv import OBSERVATION_WINDOW

ATTENTION_NAME = "kvpilot"
STEP_ARGUMENT = "kvpilot_step"
_UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "head_mask")


Guess = Callable[[int], torch.Tensor | None]


class Attend(Protocol):
    """Attention of one forward pass."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
        """q [B, query_heads, S, D], k and v [B, kv_heads, S, D], rotated; returns [B, S, query_heads, D]."""
        ...


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The function registered with transformers as ``kvpilot``.

    Raises:
        NotImplementedError: the model asks for something the kernels do not compute.
    """
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"attention argument {name}={kwargs[name]!r} is not served")
    step: Attend = kwargs[STEP_ARGUMENT]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return step.attend(int(module.layer_idx), query, key, value, scale), None  # type: ignore[arg-type]


AttentionInterface.register(ATTENTION_NAME, attention)


class DecodeAttention:
    """One decode step: a token each of several requests, over blocks of any format and tier.

    Args:
        cache: the worker's cache.
        plan: the step's.
        reading: of its requests.
        guess: while a layer attends, gives the guessed queries [R, query_heads, 1, D] of the next; None after the last.
    """

    def __init__(self, cache: KVCache, plan: DecodePlan, reading: StepReading, guess: Guess | None = None) -> None:
        self._backend = cache.backend
        self._reading = reading
        self._guess = guess
        self.plan = plan
        self._queries: list[torch.Tensor] = []

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
        """See :class:`Attend`; S is 1."""
        self._queries.append(q)
        q, k, v = q[:, :, 0], k[:, :, 0], v[:, :, 0]
        if not self._reading:
            return self._backend.decode(self.plan, layer, q, k, v, scaling)[:, None]
        if self._guess and (ahead := self._guess(layer)) is not None:
            self._reading.foresee(layer + 1, ahead[:, :, 0], scaling)
        try:
            partials, lse = self._reading.before(layer, q, scaling), self._reading.lse(q)
            self._backend.refresh(self.plan, layer)
            output = self._backend.decode(self.plan, layer, q, k, v, scaling, partials, lse)
            self._reading.count(layer, lse)
            return output[:, None]
        finally:
            self._reading.after(layer)

    def queries(self) -> torch.Tensor:
        """The queries of all layers, once all have attended: [layers, R, query_heads, 1, D]."""
        return torch.stack(self._queries)


class PromptAttention:
    """One chunk of a prompt, which reads all tokens before it exactly, whatever pipeline will follow.

    So the result does not depend on where the prompt is cut into chunks. (Behind an evictor that works meanwhile it
    reads what is kept, of which the same is true, since a chunk ends where it evicts.) The chunk's tokens are counted
    in the tables before the pass (``KVCache.advance``).

    Args:
        cache: the worker's cache.
        slot: the request's slot, whose tables are of one length.
        context: reader of its blocks, this chunk's included.
        start: tokens before this chunk, of which some may have been evicted.
        votes: float32 [layers, kv_heads, prompt_tokens] by position, to which the observation window's attention is
            added.
        all_queries: whether all queries count in the masses, not only the observation window's.
    """

    def __init__(
        self, cache: KVCache, slot: int, context: CacheContext, start: int, votes: F32, all_queries: bool
    ) -> None:
        self._cache = cache
        self._slot = slot
        self._context = context
        self._start = start
        self._votes = votes
        self._all_queries = all_queries
        self._mask: torch.Tensor | None = None
        self._last_queries: list[torch.Tensor] = []

    def queries(self) -> torch.Tensor:
        """The chunk's last queries of all layers, once all have attended: [layers, query_heads, N, D]."""
        return torch.stack(self._last_queries)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
        """See :class:`Attend`; B is 1, S the chunk's length."""
        kept = self._context.tokens - q.shape[2]  # of the tokens before
        self._cache.backend.write(self._slot, layer, kept, k[0], v[0])
        self._last_queries.append(q[0, :, -RECENT_QUERIES:].clone())  # a view would keep the whole chunk's in memory
        self._cache.scaling = scaling
        if kept:
            k, v = (part[None] for part in self._context.read(layer))  # [1, kv_heads, T, D]
        self._count_attention(layer, q[0], k[0], scaling)
        if kept and self._mask is None:
            self._mask = causal(q.shape[2], k.shape[2], q.device)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=self._mask, is_causal=self._mask is None, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2)

    def _count_attention(self, layer: int, q: torch.Tensor, k: torch.Tensor, scaling: float) -> None:
        """Adds what this chunk's queries pay to each token to the masses."""
        end = self._start + q.shape[1]
        first_vote = max(self._start, self._votes.shape[2] - OBSERVATION_WINDOW)
        first = self._start if self._all_queries else first_vote
        if first >= end:
            return
        counted = attention_received(q[:, first - self._start :], k, scaling)  # [kv_heads, queries, T]
        tables, slot, kept = self._cache.tables, self._slot, k.shape[1]
        tables.mass[slot, layer, :, :kept] += counted.sum(dim=1).cpu().numpy()
        if first_vote < end:
            paid = counted[:, first_vote - first :].sum(dim=1).cpu().numpy()  # [kv_heads, T]
            votes, position = self._votes[layer], tables.position[slot, layer, :, :kept]
            np.put_along_axis(votes, position, np.take_along_axis(votes, position, 1) + paid, 1)


def attention_received(q: torch.Tensor, k: torch.Tensor, scaling: float) -> torch.Tensor:
    """Softmax attention of the last N queries, summed over each KV head's query group.

    Args:
        q: [query_heads, N, D], queries of the last N positions.
        k: [kv_heads, T, D].

    Returns:
        float32 [kv_heads, N, T].
    """
    heads, queries, dim = q.shape
    kv_heads, tokens, _ = k.shape
    grouped = q.reshape(kv_heads, -1, dim).float()  # [kv_heads, group * N, D]
    scores = torch.matmul(grouped, k.float().transpose(1, 2)) * scaling
    scores = scores.view(kv_heads, heads // kv_heads, queries, tokens)
    scores.masked_fill_(~causal(queries, tokens, q.device), float("-inf"))
    return torch.softmax(scores, dim=-1).sum(dim=1)


def causal(queries: int, tokens: int, device: torch.device) -> torch.Tensor:
    """bool [queries, tokens]: query i, at position tokens - queries + i, sees itself and what came before."""
    return torch.ones(queries, tokens, dtype=torch.bool, device=device).tril(tokens - queries)


def check_servable(config: Any) -> None:
    """Refuses models whose attention is not plain causal softmax over all tokens.

    Raises:
        ValueError: naming the model type and what is not served.
    """
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(f"model type {config.model_type!r} has {sorted(kinds)} layers; only full_attention is served")
    if getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None):
        raise ValueError(f"model type {config.model_type!r} has a sliding window of {config.sliding_window} tokens")


def cache_shape(config: Any, dtype: torch.dtype) -> CacheShape:
    """The cache dimensions of a transformers configuration."""
    heads = config.num_attention_heads
    return CacheShape(
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        query_heads=heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=dtype,
    )
