"""A session between its turns, as values: whose it is, and the pieces that its rows are kept in."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from kernels.api import F32, I32, U8
from kernels.layout import BLOCK_TOKENS
from workers.cache.arena import Lot
from workers.cache.disk import Batch
from workers.cache.sequence_cache import SequenceCache


@dataclass(frozen=True)
class SessionKey:
    """Whose session it is, and its name: callers never meet each other's."""

    caller: str
    session_id: str


@dataclass
class SessionCounts:
    """What became of sessions so far."""

    parked: int = 0
    """Turns whose rows were kept."""
    restored: int = 0
    """Turns that began with rows of the one before."""
    restored_tokens: int = 0
    dropped: int = 0
    """Pieces that were given up for want of room."""
    expired: int = 0
    corrupt: int = 0
    """Pieces that a disk did not give back as they were; what they held was computed again."""


@dataclass(eq=False)
class Piece:
    """Adjacent rows, on the host, on disk, or both while they move."""

    rows: int
    address: I32 | None  # [rows, L, H] on the host
    batch: Batch | None = None
    leaving: bool = False
    """Whether it is to leave the host as soon as it is written."""


@dataclass(eq=False)
class Parked:
    """One session."""

    token_ids: I32  # those of its rows
    lot: Lot
    pieces: list[Piece]
    row_mass: F32 | None
    """[L, H, T] what the queries of its first T tokens pay to each; evictors that go by the whole prompt's attention
    start from there, or they would decide otherwise than in a cold run."""
    since_s: float
    """When it was parked, or last asked for."""
    wanted_rows: int = 0
    """What a request waits for; 0: none does. It keeps its place on the host meanwhile."""
    reads: deque[tuple[Piece, Future[U8]]] = field(default_factory=deque)

    def usable(self, rows: int, with_mass: bool) -> int:
        """How many of its first rows a request can start from: where masses are needed, as many as they are of."""
        if not with_mass:
            return rows
        whole = self.row_mass.shape[2] // BLOCK_TOKENS if self.row_mass is not None else 0
        return whole if whole <= rows else 0

    def host_rows(self) -> int:
        """Rows from the first on that are on the host."""
        rows = 0
        for piece in self.pieces:
            if piece.address is None:
                break
            rows += piece.rows
        return rows

    def common_rows(self, token_ids: Sequence[int]) -> int:
        """Whole rows that both begin with; at least the last token is left to compute, for its logits."""
        most = min(len(self.token_ids), max(0, len(token_ids) - 1)) // BLOCK_TOKENS * BLOCK_TOKENS
        same = self.token_ids[:most] == np.asarray(token_ids[:most], np.int32)
        return (most if same.all() else int(same.argmin())) // BLOCK_TOKENS


@dataclass(eq=False)
class Leaving:
    """A turn that has ended, whose rows are being copied to the host."""

    key: SessionKey
    token_ids: list[int]
    cache: SequenceCache
