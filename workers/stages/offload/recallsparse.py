"""TailorKV's second half: layers with concentrated attention are offloaded, and recall what a query needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from workers.stages.base import LayerPlace, Places
from workers.stages.selecting import BlockView, Digest, Recalling, upper_bound
from workers.stages.tailored import NEEDS, concentration, is_dense


@dataclass(frozen=True)
class RecallSparse(Recalling):
    """In sparse layers, blocks older than the last ``recent`` tokens live on the host, and a query recalls the
    ``share`` with the highest bound on q . k; dense layers stay on the device and read everything.

    Dense is a layer whose queries pay less than ``threshold`` to the sixteenth of the tokens that they pay most to, by
    the model's profile.

    Source: Yao et al., TailorKV, arXiv 2505.19586. There single tokens are recalled, 1 to 3 % of all, found by the
    channels of keys that stand out, which are fetched ahead; here blocks of 32, by Quest's bound, when they are asked
    for.
    """

    name: ClassVar[str] = "recallsparse"
    summary: ClassVar[str] = "Layers whose attention is concentrated on the host; a query recalls blocks (TailorKV)."
    needs: ClassVar[tuple[str, ...]] = NEEDS
    threshold: float = concentration()

    @property
    def digests(self) -> tuple[Digest, ...]:
        """A box around each block's keys."""
        return Digest.LOW, Digest.HIGH

    def selects_in(self, layer: LayerPlace) -> bool:
        """In sparse ones."""
        return not is_dense(layer, self.threshold)

    def places(self, layer: LayerPlace) -> Places:
        """The host, for sparse ones."""
        return ((self.recent, self.tier),) if self.selects_in(layer) else ()

    def select(self, view: BlockView, q: torch.Tensor) -> torch.Tensor:
        """The best by their bounds."""
        return view.best(upper_bound(view.grouped(q), view.digests[Digest.LOW], view.digests[Digest.HIGH]))
