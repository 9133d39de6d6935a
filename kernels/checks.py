"""What every backend refuses: errors that name the field, the value and what would be accepted."""

from __future__ import annotations

import numpy as np
import torch

from kernels.api import I32, Tables
from kernels.layout import BLOCK_TOKENS, UNIT_BYTES, CacheShape, Format, Tier


def check_arenas(shape: CacheShape, arenas: tuple[torch.Tensor, ...]) -> None:
    """Raises ValueError unless there is one flat, contiguous uint8 arena of whole units for each tier."""
    if len(arenas) != len(Tier):
        raise ValueError(f"arenas: got {len(arenas)}, need one for each of {[tier.name.lower() for tier in Tier]}")
    for tier, arena in zip(Tier, arenas, strict=True):
        if arena.dtype is not torch.uint8 or arena.dim() != 1 or not arena.is_contiguous():
            raise ValueError(f"{tier.name.lower()} arena: {arena.dtype} {tuple(arena.shape)}, must be flat uint8")
        if arena.numel() % UNIT_BYTES:
            raise ValueError(f"{tier.name.lower()} arena: {arena.numel()} bytes, must be a multiple of {UNIT_BYTES}")


def check_plan(tables: Tables, slots: I32) -> None:
    """Raises ValueError for a repeated slot, an empty table, or a tail block that cannot take the new token."""
    if len(np.unique(slots)) != len(slots):
        raise ValueError(f"slots {slots.tolist()}: a slot can be in a batch once")
    length = tables.length[slots]  # [R, L, H]
    if length.min(initial=1) < 1:
        raise ValueError("length 0: every table must count the step's new token")
    if length.max(initial=0) > tables.mass.shape[-1]:
        raise ValueError(f"length {length.max()}: tables hold at most {tables.mass.shape[-1]} tokens")
    tail = ((length - 1) // BLOCK_TOKENS)[..., None]
    formats = np.take_along_axis(tables.format[slots], tail, -1)
    tiers = np.take_along_axis(tables.tier[slots], tail, -1)
    if (formats != Format.RAW).any() or (tiers != Tier.DEVICE).any():
        raise ValueError("tail block: must be raw and on the device to take the step's new token")


def check_write(tables: Tables, slot: int, layer: int, start: int, tokens: int) -> None:
    """Raises ValueError unless kept tokens start .. start + tokens - 1 lie in raw device blocks."""
    if start < 0 or start + tokens > tables.mass.shape[-1]:
        raise ValueError(f"tokens {start}..{start + tokens - 1}: tables hold tokens 0..{tables.mass.shape[-1] - 1}")
    blocks = slice(start // BLOCK_TOKENS, -(-(start + tokens) // BLOCK_TOKENS))
    formats, tiers = tables.format[slot, layer, :, blocks], tables.tier[slot, layer, :, blocks]
    if (formats != Format.RAW).any() or (tiers != Tier.DEVICE).any():
        raise ValueError(f"tokens {start}..{start + tokens - 1}: can only be written to raw device blocks")
