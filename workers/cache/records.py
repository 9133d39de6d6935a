"""Numbers that belong to a request but are no blocks of its tables, in an arena's memory and within its budget."""

from __future__ import annotations

import torch
from torch.nn import functional

from kernels.api import I32, Backend
from kernels.layout import CacheShape, ForeignFormat
from workers.cache.arena import Arena
from workers.cache.formats import MOST_FORMATS


class Piece(ForeignFormat):
    """So many numbers of the model's dtype in a row. No table has such blocks."""

    numbers: int

    def __new__(cls, numbers: int) -> Piece:
        """A format of pieces of so many numbers."""
        fmt = super().__new__(cls, MOST_FORMATS)
        fmt.numbers, fmt.name = numbers, f"PIECE({numbers})"
        return fmt

    def payload_bytes(self, shape: CacheShape) -> int:
        """See ``kernels.layout.ForeignFormat``."""
        return self.numbers * shape.dtype.itemsize


class Records:
    """Pieces of one size, each called by its address.

    Args:
        arena: whose memory they are in.
        backend: what copies.
        numbers: of a piece.
    """

    def __init__(self, arena: Arena, backend: Backend, numbers: int) -> None:
        self._arena = arena
        self._backend = backend
        self.format = Piece(numbers)
        self._lot = arena.open_lot(self.format)

    def missing_pages(self, pieces: int) -> int:
        """Pages that so many more take."""
        return self._arena.pages_needed(self._lot, self.format, pieces)

    def add(self, values: torch.Tensor) -> I32:
        """Addresses [N] of new pieces of these numbers [N, numbers].

        Raises:
            TierFullError: there is no room; nothing was taken.
        """
        address = self._arena.allocate(self._lot, len(values))
        self.write(address, values)
        return address

    def write(self, address: I32, values: torch.Tensor) -> None:
        """Replaces pieces [N] by numbers [N, numbers], rounded to the model's dtype."""
        shape = self._backend.shape
        packed = values.to(shape.dtype).contiguous().view(torch.uint8)
        packed = functional.pad(packed, (0, shape.block_bytes(self.format) - packed.shape[1]))
        self._backend.store(self._arena.tier, address, packed)

    def read(self, address: I32) -> torch.Tensor:
        """The numbers [N, numbers] of pieces [N], in the model's dtype."""
        return load_piece(self._backend, self._arena.tier, address, self.format)

    def release(self, address: I32) -> None:
        """Gives pieces back."""
        self._arena.release(address)

    def close(self) -> None:
        """Gives all back."""
        self._arena.close_lot(self._lot)


def load_piece(backend: Backend, tier: int, address: I32, fmt: Piece, skip: int = 0) -> torch.Tensor:
    """The numbers [N, fmt.numbers - skip] at unit offsets of a tier's arena, without the first ``skip``."""
    shape = backend.shape
    packed = backend.load(tier, address, fmt)[:, : fmt.payload_bytes(shape)]
    return packed.contiguous().view(shape.dtype)[:, skip:]
