"""What eviction would have missed, token by token: the reference that ``workers.hindsight`` is held against."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kernels.api import Tables

SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4)
LAST = 64
Head = tuple[int, int]


@dataclass(frozen=True)
class Look:
    """A request's tables at one moment, plain numbers of the tokens that are there."""

    seen: int
    mass: dict[Head, list[float]]
    votes: dict[Head, list[float]]

    @classmethod
    def at(cls, tables: Tables, slot: int, seen: int) -> Look:
        """Copies them."""
        _, layers, heads = tables.length.shape
        length = {
            (layer, head): int(tables.length[slot, layer, head]) for layer in range(layers) for head in range(heads)
        }
        return cls(
            seen,
            {key: [float(mass) for mass in tables.mass[slot, *key, :count]] for key, count in length.items()},
            {key: [float(votes) for votes in tables.votes[slot, *key, :count]] for key, count in length.items()},
        )

    def dropped(self, head: Head, share: float) -> list[int]:
        """Tokens that a selection made now would drop: worse than each of the best, and not among the last."""
        votes, may_stay = self.votes[head], math.ceil(share * self.seen)
        if len(votes) <= may_stay:
            return []
        worst_to_stay = sorted(votes, reverse=True)[may_stay - 1]
        return [token for token in range(len(votes) - LAST) if votes[token] < worst_to_stay]

    def missed(self, later: Look) -> dict[Head, list[float]]:
        """For each head and share: what those got until a later look, of all attention until then."""
        found = {}
        for head, mass in later.mass.items():
            before = self.mass[head]
            gained = [now - (before[token] if token < len(before) else 0.0) for token, now in enumerate(mass)]
            found[head] = [sum(gained[token] for token in self.dropped(head, share)) / sum(gained) for share in SHARES]
        return found
