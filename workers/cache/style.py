"""How a pipeline wants a request's blocks: in which formats and on which tiers, layer by layer, by their age.

A block's age is how many tokens of its table are younger than the whole block: those behind its last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kernels.api import I32, U8
from kernels.layout import BLOCK_TOKENS, BlockFormat, CacheShape, Format, Tier
from workers.cache.formats import CodedFormat, formats
from workers.profile.profile import ModelProfile
from workers.stages.base import Ages, LayerPlace, Pipeline, Places


@dataclass(frozen=True)
class Style:
    """How blocks of one layer are wanted."""

    formats: Ages = ()
    """The formats of the blocks of so many tokens' age or more, rising; others stay raw."""
    places: Places = ()
    """The tiers likewise; others stay on the device."""


def styles_of(
    pipeline: Pipeline, shape: CacheShape, seen: int, profile: ModelProfile | None = None
) -> tuple[Style, ...]:
    """How a pipeline wants the blocks of each layer of a request with so many tokens."""
    codec, placer = pipeline.codec, pipeline.placer
    styles = []
    for index in range(shape.layers):
        layer = LayerPlace(index, shape, seen, profile.layer(index) if profile else None)
        places = placer.places(layer) if placer else ()
        formats = codec.ages(layer) if codec else placer.ages(layer) if placer else ()
        styles.append(Style(formats, places))
    return tuple(styles)


def tiers_in(styles: Sequence[Style]) -> set[Tier]:
    """The tiers beside the device that these ask for."""
    return {tier for style in styles for _, tier in style.places}


def device_tokens(styles: Sequence[Style]) -> int | None:
    """How many of a table's last tokens may stay on the device in the layer where most do; None: all of them."""
    stays = [style.places[0][0] if style.places else None for style in styles]
    return None if None in stays else max(tokens for tokens in stays if tokens is not None)


def off_device(styles: Sequence[Style]) -> list[tuple[Style, ...]]:
    """How finished rows of a prompt that is still being computed may be kept, raw, where some are to be on disk.

    The best way first: rows that a pipeline will have on the device wait on the host, if it uses that. Or all are on
    disk.
    """
    ways = [
        tuple(
            Style(places=tuple((age if tier is Tier.DISK else BLOCK_TOKENS, tier) for age, tier in style.places))
            for style in styles
        )
    ]
    if Tier.HOST in tiers_in(styles):
        ways.append(tuple(Style(places=((BLOCK_TOKENS, Tier.DISK),)) for _ in styles))
    return ways


def wanted(styles: Sequence[Style], length: I32, blocks: int, position: I32 | None = None) -> tuple[U8, U8]:
    """Format and tier [L, H, blocks] that each block is wanted in.

    In a format that needs a partner only those are that have one: another layer's block of the same tokens, wanted in
    the opposite format. Neither may go to disk, where a query finds its own layer's blocks alone. Others stay raw.

    Args:
        styles: of each layer.
        length: [L, H] tokens of each table.
        blocks: of the longest table.
        position: [L, H, T] original positions of the tokens; None: all tables have the same.
    """
    younger = length[..., None] - (np.arange(blocks) + 1) * BLOCK_TOKENS  # negative where a block is not full
    fmt = np.full(younger.shape, Format.RAW, np.uint8)
    tier = np.full(younger.shape, Tier.DEVICE, np.uint8)
    for style in set(styles):
        mine = np.array([other == style for other in styles])[:, None, None]
        for tokens, of_age in style.formats:
            fmt[mine & (younger >= tokens)] = of_age
        for tokens, place in style.places:
            tier[mine & (younger >= tokens)] = place
    fmt[_alone(fmt, tier, position)] = Format.RAW
    return fmt, tier


def _alone(fmt: U8, tier: U8, position: I32 | None) -> npt.NDArray[np.bool_]:
    """[L, H, B] blocks of formats that need a partner which have none."""
    partner = np.array([other.codec.partner if isinstance(other, CodedFormat) else 0 for other in formats()])[fmt]
    alone = partner != 0
    for offset in np.unique(partner[alone]).tolist():
        paired = (partner == offset) & (np.roll(partner, -offset, 0) == -offset)
        paired &= (tier != Tier.DISK) & (np.roll(tier, -offset, 0) != Tier.DISK)
        if position is not None:
            whole = position.shape[2] // BLOCK_TOKENS
            same = (position == np.roll(position, -offset, 0))[:, :, : whole * BLOCK_TOKENS]
            paired[:, :, :whole] &= same.reshape(*same.shape[:2], whole, BLOCK_TOKENS).all(-1)
        alone &= ~paired
    return np.asarray(alone, np.bool_)


def largest_format(pipeline: Pipeline, shape: CacheShape) -> BlockFormat:
    """The largest format that older blocks have."""
    stage = pipeline.codec or pipeline.placer
    return stage.largest(shape) if stage else Format.RAW
