"""The KV cache of one worker: all requests' tables, tiers, exact copies, prefixes, and the switch transaction.

Used by the engine thread alone. Every method that can run out of memory raises TierFullError and then has changed
nothing that a reader could see. This is what others speak to; what it lives in, exact copies, readers and transactions
have files of their own (``memory``, ``copies``, ``readers``, ``transaction``, ``commit``, ``evacuation``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from kernels.api import F32
from kernels.layout import BLOCK_TOKENS, BlockFormat, Format, Tier
from workers.cache.accounting import CacheUse
from workers.cache.arena import Region, TierFullError
from workers.cache.arrangement import Tokens, block_count, blocks_of
from workers.cache.commit import Commits
from workers.cache.context import CacheContext, TokenContext
from workers.cache.copies import ExactCopies
from workers.cache.evacuation import Evacuation
from workers.cache.memory import CacheMemory
from workers.cache.noting import Noting
from workers.cache.prefix import PrefixRow
from workers.cache.preparation import Preparation, Slice
from workers.cache.readers import Readers
from workers.cache.reading import StepReading
from workers.cache.recalls import Recalls
from workers.cache.selection import Views
from workers.cache.sequence_cache import Occasion, SequenceCache
from workers.cache.shadow import Shadow
from workers.cache.staging import DamagedCacheError, needed
from workers.cache.style import styles_of, tiers_in
from workers.cache.transaction import Transactions
from workers.stages.base import LossClass, Pipeline


class KVCache(CacheMemory):
    """Cache of all requests of a worker; arguments as for :class:`CacheMemory`."""

    @cached_property
    def _copies(self) -> ExactCopies:
        return ExactCopies(self)

    @cached_property
    def _readers(self) -> Readers:
        return Readers(self)

    @cached_property
    def _noting(self) -> Noting:
        return Noting(self)

    @cached_property
    def _transactions(self) -> Transactions:
        return Transactions(self, self._copies, self._readers, self._noting, self._commits)

    @cached_property
    def _commits(self) -> Commits:
        return Commits(self, self._copies, self._readers)

    @cached_property
    def _evacuation(self) -> Evacuation:
        return Evacuation(self, self._copies, self._commits, self.abandon)

    # -- life of a request ---------------------------------------------------------------------------------------------

    def open(self, max_tokens: int) -> SequenceCache:
        """Starts an empty cache for a request of at most so many tokens. There must be a free slot."""
        slot = self._free_slots.pop()
        self.tables.length[slot] = 0
        self._open[slot] = SequenceCache(slot, max_tokens, recalls=Recalls(self.recalls))
        return self._open[slot]

    def close(self, seq: SequenceCache) -> None:
        """Gives back everything a request holds."""
        self.settle(seq)  # nothing of it may reach the slot's next owner
        self.abandon(seq)
        now = blocks_of(self.tables, seq.slot)
        while seq.areas:
            seq.areas.popitem()[1].close()
        self._noting.drop(seq)
        for tier, arena in self.by_tier.items():
            arena.release(now.on(tier))
        self.device.release(self.tables.address[seq.slot][self.beyond(seq, now.length)])
        seq.reserved = 0
        self._copies.drop(seq)
        for row in seq.prefix:
            row.users -= 1
        seq.prefix = []
        self._readers.stop_selecting(seq)
        self.tables.length[seq.slot] = 0
        self.recent.drop(seq.slot)
        del self._open[seq.slot]
        self._free_slots.append(seq.slot)
        if seq.origin:
            self._reclaim(seq.origin)

    def keep_rows(self, seq: SequenceCache, at_most: int) -> int:
        """Copies further exact rows of a request that has ended to its shadow, for :meth:`close_keeping`.

        Returns:
            Rows copied; fewer than ``at_most``: there are no more, the host has no room for them, or they are damaged.
        """
        self.abandon(seq)
        self._readers.stop_selecting(seq)
        have = seq.shadow.rows if seq.shadow else 0
        row_bytes = self.host.pages_needed(None, Format.RAW, self.row_blocks) * self.host.page_bytes
        rows = min(self._copies.exact_rows(seq) - have, self.host.room_bytes // row_bytes, at_most)
        if rows <= 0:
            return 0
        try:
            self._copies.extend(seq, rows)
        except DamagedCacheError:  # rows that were copied before stay
            return 0
        return rows

    def close_keeping(self, seq: SequenceCache, copy: bool = True) -> Shadow | None:
        """Closes a request's cache, all but its exact rows, which stay on the host tier in a shadow of their own.

        Exact are rows computed with the full cache that are raw in all tables, or in the request's shadow. Those behind
        the first one that is not are given back, and so is what the host has no room for.

        Args:
            seq: the request's cache.
            copy: False: keep only what the shadow has already.

        Returns:
            None: no row is kept.
        """
        self.abandon(seq)
        if copy:
            self.keep_rows(seq, seq.seen)
        rows = self._copies.exact_rows(seq)
        shadow, seq.shadow = seq.shadow, None
        self.close(seq)
        if shadow is None:
            return None
        shadow.cut(rows)
        return shadow if shadow.rows else None

    def note_row_mass(self, seq: SequenceCache) -> None:
        """Keeps the masses of a prompt that is computed up to its last whole row, for a later turn to start from."""
        seq.row_mass = self.tables.mass[seq.slot, :, :, : seq.seen].copy()

    def resume(self, seq: SequenceCache, shadow: Shadow, row_mass: F32 | None = None) -> int:
        """Starts an empty cache with the rows of a shadow, which becomes its own.

        Args:
            seq: the empty cache.
            shadow: the rows.
            row_mass: attention masses [L, H, tokens] of their tokens; None: 0.

        Returns:
            Tokens that need not be computed.
        """
        slot, rows = seq.slot, shadow.rows
        seq.shadow = shadow
        self.tables.address[slot, :, :, :rows] = shadow.address[:rows].transpose(1, 2, 0)
        self.tables.format[slot, :, :, :rows] = Format.RAW
        self.tables.tier[slot, :, :, :rows] = Tier.HOST
        self.advance(seq, rows * BLOCK_TOKENS)
        if row_mass is not None:
            self.tables.mass[slot, :, :, : seq.seen] = row_mass
        self.note_peak(seq)
        return rows * BLOCK_TOKENS

    def fork(self, seq: SequenceCache) -> SequenceCache:
        """A second cache with the same tokens, which goes its own way from here: only blocks that are not full yet are
        copied. While forks are open, the original may grow and be forked again, but not be switched or closed.

        Raises:
            TierFullError: there is no room for the copied blocks.
            ValueError: the original has an exact copy of its own, which two cannot share, or is about to be switched.
        """
        if seq.preparation:
            raise ValueError("a cache that is being prepared for another pipeline cannot be forked")
        if seq.shadow:
            raise ValueError("a cache with a shadow cannot be forked")
        self.settle(seq)
        now = blocks_of(self.tables, seq.slot)
        tail = now.valid & ~now.full
        lot = self.device.open_lot(Format.RAW)
        addresses = self.device.allocate(lot, int(tail.sum()))
        slot = self._free_slots[-1]
        fork = replace(
            seq, slot=slot, reserved=0, lots={}, prefix=[], prompt_votes=None, origin=seq, forks=0, lent=[], readers=()
        )
        fork.inputs = None
        fork.recalls, fork.areas = Recalls(self.recalls), {}
        try:
            for home in seq.areas:
                area = fork.areas[home] = self.area(fork, home)
                area.resize(needed(now, home))
                area.follow(now)
        except TierFullError:
            for area in fork.areas.values():
                area.close()
            self.device.release(addresses)
            raise
        self.backend.store(Tier.DEVICE, addresses, self.backend.load(Tier.DEVICE, now.address[tail], Format.RAW))
        tables = self.tables
        self._open[self._free_slots.pop()] = fork
        for name in ("address", "format", "tier", "length", "position", "mass", "votes"):
            values = getattr(tables, name)
            values[slot] = values[seq.slot]
        self.recent.copy(seq.slot, slot)
        tables.address[slot, :, :, : tail.shape[2]][tail] = addresses
        fork.novelty = list(seq.novelty)
        fork.lots[Tier.DEVICE, Format.RAW] = lot
        self._readers.read_coded(fork)
        if seq.selective:
            self._readers.select(fork, seq.selective.stage, seq.selective.format, anew=True)
        if not seq.forks:
            held = [arena.lots_of(now.on(tier)) for tier, arena in self.by_tier.items()]
            seq.lent = [lot for lots in held for lot in lots if not lot.borrowed]
        for lent in seq.lent:
            lent.borrowed = True
        seq.forks += 1
        return fork

    def _reclaim(self, origin: SequenceCache) -> None:
        """A fork was closed; after the last one the original owns its blocks again."""
        origin.forks -= 1
        if not origin.forks:
            for lot in origin.lent:
                lot.borrowed = False
            origin.lent = []

    def reuse_prefix(self, seq: SequenceCache, token_ids: Sequence[int]) -> int:
        """Starts an empty cache with published rows of the same prompt. Returns tokens that need not be computed.

        At least the last token is left to compute, for its logits.
        """
        rows = self.prefixes.match(token_ids, (len(token_ids) - 1) // BLOCK_TOKENS)
        for index, row in enumerate(rows):
            row.users += 1
            self.tables.address[seq.slot, :, :, index] = row.address
        self.tables.format[seq.slot, :, :, : len(rows)] = Format.RAW
        self.tables.tier[seq.slot, :, :, : len(rows)] = Tier.DEVICE
        seq.prefix = rows
        self.advance(seq, len(rows) * BLOCK_TOKENS)
        return len(rows) * BLOCK_TOKENS

    def publish(self, seq: SequenceCache, token_ids: Sequence[int]) -> None:
        """Offers the exact rows of these tokens to later requests."""
        exact = seq.seen if seq.exact_tokens is None else seq.exact_tokens
        rows = min(len(token_ids), exact, seq.seen) // BLOCK_TOKENS
        if seq.evicted or not rows:
            return
        tables, slot = self.tables, seq.slot
        parent: PrefixRow | None = None
        for index, name in enumerate(self.prefixes.names(token_ids, rows)):
            known = self.prefixes.get(name)
            if known is None:
                if tables.format[slot, :, :, index].any() or tables.tier[slot, :, :, index].any():
                    return
                address = tables.address[slot, :, :, index].copy()
                lots = self.device.lots_of(address.reshape(-1))
                if len(lots) > 1 or lots[0].borrowed or lots[0] is seq.lots.get((Tier.DEVICE, Format.RAW)):
                    return
                known = self.prefixes.publish(name, parent, address, lots[0])
                seq.prefix.append(known)
            parent = known

    def reserve(self, seq: SequenceCache, tokens: int) -> None:
        """Makes room for the next ``tokens`` tokens of every table; room that is already there counts.

        Raises:
            TierFullError: the device tier has too few pages.
        """
        slot, tables = seq.slot, self.tables
        length = tables.length[slot]
        before, after = block_count(length + seq.reserved), block_count(length + max(tokens, seq.reserved))
        grown = after - before
        if not grown.any():
            seq.reserved = max(tokens, seq.reserved)
            return
        first, rows = int(before.min()), int(grown.max())
        if (before == first).all() and (grown == rows).all():
            self.device.require(np.zeros(0, np.int32), [(None, Format.RAW, self.row_blocks)] * rows)
            for row in range(first, first + rows):
                fresh = self.device.allocate(self.device.open_lot(Format.RAW), self.row_blocks)
                tables.address[slot, :, :, row] = fresh.reshape(length.shape)
        else:
            index = np.arange(tables.address.shape[3])
            new = (index >= before[..., None]) & (index < after[..., None])
            lot = self.lot(seq, Tier.DEVICE, Format.RAW)
            tables.address[slot][new] = self.device.allocate(lot, int(grown.sum()))
        last = int(after.max())
        index = np.arange(first, last)
        new = (index >= before[..., None]) & (index < after[..., None])
        tables.format[slot, :, :, first:last][new] = Format.RAW
        tables.tier[slot, :, :, first:last][new] = Tier.DEVICE
        seq.reserved = tokens
        self.note_peak(seq, extra_rows=after - block_count(length))

    def advance(self, seq: SequenceCache, tokens: int) -> None:
        """Counts the next ``tokens`` tokens in; their keys and values are written by the forward pass that follows."""
        slot, tables = seq.slot, self.tables
        length = tables.length[slot]
        positions = np.arange(seq.seen, seq.seen + tokens, dtype=np.int32)
        start = int(length.flat[0])
        if (length == start).all():
            places: tuple[object, ...] = (slot, slice(None), slice(None), slice(start, start + tokens))
        else:
            layer, head = np.indices(length.shape)
            index = length[..., None] + np.arange(tokens)
            places = (slot, layer[..., None], head[..., None], index)
        tables.position[places] = positions  # type: ignore[index]
        tables.mass[places] = 0  # type: ignore[index]
        tables.votes[places] = 0  # type: ignore[index]
        length += tokens
        seq.seen += tokens
        seq.reserved = max(0, seq.reserved - tokens)

    def reading(self, sequences: Sequence[SequenceCache]) -> StepReading:
        """Readers of a decode step over these requests."""
        return self._readers.reading(sequences)

    def pool_bytes(self) -> int:
        """Device bytes of all pools of recalled blocks: what :meth:`give_up_pools` gives back."""
        return self._readers.pool_bytes()

    def give_up_pools(self, wanted_bytes: int) -> int:
        """See :meth:`Readers.give_up_pools`."""
        return self._readers.give_up_pools(wanted_bytes)

    def take_back(self, region: Region) -> bool:
        """Takes a lent region of the device arena back, and moves blocks that lie there.

        Returns:
            False: not now, nothing has changed. They have nowhere to go, or a switch is being prepared, which must find
            blocks where they were.
        """
        if any(seq.preparation for seq in self._open.values()):
            return False
        areas = [area for seq in self._open.values() for area in seq.areas.values() if area.tier is Tier.DEVICE]
        for area in areas:
            area.quiet()
        try:
            now = self.device.take_back(region)
        except TierFullError:
            return False
        on_device = self.tables.tier == Tier.DEVICE
        self.tables.address[on_device] = now(self.tables.address[on_device])
        self.prefixes.moved(now)
        self._readers.moved(now)
        for area in areas:
            area.moved(now)
        return True

    # -- reading -------------------------------------------------------------------------------------------------------

    def context(self, seq: SequenceCache) -> CacheContext:
        """Reader of what a request keeps, layer by layer: of a prompt that is being computed, its exact keys and
        values."""
        return CacheContext(self.sources(seq), blocks_of(self.tables, seq.slot), self.positions(seq), seq.selective)

    def exact_context(self, seq: SequenceCache, tokens: int) -> TokenContext | None:
        """See :meth:`ExactCopies.context`."""
        return self._copies.context(seq, tokens)

    def evacuate(self, seq: SequenceCache, pipeline: Pipeline | None = None) -> int:
        """See :meth:`Evacuation.evacuate`."""
        return self._evacuation.evacuate(seq, pipeline)

    def note_inputs(self, seq: SequenceCache, pipeline: Pipeline) -> None:
        """Has what layers are given for the keys and values of a request's coming tokens noted, if its pipeline, which
        may not be in force yet, makes blocks again from that."""
        self._noting.follow(seq, pipeline)

    # -- pipelines -----------------------------------------------------------------------------------------------------

    def apply(self, seq: SequenceCache, pipeline: Pipeline, occasion: Occasion) -> None:
        """See :meth:`Transactions.apply`."""
        self._transactions.apply(seq, pipeline, occasion)

    def begin(self, seq: SequenceCache, pipeline: Pipeline) -> Preparation:
        """See :meth:`Transactions.begin`."""
        return self._transactions.begin(seq, pipeline)

    def left_to_prepare(self, seq: SequenceCache) -> Counter[tuple[Tier, BlockFormat]]:
        """See :meth:`Transactions.left_to_prepare`."""
        return self._transactions.left_to_prepare(seq)

    def prepare(self, seq: SequenceCache, most: Callable[[Tier, BlockFormat], int]) -> Slice | None:
        """See :meth:`Transactions.prepare`."""
        return self._transactions.prepare(seq, most)

    def abandon(self, seq: SequenceCache) -> None:
        """See :meth:`Transactions.abandon`."""
        self._transactions.abandon(seq)

    def views(self, seq: SequenceCache, tokens: Tokens) -> Views:
        """See :meth:`Transactions.views`."""
        return self._transactions.views(seq, tokens)

    # -- accounting ----------------------------------------------------------------------------------------------------

    def use(self, seq: SequenceCache) -> CacheUse:
        """Bytes a request takes now, its peak included."""
        now = self.measure(seq)
        return now.with_peak(seq.peak)

    def loss_class(self, seq: SequenceCache, pipeline: Pipeline) -> LossClass:
        """The loss class of a request: its pipeline's, or permanent once something is gone."""
        return LossClass.PERMANENT if seq.lost else pipeline.loss_class

    def capacity_bytes(self) -> int:
        """Bytes of the raw rows that fit the tiers together, all lent that can be: what one request alone can take."""
        row_bytes = self.worst_bytes(1)
        return sum(arena.most_bytes // row_bytes for arena in self.arenas.values()) * row_bytes

    def device_tokens_at_least(self, seq: SequenceCache, fmt: BlockFormat) -> int:
        """Last tokens of the longest table that must stay on the device if the host tier takes all it has room for.

        Args:
            seq: the request.
            fmt: the format its older blocks would have on the host.
        """
        now = blocks_of(self.tables, seq.slot)
        rows = self.host.room_bytes // (self.host.pages_needed(None, fmt, self.row_blocks) * self.host.page_bytes)
        away = int((now.valid & (now.tier == Tier.HOST)).sum(axis=2).min())
        return max(0, -(-int(now.length.max(initial=0)) // BLOCK_TOKENS) - away - rows) * BLOCK_TOKENS

    def refuses(self, pipeline: Pipeline) -> str | None:
        """Why no request can have a pipeline here; None: they can, as far as there is room."""
        placer = pipeline.placer
        if placer and not self.disk and Tier.DISK in tiers_in(styles_of(pipeline, self.shape, 0, self.profile)):
            return f"stage {placer.name!r} needs a disk tier, and this worker has none (its disk_budget_bytes is 0)"
        if placer and pipeline.recomputed and self.remaker and self.remaker.refusal:
            return f"stage {placer.name!r} cannot make keys and values of this model again: {self.remaker.refusal}"
        if (lent := pipeline.lent_layers) > len(self.device.regions):
            return (
                f"stage {placer and placer.name!r} has {lent} layers lend their memory, and on this worker at most"
                f" {len(self.device.regions)} can (its lendable_layers)"
            )
        return None

    def note_scratch(self, seq: SequenceCache, scratch: SequenceCache) -> None:
        """Counts the raw device blocks of another cache, which works for this request, in its peak."""
        blocks = int(block_count(self.tables.length[scratch.slot] + scratch.reserved).sum())
        seq.peak = seq.peak.peak_with(self.measure(seq).plus_raw_device_blocks(self.shape, blocks))
