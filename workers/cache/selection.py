"""Which tokens an evictor keeps: protection of the first and last, then top-k by its score; and what others become."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kernels.api import F32, I32, Backend, TokenSource
from kernels.layout import BLOCK_TOKENS
from workers.cache.arrangement import Mask, Tokens
from workers.stages.base import Evictor, LayerView
from workers.stages.budgets import best, free_tokens

Queries = Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]
"""Of a layer, at most so many: see ``workers.cache.recent.RecentQueries.read``."""


def choose(
    evictor: Evictor,
    tokens: Tokens,
    seen: int,
    scaling: float,
    backend: Backend,
    queries: Queries,
    device: torch.device,
    reconstruction: F32 | None = None,
    novelty: Sequence[float] = (),
) -> Mask:
    """Marks the tokens [L, H, T] that stay. Ties go to the more recent token.

    ``reconstruction`` and ``novelty`` are those of ``SequenceCache``.

    Raises:
        ValueError: a score of the wrong shape or with NaN, naming the stage.
    """
    sinks, recent = evictor.protected(seen)
    if recent < BLOCK_TOKENS:
        raise ValueError(f"stage {evictor.name!r} protects the last {recent} tokens; at least {BLOCK_TOKENS} must stay")
    free = max(evictor.budget(seen) - sinks - recent, 0)
    layers = len(tokens.valid)
    keep = np.zeros(tokens.valid.shape, bool)
    for layer in range(layers):
        view = _view(tokens, layer, seen, scaling, backend, queries, device, reconstruction, novelty)
        score = evictor.score(view)
        valid, position = tokens.valid[layer], tokens.position[layer]
        if score.shape != valid.shape or not bool(torch.isfinite(score[view.valid]).all()):
            raise ValueError(f"stage {evictor.name!r}: scores must be finite and of shape {valid.shape}")
        protected = (position < sinks) | (position >= seen - recent)
        here = free_tokens(evictor.rule, layer, layers, free, seen - sinks - recent)
        keep[layer] = best(evictor.rule, score.double().cpu().numpy(), protected, valid, sinks + recent, here)
    return keep


@dataclass(frozen=True)
class Merged:
    """Tokens that hold something else from now on, because others were merged into them. N of them."""

    place: tuple[npt.NDArray[np.int64], ...]  # layer, head and index in the table [N] each
    k: torch.Tensor  # [N, D]
    v: torch.Tensor  # [N, D]
    threshold: F32  # [L, H] for the next time


def merge(
    evictor: Evictor,
    tokens: Tokens,
    keep: Mask,
    seen: int,
    scaling: float,
    backend: Backend,
    queries: Queries,
    device: torch.device,
    threshold: F32,
) -> Merged:
    """Merges the tokens that :func:`choose` does not keep into those it does, all but the last 32.

    The last ones stay as they are until an exact copy has them.
    """
    place, found = [], []
    threshold = threshold.copy()
    for layer in range(len(tokens.valid)):
        view = _view(tokens, layer, seen, scaling, backend, queries, device)
        into = keep[layer] & (tokens.position[layer] < seen - BLOCK_TOKENS)
        evicted = torch.from_numpy(tokens.valid[layer] & ~keep[layer]).to(device)
        before = torch.from_numpy(threshold[layer]).to(device)
        k, v, after = evictor.merge(view, evicted, torch.from_numpy(into).to(device), before)
        threshold[layer] = after.cpu().numpy()
        old_k, old_v = view.read()
        changed = ((k.to(old_k.dtype) != old_k) | (v.to(old_v.dtype) != old_v)).any(dim=-1).cpu().numpy() & into
        head, index = np.nonzero(changed)
        place.append((np.full(len(head), layer), head, index))
        found.append(tuple(part.to(old_k.dtype)[head, index] for part in (k, v)))
    axes = tuple(np.concatenate(axis) for axis in zip(*place, strict=True))
    k, v = (torch.cat(part) for part in zip(*found, strict=True))
    return Merged(axes, k, v, threshold)


def _view(
    tokens: Tokens,
    layer: int,
    seen: int,
    scaling: float,
    backend: Backend,
    queries: Queries,
    device: torch.device,
    reconstruction: F32 | None = None,
    novelty: Sequence[float] = (),
) -> LayerView:
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
        index=layer,
        layers=len(tokens.position),
        position=torch.from_numpy(tokens.position[layer]).to(device),
        valid=torch.from_numpy(tokens.valid[layer]).to(device),
        mass=torch.from_numpy(tokens.mass[layer]).to(device),
        votes=torch.from_numpy(tokens.votes[layer].astype(np.float32)).to(device),
        seen=seen,
        scaling=scaling,
        read=read,
        queries=partial(queries, layer),
        reconstruction=_by_token(reconstruction, tokens.position[layer], layer, device),
        novelty=_surprises(novelty, tokens.position[layer], device),
    )


def _by_token(by_position: F32 | None, position: I32, layer: int, device: torch.device) -> torch.Tensor | None:
    """Of a layer's scores [L, H, positions], those of the tokens at ``position`` [H, T]; 1 for later tokens."""
    if by_position is None:
        return None
    known = position < by_position.shape[2]
    scores = np.take_along_axis(by_position[layer], np.where(known, position, 0).clip(min=0), axis=1)
    return torch.from_numpy(np.where(known, scores, np.float32(1))).to(device)


def _surprises(by_position: Sequence[float], position: I32, device: torch.device) -> torch.Tensor:
    """Of the surprises by position those of the tokens at ``position`` [H, T]; NaN where there is none."""
    known = np.array([*by_position, np.nan], np.float32)
    place = np.where(position < 0, len(by_position), position).clip(max=len(by_position))
    return torch.from_numpy(known[place]).to(device)
