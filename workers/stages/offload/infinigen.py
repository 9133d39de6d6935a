"""InfiniGen: what a layer will read is guessed one layer ahead, and fetched meanwhile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvpilot.bounds import Bounds
from workers.stages.base import parameter
from workers.stages.selecting import BlockView, Digest, Recalling, block_share, upper_bound


@dataclass(frozen=True)
class InfiniGen(Recalling):
    """Older blocks on the host; the attention input of one layer, sent through the next one's projections, guesses its
    query, and the blocks that this would read come to the device before the layer begins.

    A layer reads just the blocks guessed for it, and where the guess was wrong it does without, as in the paper; the
    first layer reads everything. Blocks are read whose score may come within ``alpha`` of the best block's, by the
    bound on q . k, as many in each head of a layer as its heads would read on average, and at most the ``share``.

    Source: Lee et al., InfiniGen: Efficient Generative Inference of Large Language Models with Dynamic KV Cache
    Management, arXiv 2406.19707. There tokens are fetched, here blocks of 32. Left out: the skewing of query and key
    weights by SVD and the partial weights and keys that it allows; the guess takes the whole projection (a tenth of a
    layer's weights where KV heads are shared), and keys are judged by the box around each block. On a worker whose
    copies are not asynchronous a guess saves no time.
    """

    name: ClassVar[str] = "infinigen"
    summary: ClassVar[str] = "Older blocks on the host; each layer's reads are guessed and fetched a layer ahead."
    guesses: ClassVar[bool] = True
    share: float = block_share(0.2)
    alpha: float = parameter(4.0, Bounds(above=0, most=1e6), "attention score")

    @property
    def digests(self) -> tuple[Digest, ...]:
        """A box around each block's keys."""
        return Digest.LOW, Digest.HIGH

    def select(self, view: BlockView, q: torch.Tensor) -> torch.Tensor:
        """The best by their bounds, as many as come close to the best of all."""
        bound = upper_bound(view.grouped(q), view.digests[Digest.LOW], view.digests[Digest.HIGH]) * view.scaling
        bound = bound.masked_fill(~view.valid, -torch.inf)
        close = (bound >= bound.amax(dim=1, keepdim=True) - self.alpha) & view.valid
        count = close.sum(dim=1).float().mean().ceil().long()
        return view.best(bound, torch.minimum(view.budget, count))
