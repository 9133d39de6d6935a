"""Blocks of the same tokens in another layer, without which some codecs cannot decode theirs.

Nothing stores where they are: a request's tables say so, since both are always in the same place of their layers'
tables (``workers.cache.style.wanted``). So a block may move while its partner stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kernels.api import I32, Tables, TokenSource
from kernels.layout import BLOCK_TOKENS, Tier
from workers.cache.arrangement import of_blocks
from workers.cache.formats import CodedFormat


@dataclass(frozen=True)
class Partners:
    """Those of one request's blocks."""

    tables: Tables
    slot: int

    def of(self, fmt: CodedFormat, tier: Tier, address: I32) -> TokenSource:
        """The partners [N] of the request's full blocks at these addresses [N] of a tier, which have that format."""
        tables, slot = self.tables, self.slot
        full = np.arange(tables.address.shape[3]) < (tables.length[slot] // BLOCK_TOKENS)[..., None]
        mine = full & (tables.format[slot] == fmt) & (tables.tier[slot] == tier)
        layer, head, index = np.nonzero(mine)
        known = tables.address[slot][mine]
        order = np.argsort(known)
        at = order[np.searchsorted(known, address, sorter=order)]
        place = (slot, layer[at] + fmt.codec.partner, head[at], index[at])
        return of_blocks(tables.address[place], tables.format[place], tables.tier[place])
