"""Attention beside the host's memory: what is there is not brought to the device, the processor next to it attends."""

from __future__ import annotations

import numpy as np
import torch

from kernels.api import Backend, DecodePlan, Tables
from kernels.layout import Format, Tier
from kernels.partials import Partial
from workers.cache.arrangement import Mask


class NearReader:
    """One request's reader of its host blocks (``workers.cache.reading.Reader``).

    What it finds is merged with the device's part by log-sum-exp (``kernels.partials``). It adds to no mass: tokens on
    the host keep the masses that they had when they came there. Blocks in codecs' own formats are left to their reader.

    Args:
        backend: kernels that run where the host tier is, over the same tables.
        tables: block tables.
        slot: the request's.
    """

    def __init__(self, backend: Backend, tables: Tables, slot: int) -> None:
        self._backend = backend
        self._tables = tables
        self._slot = slot
        self._plan: DecodePlan | None = None
        self._layer = -1
        self._hidden: Mask | None = None  # [H, B]

    def before(self, layer: int, q: torch.Tensor, scaling: float) -> Partial | None:
        """See ``workers.cache.reading.Reader``: attends to the layer's host blocks, and hides them from the kernels."""
        if self._plan is None or layer <= self._layer:
            self._plan = self._backend.plan(np.array([self._slot], np.int32), (Tier.HOST,), appends=False)
        self._layer = layer
        tier = self._tables.tier[self._slot, layer]
        self._hidden = (tier == Tier.HOST) & (self._tables.format[self._slot, layer] < len(Format))
        if not self._hidden.any():
            return None
        found = self._backend.attend(self._plan, layer, q.cpu(), scaling)
        tier[self._hidden] = Tier.DISK
        return found

    def after(self, layer: int) -> None:
        """See ``workers.cache.reading.Reader``."""
        if self._hidden is not None:
            self._tables.tier[self._slot, layer][self._hidden] = Tier.HOST
            self._hidden = None
