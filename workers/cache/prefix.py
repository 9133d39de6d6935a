"""Prompts seen before: rows of exact raw blocks that several requests share.

A row is 32 tokens over all layers and KV heads. Its name is a hash chained over all tokens before it, the model and the
format, so a row is found only behind the very same tokens. Only rows computed with the full cache are published.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kernels.api import I32
from kernels.layout import BLOCK_TOKENS
from workers.cache.arena import Arena, Lot


@dataclass(eq=False)
class PrefixRow:
    """A published row; ``users`` counts live requests whose tables refer to it, ``children`` rows right behind it."""

    name: bytes
    address: I32  # [L, H]
    lot: Lot
    parent: PrefixRow | None = field(repr=False)
    users: int = 0
    children: int = 0


class PrefixIndex:
    """The published rows of one worker's device tier, least recently used first."""

    def __init__(self, arena: Arena, model: str) -> None:
        self._arena = arena
        self._root = hashlib.blake2b(f"{model}\0raw".encode(), digest_size=16).digest()
        self._rows: dict[bytes, PrefixRow] = {}  # insertion order is the order of last use

    def __len__(self) -> int:
        return len(self._rows)

    def names(self, token_ids: Sequence[int], rows: int) -> list[bytes]:
        """Names of the first ``rows`` rows of these tokens."""
        tokens = np.asarray(token_ids[: rows * BLOCK_TOKENS], np.int32)
        names, name = [], self._root
        for row in range(rows):
            piece = tokens[row * BLOCK_TOKENS : (row + 1) * BLOCK_TOKENS].tobytes()
            name = hashlib.blake2b(name + piece, digest_size=16).digest()
            names.append(name)
        return names

    def match(self, token_ids: Sequence[int], max_rows: int) -> list[PrefixRow]:
        """The longest run of published rows these tokens start with, and marks them used just now."""
        found: list[PrefixRow] = []
        for name in self.names(token_ids, max_rows):
            row = self._rows.get(name)
            if row is None:
                break
            found.append(row)
        for row in reversed(found):  # a parent outlives its children, so it is the more recent one
            self._rows[row.name] = self._rows.pop(row.name)
        return found

    def publish(self, name: bytes, parent: PrefixRow | None, address: I32, lot: Lot) -> PrefixRow:
        """Takes a row over from the request that computed it; the request becomes its first user."""
        lot.borrowed = True
        row = PrefixRow(name, address, lot, parent, users=1)
        if parent:
            parent.children += 1
        self._rows[name] = row
        return row

    def withdraw(self, row: PrefixRow) -> None:
        """Gives a row back to its only user: nobody will find it any more."""
        row.users, row.lot.borrowed = 0, False
        if row.parent:
            row.parent.children -= 1
        del self._rows[row.name]

    def get(self, name: bytes) -> PrefixRow | None:
        """The row of that name, if published."""
        return self._rows.get(name)

    def drop(self, wanted_bytes: int) -> int:
        """Forgets unused rows until so many bytes are free again, and returns the bytes freed.

        Least recently used first, but a row with others behind it only when nothing else is left: those behind it can
        not be found without it.
        """
        freed = 0
        unused = sorted((row for row in self._rows.values() if not row.users), key=lambda row: row.children > 0)
        while freed < wanted_bytes and unused:
            row = unused.pop(0)
            freed += row.lot.pages * self._arena.page_bytes
            if row.parent:
                row.parent.children -= 1
                if not row.parent.children and row.parent in unused:
                    unused.remove(row.parent)
                    unused.insert(0, row.parent)
            del self._rows[row.name]
            self._arena.close_lot(row.lot)
        return freed

    def moved(self, now: Callable[[I32], I32]) -> None:
        """Blocks of the device have moved; ``now`` says where to."""
        for row in self._rows.values():
            row.address = now(row.address)

    def unused_bytes(self) -> int:
        """Bytes that :meth:`drop` could free."""
        return sum(row.lot.pages for row in self._rows.values() if not row.users) * self._arena.page_bytes
