"""The last queries of every request, from which evictors work out who looks at what now."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.layout import BLOCK_TOKENS, CacheShape

RECENT_QUERIES = BLOCK_TOKENS
"""Queries kept of each request: those since an evictor that works while decoding was last called."""


@dataclass(frozen=True)
class _Ring:
    """One request's queries; that of position p lies at p % RECENT_QUERIES."""

    queries: torch.Tensor  # [layers, query_heads, RECENT_QUERIES, D] in the model's dtype
    position: torch.Tensor  # int64 [RECENT_QUERIES], -1 where there is none

    @staticmethod
    def empty(shape: CacheShape, device: torch.device) -> _Ring:
        size = (shape.layers, shape.query_heads, RECENT_QUERIES, shape.head_dim)
        nowhere = torch.full((RECENT_QUERIES,), -1, dtype=torch.int64, device=device)
        return _Ring(torch.zeros(size, dtype=shape.dtype, device=device), nowhere)


class RecentQueries:
    """Queries by request slot, as rotated for the scores. A few MiB a request that decodes, on the device.

    A request has fewer than RECENT_QUERIES of them if it computed fewer tokens itself (the others came from a prefix).
    """

    def __init__(self, shape: CacheShape, device: torch.device) -> None:
        self._shape = shape
        self._device = device
        self._rings: dict[int, _Ring] = {}

    def note(self, slot: int, start: int, queries: torch.Tensor) -> None:
        """Takes in the queries [layers, query_heads, N, D] of positions start .. start + N - 1."""
        ring = self._rings.get(slot)
        if ring is None:
            ring = self._rings[slot] = _Ring.empty(self._shape, self._device)
        end = start + queries.shape[2]
        first = max(start, end - RECENT_QUERIES)
        while first < end:  # slices, at most two: a list of places takes longer
            place = first % RECENT_QUERIES
            count = min(end - first, RECENT_QUERIES - place)
            ring.queries[:, :, place : place + count] = queries[:, :, first - start : first - start + count]
            ring.position[place : place + count] = torch.arange(first, first + count)
            first += count

    def read(self, slot: int, layer: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The last queries, at most so many: float32 [query_heads, n, D] and their positions int64 [n], rising.

        Raises:
            KeyError: none was noted. A request computes at least the last token of its prompt itself.
        """
        ring = self._rings[slot]
        order = ring.position.argsort()
        order = order[ring.position[order] >= 0]
        order = order[max(0, len(order) - most) :]
        return ring.queries[layer][:, order].float(), ring.position[order]

    def copy(self, slot: int, to: int) -> None:
        """Has another slot begin with the same queries."""
        ring = self._rings.get(slot)
        if ring is not None:
            self._rings[to] = _Ring(ring.queries.clone(), ring.position.clone())

    def drop(self, slot: int) -> None:
        """Forgets a request."""
        self._rings.pop(slot, None)
