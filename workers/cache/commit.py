"""The commit of a switch: all of an arrangement's blocks are built and its tables put in force, or nothing changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from kernels.api import I32, TokenSource
from kernels.layout import BlockFormat, Format, Tier
from workers.cache.arena import Lot
from workers.cache.arrangement import BUILD, Arrangement, Mask, Tokens, blocks_of, pick, restyle, tokens_of
from workers.cache.blocks import Notes, Owners
from workers.cache.copies import ExactCopies
from workers.cache.disk_tier import WRITE_BYTES
from workers.cache.formats import MOST_FORMATS, format_of
from workers.cache.inputs import Remaking
from workers.cache.memory import CacheMemory
from workers.cache.preparation import I64
from workers.cache.readers import Readers
from workers.cache.sequence_cache import SequenceCache
from workers.cache.staging import DamagedCacheError, needed
from workers.cache.style import Style, wanted

_NOTHING = np.zeros(0, np.int32)


class Commits:
    """Brings requests' blocks to where an arrangement has them."""

    def __init__(self, memory: CacheMemory, copies: ExactCopies, readers: Readers) -> None:
        self._memory = memory
        self._copies = copies
        self._readers = readers

    def commit(self, seq: SequenceCache, target: Arrangement) -> None:
        """Reserves, builds the new blocks beside the old, frees these, and swaps the tables.

        Raises:
            TierFullError: a tier lacks room for the result; nothing has changed.
            DamagedCacheError: blocks on disk are damaged beyond repair; likewise.
        """
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
        released = {tier: np.concatenate([without(now.on(tier), new.on(tier)), vain[tier]]) for tier in Tier}
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
                notes = self.notes(seq, fmt, layer[mine], head[mine], index[mine], target.moved)
                if direct[tier]:
                    new.address[mask] = self.build(seq, source, tier, fmt, owners[mine], notes)
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

    def build(
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

    def restyle(self, seq: SequenceCache, styles: Sequence[Style]) -> Arrangement:
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

    def _pieces(
        self, seq: SequenceCache, source: TokenSource, fmt: BlockFormat, owners: Owners, notes: Notes | None
    ) -> Iterator[torch.Tensor]:
        """New blocks in pieces of a size to be written at once."""
        most = max(1, WRITE_BYTES // self._memory.shape.block_bytes(fmt))
        for start in range(0, len(source.address), most):
            some = np.arange(start, min(start + most, len(source.address)))
            yield self._memory.sources(seq).encode(pick(source, some), fmt, owners[some], notes and notes[some])

    def notes(
        self, seq: SequenceCache, fmt: BlockFormat, layer: I64, head: I64, index: I64, moved: Tokens | None = None
    ) -> Notes | None:
        """See ``CacheMemory.notes``; partners, too, are exact where the copy has them."""
        notes = self._memory.notes(seq, fmt, layer, head, index, moved)
        if notes and notes.partners:
            self._copies.prefer(seq, *notes.partners, np.zeros(len(layer), np.uint8))
        return notes

    def _remaking(self, seq: SequenceCache, target: Arrangement) -> Remaking | None:
        """What is made again of the tables that are about to be in force. What was noted is of tokens that are stored
        as they were computed: it is dropped as soon as an evictor or a codec comes into force."""
        if not (seq.inputs and target.recomputed):
            return None
        position = self._memory.positions(seq) if target.moved is None else target.moved.position
        return seq.inputs.plan(target.blocks, position, target.recomputed)

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

    def _release_prefixes(self, seq: SequenceCache) -> None:
        """Stops counting as a user of published rows that its tables no longer refer to."""
        if not seq.prefix:
            return
        used = {lot.id for lot in self._memory.device.lots_of(blocks_of(self._memory.tables, seq.slot).on(Tier.DEVICE))}
        for row in seq.prefix:
            if row.lot.id not in used:
                row.users -= 1
        seq.prefix = [row for row in seq.prefix if row.lot.id in used]


def without(addresses: I32, others: I32) -> I32:
    """Those of the addresses that are not among the others."""
    # By sorting: numpy's choice for integers is a table over the whole range, and an arena's is wide.
    return addresses[np.isin(addresses, others, invert=True, kind="sort")]
