"""Conversation: a turn reads a part of what was said before, and drops nothing for later turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from workers.stages.selecting import BlockView, Recalling, block_share


@dataclass(frozen=True)
class Conversation(Recalling):
    """Once a turn, at the prompt's end: the ``share`` of older blocks that its last 64 queries vote for; all stay.

    Blocks older than the last ``recent`` tokens live on the host, those chosen are recalled as the turn begins, and
    what is generated in the turn is read whatever happens. The next turn's prompt attends to everything, and chooses
    again. At a switch in mid-generation the votes are those of the last queries.

    Source: the multi-turn variant of Behnam et al., RocketKV, arXiv 2502.14051 (nothing is dropped, the choice is made
    anew each turn); Kim et al., EpiCache, arXiv 2509.17396, of which the clustering of a conversation into episodes
    with budgets of their own is left out.
    """

    name: ClassVar[str] = "conversation"
    summary: ClassVar[str] = "A turn reads the blocks its prompt's end votes for; all stay on the host for later turns."
    share: float = block_share(0.5)

    def select(self, view: BlockView, q: torch.Tensor) -> torch.Tensor:
        """What was chosen as the turn began, and all that has come since."""
        if view.read_before is None:
            return view.best(view.votes())
        before = F.pad(view.read_before, (0, len(view.valid[0]) - view.read_before.shape[1]), value=True)
        return before & view.valid
