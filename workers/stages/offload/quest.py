"""Quest: each query reads the blocks that could matter to it most."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from workers.stages.selecting import BlockView, Digest, Selector, block_share, dense_layers


@dataclass(frozen=True)
class Quest(Selector):
    """Everything stays where it is; a query reads the ``share`` of a head's blocks with the highest bound on q . k.

    The bound is that of a block's bounding box: the sum over channels of max(q low, q high). The last 32 tokens are
    always read, and in the first ``dense`` layers, where attention is spread out, everything.

    Source: Tang et al., Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference, arXiv 2406.10774. Its
    pages have 16 tokens, ours 32; its budget is a number of tokens; its models have a KV head a query head: here a
    block counts as the highest bound in the query group that shares its KV head.
    """

    name: ClassVar[str] = "quest"
    summary: ClassVar[str] = "Each query reads the blocks whose key bounds promise it the most; all of them stay."
    digests: ClassVar[tuple[Digest, ...]] = (Digest.LOW, Digest.HIGH)
    share: float = block_share()
    dense: int = dense_layers(2)

    def budget(self, blocks: int) -> int:
        """The share, rounded up."""
        return math.ceil(self.share * blocks)

    def select(self, view: BlockView, q: torch.Tensor) -> torch.Tensor:
        """The best by their bounds."""
        if view.index < self.dense:
            return view.valid
        return view.best(upper_bound(view.grouped(q), view.digests[Digest.LOW], view.digests[Digest.HIGH]))


def upper_bound(q: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The most that q . k can be for a key between the bounds, of the group's queries the highest: float32 [H, B].

    Args:
        q: float32 [H, G, D].
        low, high: [H, B, D].
    """
    return (q.clamp(min=0) @ high.float().mT + q.clamp(max=0) @ low.float().mT).amax(dim=1)
