"""The exact copy of a request's cache on the host tier, kept so that a lossy pipeline can be undone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kernels.api import F16, F32, I32, TokenSource
from kernels.layout import BLOCK_TOKENS, Format, Tier
from workers.cache.arena import Arena, Lot
from workers.cache.blocks import Owners
from workers.cache.sources import Sources


class Shadow:
    """Raw blocks of whole rows: row r holds the tokens at positions 32 r .. 32 r + 31 of every layer and KV head.

    Its blocks double as a request's host-tier blocks: block tables may refer to them. It also remembers the masses of
    tokens that were evicted, so that a restored token has a score.
    """

    def __init__(self, arena: Arena, max_tokens: int) -> None:
        shape = arena.shape
        rows = -(-max_tokens // BLOCK_TOKENS) + 1
        self._arena = arena
        self.lot = arena.open_lot(Format.RAW, borrowed=True)
        self.rows = 0
        self.address: I32 = np.full((rows, shape.layers, shape.kv_heads), -1, np.int32)
        self.mass: F32 | None = None  # [L, H, tokens] by position, once something was evicted
        self.votes: F16 | None = None  # likewise

    @classmethod
    def of_rows(cls, arena: Arena, max_tokens: int, lot: Lot, address: I32) -> Shadow:
        """A shadow that begins with rows [rows, L, H] that a lot of its own holds already."""
        shadow = cls(arena, max_tokens)
        shadow.lot, lot.borrowed = lot, True
        shadow.rows = len(address)
        shadow.address[: shadow.rows] = address
        return shadow

    @property
    def nbytes(self) -> int:
        """Bytes of its blocks."""
        shape = self._arena.shape
        return self.rows * shape.layers * shape.kv_heads * shape.block_bytes(Format.RAW)

    def add_rows(self, sources: Sources, source: TokenSource, owners: Owners, rows: int) -> None:
        """Appends ``rows`` rows whose tokens ``source`` names, in the order row, layer, head.

        Raises:
            TierFullError: nothing was added.
        """
        addresses = self._arena.allocate(self.lot, len(source.address))
        try:
            sources.transcode(source, Format.RAW, Tier.HOST, addresses, owners)
        except BaseException:
            self.lot.borrowed = False
            self._arena.release(addresses)
            self.lot.borrowed = True
            raise
        self.address[self.rows : self.rows + rows] = addresses.reshape(rows, *self.address.shape[1:])
        self.rows += rows

    def covers(self, seen: int) -> bool:
        """Whether every whole row of ``seen`` tokens is here."""
        return self.rows >= seen // BLOCK_TOKENS

    def remember(self, position: I32, valid: npt.NDArray[np.bool_], mass: F32, votes: F16) -> None:
        """Keeps the masses [L, H, T] of tokens at ``position`` [L, H, T] for the day they are restored."""
        if self.mass is None or self.votes is None:
            shape = (*self.address.shape[1:], self.address.shape[0] * BLOCK_TOKENS)
            self.mass, self.votes = np.zeros(shape, np.float32), np.zeros(shape, np.float16)
        layer, head, _ = np.nonzero(valid)
        self.mass[layer, head, position[valid]] = mass[valid]
        self.votes[layer, head, position[valid]] = votes[valid]

    def trim(self, referred: I32) -> None:
        """Gives back the last rows, as far as no table refers to a block of them."""
        kept = self.rows
        while kept and not np.isin(self.address[kept - 1], referred).any():
            kept -= 1
        self.cut(kept)

    def cut(self, rows: int) -> None:
        """Gives back all rows behind the first ``rows``, to which no table may refer."""
        given_back = self.address[rows : self.rows].reshape(-1).copy()
        self.address[rows : self.rows] = -1
        self.rows = min(rows, self.rows)
        self.lot.borrowed = False
        self._arena.release(given_back)
        self.lot.borrowed = True

    def hand_over(self, referred: I32) -> None:
        """Ends the copy: blocks that tables refer to become the request's own, all others go."""
        self.lot.borrowed = False
        self._arena.release(np.setdiff1d(self.address[: self.rows], referred).astype(np.int32))

    def close(self) -> None:
        """Gives its memory back."""
        self._arena.close_lot(self.lot)
