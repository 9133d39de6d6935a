"""SnapKV: what the end of the prompt looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from kernels.layout import BLOCK_TOKENS
from kvpilot.bounds import Bounds
from workers.stages.base import LayerView, Share, budgets, parameter, shadow

OBSERVATION_WINDOW = 64


@dataclass(frozen=True)
class SnapKV(Share):
    """Once, after the prompt or at a switch: per head the tokens that the last 64 queries vote for.

    Votes are attention summed over the observation window's queries and the KV head's query group, average-pooled over
    ``pool`` neighbours so that a kept token keeps its context. The window itself stays. Tokens generated later all
    stay. At a switch in mid-generation the votes are those of the last queries, older ones fading (see
    ``kernels.api.VOTE_DECAY``).

    Source: Li et al., SnapKV: LLM Knows What You are Looking for Before Generation, arXiv 2404.14469. Query-aware.
    """

    name: ClassVar[str] = "snapkv"
    summary: ClassVar[str] = "Tokens the last 64 queries attend to, chosen once per head."
    evicts_while_decoding: ClassVar[bool] = False
    pool: int = parameter(5, Bounds(least=1, most=63, step=2), "tokens", minor=True)
    budgets: str = budgets()
    shadow: bool = shadow()

    def budget(self, seen: int) -> int:
        """The share ``keep`` of all tokens seen, at least the observation window and a block."""
        return max(OBSERVATION_WINDOW + BLOCK_TOKENS, super().budget(seen))

    def protected(self, seen: int) -> tuple[int, int]:
        """The observation window."""
        return 0, OBSERVATION_WINDOW

    def score(self, layer: LayerView) -> torch.Tensor:
        """Pooled votes."""
        votes = layer.votes[:, None]  # [H, 1, T]
        return F.avg_pool1d(votes, self.pool, stride=1, padding=self.pool // 2, count_include_pad=False)[:, 0]
