"""Older blocks in host memory, attended to by the processor beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from workers.stages.base import LossClass, Placer, whole_blocks


@dataclass(frozen=True)
class NearData(Placer):
    """Blocks older than the last ``recent`` tokens live on the host tier, where the CPU attends to them.

    Of each layer's attention the CPU computes the part over the host's blocks, the device the rest, and both are merged
    by their log-sum-exp: a query and a partial result travel instead of keys and values. Nothing is dropped or
    rounded, but sums are taken in another order: logits are those of ``full`` up to the rounding of float32, not bit
    for bit, so it is no exact stage, and rows computed under it are not published as prefixes. A switch away undoes it
    and needs no copy. While it is in force, tokens on the host gain no attention mass: evictors that go by it see what
    they had before, and signals only what the device reads.

    Source: after Jang et al., INF^2, arXiv 2502.09921, whose near-storage accelerator is the host's CPU here.
    """

    name: ClassVar[str] = "neardata"
    near: ClassVar[bool] = True
    summary: ClassVar[str] = "Older blocks on the host tier; the CPU attends to them there, the device to the rest."
    recent: int = whole_blocks(256)

    @property
    def loss_class(self) -> LossClass:
        """Recoverable: nothing is lost, but logits are rounded otherwise."""
        return LossClass.RECOVERABLE

    def device_tokens(self) -> int:
        """``recent``."""
        return self.recent

    def with_device_tokens(self, recent: int, seen: int) -> NearData:
        """So many."""
        return replace(self, recent=recent)
