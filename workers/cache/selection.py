"""Which tokens an evictor keeps: protection of the first and last, then top-k by its score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from kernels.api import F32, TokenSource
from kernels.layout import BLOCK_TOKENS
from workers.cache.arrangement import Mask, Tokens
from workers.cache.blocks import Owners
from workers.cache.sources import Sources
from workers.profile.profile import ModelProfile, names_of
from workers.stages.base import Evictor, LayerView
from workers.stages.budgets import PER_HEAD, Counts, best, free_tokens

Queries = Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]
"""Of a layer, at most so many: see ``workers.cache.recent.RecentQueries.read``."""


@dataclass(frozen=True)
class Views:
    """What evictors may look at, layer by layer."""

    tokens: Tokens
    seen: int  # tokens of the request so far
    scaling: float  # the model's factor on attention scores
    sources: Sources
    queries: Queries
    device: torch.device
    profile: ModelProfile | None = None
    reconstruction: F32 | None = None  # [L, H, positions], see SequenceCache
    novelty: Sequence[float] = ()  # [positions], likewise

    def layer(self, index: int) -> LayerView:
        """One layer's tokens."""
        tokens, device = self.tokens, self.device
        return LayerView(
            index=index,
            layers=len(tokens.position),
            position=torch.from_numpy(tokens.position[index]).to(device),
            valid=torch.from_numpy(tokens.valid[index]).to(device),
            mass=torch.from_numpy(tokens.mass[index]).to(device),
            votes=torch.from_numpy(tokens.votes[index].astype(np.float32)).to(device),
            seen=self.seen,
            scaling=self.scaling,
            read=partial(self._read, index),
            queries=partial(self.queries, index),
            profile=self.profile.layer(index) if self.profile else None,
            reconstruction=self._reconstruction(index),
            novelty=self._novelty(index),
        )

    def _reconstruction(self, layer: int) -> torch.Tensor | None:
        """[H, T], 1 for tokens that came after the pass."""
        if self.reconstruction is None:
            return None
        position = self.tokens.position[layer]
        known = position < self.reconstruction.shape[2]
        scores = np.take_along_axis(self.reconstruction[layer], np.where(known, position, 0).clip(min=0), axis=1)
        return torch.from_numpy(np.where(known, scores, np.float32(1))).to(self.device)

    def _novelty(self, layer: int) -> torch.Tensor:
        """[H, T], NaN where none was noted."""
        position, noted = self.tokens.position[layer], len(self.novelty)
        surprises = np.array([*self.novelty, np.nan], np.float32)
        return torch.from_numpy(surprises[np.where(position < 0, noted, position).clip(max=noted)]).to(self.device)

    def _read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.tokens
        heads, count = tokens.position.shape[1:]
        padded = -(-count // BLOCK_TOKENS) * BLOCK_TOKENS

        def by_block(values: Any, empty: int) -> Any:
            full = np.full((heads, padded), empty, values.dtype)
            full[:, :count] = np.where(tokens.valid[layer], values[layer], empty)
            return full.reshape(-1, BLOCK_TOKENS)

        source = TokenSource(
            by_block(tokens.address, -1),
            by_block(tokens.format, 0),
            by_block(tokens.tier, 0),
            by_block(tokens.row, 0),
        )
        owners = Owners(
            np.full(len(source.address), layer),
            np.arange(heads).repeat(padded // BLOCK_TOKENS),
            by_block(tokens.position, 0),
        )
        k, v = self.sources.read(source, owners)
        return k.reshape(heads, padded, -1)[:, :count], v.reshape(heads, padded, -1)[:, :count]


def choose(evictor: Evictor, views: Views) -> Mask:
    """Marks the tokens [L, H, T] that stay. Ties go to the more recent token.

    Raises:
        ValueError: a score of the wrong shape or with NaN, or a profile that lacks what the stage needs, naming it.
    """
    if lack := evictor.lacks(names_of(views.profile)):
        raise ValueError(f"stage {evictor.name!r}: {lack}")
    tokens, seen = views.tokens, views.seen
    sinks, recent = evictor.protected(seen)
    if recent < BLOCK_TOKENS:
        raise ValueError(f"stage {evictor.name!r} protects the last {recent} tokens; at least {BLOCK_TOKENS} must stay")
    free = max(evictor.budget(seen) - sinks - recent, 0)
    layers = len(tokens.valid)
    keep = np.zeros(tokens.valid.shape, bool)
    for layer in range(layers):
        view = views.layer(layer)
        score = evictor.score(view)
        valid, position = tokens.valid[layer], tokens.position[layer]
        if score.shape != valid.shape or not bool(torch.isfinite(score[view.valid]).all()):
            raise ValueError(f"stage {evictor.name!r}: scores must be finite and of shape {valid.shape}")
        protected = (position < sinks) | (position >= seen - recent)
        here: int | Counts = free_tokens(evictor.rule, layer, layers, free, seen - sinks - recent)
        if evictor.rule == PER_HEAD:
            budget = evictor.head_budget_of(view).cpu().numpy()  # [H]
            here = np.maximum(budget, (protected & valid).sum(axis=1)) - sinks - recent
        keep[layer] = best(evictor.rule, score.double().cpu().numpy(), protected, valid, sinks + recent, here)
    return keep
