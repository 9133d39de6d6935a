"""The switch transaction: a request's blocks are brought to where a pipeline wants them, at once or not at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from kernels.api import I32, TokenSource
from kernels.layout import BLOCK_TOKENS, BlockFormat, Format, Tier
from workers.cache.arena import Lot, TierFullError
from workers.cache.arrangement import (
    BUILD,
    Arrangement,
    Mask,
    Merging,
    Tokens,
    block_count,
    blocks_of,
    pick,
    regroup,
    restyle,
    tokens_of,
)
from workers.cache.blocks import Notes, Owners
from workers.cache.copies import ExactCopies
from workers.cache.disk_tier import WRITE_BYTES
from workers.cache.formats import MOST_FORMATS, format_of
from workers.cache.inputs import Remaking
from workers.cache.memory import CacheMemory
from workers.cache.merging import merge
from workers.cache.noting import Noting
from workers.cache.preparation import I64, Preparation, Slice
from workers.cache.readers import Readers
from workers.cache.selection import Views, choose
from workers.cache.sequence_cache import Occasion, SequenceCache
from workers.cache.staging import DamagedCacheError, needed
from workers.cache.style import Style, off_device, tiers_in, wanted
from workers.stages.base import Evictor, LossClass, Pipeline


class Transactions:
    """Applies pipelines to requests, and prepares for it ahead."""

    def __init__(self, memory: CacheMemory, copies: ExactCopies, readers: Readers, noting: Noting) -> None:
        self._memory = memory
        self._copies = copies
        self._readers = readers
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
            seq.preparation.plan(self._restyle(seq, styles), by_shadow=copied and not seq.evicted)
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
        notes = self._notes(seq, piece.format, piece.layer, piece.head, piece.index)
        addresses = self._build(seq, piece.source, *kind, owners, notes, self._allocate_ahead)
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

    def _build(
        self,
        seq: SequenceCache,
        source: TokenSource,
        tier: Tier,
        fmt: BlockFormat,
        owners: Owners,
        notes: Notes | None,
        allocate: Callable[[Lot, Tier, int], I32] | None = None,
    ) -> I32:
        """Builds new blocks on a tier; on any error it is as if there had been none. Returns their addresses."""
        if tier is Tier.DISK:
            assert self._memory.disk is not None
            addresses = self._memory.disk.write(self._pieces(seq, source, fmt, owners, notes), fmt)
            self._memory.count_moves(seq, source, tier, fmt, addresses)
            return addresses
        lot, blocks = self._memory.lot(seq, tier, fmt), len(source.address)
        addresses = allocate(lot, tier, blocks) if allocate else self._memory.arenas[tier].allocate(lot, blocks)
        try:
            self._memory.sources(seq).transcode(source, fmt, tier, addresses, owners, notes)
        except BaseException:
            self._memory.arenas[tier].release(addresses)
            raise
        self._memory.count_moves(seq, source, tier, fmt)
        return addresses

    def _pieces(
        self, seq: SequenceCache, source: TokenSource, fmt: BlockFormat, owners: Owners, notes: Notes | None
    ) -> Iterator[torch.Tensor]:
        """New blocks in pieces of a size to be written at once."""
        most = max(1, WRITE_BYTES // self._memory.shape.block_bytes(fmt))
        for start in range(0, len(source.address), most):
            some = np.arange(start, min(start + most, len(source.address)))
            yield self._memory.sources(seq).encode(pick(source, some), fmt, owners[some], notes and notes[some])

    def evacuate(self, seq: SequenceCache, pipeline: Pipeline | None = None) -> int:
        """Moves a prompt's oldest finished rows to the host tier, as many as it has room for; returns how many.

        Without it, the device would hold the whole raw prompt before a pipeline that compresses it takes effect. Where
        ``pipeline`` will have them on disk, or off the device in some layers only, and needs no exact copy on the host,
        they go to their places at once, and whatever must leave the device after them too.
        """
        if seq.evicted and seq.shadow is None:  # rows are not whole any more
            return 0
        self.abandon(seq)
        if not (seq.shadow or (pipeline and pipeline.wants_shadow)):
            styles = self._memory.styles(seq, pipeline) if pipeline else (_TO_HOST,) * self._memory.shape.layers
            begun = bool(len(blocks_of(self._memory.tables, seq.slot).on(Tier.HOST)))
            by_layer = len({bool(style.places) for style in styles}) == 2
            ways = off_device(styles) if Tier.DISK in tiers_in(styles) else [styles] if begun or by_layer else []
            full = False
            for way in ways:
                try:
                    if moved := self._to_places(seq, way):
                        return moved
                except TierFullError:
                    full = True
            if begun or (ways and not full):
                return 0
        copied = seq.shadow.rows if seq.shadow else 0
        self._copies.extend(seq, at_most=self._memory.host.room_bytes // self._memory.worst_bytes(1))
        assert seq.shadow is not None
        device_tokens = seq.seen - seq.shadow.rows * BLOCK_TOKENS
        older_to_host = Style(places=((device_tokens, Tier.HOST),))
        self._commit(seq, self._restyle(seq, (older_to_host,) * self._memory.shape.layers))
        return seq.shadow.rows - copied

    def _to_places(self, seq: SequenceCache, styles: Sequence[Style]) -> int:
        """Moves a prompt's finished blocks to where these have them, raw, but no more than the host has room for.

        Returns:
            How many, as whole rows, rounded up.
        """
        now, heads = blocks_of(self._memory.tables, seq.slot), self._memory.shape.kv_heads
        row = heads * sum(Tier.HOST in tiers_in([style]) for style in styles)
        more = self._memory.host.room_bytes // self._memory.shape.block_bytes(Format.RAW) // max(1, row)
        there = (now.tier == Tier.HOST).sum(axis=(1, 2)) // heads  # [L] rows
        raw = []
        for style, rows in zip(styles, (there + more).tolist(), strict=True):
            least = {Tier.HOST: seq.seen - rows * BLOCK_TOKENS, Tier.DISK: 0}
            raw.append(Style(places=tuple((max(age, least[tier]), tier) for age, tier in style.places)))
        target = self._restyle(seq, raw)
        moved = int((target.blocks.tier != now.tier).sum())
        self._commit(seq, target)
        return -(-moved // self._memory.row_blocks)

    def _restyle(self, seq: SequenceCache, styles: Sequence[Style]) -> Arrangement:
        """The same tokens in these styles.

        A row's blocks share pages. Where some layers' leave the device, those that stay move together with others that
        do, so that pages become free, or nobody's but the index's if they are published and nobody else reads them.
        """
        now = blocks_of(self._memory.tables, seq.slot)
        if len({style.places for style in styles}) == 1:
            return restyle(now, self._memory.positions(seq), styles)
        _, tier = wanted(styles, now.length, now.address.shape[2])
        here = now.full & (now.tier == Tier.DEVICE)
        stays = here & (tier == Tier.DEVICE) & (here & (tier != Tier.DEVICE)).any(axis=(0, 1))
        device, address, own = self._memory.device, now.address[stays], seq.lots.get((Tier.DEVICE, Format.RAW))
        published = [row.lot for row in seq.prefix if row.users == 1]
        rows = [lot for lot in device.lots_of(address) if not lot.borrowed and lot is not own] + published
        stays[stays] = (now.format[stays] == Format.RAW) & device.among(address, rows)
        return restyle(now, self._memory.positions(seq), styles, anew=stays)

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
        return self._restyle(seq, styles)

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
            self._commit(seq, target)
        except BaseException:
            for tier, address in scratch.items():
                self._memory.arenas[tier].release(address)
            raise
        for tier, address in scratch.items():
            self._memory.arenas[tier].release(_without(address, target.blocks.on(tier)))
        if target.moved is not None:
            seq.merging = target.merging and replace(target.merging, scratch={})

    def _commit(self, seq: SequenceCache, target: Arrangement) -> None:
        if seq.damaged:
            raise DamagedCacheError("blocks on disk were damaged; the request's tokens are to be computed again")
        now, new = blocks_of(self._memory.tables, seq.slot), target.blocks
        self._copies.refer(seq, target)
        vain = seq.preparation.place(now, target) if seq.preparation else dict.fromkeys(Tier, _NOTHING)
        build = new.valid & (new.address == BUILD)
        layer, head, index = np.nonzero(build)
        owners = Owners(layer, head, target.source_position)
        self._copies.prefer(seq, target.source, owners, new.format[build])
        groups: dict[tuple[Tier, BlockFormat], Mask] = {}
        for code in np.unique(new.tier[build].astype(int) * MOST_FORMATS + new.format[build]).tolist():
            tier, fmt = Tier(code // MOST_FORMATS), format_of(code % MOST_FORMATS)
            groups[tier, fmt] = build & (new.tier == tier) & (new.format == fmt)
        released = {tier: np.concatenate([_without(now.on(tier), new.on(tier)), vain[tier]]) for tier in Tier}
        wanted = {key: int(mask.sum()) for key, mask in groups.items()}
        raw_device, beyond = (Tier.DEVICE, Format.RAW), self._memory.beyond(seq, new.length)
        if target.moved is not None and seq.reserved:  # other ends of tables: the room behind them moves along
            spare = self._memory.tables.address[seq.slot][self._memory.beyond(seq, now.length)]
            released[Tier.DEVICE] = np.concatenate([released[Tier.DEVICE], spare])
            wanted[raw_device] = wanted.get(raw_device, 0) + int(beyond.sum())
        fetched = [Tier.DISK, *([Tier.HOST] if target.fetches else [])]
        rooms = {home: room for home in fetched if (room := needed(new, home))}
        remaking = self._remaking(seq, target)
        if remaking:
            rooms[Tier.HOST][Format.RAW] += remaking.beyond
        areas = {home: seq.areas.get(home) or self._memory.area(seq, home) for home in {**seq.areas, **rooms}}
        for home, area in areas.items():
            surplus = area.surplus(rooms.get(home, {}))
            released[area.tier] = np.concatenate([released[area.tier], surplus])
        direct = {}
        for tier, arena in self._memory.by_tier.items():
            here = [(seq.lots.get(key), key[1], blocks) for key, blocks in wanted.items() if key[0] is tier]
            for home, area in areas.items():
                here += area.missing(rooms.get(home, {})) if area.tier is tier else []
            arena.require(released[tier], here)
            direct[tier] = tier is Tier.DISK or self._memory.arenas[tier].has_room(here)

        of_build = np.cumsum(build.reshape(-1)) - 1  # place of each block to build among the sources
        built, done = {}, []
        try:
            for (tier, fmt), mask in sorted(groups.items(), key=lambda group: group[0], reverse=True):  # disks may fail
                mine = of_build[mask.reshape(-1)]
                source = pick(target.source, mine)
                notes = self._notes(seq, fmt, layer[mine], head[mine], index[mine], target.moved)
                if direct[tier]:
                    new.address[mask] = self._build(seq, source, tier, fmt, owners[mine], notes)
                    done.append((tier, new.address[mask]))
                else:  # what is given back makes the room: a copy waits elsewhere until then
                    built[tier, fmt] = self._memory.sources(seq).encode(source, fmt, owners[mine], notes)
                    self._memory.count_moves(seq, source, tier, fmt)
        except BaseException:
            for tier, addresses in done:
                self._memory.by_tier[tier].release(addresses)
            raise
        if target.moved is not None and seq.shadow is not None:
            before = tokens_of(self._memory.tables, seq.slot)
            seq.shadow.remember(before.position, before.valid, before.mass, before.votes)

        for area in areas.values():
            area.quiet()
        for tier, arena in self._memory.by_tier.items():
            arena.release(released[tier])
        for (tier, fmt), blocks in built.items():
            addresses = self._memory.arenas[tier].allocate(self._memory.lot(seq, tier, fmt), len(blocks))
            self._memory.backend.store(tier, addresses, blocks)
            new.address[groups[tier, fmt]] = addresses
        for home, area in areas.items():
            area.resize(rooms.get(home, {}))
            area.follow(new, remaking if home is Tier.HOST and seq.inputs else None)  # they may have given way
        seq.areas = {home: areas[home] for home in rooms}
        self._swap_tables(seq, target)
        if target.moved is not None and beyond.any():
            tables, lot = self._memory.tables, self._memory.lot(seq, *raw_device)
            tables.address[seq.slot][beyond] = self._memory.device.allocate(lot, int(beyond.sum()))
            tables.format[seq.slot][beyond], tables.tier[seq.slot][beyond] = Format.RAW, Tier.DEVICE
        self._release_prefixes(seq)
        self._readers.read_coded(seq)
        self._memory.note_peak(seq)

    def _remaking(self, seq: SequenceCache, target: Arrangement) -> Remaking | None:
        """What is made again of the tables that are about to be in force. What was noted is of tokens that are stored
        as they were computed: it is dropped as soon as an evictor or a codec comes into force."""
        if not (seq.inputs and target.recomputed):
            return None
        position = self._memory.positions(seq) if target.moved is None else target.moved.position
        return seq.inputs.plan(target.blocks, position, target.recomputed)

    def _notes(
        self, seq: SequenceCache, fmt: BlockFormat, layer: I64, head: I64, index: I64, moved: Tokens | None = None
    ) -> Notes | None:
        """See ``CacheMemory.notes``; partners, too, are exact where the copy has them."""
        notes = self._memory.notes(seq, fmt, layer, head, index, moved)
        if notes and notes.partners:
            self._copies.prefer(seq, *notes.partners, np.zeros(len(layer), np.uint8))
        return notes

    def _swap_tables(self, seq: SequenceCache, target: Arrangement) -> None:
        tables, slot, blocks = self._memory.tables, seq.slot, target.blocks
        width = blocks.address.shape[2]
        tables.address[slot, :, :, :width] = blocks.address
        tables.format[slot, :, :, :width] = blocks.format
        tables.tier[slot, :, :, :width] = blocks.tier
        tables.length[slot] = blocks.length
        if target.moved is not None:
            count = target.moved.position.shape[2]
            tables.position[slot, :, :, :count] = target.moved.position
            tables.mass[slot, :, :, :count] = target.moved.mass
            tables.votes[slot, :, :, :count] = target.moved.votes
            seq.evicted = bool((blocks.length < seq.seen).any())

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

    def _release_prefixes(self, seq: SequenceCache) -> None:
        """Stops counting as a user of published rows that its tables no longer refer to."""
        if not seq.prefix:
            return
        used = {lot.id for lot in self._memory.device.lots_of(blocks_of(self._memory.tables, seq.slot).on(Tier.DEVICE))}
        for row in seq.prefix:
            if row.lot.id not in used:
                row.users -= 1
        seq.prefix = [row for row in seq.prefix if row.lot.id in used]


_NOTHING = np.zeros(0, np.int32)
_TO_HOST = Style(places=((0, Tier.HOST),))


def _without(addresses: I32, others: I32) -> I32:
    """Those of the addresses that are not among the others."""
    # By sorting: numpy's choice for integers is a table over the whole range, and an arena's is wide.
    return addresses[np.isin(addresses, others, invert=True, kind="sort")]
