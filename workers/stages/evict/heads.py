"""What stages share that keep all tokens of some heads and a window of the others'."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch

from workers.profile.profile import LayerProfile
from workers.stages.base import Evictor, LayerView
from workers.stages.budgets import PER_HEAD


@dataclass(frozen=True)
class SomeHeads(Evictor):
    """Heads that the model's profile picks keep everything; the others the protected tokens, the first and last."""

    @abstractmethod
    def full(self, profile: LayerProfile) -> torch.Tensor:
        """Which KV heads of a layer keep everything: bool [H]."""

    @property
    def rule(self) -> str:
        """Each head its own number."""
        return PER_HEAD

    def budget(self, seen: int) -> int:
        """All: what the picked heads keep."""
        return max(seen, sum(self.protected(seen)))

    def head_budget(self, seen: int, profile: LayerProfile | None) -> torch.Tensor:
        """All, or what is protected."""
        assert profile is not None
        return torch.where(self.full(profile), self.budget(seen), sum(self.protected(seen)))

    def score(self, layer: LayerView) -> torch.Tensor:
        """Newer is higher: beyond the protected tokens a head keeps all or none."""
        return layer.position.float()


def best_of(strength: torch.Tensor, count: int) -> torch.Tensor:
    """Which entries of a tensor are the ``count`` greatest, the earlier ones among equals: bool of its shape."""
    order = strength.flatten().argsort(descending=True, stable=True)[:count]
    chosen = torch.zeros(strength.numel(), dtype=torch.bool, device=strength.device)
    chosen[order] = True
    return chosen.view(strength.shape)
