"""DuoAttention: retrieval heads see everything, streaming heads sinks and recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvpilot.bounds import Bounds
from workers.profile.profile import LayerProfile
from workers.stages.base import parameter, shadow, whole_blocks
from workers.stages.evict.heads import SomeHeads, best_of


@dataclass(frozen=True)
class Duo(SomeHeads):
    """The share ``share`` of all KV heads of the model, those that retrieve most, keep every token; the others the
    first ``sinks`` and the last ``recent``.

    Which heads retrieve is measured, in the model's profile: what a passage that comes again pays to its first copy.
    The paper learns it: gates between full and streaming attention, trained on passkeys so that as few as possible
    stay open. Evicts once per 32 generated tokens: a streaming head holds up to 31 more.

    Source: Xiao et al., DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads, arXiv
    2410.10819. Query-agnostic.
    """

    name: ClassVar[str] = "duo"
    summary: ClassVar[str] = "All tokens of heads that retrieve; of the others the first and the recent (DuoAttention)."
    needs: ClassVar[tuple[str, ...]] = ("retrieval",)
    share: float = parameter(0.5, Bounds(least=0, most=1), "share of all KV heads")
    sinks: int = parameter(64, Bounds(least=0, most=1024), "tokens")
    recent: int = whole_blocks(256)
    shadow: bool = shadow()

    def protected(self, seen: int) -> tuple[int, int]:
        """What streaming heads keep."""
        return self.sinks, self.recent

    def full(self, profile: LayerProfile) -> torch.Tensor:
        """Those of the layer that are among the model's best."""
        retrieval = profile.model.tensor("retrieval")
        return best_of(retrieval, round(self.share * retrieval.numel()))[profile.index]
