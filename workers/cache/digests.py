"""Digests of a request's blocks: what is kept on the device of keys that a query may not read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from kernels.api import I32, U8, Tables
from kernels.layout import BLOCK_TOKENS, CacheShape
from workers.cache.arrangement import Mask
from workers.stages.selecting import Digest

GROWTH_BLOCKS = 16
"""Digests come in steps of so many blocks a head."""


def digest(keys: torch.Tensor, kinds: Sequence[Digest]) -> dict[Digest, torch.Tensor]:
    """Digests of blocks of keys [..., 32, D]."""
    found: dict[Digest, torch.Tensor] = {}
    if Digest.LOW in kinds:
        found[Digest.LOW] = keys.amin(-2)
    if Digest.HIGH in kinds:
        found[Digest.HIGH] = keys.amax(-2)
    if Digest.MEAN in kinds or Digest.RADIUS in kinds:
        mean = keys.float().mean(-2).to(keys.dtype)
        if Digest.MEAN in kinds:
            found[Digest.MEAN] = mean
        if Digest.RADIUS in kinds:
            found[Digest.RADIUS] = (keys.float() - mean.float()[..., None, :]).norm(dim=-1).amax(-1)
    return found


def digest_bytes(kinds: Sequence[Digest], shape: CacheShape, layers: int, blocks: int) -> tuple[int, int]:
    """Bytes of the digests of so many blocks a head of so many layers, and as if the model's dtype had 16 bits."""
    room = -(-blocks // GROWTH_BLOCKS) * GROWTH_BLOCKS * layers * shape.kv_heads
    numbers = shape.head_dim * sum(kind is not Digest.RADIUS for kind in kinds)
    radius = 4 * (Digest.RADIUS in kinds)
    return room * (numbers * shape.dtype.itemsize + radius), room * (numbers * 2 + radius)


class Digests:
    """Digests of the first blocks of each table of a request, made once a block and kept while it stays what it is.

    A block is what it is by its tokens and its format; where it lives does not matter.

    Args:
        kinds: what is kept.
        shape: the cache's dimensions.
        layers: bool [L] of which layers; of others there is nothing.
        device: where it is kept.
    """

    def __init__(self, kinds: Sequence[Digest], shape: CacheShape, layers: Mask, device: torch.device) -> None:
        self.kinds = tuple(kinds)
        self._shape = shape
        self._row = np.cumsum(layers) - 1
        self._rows = int(layers.sum())
        heads = (shape.layers, shape.kv_heads)
        self.count: I32 = np.zeros(heads, np.int32)
        """[L, H] blocks that have one."""
        self._values = {
            kind: torch.zeros(
                (self._rows, shape.kv_heads, 0, *(() if kind is Digest.RADIUS else (shape.head_dim,))),
                dtype=torch.float32 if kind is Digest.RADIUS else shape.dtype,
                device=device,
            )
            for kind in self.kinds
        }
        self._position: I32 = np.zeros((*heads, 0, BLOCK_TOKENS), np.int32)
        self._format: U8 = np.zeros((*heads, 0), np.uint8)

    def nbytes(self) -> tuple[int, int]:
        """Bytes on the device, and as if the model's dtype had 16 bits."""
        return digest_bytes(self.kinds, self._shape, self._rows, self._format.shape[2])

    def of(self, layer: int, blocks: int) -> dict[Digest, torch.Tensor]:
        """Those of a layer's first blocks: [H, blocks, D], radius [H, blocks]; without meaning beyond ``count``."""
        return {kind: values[self._row[layer], :, :blocks] for kind, values in self._values.items()}

    def check(self, tables: Tables, slot: int) -> None:
        """Forgets blocks that are no longer what they were, and all behind them; gives room back."""
        width = min(self._format.shape[2], tables.format.shape[3])
        position = tables.position[slot, :, :, : width * BLOCK_TOKENS].reshape(*self.count.shape, width, BLOCK_TOKENS)
        same = (self._position[:, :, :width] == position).all(-1)
        same &= self._format[:, :, :width] == tables.format[slot, :, :, :width]
        same &= np.arange(width) < np.minimum(self.count, tables.length[slot] // BLOCK_TOKENS)[..., None]
        self.count = np.logical_and.accumulate(same, axis=2).sum(axis=2, dtype=np.int32)
        room = -(-int(self.count.max()) // GROWTH_BLOCKS) * GROWTH_BLOCKS
        if room < self._format.shape[2]:
            self._values = {kind: values[:, :, :room].clone() for kind, values in self._values.items()}
            self._position, self._format = self._position[:, :, :room].copy(), self._format[:, :, :room].copy()

    def extend(
        self, tables: Tables, slot: int, layer: int, blocks: I32, read: Callable[[int, I32, I32], torch.Tensor]
    ) -> None:
        """Adds what is missing of a layer's first ``blocks`` [H], which must be complete.

        Args:
            tables, slot, layer: whose blocks.
            blocks: how many of each head are to have a digest.
            read: gives the keys [N, 32, D] of blocks by layer, head [N] and place in the table [N].
        """
        count = self.count[layer]
        if (count >= blocks).all():
            return
        self._reserve(int(blocks.max()))
        index = np.arange(int(blocks.max()))
        head, block = (
            axis.astype(np.int32) for axis in np.nonzero((index >= count[:, None]) & (index < blocks[:, None]))
        )
        for kind, values in digest(read(layer, head, block), self.kinds).items():
            self._values[kind][self._row[layer], head, block] = values
        by_block = tables.position[slot, layer].reshape(len(count), -1, BLOCK_TOKENS)
        self._position[layer, head, block] = by_block[head, block]
        self._format[layer, head, block] = tables.format[slot, layer, head, block]
        self.count[layer] = np.maximum(count, blocks)

    def _reserve(self, blocks: int) -> None:
        more = -(-blocks // GROWTH_BLOCKS) * GROWTH_BLOCKS - self._format.shape[2]
        if more <= 0:
            return
        for kind, values in self._values.items():
            fresh = values.new_zeros(*values.shape[:2], more, *values.shape[3:])
            self._values[kind] = torch.cat([values, fresh], dim=2)
        heads = self.count.shape
        self._position = np.concatenate([self._position, np.zeros((*heads, more, BLOCK_TOKENS), np.int32)], axis=2)
        self._format = np.concatenate([self._format, np.zeros((*heads, more), np.uint8)], axis=2)
