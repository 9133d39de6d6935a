"""How much of a switch may be done between two decode steps: as measured, a share of what a step takes."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping

from kernels.layout import BlockFormat, Tier
from workers.cache.preparation import Slice

FIRST_STEP_MS = 20.0
FIRST_BYTES_PER_S = 2e9
"""First guesses, until a step and a slice were measured: a decode step's time, and raw bytes converted a second."""
STEPS_KEPT, SLICES_KEPT = 16, 8


class Pace:
    """Sizes slices of switches. Medians of the latest measurements: a hiccup of the machine is no new pace.

    Args:
        share: most time of a slice, as a share of a decode step; 0: every slice has ``least_blocks``.
        least_blocks: blocks that a slice may have however long they take.
        raw_block_bytes: bytes of a raw block, for the first guess.
    """

    def __init__(self, share: float, least_blocks: int, raw_block_bytes: int) -> None:
        self._share = share
        self._least_blocks = least_blocks
        self._first_block_ms = raw_block_bytes / FIRST_BYTES_PER_S * 1e3
        self._step_ms: deque[float] = deque(maxlen=STEPS_KEPT)
        self._block_ms: dict[tuple[Tier, BlockFormat], deque[float]] = {}

    def stepped(self, decode_ms: float) -> None:
        """A decode step took so long."""
        self._step_ms.append(decode_ms)

    def built(self, piece: Slice, duration_ms: float) -> None:
        """A slice took so long. What a small one takes is not for its blocks, and says nothing."""
        if piece.blocks >= self._least_blocks:
            kept = self._block_ms.setdefault((piece.tier, piece.format), deque(maxlen=SLICES_KEPT))
            kept.append(duration_ms / piece.blocks)

    @property
    def budget_ms(self) -> float:
        """Most time of a slice."""
        return self._share * (statistics.median(self._step_ms) if self._step_ms else FIRST_STEP_MS)

    def most(self, tier: Tier, fmt: BlockFormat) -> int:
        """Blocks of that tier and format that a slice may have."""
        return max(self._least_blocks, int(self.budget_ms / self._ms_per_block(tier, fmt)))

    def fits(self, left: Mapping[tuple[Tier, BlockFormat], int]) -> bool:
        """Whether so many blocks, by tier and format, are no more than a slice."""
        if sum(left.values()) <= self._least_blocks:
            return True
        return sum(blocks * self._ms_per_block(*kind) for kind, blocks in left.items()) <= self.budget_ms

    def _ms_per_block(self, tier: Tier, fmt: BlockFormat) -> float:
        kept = self._block_ms.get((tier, fmt))
        return statistics.median(kept) if kept else self._first_block_ms
