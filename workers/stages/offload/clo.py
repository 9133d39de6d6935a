"""CLO: a query much like the one before reads what that one read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from kvpilot.bounds import Bounds
from workers.stages.base import parameter
from workers.stages.selecting import BlockView, Digest, Recalling, upper_bound


@dataclass(frozen=True)
class CLO(Recalling):
    """Older blocks on the host; heads whose query has hardly turned since the last step keep what they have fetched.

    Where the cosine between a head's query and its last one is ``alike`` or more, in all queries of the group that
    shares a KV head, nothing is chosen and nothing fetched. Other heads choose anew, the ``share`` of older blocks with
    the highest bound on q . k.

    Source: CLO: Efficient LLM Inference System with CPU-Light KVCache Offloading via Algorithm-System Co-Design, arXiv
    2511.14510. Left out: heads that often choose anew keeping all their blocks on the device (here a placer treats all
    heads alike), and the zero-copy transfer engine. How blocks are ranked is Quest's bound.
    """

    name: ClassVar[str] = "clo"
    summary: ClassVar[str] = "Older blocks on the host; a query like the last one reads what has been fetched for that."
    alike: float = parameter(0.9, Bounds(least=0, most=1), "cosine")

    @property
    def digests(self) -> tuple[Digest, ...]:
        """A box around each block's keys."""
        return Digest.LOW, Digest.HIGH

    def select(self, view: BlockView, q: torch.Tensor) -> torch.Tensor:
        """The last choice, or the best by their bounds."""
        queries = view.grouped(q)
        chosen = view.best(upper_bound(queries, view.digests[Digest.LOW], view.digests[Digest.HIGH]))
        if view.asked_before is None or view.read_before is None:
            return chosen
        cosine = F.cosine_similarity(queries, view.grouped(view.asked_before), dim=-1).amin(dim=1)  # [H]
        before = F.pad(view.read_before, (0, chosen.shape[1] - view.read_before.shape[1]))
        return torch.where((cosine >= self.alike)[:, None], before & view.valid, chosen)
