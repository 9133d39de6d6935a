"""ArkVale: older blocks on the host, recalled when a query needs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvpilot.bounds import Bounds
from workers.stages.base import parameter
from workers.stages.selecting import BlockView, Digest, Recalling, upper_bound

BALL, BOX = "ball", "box"


@dataclass(frozen=True)
class ArkVale(Recalling):
    """Blocks older than the last ``recent`` tokens live on the host; a query recalls the ``share`` of them it needs.

    The device keeps of each block a volume that its keys lie in, a box or a ball. A block counts as much as the most
    that q . k can be in there, of the query group that shares its KV head the highest. Recalled blocks stay in a pool
    of that many a head until others are needed: the one unread for longest goes, at no cost, since the host keeps all.

    Source: Chen et al., ArkVale: Efficient Generative LLM Inference with Recallable Key-Value Eviction, NeurIPS 2024.
    There a page is copied out as it is made and leaves the device by its past importance; here blocks go to the host by
    age and leave the pool by last use. Every layer recalls.
    """

    name: ClassVar[str] = "arkvale"
    summary: ClassVar[str] = "Older blocks on the host; a query recalls those whose keys may matter to it most."
    volume: str = parameter(BOX, Bounds(choices=(BOX, BALL)), minor=True)

    @property
    def digests(self) -> tuple[Digest, ...]:
        """The volume."""
        return (Digest.LOW, Digest.HIGH) if self.volume == BOX else (Digest.MEAN, Digest.RADIUS)

    def select(self, view: BlockView, q: torch.Tensor) -> torch.Tensor:
        """The best by what their volumes allow."""
        queries, digests = view.grouped(q), view.digests
        if self.volume == BOX:
            return view.best(upper_bound(queries, digests[Digest.LOW], digests[Digest.HIGH]))
        at_mean = queries @ digests[Digest.MEAN].float().mT  # [H, G, B]
        reach = queries.norm(dim=-1, keepdim=True) * digests[Digest.RADIUS][:, None]
        return view.best((at_mean + reach).amax(dim=1))
