"""How a pipeline wants a request's blocks: in which formats and on which tiers, layer by layer, by their age.

A block's age is how many tokens of its table are younger than the whole block: those behind its last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kernels.api import I32, U8
from kernels.layout import BLOCK_TOKENS, BlockFormat, CacheShape, Format, Tier
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


def wanted(styles: Sequence[Style], length: I32, blocks: int) -> tuple[U8, U8]:
    """Format and tier [L, H, blocks] that each block is wanted in.

    Args:
        styles: of each layer.
        length: [L, H] tokens of each table.
        blocks: of the longest table.
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
    return fmt, tier


def largest_format(pipeline: Pipeline, shape: CacheShape) -> BlockFormat:
    """The largest format that older blocks have."""
    stage = pipeline.codec or pipeline.placer
    return stage.largest(shape) if stage else Format.RAW
