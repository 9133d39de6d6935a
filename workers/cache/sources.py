"""A request's tokens for whoever reads or rebuilds them, wherever they are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from kernels.api import I32, TokenSource
from kernels.layout import BlockFormat, Tier
from workers.cache.blocks import I64, BlockStore, Notes, Owners
from workers.cache.partners import Partners
from workers.cache.staging import Staging


class Sources:
    """The block store's methods, for tokens of which some are on disk: these come to memory piece by piece.

    Args:
        blocks: reads and builds blocks that are in memory.
        staging: what brings blocks from disk; None: none is there.
        partners: finds blocks that codecs decode others with.

    Every method raises DamagedCacheError where blocks on disk are damaged beyond repair.
    """

    def __init__(self, blocks: BlockStore, staging: Staging | None, partners: Partners) -> None:
        self._blocks = blocks
        self._staging = staging
        self._partners = partners

    def read(self, source: TokenSource, owners: Owners) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``workers.cache.blocks.BlockStore.read``."""
        parts = [self._blocks.read(piece, owners[part], self._partners) for piece, part in self._pieces(source)]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([k for k, _ in parts]), torch.cat([v for _, v in parts])

    def encode(self, source: TokenSource, fmt: BlockFormat, owners: Owners, notes: Notes | None = None) -> torch.Tensor:
        """See ``workers.cache.blocks.BlockStore.encode``."""
        parts = [
            self._blocks.encode(piece, fmt, owners[part], notes and notes[part], self._partners)
            for piece, part in self._pieces(source)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def transcode(
        self,
        source: TokenSource,
        fmt: BlockFormat,
        tier: Tier,
        address: I32,
        owners: Owners,
        notes: Notes | None = None,
    ) -> None:
        """See ``workers.cache.blocks.BlockStore.transcode``."""
        for piece, part in self._pieces(source):
            self._blocks.transcode(piece, fmt, tier, address[part], owners[part], notes and notes[part], self._partners)

    def _pieces(self, source: TokenSource) -> Iterator[tuple[TokenSource, I64]]:
        """The source in pieces of which every token is in memory, each to be used before the next is asked for, and
        which blocks of the source these are."""
        if self._staging is None or not (source.tier == Tier.DISK).any():
            yield source, np.arange(len(source.address))
            return
        start = 0
        for piece in self._staging.pieces(source):
            yield piece, np.arange(start, start + len(piece.address))
            start += len(piece.address)
