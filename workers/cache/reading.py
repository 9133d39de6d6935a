"""How one request's queries read its cache where that is more than all of its blocks as the kernels find them.

A reader is asked in every layer of a decode step, before the kernel runs and after. It may change the request's tables
for that time, all but the tail block: bring blocks to where kernels read them, or mark some as not to be read
(``Tier.DISK``). It may attend to tokens by itself and hand in the result as a partial one. So recall, top-block reads,
attention beside the host's memory, states of fixed size and formats that kernels do not know are all the same here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch

from kernels.api import DecodePlan
from kernels.layout import CacheShape
from kernels.partials import Partial
from workers.cache.recall import SelectiveReader


class Reader(Protocol):
    """Reads for one request; kept with its cache as long as its pipeline wants it."""

    def before(self, layer: int, q: torch.Tensor, scaling: float) -> Partial | None:
        """Prepares a layer's tables for this query.

        Args:
            layer: which layer, in rising order within a step.
            q: [1, query_heads, D] the step's rotated query.
            scaling: factor on the scores.

        Returns:
            Attention to what the kernel will not read, of one row; None if there is none.
        """
        ...

    def after(self, layer: int) -> None:
        """The layer is done: its tables are to be as they were before, its blocks may go."""
        ...


@runtime_checkable
class Counter(Protocol):
    """A reader that attends to tokens of the request's tables, whose masses it therefore counts."""

    def count(self, layer: int, lse: torch.Tensor) -> None:
        """The layer is done, with this log of the sum of exp(score) over everything, [query_heads]."""
        ...

    def add_block_mass(self, plan: DecodePlan, row: int) -> None:
        """Adds to a finished step's block masses, in which the request has that row."""
        ...


class StepReading:
    """The readers of one decode step's rows.

    Args:
        readers: of each row that has any, in the order in which they are asked.
        rows: how many rows the step has.
        shape: the cache's dimensions.
    """

    def __init__(
        self,
        readers: Mapping[int, Sequence[Reader]],
        rows: int,
        shape: CacheShape,
    ) -> None:
        self._readers = {row: tuple(own) for row, own in readers.items() if own}
        counting = ((row, [reader for reader in own if isinstance(reader, Counter)]) for row, own in readers.items())
        self._counters = {row: own for row, own in counting if own}
        self._rows = rows
        self._shape = shape

    def __bool__(self) -> bool:
        return bool(self._readers)

    def before(self, layer: int, q: torch.Tensor, scaling: float) -> list[Partial]:
        """Has all readers prepare a layer for q [R, query_heads, D]; the partial results of all rows."""
        parts: list[Partial] = []
        for row, own in self._readers.items():
            found = [part for reader in own if (part := reader.before(layer, q[row : row + 1], scaling))]
            while len(parts) < len(found):
                parts.append(self._nothing(q.device))
            for part, mine in zip(parts, found, strict=False):
                part.output[row], part.lse[row] = mine.output[0], mine.lse[0]
        return parts

    def lse(self, q: torch.Tensor) -> torch.Tensor | None:
        """Where a layer's kernel is to leave the lse of each query of q [R, query_heads, D]; None: nobody asks."""
        return torch.empty(q.shape[:2], device=q.device) if self._counters else None

    def count(self, layer: int, lse: torch.Tensor | None) -> None:
        """Has the masses of a layer counted."""
        if lse is not None:
            for row, own in self._counters.items():
                for counter in own:
                    counter.count(layer, lse[row])

    def finish(self, plan: DecodePlan) -> None:
        """Completes the block masses of a step that the backend has finished."""
        for row, own in self._counters.items():
            for counter in own:
                counter.add_block_mass(plan, row)

    @property
    def guesses(self) -> bool:
        """Whether a reader wants to know queries a layer ahead."""
        return any(reader.stage.guesses for _, reader in self._selective())

    def foresee(self, layer: int, q: torch.Tensor, scaling: float) -> None:
        """Tells readers what a layer's queries [R, query_heads, D] will probably be."""
        for row, reader in self._selective():
            if reader.stage.guesses:
                reader.foresee(layer, q[row : row + 1], scaling)

    def _selective(self) -> Iterator[tuple[int, SelectiveReader]]:
        for row, own in self._readers.items():
            yield from ((row, reader) for reader in own if isinstance(reader, SelectiveReader))

    def after(self, layer: int) -> None:
        """Tells all readers that a layer is done, in the opposite order."""
        for own in self._readers.values():
            for reader in reversed(own):
                reader.after(layer)

    def _nothing(self, device: torch.device) -> Partial:
        heads, dim = self._shape.query_heads, self._shape.head_dim
        return Partial(
            torch.zeros(self._rows, heads, dim, device=device),
            torch.full((self._rows, heads), -torch.inf, device=device),
        )
