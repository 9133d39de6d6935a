"""Merging: what is evicted goes on, in part, in tokens that stay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from kvpilot.bounds import Bounds
from workers.stages.base import LayerView, budgets, parameter, shadow
from workers.stages.evict.heavy import HeavyHitters

CAM, D2O = "cam", "d2o"
CAM_NEIGHBOURS = 32
D2O_DECAY = 0.7
ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Merge(HeavyHitters):
    """H2O's choice (half the budget to most attention so far, half recent), but what goes is merged into what stays.

    ``method="cam"``: an evicted value is added, in equal parts, to the next 32 kept ones. That happens with the odds of
    its attention so far to the mean of theirs, at most 1; lots depend on ``seed``, layer, head and position alone.
    Keys stay as they are. Source: Zhang et al., CaM: Cache Merging for Memory-efficient LLMs Inference, ICML 2024.

    ``method="d2o"``: an evicted key and value are merged into the kept token whose key is most like its own (cosine u),
    if u reaches a threshold: at first the mean of all u, then, token by token, 0.7 u + 0.3 of what it was. A kept token
    weighs e, those merged into it exp(u) each, and the weights sum to 1. Source: Wan et al., D2O: Dynamic
    Discriminative Operations for Efficient Generative Inference of Large Language Models, arXiv 2406.13035.

    Tokens among the last 32 take nothing up: they are not in the exact copy yet. What would go there is lost. Evicts
    once per 32 generated tokens instead of at every step; D2O's budgets by layer are left to ``budgets``.
    """

    name: ClassVar[str] = "merge"
    summary: ClassVar[str] = "Tokens that received most attention and recent ones; others are merged into them."
    merges: ClassVar[bool] = True
    method: str = parameter(CAM, Bounds(choices=(CAM, D2O)))
    seed: int = parameter(0, Bounds(least=0), minor=True)
    budgets: str = budgets()
    shadow: bool = shadow()

    def merge(
        self, layer: LayerView, evicted: torch.Tensor, into: torch.Tensor, threshold: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See :class:`Evictor`."""
        keys, values = (part.float().clone() for part in layer.read())
        threshold = threshold.clone()
        uniform = self._lots(layer) if self.method == CAM else None
        for head in range(len(keys)):
            gone, kept = evicted[head].nonzero()[:, 0], into[head].nonzero()[:, 0]
            if not len(gone) or not len(kept):
                continue
            if uniform is not None:
                _add_to_next(values[head], layer.mass[head], uniform[head], gone, kept)
            else:
                threshold[head] = _merge_alike(keys[head], values[head], gone, kept, float(threshold[head]))
        return keys, values, threshold

    def _lots(self, layer: LayerView) -> torch.Tensor:
        """[H, T] uniform numbers by position."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer.index)
        lots = torch.rand(layer.seen, len(layer.mass), generator=generator).to(layer.mass.device)
        return lots.mT.gather(1, layer.position.long().clamp(0, layer.seen - 1))


def _add_to_next(
    values: torch.Tensor, mass: torch.Tensor, uniform: torch.Tensor, gone: torch.Tensor, kept: torch.Tensor
) -> None:
    """CaM on one head's values [T, D], in place: those at ``gone`` go to the kept ones that follow, by lot."""
    first = torch.searchsorted(kept, gone)
    last = (first + CAM_NEIGHBOURS).clamp(max=len(kept))
    total = F.pad(mass[kept].double().cumsum(0), (1, 0))
    count = (last - first).double()
    odds = mass[gone].double() / ((total[last] - total[first]) / count)
    merged = (uniform[gone] < odds.nan_to_num(0.0)) & (count > 0)
    part = values[gone].double() * (merged / count.clamp(min=1))[:, None]  # [gone, D]
    steps = part.new_zeros(len(kept) + 1, values.shape[1])
    steps.index_add_(0, first, part)
    steps.index_add_(0, last, -part)
    values[kept] += steps.cumsum(0)[:-1].float()


def _merge_alike(
    keys: torch.Tensor, values: torch.Tensor, gone: torch.Tensor, kept: torch.Tensor, threshold: float
) -> float:
    """D2O on one head's keys and values [T, D], in place; returns the threshold for the next eviction."""
    direction = F.normalize(keys, dim=-1)
    found = [(part @ direction[kept].T).max(dim=1) for part in torch.split(direction[gone], ROWS_AT_ONCE)]
    likeness = torch.cat([each.values for each in found])
    nearest = kept[torch.cat([each.indices for each in found])]
    if math.isnan(threshold):
        threshold = float(likeness.mean())
        alike = likeness >= threshold
    else:
        bounds = []
        for value in likeness.tolist():
            threshold = D2O_DECAY * value + (1 - D2O_DECAY) * threshold
            bounds.append(threshold)
        alike = likeness >= likeness.new_tensor(bounds)
    weight = likeness[alike].exp()
    total = torch.full_like(keys[:, 0], math.e).index_add_(0, nearest[alike], weight)
    for part in (keys, values):
        joined = (part * math.e).index_add_(0, nearest[alike], part[gone[alike]] * weight[:, None])
        part[kept] = (joined / total[:, None])[kept]
    return threshold
