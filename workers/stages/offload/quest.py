"""Quest: each query reads the blocks that could matter to it most."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from workers.stages.selecting import BlockView, Digest, Selector, block_share, dense_layers, upper_bound


@dataclass(frozen=True)
class Quest(Selector):
    """Everything stays where it is; a query reads the ``share`` of a head's older blocks with the highest bound on
    q . k.

    The bound is that of a block's bounding box: the sum over channels of max(q low, q high). Blocks of the last 32
    tokens are always read, and in the first ``dense`` layers, where attention is spread out, everything.

    Source: Tang et al., Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference, arXiv 2406.10774. Its
    pages have 16 tokens, ours 32; its budget is a number of tokens; its models have a KV head a query head: here a
    block counts as the highest bound in the query group that shares its KV head.
    """

    name: ClassVar[str] = "quest"
    summary: ClassVar[str] = "Each query reads the blocks whose key bounds promise it the most; all of them stay."
    share: float = block_share()
    dense: int = dense_layers(2)

    @property
    def digests(self) -> tuple[Digest, ...]:
        """A box around each block's keys."""
        return Digest.LOW, Digest.HIGH

    def budget(self, older: int) -> int:
        """The share, rounded up."""
        return math.ceil(self.share * older)

    def select(self, view: BlockView, q: torch.Tensor) -> torch.Tensor:
        """The best by their bounds."""
        if view.index < self.dense:
            return view.valid
        return view.best(upper_bound(view.grouped(q), view.digests[Digest.LOW], view.digests[Digest.HIGH]))
