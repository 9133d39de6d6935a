"""The switch transaction: a request's blocks are brought to where a pipeline wants them, at once or not at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from kernels.api import I32
from kernels.layout import BLOCK_TOKENS, BlockFormat, Format, Tier
from workers.cache.arena import Lot, TierFullError
from workers.cache.arrangement import (
    Arrangement,
    Mask,
    Merging,
    Tokens,
    block_count,
    blocks_of,
    regroup,
    tokens_of,
)
from workers.cache.blocks import Owners
from workers.cache.commit import Commits, without
from workers.cache.copies import ExactCopies
from workers.cache.memory import CacheMemory
from workers.cache.merging import merge
from workers.cache.noting import Noting
from workers.cache.preparation import Preparation, Slice
from workers.cache.readers import Readers
from workers.cache.selection import Views, choose
from workers.cache.sequence_cache import Occasion, SequenceCache
from workers.cache.staging import DamagedCacheError
from workers.stages.base import Evictor, LossClass, Pipeline


class Transactions:
    """Applies pipelines to requests, and prepares for it ahead."""

    def __init__(
        self, memory: CacheMemory, copies: ExactCopies, readers: Readers, noting: Noting, commits: Commits
    ) -> None:
        self._memory = memory
        self._copies = copies
        self._readers = readers
        self._commits = commits
        self._noting = noting

    def apply(self, seq: SequenceCache, pipeline: Pipeline, occasion: Occasion) -> None:
        """Brings a request's blocks to where ``pipeline`` wants them: one transaction.

        Reserve, build the new blocks beside the old, then free the old, place the new and swap the tables. Tokens and
        blocks that are already right stay untouched; those that :meth:`prepare` has built for a switch to this pipeline
        are taken over. A preparation for anything else is abandoned.

        Raises:
            TierFullError: a tier lacks room for the result; the request is as it was, and before it was prepared.
            ValueError: the pipeline's evictor does not work; likewise.
            DamagedCacheError: blocks on disk are damaged beyond repair; likewise, but nothing can be done with it.
        """
        if seq.preparation and (occasion is not Occasion.SWITCH or seq.preparation.pipeline != pipeline):
            self.abandon(seq)
        if occasion is not Occasion.PROMPT and not pipeline.is_full and seq.seen < BLOCK_TOKENS:
            self.abandon(seq)
            return
        self._memory.settle(seq)
        seq.preparation = seq.preparation or Preparation(pipeline, seq.shadow.rows if seq.shadow else None)
        try:
            if self._copies.due(seq, pipeline):
                self._copies.bring_up_to_date(seq, pipeline)
            while True:
                try:
                    target = self._arrange(seq, pipeline, occasion)
                    target.fetches, target.recomputed = pipeline.fetches, pipeline.recomputed
                    self._commit_and_clear(seq, target)
                    break
                except TierFullError as full:
                    if full.tier is not Tier.DEVICE:
                        raise
                    dropped = self._memory.prefixes.drop(full.needed_bytes - full.free_bytes)
                    if not (dropped or self._take_back(seq)):
                        raise
        except (TierFullError, ValueError, DamagedCacheError):
            self.abandon(seq)
            raise
        seq.preparation = None
        self._after(seq, pipeline, occasion)

    def begin(self, seq: SequenceCache, pipeline: Pipeline) -> Preparation:
        """Plans what :meth:`prepare` is to build ahead of a switch; nothing is built yet.

        What an evictor keeps is chosen at the switch, so only the exact copy can be made ahead of it, and nothing ahead
        of one that brings evicted tokens back. A preparation for another pipeline is abandoned.
        """
        if seq.preparation and seq.preparation.pipeline == pipeline:
            return seq.preparation
        self.abandon(seq)
        seq.preparation = Preparation(pipeline, seq.shadow.rows if seq.shadow else None)
        copied = self._copies.due(seq, pipeline)
        if copied:
            seq.preparation.copied_rows = seq.seen // BLOCK_TOKENS
        if not (pipeline.evictor or (seq.evicted and seq.shadow)):
            styles = self._memory.styles(seq, pipeline)
            seq.preparation.plan(self._commits.restyle(seq, styles), by_shadow=copied and not seq.evicted)
        return seq.preparation

    def left_to_prepare(self, seq: SequenceCache) -> Counter[tuple[Tier, BlockFormat]]:
        """Blocks that :meth:`prepare` has yet to build, by tier and format."""
        assert seq.preparation is not None
        left = seq.preparation.left()
        rows = seq.preparation.copied_rows - (seq.shadow.rows if seq.shadow else 0)
        if rows > 0:
            left[Tier.HOST, Format.RAW] += rows * self._memory.row_blocks
        return left

    def prepare(self, seq: SequenceCache, most: Callable[[Tier, BlockFormat], int]) -> Slice | None:
        """Builds a slice of what :meth:`begin` has planned: first the exact copy, then the blocks.

        Args:
            seq: the request.
            most: how many blocks of a tier and format a slice may have; of the exact copy it has one row at least.

        Returns:
            What was built. None: all is there, and :meth:`apply` has little left to do.

        Raises:
            TierFullError: a tier lacks room for it beside the blocks in force. What was built before stays.
        """
        preparation = seq.preparation
        assert preparation is not None
        rows = seq.shadow.rows if seq.shadow else 0
        if rows < preparation.copied_rows:
            at_most = max(1, most(Tier.HOST, Format.RAW) // self._memory.row_blocks)
            self._copies.bring_up_to_date(seq, preparation.pipeline, min(at_most, preparation.copied_rows - rows))
            assert seq.shadow is not None
            if seq.shadow.rows == rows:  # no room for a copy that is about to be given up
                preparation.copied_rows = rows
            return Slice(Tier.HOST, Format.RAW, (seq.shadow.rows - rows) * self._memory.row_blocks)
        kind = preparation.next_kind
        if kind is None:
            return None
        piece = preparation.next_piece(max(1, most(*kind)))
        blocks = len(piece.layer)
        owners = Owners(piece.layer, piece.head, piece.position)
        self._copies.prefer(seq, piece.source, owners, np.full(blocks, piece.format, np.uint8))
        notes = self._commits.notes(seq, piece.format, piece.layer, piece.head, piece.index)
        addresses = self._commits.build(seq, piece.source, *kind, owners, notes, self._allocate_ahead)
        preparation.add(addresses)
        self._memory.note_peak(seq)
        return Slice(piece.tier, piece.format, blocks)

    def abandon(self, seq: SequenceCache) -> None:
        """Gives back what was built ahead of a switch: the request is as if there had been none."""
        preparation, seq.preparation = seq.preparation, None
        if preparation is None:
            return
        for tier, arena in self._memory.by_tier.items():
            arena.release(preparation.on(tier))
        if preparation.shadow_rows is None:
            self._copies.drop(seq)
        elif seq.shadow:
            seq.shadow.cut(preparation.shadow_rows)

    def _allocate_ahead(self, lot: Lot, tier: Tier, blocks: int) -> I32:
        """Memory for blocks beside those in force, at the cost of prefixes that nobody uses."""
        while True:
            try:
                return self._memory.arenas[tier].allocate(lot, blocks)
            except TierFullError as full:
                if tier is not Tier.DEVICE or not self._memory.prefixes.drop(full.needed_bytes - full.free_bytes):
                    raise

    def views(self, seq: SequenceCache, tokens: Tokens) -> Views:
        """What evictors may look at of these tokens of a request."""
        return Views(
            tokens,
            seq.seen,
            self._memory.scaling,
            self._memory.sources(seq),
            partial(self._memory.recent.read, seq.slot),
            self._memory.device.data.device,
            self._memory.profile,
            seq.reconstruction,
            seq.novelty,
        )

    def _arrange(self, seq: SequenceCache, pipeline: Pipeline, occasion: Occasion) -> Arrangement:
        evictor, styles = pipeline.evictor, self._memory.styles(seq, pipeline)
        going_on = evictor is not None and evictor.evicts_while_prefilling and occasion is Occasion.PROMPT
        settle = occasion is Occasion.SETTLE or going_on
        restore = seq.evicted and not settle and seq.shadow is not None and seq.shadow.covers(seq.seen)
        if evictor and (not settle or evictor.evicts_while_decoding):
            tokens = self._copies.everything(seq) if restore else tokens_of(self._memory.tables, seq.slot)
            views = self.views(seq, tokens)
            full = int(tokens.valid.sum(axis=2).max(initial=0)) > evictor.budget(seq.seen)
            if evictor.evicts_while_prefilling and self._memory.catalyse and full:
                views = replace(views, queries=self._memory.catalyse(seq))
            keep = choose(evictor, views)
            if restore or not keep[tokens.valid].all():
                merging = None if restore else seq.merging
                if evictor.merges and not keep[tokens.valid].all():
                    merging = self._merge(seq, evictor, views, keep, merging)
                target = regroup(tokens, keep, styles)
                target.merging = merging
                return target
        elif restore:
            tokens = self._copies.everything(seq)
            return regroup(tokens, tokens.valid, styles)
        return self._commits.restyle(seq, styles)

    def _merge(self, seq: SequenceCache, evictor: Evictor, views: Views, keep: Mask, before: Merging | None) -> Merging:
        """Writes what the kept tokens become to blocks of their own, and has the views' tokens read from there."""
        tokens, heads = views.tokens, (self._memory.shape.layers, self._memory.shape.kv_heads)
        found = merge(evictor, views, keep, before.threshold if before else np.full(heads, np.nan, np.float32))
        merged = np.zeros((*heads, seq.seen), bool)
        if before:
            merged[:, :, : before.merged.shape[2]] = before.merged
        layer, head, _ = found.place
        merged[layer, head, tokens.position[found.place]] = True
        count = len(found.k)
        if not count:
            return Merging(merged, found.threshold)
        address, tier = self._allocate_scratch(seq, int(block_count(np.array(count))))
        whole = torch.zeros(2, len(address) * BLOCK_TOKENS, self._memory.shape.head_dim).to(found.k)
        whole[0, :count], whole[1, :count] = found.k, found.v
        payload = whole.view(2, len(address), -1).transpose(0, 1).flatten(1).view(torch.uint8)
        padding = self._memory.shape.block_bytes(Format.RAW) - payload.shape[1]
        self._memory.backend.store(tier, address, torch.nn.functional.pad(payload, (0, padding)))
        at = np.arange(count)
        tokens.row = tokens.row.copy()  # it may be a view that repeats one row
        tokens.address[found.place] = address[at // BLOCK_TOKENS]
        tokens.row[found.place] = (at % BLOCK_TOKENS).astype(np.uint8)
        tokens.format[found.place], tokens.tier[found.place] = Format.RAW, tier
        return Merging(merged, found.threshold, {tier: address})

    def _allocate_scratch(self, seq: SequenceCache, blocks: int) -> tuple[I32, Tier]:
        """Memory for raw blocks that lie beside those in force for a moment, where there is room for them."""
        try:
            address = self._memory.device.allocate(self._memory.lot(seq, Tier.DEVICE, Format.RAW), blocks)
            seq.peak = seq.peak.peak_with(self._memory.measure(seq).plus_raw_device_blocks(self._memory.shape, blocks))
            return address, Tier.DEVICE
        except TierFullError:
            return self._memory.host.allocate(self._memory.lot(seq, Tier.HOST, Format.RAW), blocks), Tier.HOST

    def _commit_and_clear(self, seq: SequenceCache, target: Arrangement) -> None:
        """Commits, and gives back what was written for it and is not part of a table."""
        scratch = target.merging.scratch if target.merging else {}
        try:
            self._commits.commit(seq, target)
        except BaseException:
            for tier, address in scratch.items():
                self._memory.arenas[tier].release(address)
            raise
        for tier, address in scratch.items():
            self._memory.arenas[tier].release(without(address, target.blocks.on(tier)))
        if target.moved is not None:
            seq.merging = target.merging and replace(target.merging, scratch={})

    def _after(self, seq: SequenceCache, pipeline: Pipeline, occasion: Occasion) -> None:
        """Settles what a pipeline means for exactness and for reading, and drops a shadow that nothing needs."""
        self._readers.follow(seq, pipeline, anew=occasion is not Occasion.SETTLE)
        lossy = seq.evicted or bool(self._memory.tables.format[seq.slot][self._memory.valid(seq)].any())
        if (lossy or pipeline.reads_otherwise) and seq.exact_tokens is None:
            seq.exact_tokens = seq.seen
        if lossy and pipeline.loss_class is LossClass.PERMANENT:
            seq.lost = True
        self._noting.follow(seq, pipeline)
        if seq.shadow and not pipeline.wants_shadow:
            on_host = blocks_of(self._memory.tables, seq.slot).on(Tier.HOST)
            if len(self._memory.host.owned(on_host)) == len(on_host):
                self._copies.drop(seq)
            elif pipeline.loss_class is LossClass.PERMANENT:
                seq.shadow.hand_over(on_host)
                seq.shadow = None
            else:
                seq.shadow.trim(on_host)

    def _take_back(self, seq: SequenceCache) -> bool:
        """Withdraws published rows that only this request uses, so that a switch can free them. False: none there."""
        mine = [row for row in seq.prefix if row.users == 1]
        for row in mine:
            self._memory.prefixes.withdraw(row)
        seq.prefix = [row for row in seq.prefix if row.users]
        return bool(mine)
