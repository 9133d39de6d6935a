"""Where a request's tokens are and where a pipeline wants them: values that a switch transaction works on.

Shapes: L layers, H KV heads, B blocks and T tokens of the longest table. Tables may differ in length; ``valid`` masks
say which entries exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kernels.api import F16, F32, I32, U8, Tables, TokenSource
from kernels.layout import BLOCK_TOKENS, Tier
from workers.cache.style import Style, wanted

Mask = npt.NDArray[np.bool_]
ROWS: U8 = np.arange(BLOCK_TOKENS, dtype=np.uint8)
BUILD = -1
"""Address of a block that is yet to be built."""


def block_count(length: I32) -> I32:
    """Blocks that hold so many tokens."""
    return np.asarray(-(-length // BLOCK_TOKENS), np.int32)


@dataclass
class Blocks:
    """The blocks of all of a request's tables."""

    length: I32  # [L, H] tokens
    address: I32  # [L, H, B], BUILD where there is none yet
    format: U8  # [L, H, B]
    tier: U8  # [L, H, B]

    @property
    def valid(self) -> Mask:
        """[L, H, B] which entries are blocks."""
        return np.arange(self.address.shape[2]) < block_count(self.length)[..., None]

    @property
    def full(self) -> Mask:
        """[L, H, B] which blocks hold 32 tokens."""
        return np.arange(self.address.shape[2]) < (self.length // BLOCK_TOKENS)[..., None]

    def on(self, tier: Tier) -> I32:
        """Addresses of the blocks on a tier."""
        return np.asarray(self.address[self.valid & (self.tier == tier)], np.int32)


@dataclass
class Tokens:
    """The tokens of all of a request's tables, and where each can be read."""

    valid: Mask  # [L, H, T]
    position: I32  # [L, H, T]
    address: I32  # [L, H, T] of the block that holds the token
    format: U8  # [L, H, T]
    tier: U8  # [L, H, T]
    row: U8  # [L, H, T] in that block
    mass: F32  # [L, H, T]
    votes: F16  # [L, H, T]


def blocks_of(tables: Tables, slot: int) -> Blocks:
    """A copy of a slot's block tables, cut to what is in use."""
    length = tables.length[slot].copy()
    used = int(block_count(length).max(initial=0))
    return Blocks(
        length,
        tables.address[slot, :, :, :used].copy(),
        tables.format[slot, :, :, :used].copy(),
        tables.tier[slot, :, :, :used].copy(),
    )


def tokens_of(tables: Tables, slot: int) -> Tokens:
    """A copy of a slot's tables, token by token."""
    length = tables.length[slot]
    count = int(length.max(initial=0))
    index = np.arange(count)
    block = index // BLOCK_TOKENS
    return Tokens(
        valid=index < length[..., None],
        position=tables.position[slot, :, :, :count].copy(),
        address=tables.address[slot][:, :, block],
        format=tables.format[slot][:, :, block],
        tier=tables.tier[slot][:, :, block],
        row=np.broadcast_to((index % BLOCK_TOKENS).astype(np.uint8), (*length.shape, count)),
        mass=tables.mass[slot, :, :, :count].copy(),
        votes=tables.votes[slot, :, :, :count].copy(),
    )


@dataclass
class Merging:
    """What a request's tokens have taken up of others."""

    merged: Mask  # [L, H, positions] tokens that are not what they were
    threshold: F32  # [L, H] what the evictor is to be given next time
    scratch: dict[Tier, I32] = field(default_factory=dict)
    """Raw blocks with what tokens have just become, for new blocks to be built from, or to be taken as they are."""


@dataclass
class Arrangement:
    """A whole new set of tables, of which some blocks are yet to be built from ``source``."""

    blocks: Blocks
    source: TokenSource  # one row per block to build, in the order layer, head, block
    source_position: I32  # [N, 32] original positions of the source's tokens, -1 beyond the end
    moved: Tokens | None = None  # the kept tokens [valid, packed to the left] where they changed; None: the same tokens
    merging: Merging | None = None  # of tokens that moved: what others were merged into; None: nothing ever was
    fetches: bool = False  # whether blocks on the host are to pass through the device
    recomputed: float = 0.0  # the share of them that is made again there instead, as far as it can be


def pick(source: TokenSource, index: npt.NDArray[np.integer]) -> TokenSource:
    """The sources of some of the blocks, copied."""
    return TokenSource(source.address[index], source.format[index], source.tier[index], source.row[index])


def of_blocks(address: I32, fmt: U8, tier: U8) -> TokenSource:
    """The tokens of whole blocks, each given by address, format and tier [N], in their order."""
    spread = np.ones(BLOCK_TOKENS, np.uint8)
    rows = np.broadcast_to(ROWS, (len(address), BLOCK_TOKENS)).copy()
    return TokenSource(address[:, None] * spread, fmt[:, None] * spread, tier[:, None] * spread, rows)


def restyle(now: Blocks, position: I32, styles: Sequence[Style], anew: Mask | None = None) -> Arrangement:
    """The same tokens in other formats and tiers.

    Args:
        now: the tables.
        position: [L, H, T] original positions of the tokens.
        styles: how they are wanted, by layer.
        anew: [L, H, B] full blocks to build anew though they may be right; None: no others than have to be.
    """
    wanted_format, wanted_tier = wanted(styles, now.length, now.address.shape[2], position)
    build = now.full & ((wanted_format != now.format) | (wanted_tier != now.tier))
    if anew is not None:
        build |= anew
    address = np.where(build, np.int32(BUILD), now.address)
    blocks = Blocks(now.length, address, wanted_format, wanted_tier)
    source = of_blocks(now.address[build], now.format[build], now.tier[build])
    whole = position.shape[2] // BLOCK_TOKENS
    by_block = position[:, :, : whole * BLOCK_TOKENS].reshape(*position.shape[:2], whole, BLOCK_TOKENS)
    return Arrangement(blocks, source, by_block[build[:, :, :whole]])


def regroup(tokens: Tokens, keep: Mask, styles: Sequence[Style]) -> Arrangement:
    """Other tokens: those of ``tokens`` that ``keep`` [L, H, T] marks, packed into new blocks of each layer's style.

    A block that would hold exactly what an existing block of the wanted format and tier holds is taken as it is.
    """
    length = keep.sum(axis=2, dtype=np.int32)
    width = int(block_count(length).max()) * BLOCK_TOKENS
    layer, head, index = np.nonzero(keep)
    starts = np.cumsum(length.reshape(-1)) - length.reshape(-1)
    rank = np.arange(len(index)) - np.repeat(starts, length.reshape(-1))

    def pack(values: npt.NDArray[np.generic], empty: int, dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
        packed = np.full((*length.shape, width), empty, dtype)
        packed[layer, head, rank] = values[layer, head, index]
        return packed

    moved = Tokens(
        valid=np.arange(width) < length[..., None],
        position=pack(tokens.position, -1, np.int32),  # type: ignore[arg-type]
        address=pack(tokens.address, BUILD, np.int32),  # type: ignore[arg-type]
        format=pack(tokens.format, 0, np.uint8),  # type: ignore[arg-type]
        tier=pack(tokens.tier, 0, np.uint8),  # type: ignore[arg-type]
        row=pack(tokens.row, 0, np.uint8),  # type: ignore[arg-type]
        mass=pack(tokens.mass, 0, np.float32),  # type: ignore[arg-type]
        votes=pack(tokens.votes, 0, np.float16),  # type: ignore[arg-type]
    )
    by_block = (*length.shape, width // BLOCK_TOKENS, BLOCK_TOKENS)
    address, row = moved.address.reshape(by_block), moved.row.reshape(by_block)
    format_, tier = moved.format.reshape(by_block), moved.tier.reshape(by_block)
    blocks = Blocks(length, address[..., 0].copy(), format_[..., 0].copy(), tier[..., 0].copy())
    wanted_format, wanted_tier = wanted(styles, length, width // BLOCK_TOKENS, moved.position)
    same = (address == address[..., :1]) & (tier == tier[..., :1]) & (row == ROWS)
    whole = blocks.full & same.all(-1)
    reuse = whole & (blocks.format == wanted_format) & (blocks.tier == wanted_tier)
    build = blocks.valid & ~reuse
    blocks = Blocks(length, np.where(reuse, blocks.address, np.int32(BUILD)), wanted_format, wanted_tier)
    source = TokenSource(address[build], format_[build], tier[build], row[build])
    return Arrangement(blocks, source, moved.position.reshape(by_block)[build], moved)
