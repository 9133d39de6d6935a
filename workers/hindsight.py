"""What eviction would have missed: the attention of the last steps, held against a selection made before them.

Votes tell what is attended now. What matters to an evictor is what will be attended next, and for a selection that it
might have made some steps ago, this is known already.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kernels.api import F32, I32, U8, Tables
from models.features import F64, KEPT_SHARES
from workers.counting import set_levels, sum_by_level

HINDSIGHT_STEPS = 16
"""Steps after which a selection is replaced by a newer one at the next look."""
RECENT_TOKENS = 64
"""Last tokens that no selection drops."""
U16: TypeAlias = npt.NDArray[np.uint16]


class Hindsight:
    """A backtest of eviction by votes, of one request.

    A token's level is the number of ``KEPT_SHARES`` at which the selection drops it: one that goes where 1/4 may stay
    goes where 1/8 may. Masses are kept by level only, and what they gained since is what was paid to each.
    """

    def __init__(self) -> None:
        self._seen = 0
        self._length: I32 = np.zeros((0, 0), np.int32)
        self._level: U8 = np.zeros((0, 0, 0), np.uint8)  # [L, H, T]
        self._mass: F64 = np.zeros((0, 0, 0))  # [L, H, levels]

    def look(self, tables: Tables, slot: int, seen: int, least: U16) -> F64 | None:
        """Compares with the selection of an earlier look, and makes one for the next.

        Args:
            tables: with masses and votes.
            slot: the request's.
            seen: its tokens so far, kept or not.
            least: [L, H, KEPT_SHARES] least vote of the tokens that may stay, as the bits of a float16.

        Returns:
            [L, H, KEPT_SHARES] share of the attention since then on tokens that would have been dropped; None where
            there is nothing to compare with: no step since, or meanwhile tokens were evicted or restored, or all of
            them computed again.
        """
        length = tables.length[slot]
        steps = seen - self._seen
        grown = length.shape == self._length.shape and bool((length - self._length == steps).all())
        if grown and steps == 0:
            return None
        missed = self._compare(tables, slot, length) if grown and steps > 0 else None
        if missed is None or steps >= HINDSIGHT_STEPS:
            self._seen, self._length = seen, length.copy()
            self._level = _levels(tables, slot, length, least)
            self._mass = _mass_by_level(tables.mass[slot], length, self._level)[..., :-1]
        return missed

    def _compare(self, tables: Tables, slot: int, length: I32) -> F64 | None:
        now = _mass_by_level(tables.mass[slot], length, self._level)
        gained = now[..., :-1] - self._mass  # [L, H, levels]
        total = gained.sum(axis=2) + now[..., -1]
        if (gained < 0).any() or not (total > 0).all():
            return None  # masses only grow: these are other tokens', or were counted anew
        beyond = gained[..., :0:-1].cumsum(axis=2)[..., ::-1]
        return np.asarray(np.minimum(beyond / total[..., None], 1.0))


def _levels(tables: Tables, slot: int, length: I32, least: U16) -> U8:
    """[L, H, T] the level of each token; 0 for the last ones and where there is none."""
    levels = np.zeros((*length.shape, int(length.max())), np.uint8)
    set_levels(tables.votes[slot].view(np.uint16), length, least, RECENT_TOKENS, levels)
    return levels


def _mass_by_level(mass: F32, length: I32, level: U8) -> F64:
    """Sums of ``mass`` [L, H, T'] by the level of each token, [L, H, levels + 1]; tokens beyond ``level`` last."""
    sums = np.zeros((*length.shape, len(KEPT_SHARES) + 2))
    sum_by_level(mass, length, level, sums)
    return sums
