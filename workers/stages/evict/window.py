"""StreamingLLM: attention sinks and a sliding window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvpilot.bounds import Bounds
from workers.stages.base import Evictor, LayerView, parameter, shadow, whole_blocks


@dataclass(frozen=True)
class Window(Evictor):
    """The first ``sinks`` tokens and the last ``recent``; positions are not re-indexed.

    Evicts once per 32 generated tokens, so a head holds up to 31 tokens more than ``sinks + recent``.

    Source: Xiao et al., Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453.
    """

    name: ClassVar[str] = "window"
    summary: ClassVar[str] = "The first few tokens (attention sinks) and the most recent ones (StreamingLLM)."
    alike: ClassVar[bool] = True
    sinks: int = parameter(4, Bounds(least=0, most=1024), "tokens")
    recent: int = whole_blocks(512)
    shadow: bool = shadow()

    def budget(self, seen: int) -> int:
        """Sinks plus window."""
        return self.sinks + self.recent

    def protected(self, seen: int) -> tuple[int, int]:
        """All of the budget is protected: the rule is one of position alone."""
        return self.sinks, self.recent

    def score(self, layer: LayerView) -> torch.Tensor:
        """Newer is higher."""
        return layer.position.float()
