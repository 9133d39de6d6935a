"""Which tokens an evictor keeps: protection of the first and last, then top-k by its score."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kernels.api import Backend, TokenSource
from kernels.layout import BLOCK_TOKENS
from workers.cache.arrangement import Mask, Tokens
from workers.stages.base import Evictor, LayerView


def choose(evictor: Evictor, tokens: Tokens, seen: int, backend: Backend) -> Mask:
    """Marks the tokens [L, H, T] that stay. Ties go to the more recent token.

    Raises:
        ValueError: a score of the wrong shape or with NaN, naming the stage.
    """
    sinks, recent = evictor.protected(seen)
    if recent < BLOCK_TOKENS:
        raise ValueError(f"stage {evictor.name!r} protects the last {recent} tokens; at least {BLOCK_TOKENS} must stay")
    budget = max(evictor.budget(seen), sinks + recent)
    keep = np.zeros(tokens.valid.shape, bool)
    for layer in range(len(keep)):
        valid = tokens.valid[layer]
        view = _view(tokens, layer, seen, backend)
        score = evictor.score(view)
        if score.shape != view.position.shape or not bool(torch.isfinite(score).all()):
            raise ValueError(f"stage {evictor.name!r}: scores must be finite and of shape {tuple(view.position.shape)}")
        score = score.double()
        score[torch.from_numpy((view.position.numpy() < sinks) | (view.position.numpy() >= seen - recent))] = torch.inf
        score[torch.from_numpy(~valid)] = -torch.inf
        count = min(budget, score.shape[1])
        # Top-k of the reversed row: among equals, the later position comes first.
        best = torch.flip(score, dims=[1]).argsort(dim=1, descending=True, stable=True)[:, :count]
        chosen = torch.zeros(score.shape, dtype=torch.bool).scatter_(1, score.shape[1] - 1 - best, True)
        keep[layer] = chosen.numpy() & valid
    return keep


def _view(tokens: Tokens, layer: int, seen: int, backend: Backend) -> LayerView:
    def read() -> tuple[torch.Tensor, torch.Tensor]:
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
        k, v = backend.read(source)
        return k.reshape(heads, padded, -1)[:, :count], v.reshape(heads, padded, -1)[:, :count]

    return LayerView(
        position=torch.from_numpy(tokens.position[layer]),
        mass=torch.from_numpy(tokens.mass[layer]),
        votes=torch.from_numpy(tokens.votes[layer].astype(np.float32)),
        seen=seen,
        read=read,
    )
