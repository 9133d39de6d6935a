"""A switch under way: blocks built ahead, beside those in force, so that its commit has little left to build.

Decode steps in between only append tokens. A full block does not change, so what was built from it stays right for as
long as the table has that block in that place; :meth:`Preparation.place` checks just this. The exact copy (shadow) may
grow ahead as well: no table refers to it before the commit. So until then no reader sees anything of a preparation, and
to abandon it is to give its blocks back.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kernels.api import I32, U8, TokenSource
from kernels.layout import BlockFormat, Format, Tier
from workers.cache.arrangement import BUILD, Arrangement, Blocks, pick
from workers.cache.formats import format_of
from workers.stages.base import Pipeline

I64 = npt.NDArray[np.int64]
_NO_PLACES: I64 = np.zeros(0, np.int64)
_NO_CODES: U8 = np.zeros(0, np.uint8)
_NO_ADDRESSES: I32 = np.zeros(0, np.int32)


@dataclass(frozen=True)
class Slice:
    """Blocks that were built ahead in one go."""

    tier: Tier
    format: BlockFormat
    blocks: int


@dataclass
class Piece:
    """The next blocks to build ahead, all of one tier and format."""

    tier: Tier
    format: BlockFormat
    source: TokenSource
    position: I32  # [n, 32] original positions of the source's tokens
    layer: I64  # [n]
    head: I64  # [n]
    index: I64  # [n] place in the table


@dataclass
class Preparation:
    """What is built ahead for one request's switch to ``pipeline``. N blocks, those of a tier and format together."""

    pipeline: Pipeline
    shadow_rows: int | None
    """Rows that the exact copy had before; None: there was none."""
    copied_rows: int = 0
    """Rows that the exact copy should have before blocks are built."""
    built: int = 0
    """How many of the N blocks are there."""

    layer: I64 = field(default_factory=lambda: _NO_PLACES)  # [N]
    head: I64 = field(default_factory=lambda: _NO_PLACES)  # [N]
    index: I64 = field(default_factory=lambda: _NO_PLACES)  # [N] place in the table
    tier: U8 = field(default_factory=lambda: _NO_CODES)  # [N]
    format: U8 = field(default_factory=lambda: _NO_CODES)  # [N]
    address: I32 = field(default_factory=lambda: _NO_ADDRESSES)  # [N], BUILD where it is not built yet
    _source: TokenSource | None = None
    _position: I32 = field(default_factory=lambda: np.zeros((0, 0), np.int32))  # [N, 32]

    def plan(self, target: Arrangement, by_shadow: bool) -> None:
        """Takes note of what is to be built.

        Args:
            target: the same tokens in their new formats and tiers; blocks that are not full yet have none to build.
            by_shadow: whether the exact copy will serve as the raw blocks on the host tier.
        """
        blocks = target.blocks
        build = blocks.valid & (blocks.address == BUILD)
        tier, fmt = blocks.tier[build], blocks.format[build]
        order = np.lexsort((fmt, tier))
        if by_shadow:
            order = order[(tier[order] != Tier.HOST) | (fmt[order] != Format.RAW)]
        self.layer, self.head, self.index = (axis[order] for axis in np.nonzero(build))
        self.tier, self.format = tier[order], fmt[order]
        self.address = np.full(len(order), BUILD, np.int32)
        self._source, self._position = pick(target.source, order), target.source_position[order]

    def left(self) -> Counter[tuple[Tier, BlockFormat]]:
        """Blocks yet to be built, by tier and format."""
        rest = zip(self.tier[self.built :].tolist(), self.format[self.built :].tolist(), strict=True)
        return Counter({(Tier(tier), format_of(fmt)): blocks for (tier, fmt), blocks in Counter(rest).items()})

    @property
    def next_kind(self) -> tuple[Tier, BlockFormat] | None:
        """Tier and format of the next block to build; None: all are there."""
        if self.built == len(self.address):
            return None
        return Tier(int(self.tier[self.built])), format_of(int(self.format[self.built]))

    def next_piece(self, most: int) -> Piece:
        """The next blocks to build, at most so many; there must be one."""
        assert self._source is not None
        kind = self.next_kind
        assert kind is not None
        end = min(self.built + most, len(self.address))
        same = (self.tier[self.built : end] == kind[0]) & (self.format[self.built : end] == kind[1])
        part = np.arange(self.built, self.built + int(same.sum()))
        places = self.layer[part], self.head[part], self.index[part]
        return Piece(*kind, pick(self._source, part), self._position[part], *places)

    def add(self, addresses: I32) -> None:
        """The next blocks are built, and lie there."""
        self.address[self.built : self.built + len(addresses)] = addresses
        self.built += len(addresses)

    def on(self, tier: Tier) -> I32:
        """Addresses of the blocks built on a tier."""
        return np.asarray(self.address[: self.built][self.tier[: self.built] == tier], np.int32)

    def place(self, now: Blocks, target: Arrangement) -> dict[Tier, I32]:
        """Puts what is built where ``target`` has the same blocks to build, which then need no source.

        Args:
            now: the tables in force.
            target: what is about to be committed.

        Returns:
            Addresses of the blocks built in vain, by tier.
        """
        if not self.built:
            return dict.fromkeys(Tier, _NO_ADDRESSES)
        assert self._source is not None
        blocks, built = target.blocks, slice(0, self.built)
        build = blocks.valid & (blocks.address == BUILD)
        index = self.index[built]
        inside = index < min(now.address.shape[2], build.shape[2])
        places = (self.layer[built], self.head[built], np.where(inside, index, 0))
        fits = (
            inside
            & build[places]
            & (blocks.tier[places] == self.tier[built])
            & (blocks.format[places] == self.format[built])
            & (now.address[places] == self._source.address[built, 0])
            & (now.tier[places] == self._source.tier[built, 0])
        )
        if target.moved is not None:  # other tokens: none of the blocks would be the same
            fits[:] = False
        blocks.address[tuple(axis[fits] for axis in places)] = self.address[built][fits]
        still = (blocks.address == BUILD)[build]
        target.source = pick(target.source, np.flatnonzero(still))
        target.source_position = target.source_position[still]
        return {tier: self.address[built][~fits & (self.tier[built] == tier)] for tier in Tier}
