"""What a pipeline's cache will take, before there is one: to the byte where that does not depend on the text."""

from __future__ import annotations

import numpy as np

from kernels.api import I32
from kernels.layout import BLOCK_TOKENS, CacheShape, Format, Tier
from workers.cache.accounting import CacheUse, measure
from workers.cache.arrangement import Blocks
from workers.cache.digests import digest_bytes
from workers.cache.inputs import pieces_of, rows_of
from workers.cache.recall import layers_of
from workers.cache.reconstructing import kept_bytes
from workers.cache.staging import needed, staging_bytes
from workers.cache.style import largest_format, styles_of, wanted
from workers.profile.profile import ModelProfile, names_of
from workers.stages.base import Evictor, Pipeline
from workers.stages.budgets import PER_HEAD, free_tokens
from workers.stages.selecting import Reconstructing, Selector


def expected_use(
    pipeline: Pipeline,
    shape: CacheShape,
    tokens: int,
    profile: ModelProfile | None = None,
    input_width: int | None = None,
) -> CacheUse:
    """Bytes when a prompt of so many tokens has just been computed: blocks, their scales and zeros, tables, exact copy,
    staging areas, layers' inputs, digests and, if the device has room for all of it, the pool of recalled blocks.

    ``budgets="ada"`` shares a layer's tokens out to its heads by what the text is; here each head gets the mean, which
    is at most one block a head from what it will be. Of stages whose text alone says how many tokens each head keeps
    (``fastgen``), and of blocks that are packed in files (``swap``), the most they can take is told. While decoding,
    evictors that evict again hold up to 31 tokens more; those that do not, all that are generated. Layers' inputs
    (``kvpr``) are those of a request that generates nothing, of which all were noted. Peaks are not told.

    Args:
        pipeline: what the cache is brought to.
        shape: the model's cache dimensions.
        tokens: of the prompt.
        profile: the model's, for stages that need it.
        input_width: channels of what its layers are given for keys and values; None: as many as its query heads have.

    Raises:
        ValueError: the profile lacks what a stage needs.
    """
    length = kept_tokens(pipeline.evictor, shape, tokens, profile)  # [L, H]
    blocks = -(-length // BLOCK_TOKENS)
    index = np.arange(int(blocks.max(initial=0)))
    valid = index < blocks[..., None]  # [L, H, B]
    format_, tier = wanted(styles_of(pipeline, shape, tokens, profile), length, len(index))
    shadowed = 0
    if pipeline.wants_shadow:
        shadowed = tokens // BLOCK_TOKENS * length.size
        if (length == tokens).all():  # raw blocks on the host are the copy's own
            shadowed -= int((valid & (tier == Tier.HOST) & (format_ == Format.RAW)).sum())
    use = measure(shape, valid, format_, tier, tokens, shadowed * shape.block_bytes(Format.RAW))
    placer = pipeline.placer
    if isinstance(placer, Reconstructing):
        covered = np.maximum(length - placer.always(), 0) // BLOCK_TOKENS
        use = use.plus_device_bytes(*kept_bytes(placer, shape, covered))
    elif isinstance(placer, Selector):
        pooled = largest_format(pipeline, shape)
        older = max(0, int(length.max(initial=0)) - placer.always()) // BLOCK_TOKENS
        layers = int(layers_of(placer, shape, profile).sum())
        digests = digest_bytes(placer.digests, shape, layers, older)
        places = placer.pool_blocks(older) * layers * shape.kv_heads
        sizes = (shape.block_bytes(pooled), shape.block_bytes_16bit(pooled))
        use = use.plus_device_bytes(*(more + places * size for more, size in zip(digests, sizes, strict=True)))
    found = Blocks(length, np.zeros(valid.shape, np.int32), format_, tier)
    use = use.plus_area(Tier.HOST, *staging_bytes(shape, needed(found, Tier.DISK)))
    if not pipeline.fetches:
        return use
    through = needed(found, Tier.HOST)
    if pipeline.recomputed:
        pieces = pieces_of(input_width or shape.query_heads * shape.head_dim, shape.head_dim)
        noted = rows_of(pipeline.recomputed, tokens // BLOCK_TOKENS)
        use = use.plus_host_bytes(noted * shape.layers * pieces * shape.block_bytes(Format.RAW))
        rows = through.get(Format.RAW, 0) // shape.kv_heads
        if more := rows_of(pipeline.recomputed, rows) * max(0, pieces - shape.kv_heads):
            through[Format.RAW] += more
    return use.plus_area(Tier.DEVICE, *staging_bytes(shape, through))


def kept_tokens(evictor: Evictor | None, shape: CacheShape, tokens: int, profile: ModelProfile | None = None) -> I32:
    """[layers, kv_heads] tokens that stay of so many, in the mean of a layer's heads; arguments as above."""
    length = np.full((shape.layers, shape.kv_heads), tokens, np.int32)
    if evictor and (lack := evictor.lacks(names_of(profile))):
        raise ValueError(f"stage {evictor.name!r}: {lack}")
    if evictor and evictor.rule == PER_HEAD:
        for layer in range(shape.layers):
            budget = evictor.head_budget(tokens, profile.layer(layer) if profile else None)
            if budget is not None:
                length[layer] = np.minimum(tokens, np.maximum(budget.cpu().numpy(), sum(evictor.protected(tokens))))
    elif evictor:
        fixed = sum(evictor.protected(tokens))
        free = max(evictor.budget(tokens) - fixed, 0)
        for layer in range(shape.layers):
            length[layer] = min(tokens, fixed + free_tokens(evictor.rule, layer, shape.layers, free, tokens - fixed))
    return length
