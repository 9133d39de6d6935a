"""Exact copies (shadows) of what lossy pipelines change: how they grow, and how blocks are built from them."""

from __future__ import annotations

import numpy as np

from kernels.api import U8, TokenSource
from kernels.layout import BLOCK_TOKENS, Format, Tier
from workers.cache.arena import TierFullError
from workers.cache.arrangement import BUILD, Arrangement, Tokens, pick, tokens_of
from workers.cache.blocks import Owners, whole_blocks
from workers.cache.context import TokenContext
from workers.cache.memory import CacheMemory
from workers.cache.sequence_cache import SequenceCache
from workers.cache.shadow import Shadow
from workers.stages.base import LossClass, Pipeline


class ExactCopies:
    """The exact copies of all requests of a worker, and which of their rows are exact."""

    def __init__(self, memory: CacheMemory) -> None:
        self._memory = memory

    def due(self, seq: SequenceCache, pipeline: Pipeline) -> bool:
        """Whether a switch to ``pipeline`` begins with bringing the exact copy up to date."""
        return seq.shadow is not None or (pipeline.wants_shadow and not seq.lost)

    def bring_up_to_date(self, seq: SequenceCache, pipeline: Pipeline, at_most: int | None = None) -> None:
        """Extends the exact copy ahead of a switch; lack of room is none if the switch gives the copy up."""
        try:
            self.extend(seq, at_most)
        except TierFullError:
            if pipeline.loss_class is not LossClass.PERMANENT:
                raise

    def extend(self, seq: SequenceCache, at_most: int | None = None) -> None:
        """Brings the shadow up to the last whole row, or ``at_most`` rows further."""
        shadow = seq.shadow or Shadow(self._memory.host, seq.max_tokens)
        first, rows = shadow.rows, seq.seen // BLOCK_TOKENS - shadow.rows
        rows = rows if at_most is None else min(rows, at_most)
        if rows > 0:
            tables, slot = self._memory.tables, seq.slot
            # The last tokens of every table are the last positions, whatever was evicted before them.
            offset = tables.length[slot] - seq.seen  # [L, H] from a position to its place in the table
            position = np.arange(first * BLOCK_TOKENS, (first + rows) * BLOCK_TOKENS).reshape(rows, 1, 1, BLOCK_TOKENS)
            index = position + offset[..., None]  # [rows, L, H, 32]
            layer, head = (axis[None, ..., None] for axis in np.indices(offset.shape))
            block = index // BLOCK_TOKENS
            flat = (rows * self._memory.row_blocks, BLOCK_TOKENS)
            source = TokenSource(
                tables.address[slot, layer, head, block].reshape(flat),
                tables.format[slot, layer, head, block].reshape(flat),
                tables.tier[slot, layer, head, block].reshape(flat),
                (index % BLOCK_TOKENS).astype(np.uint8).reshape(flat),
            )
            of_layer, of_head = (np.broadcast_to(axis, index.shape)[..., 0].ravel() for axis in (layer, head))
            owners = Owners(of_layer, of_head, np.broadcast_to(position, index.shape).reshape(flat).astype(np.int32))
            shadow.add_rows(self._memory.sources(seq), source, owners, rows)
            self._memory.count_moves(seq, source, Tier.HOST, Format.RAW)
        seq.shadow = shadow

    def everything(self, seq: SequenceCache) -> Tokens:
        """All tokens of a request, those evicted included: from its shadow, and from its tables beyond the last row."""
        shadow = seq.shadow
        assert shadow is not None
        now = tokens_of(self._memory.tables, seq.slot)
        shadow.remember(now.position, now.valid, now.mass, now.votes)
        assert shadow.mass is not None
        assert shadow.votes is not None
        heads = (self._memory.shape.layers, self._memory.shape.kv_heads)
        position = np.broadcast_to(np.arange(seq.seen, dtype=np.int32), (*heads, seq.seen)).copy()
        row = position // BLOCK_TOKENS
        layer, head = (axis[..., None] for axis in np.indices(heads))
        everything = Tokens(
            valid=np.ones(position.shape, bool),
            position=position,
            address=shadow.address[row, layer, head],
            format=np.full(position.shape, Format.RAW, np.uint8),
            tier=np.full(position.shape, Tier.HOST, np.uint8),
            row=(position % BLOCK_TOKENS).astype(np.uint8),
            mass=shadow.mass[:, :, : seq.seen].copy(),
            votes=shadow.votes[:, :, : seq.seen].copy(),
        )
        tail = now.valid & (now.position >= shadow.rows * BLOCK_TOKENS)
        layers, head_, index = np.nonzero(tail)
        place = (layers, head_, now.position[tail])
        for name in ("address", "format", "tier", "row"):
            getattr(everything, name)[place] = getattr(now, name)[layers, head_, index]
        return everything

    def prefer(self, seq: SequenceCache, source: TokenSource, owners: Owners, wanted: U8) -> None:
        """Lets blocks be built from the shadow's exact tokens instead of rounded ones.

        Args:
            seq: the request.
            source: of N blocks; changed in place.
            owners: of the blocks; a position is -1 beyond the end.
            wanted: [N] formats to build. A coded block that only moves is not encoded anew.
        """
        if seq.shadow is None:
            return
        layer, head, position = owners.layer, owners.head, owners.position
        rounded = (source.format != Format.RAW) & (position >= 0) & (position < seq.shadow.rows * BLOCK_TOKENS)
        if seq.merging:  # what a token has taken up, the copy does not have
            merged = seq.merging.merged
            known = position < merged.shape[2]
            place = np.where(known, position, 0).clip(min=0)
            rounded &= ~(known & merged[layer[:, None], head[:, None], place])
        moves = (wanted >= len(Format)) & (source.format[:, 0] == wanted)
        if moves.any():
            rounded[moves & whole_blocks(source)] = False
        if not rounded.any():
            return
        row = np.where(rounded, position // BLOCK_TOKENS, 0)  # [N, 32]
        np.copyto(source.address, seq.shadow.address[row, layer[:, None], head[:, None]], where=rounded)
        np.copyto(source.format, np.uint8(Format.RAW), where=rounded)
        np.copyto(source.tier, np.uint8(Tier.HOST), where=rounded)
        np.copyto(source.row, (position % BLOCK_TOKENS).astype(np.uint8), where=rounded)

    def refer(self, seq: SequenceCache, target: Arrangement) -> None:
        """Where a raw host block is wanted and the shadow has that very row, the table refers to it: no copy."""
        blocks = target.blocks
        wanted = blocks.valid & (blocks.address == BUILD) & (blocks.tier == Tier.HOST) & (blocks.format == Format.RAW)
        if seq.shadow is None or not wanted.any() or (blocks.length != seq.seen).any():
            return
        layer, head, index = np.nonzero(wanted)
        have = index < seq.shadow.rows
        layer, head, index = layer[have], head[have], index[have]
        build = blocks.valid & (blocks.address == BUILD)
        blocks.address[layer, head, index] = seq.shadow.address[index, layer, head]
        still = (blocks.valid & (blocks.address == BUILD))[build]
        target.source = pick(target.source, np.flatnonzero(still).astype(np.int32))
        target.source_position = target.source_position[still]

    def drop(self, seq: SequenceCache) -> None:
        """Gives a request's exact copy up."""
        if seq.shadow:
            seq.shadow.close()
            seq.shadow = None

    def exact_rows(self, seq: SequenceCache) -> int:
        """Rows from the first on that are as the full cache computed them, in all tables or in the shadow."""
        exact = seq.seen if seq.exact_tokens is None else seq.exact_tokens
        return min(exact // BLOCK_TOKENS, max(seq.shadow.rows if seq.shadow else 0, self._raw_rows(seq)))

    def _raw_rows(self, seq: SequenceCache) -> int:
        """Rows from the first on that all tables hold raw, and nothing was evicted from."""
        if seq.evicted:
            return 0
        rows = seq.seen // BLOCK_TOKENS
        rounded = (self._memory.tables.format[seq.slot, :, :, :rows] != Format.RAW).any(axis=(0, 1))
        return int(rounded.argmax()) if rounded.any() else rows

    def context(self, seq: SequenceCache, tokens: int) -> TokenContext | None:
        """Reader of the exact keys and values of a request's first ``tokens`` tokens, kept or not. Changes nothing.

        Whole rows come from the shadow where there is one, all other tokens from the tables.

        Returns:
            None where something was rounded or dropped that the shadow does not have.
        """
        if seq.lost:
            return None
        tables, slot, heads = self._memory.tables, seq.slot, (self._memory.shape.layers, self._memory.shape.kv_heads)
        shadowed = min(seq.shadow.rows * BLOCK_TOKENS, tokens) if seq.shadow else 0
        width = -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS
        row = np.broadcast_to(np.arange(width) % BLOCK_TOKENS, (*heads, width)).astype(np.uint8)
        address = np.full(row.shape, -1, np.int32)
        fmt, tier = np.full(row.shape, Format.RAW, np.uint8), np.full(row.shape, Tier.HOST, np.uint8)
        if seq.shadow:
            rows = seq.shadow.address[: -(-shadowed // BLOCK_TOKENS)]  # [rows, L, H]
            address[:, :, :shadowed] = np.repeat(rows.transpose(1, 2, 0), BLOCK_TOKENS, axis=2)[:, :, :shadowed]
        position = np.arange(shadowed, tokens)
        # The last tokens of every table are the last positions, whatever was evicted before them.
        index = position + (tables.length[slot] - seq.seen)[..., None]  # [L, H, tail]
        if (index < 0).any():
            return None
        layer, head = (axis[..., None] for axis in np.indices(heads))
        block = index // BLOCK_TOKENS
        there = tables.position[slot, layer, head, index] == position
        if not (there & (tables.format[slot, layer, head, block] == Format.RAW)).all():
            return None
        address[:, :, shadowed:tokens] = tables.address[slot, layer, head, block]
        tier[:, :, shadowed:tokens] = tables.tier[slot, layer, head, block]
        row[:, :, shadowed:tokens] = index % BLOCK_TOKENS
        return TokenContext(self._memory.sources(seq), address, fmt, tier, row, tokens)
