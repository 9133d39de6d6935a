"""What tokens that stay become when an evictor merges into them those that go."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kernels.api import F32
from kernels.layout import BLOCK_TOKENS
from workers.cache.arrangement import Mask
from workers.cache.selection import Views
from workers.stages.base import Evictor


@dataclass(frozen=True)
class Merged:
    """Tokens that hold something else from now on. N of them."""

    place: tuple[npt.NDArray[np.int64], ...]  # layer, head and index in the table [N] each
    k: torch.Tensor  # [N, D]
    v: torch.Tensor  # [N, D]
    threshold: F32  # [L, H] for the next time


def merge(evictor: Evictor, views: Views, keep: Mask, threshold: F32) -> Merged:
    """Merges the tokens that are not kept [L, H, T] into those that are, all but the last 32.

    The last ones stay as they are until an exact copy has them.
    """
    tokens, device = views.tokens, views.device
    place, found = [], []
    threshold = threshold.copy()
    for layer in range(len(tokens.valid)):
        view = views.layer(layer)
        into = keep[layer] & (tokens.position[layer] < views.seen - BLOCK_TOKENS)
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
