"""RazorAttention: echo and induction heads see everything, the others what is near."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from kvpilot.bounds import Bounds
from workers.profile.profile import LayerProfile
from workers.stages.base import parameter, shadow, whole_blocks
from workers.stages.evict.heads import SomeHeads, best_of

SINKS = 4
NEAR = 5
"""Heads that do not retrieve keep at least one of so many tokens."""


@dataclass(frozen=True)
class Razor(SomeHeads):
    """KV heads with one of the model's best query heads at echo (share ``echo``) or induction (share ``induction``)
    keep every token; the others the first 4 and the last fifth of all tokens seen, at least the last ``recent``.

    Echo and induction are measured on random tokens that come several times, in the model's profile. The paper's
    windows have at least 4,000 tokens; with so many nothing is saved at shorter contexts, so ``recent`` is smaller by
    default. It also puts one token in the place of those dropped, with the mean of their keys and values and the weight
    of all of them: block tables hold tokens of weight one only, so there is none here, and what is dropped is gone.

    Source: Tang et al., RazorAttention: Efficient KV Cache Compression Through Retrieval Heads, arXiv 2407.15891.
    Query-agnostic.
    """

    name: ClassVar[str] = "razor"
    summary: ClassVar[str] = "All tokens of echo and induction heads; of the others what is near (RazorAttention)."
    needs: ClassVar[tuple[str, ...]] = ("echo", "induction")
    echo: float = parameter(0.01, Bounds(least=0, most=1), "share of all query heads")
    induction: float = parameter(0.14, Bounds(least=0, most=1), "share of all query heads")
    recent: int = whole_blocks(512)
    shadow: bool = shadow()

    def protected(self, seen: int) -> tuple[int, int]:
        """What heads keep that do not retrieve."""
        return SINKS, max(self.recent, math.ceil(seen / NEAR))

    def full(self, profile: LayerProfile) -> torch.Tensor:
        """Those of the layer with a query head among the model's best."""
        model = profile.model
        shares = {"echo": self.echo, "induction": self.induction}
        asking = [
            best_of(model.tensor(name), round(share * model.tensor(name).numel())) for name, share in shares.items()
        ]
        best = torch.stack(asking).any(dim=0)[profile.index]  # [query heads]
        return best.view(model.shape.kv_heads, -1).any(dim=1)
