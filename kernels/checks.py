"""What every backend refuses: errors that name the field, the value and what would be accepted."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch

from kernels.api import I32, DecodePlan, Tables
from kernels.layout import BLOCK_TOKENS, MEMORY_TIERS, UNIT_BYTES, CacheShape, Format, Tier
from kernels.partials import Partial


def check_arenas(shape: CacheShape, arenas: tuple[torch.Tensor, ...]) -> None:
    """Raises ValueError unless there is one flat, contiguous uint8 arena of whole units for each tier."""
    if len(arenas) != len(MEMORY_TIERS):
        needed = [tier.name.lower() for tier in MEMORY_TIERS]
        raise ValueError(f"arenas: got {len(arenas)}, need one for each of {needed}")
    for tier, arena in zip(MEMORY_TIERS, arenas, strict=True):
        if arena.dtype is not torch.uint8 or arena.dim() != 1 or not arena.is_contiguous():
            raise ValueError(f"{tier.name.lower()} arena: {arena.dtype} {tuple(arena.shape)}, must be flat uint8")
        if arena.numel() % UNIT_BYTES:
            raise ValueError(f"{tier.name.lower()} arena: {arena.numel()} bytes, must be a multiple of {UNIT_BYTES}")


def check_plan(tables: Tables, slots: I32, tiers: Collection[Tier], appends: bool) -> None:
    """Raises ValueError for a repeated slot or lengths that no table has, and, where the plan is to append, for an
    empty table or a tail block that cannot take the new token or is not read."""
    if len(np.unique(slots)) != len(slots):
        raise ValueError(f"slots {slots.tolist()}: a slot can be in a batch once")
    for tier in tiers:
        if tier not in MEMORY_TIERS:
            raise ValueError(f"tiers: got {tier!r}, must be of {[tier.name for tier in MEMORY_TIERS]}")
    length = tables.length[slots]  # [R, L, H]
    if length.max(initial=0) > tables.mass.shape[-1]:
        raise ValueError(f"length {length.max()}: tables hold at most {tables.mass.shape[-1]} tokens")
    if not appends:
        return
    if Tier.DEVICE not in tiers:
        raise ValueError(
            f"tiers {[Tier(tier).name for tier in tiers]}: a step that appends must read DEVICE, where it does"
        )
    if length.min(initial=1) < 1:
        raise ValueError("length 0: every table must count the step's new token")
    tail = ((length - 1) // BLOCK_TOKENS)[..., None]
    formats = np.take_along_axis(tables.format[slots], tail, -1)
    tiers = np.take_along_axis(tables.tier[slots], tail, -1)
    if (formats != Format.RAW).any() or (tiers != Tier.DEVICE).any():
        raise ValueError("tail block: must be raw and on the device to take the step's new token")


def check_decode(plan: DecodePlan, q: torch.Tensor, partials: Sequence[Partial]) -> None:
    """Raises ValueError for a plan that is not for ``decode``, or partials that are not of these queries."""
    if not plan.appends:
        raise ValueError("plan: appends nothing, decode needs one that does; attend takes this one")
    for part in partials:
        if part.output.shape != q.shape:
            raise ValueError(f"partials: output of shape {tuple(part.output.shape)}, must be q's {tuple(q.shape)}")


def check_attend(plan: DecodePlan) -> None:
    """Raises ValueError for a plan that is not for ``attend``."""
    if plan.appends:
        raise ValueError("plan: appends a token that is not there yet, attend needs one made with appends=False")


def check_write(tables: Tables, slot: int, layer: int, start: int, tokens: int) -> None:
    """Raises ValueError unless kept tokens start .. start + tokens - 1 lie in raw device blocks."""
    if start < 0 or start + tokens > tables.mass.shape[-1]:
        raise ValueError(f"tokens {start}..{start + tokens - 1}: tables hold tokens 0..{tables.mass.shape[-1] - 1}")
    blocks = slice(start // BLOCK_TOKENS, -(-(start + tokens) // BLOCK_TOKENS))
    formats, tiers = tables.format[slot, layer, :, blocks], tables.tier[slot, layer, :, blocks]
    if (formats != Format.RAW).any() or (tiers != Tier.DEVICE).any():
        raise ValueError(f"tokens {start}..{start + tokens - 1}: can only be written to raw device blocks")
