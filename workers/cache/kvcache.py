"""The KV cache of one worker: all requests' tables, both tiers, shadows, prefixes, and the switch transaction.

Used by the engine thread alone. Every method that can run out of memory raises TierFullError and then has changed
nothing that a reader could see.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from typing import Any

import numpy as np
import torch

from kernels.api import F32, I32, U8, Backend, Tables, TokenSource
from kernels.backends import make_backend
from kernels.layout import BLOCK_TOKENS, BlockFormat, CacheShape, Format, Tier
from workers.cache.accounting import CacheUse, measure
from workers.cache.arena import Arena, Lot, TierFullError
from workers.cache.arrangement import (
    BUILD,
    Arrangement,
    Blocks,
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
from workers.cache.blocks import BlockStore, Notes, Owners, whole_blocks
from workers.cache.coded import CodedReader
from workers.cache.disk import DiskStore
from workers.cache.disk_tier import WRITE_BYTES, DiskTier
from workers.cache.formats import MOST_FORMATS, format_of
from workers.cache.merging import merge
from workers.cache.near import NearReader
from workers.cache.pool import RecallCounts
from workers.cache.prefix import PrefixIndex, PrefixRow
from workers.cache.preparation import I64, Preparation, Slice
from workers.cache.reading import Reader, StepReading
from workers.cache.recall import SelectiveReader
from workers.cache.recent import RecentQueries
from workers.cache.selection import Queries, Views, choose
from workers.cache.shadow import Shadow
from workers.cache.staging import DamagedCacheError, Recalls, Sources, Staging, needed
from workers.cache.style import Style, largest_format, off_device, styles_of, tiers_in
from workers.profile.profile import ModelProfile
from workers.stages.base import Evictor, LossClass, Pipeline
from workers.stages.selecting import Selector


class Occasion(Enum):
    """Why a pipeline is applied: the prompt is complete, another one took over, or 32 more tokens have come."""

    PROMPT = "prompt"
    SWITCH = "switch"
    SETTLE = "settle"


@dataclass
class SequenceCache:
    """One request's share of the cache. Changed by :class:`KVCache` only."""

    slot: int
    max_tokens: int
    seen: int = 0
    """Tokens stored so far, kept or not."""
    reserved: int = 0
    """Tokens that every table has room for, but that are not counted in yet."""
    evicted: bool = False
    """Whether its tables lack tokens."""
    lost: bool = False
    """Whether something was dropped or rounded for good."""
    exact_tokens: int | None = None
    """Tokens computed before the first lossy pipeline; None while all are."""
    shadow: Shadow | None = None
    lots: dict[tuple[Tier, BlockFormat], Lot] = field(default_factory=dict)
    prefix: list[PrefixRow] = field(default_factory=list)
    prompt_votes: F32 | None = None
    """[L, H, prompt tokens] votes while the prompt is computed, in full precision: a sum over several chunks, rounded
    as often, would depend on where the prompt is cut."""
    reconstruction: F32 | None = None
    """[L, H, positions] the most attention each of the first tokens received while the model repeated the text; None
    until then. Replaced, never changed: forks share it."""
    novelty: list[float] = field(default_factory=list)
    """[positions] surprise -log p of each token when it came, NaN where it was not noted, the rest likewise."""
    merging: Merging | None = None
    """What its tokens have taken up of evicted ones, since all were last as they had been computed. Replaced, never
    changed."""
    row_mass: F32 | None = None
    """[L, H, T] attention mass that the queries of the first T tokens pay, T being the prompt's whole rows."""
    peak: CacheUse = field(default_factory=CacheUse)
    preparation: Preparation | None = None
    """The switch that is being prepared."""
    origin: SequenceCache | None = None
    """The cache it is a fork of."""
    forks: int = 0
    """Open forks of it."""
    lent: list[Lot] = field(default_factory=list)
    """Its own lots, which its forks read."""
    readers: tuple[Reader, ...] = ()
    """What reads it in decode steps, beside or before the kernels."""
    coded: CodedReader | None = None
    """What reads its blocks that kernels do not know, after the readers."""
    staging: Staging | None = None
    """Where its blocks on disk pass through; None: it has none."""

    @property
    def damaged(self) -> bool:
        """Whether something of it is gone from the disk for good, so that its tokens must be computed again."""
        return self.staging is not None and self.staging.damaged

    def note_surprises(self, position: int, surprises: Sequence[float]) -> None:
        """Notes the surprises of the tokens from ``position`` on, for evictors that go by novelty."""
        del self.novelty[position:]
        self.novelty.extend([float("nan")] * (position - len(self.novelty)))
        self.novelty.extend(surprises)

    @property
    def selective(self) -> SelectiveReader | None:
        """The one of its readers that has queries read only some blocks."""
        return next((reader for reader in self.readers if isinstance(reader, SelectiveReader)), None)


class KVCache:
    """Cache of all requests of a worker.

    Args:
        shape: the model's cache dimensions.
        device_bytes, host_bytes: tier budgets, rounded down to whole pages.
        slots: most requests at once.
        max_tokens: longest request.
        model: name that prefixes are hashed with.
        device: where the device tier lives.
        backend: kernel backend, see ``kernels.backends``.
        profile: the model's, for stages that need it.
        disk: files of the disk tier; None: there is no such tier.
    """

    def __init__(
        self,
        shape: CacheShape,
        device_bytes: int,
        host_bytes: int,
        slots: int,
        max_tokens: int,
        model: str,
        device: torch.device,
        backend: str = "auto",
        profile: ModelProfile | None = None,
        disk: DiskStore | None = None,
    ) -> None:
        self.shape = shape
        self.profile = profile
        self.device = Arena(Tier.DEVICE, device_bytes, shape, device)
        self.host = Arena(Tier.HOST, host_bytes, shape, torch.device("cpu"))
        self.tables = Tables.allocate(slots, shape, max_tokens)
        self.backend: Backend = make_backend(backend, shape, (self.device.data, self.host.data), self.tables)
        nothing = torch.empty(0, dtype=torch.uint8)
        self._near = make_backend("cpu", shape, (nothing, self.host.data), self.tables)
        """Kernels beside the host tier, which read nothing else."""
        self.blocks = BlockStore(backend, self.backend, profile)
        self.prefixes = PrefixIndex(self.device, model)
        self.recent = RecentQueries(shape, device)
        self.recalled = RecallCounts()
        self._selecting: dict[int, SelectiveReader] = {}  # by slot
        self.scaling = shape.head_dim**-0.5
        """The model's factor on attention scores; its attention says if it is another one."""
        self.catalyse: Callable[[SequenceCache], Queries] | None = None
        """Runs a catalyst prompt behind a request, without a trace, and gives its queries; None: no model, or none
        that has words. The last queries then stand in."""
        self.disk = DiskTier(disk, shape) if disk else None
        self.recalls = Recalls()
        self._arenas = {Tier.DEVICE: self.device, Tier.HOST: self.host}
        self._tiers: dict[Tier, Arena | DiskTier] = {**self._arenas, **({Tier.DISK: self.disk} if self.disk else {})}
        self._free_slots = list(range(slots - 1, -1, -1))
        self._row_blocks = shape.layers * shape.kv_heads

    @property
    def tiers(self) -> tuple[Arena | DiskTier, ...]:
        """What blocks live on, the fastest first."""
        return tuple(self._tiers.values())

    # -- life of a request ---------------------------------------------------------------------------------------------

    def open(self, max_tokens: int) -> SequenceCache:
        """Starts an empty cache for a request of at most so many tokens. There must be a free slot."""
        slot = self._free_slots.pop()
        self.tables.length[slot] = 0
        return SequenceCache(slot, max_tokens)

    def close(self, seq: SequenceCache) -> None:
        """Gives back everything a request holds."""
        self.settle(seq)  # nothing of it may reach the slot's next owner
        self.abandon(seq)
        now = blocks_of(self.tables, seq.slot)
        if seq.staging:
            seq.staging.close()
            seq.staging = None
        for tier, arena in self._tiers.items():
            arena.release(now.on(tier))
        self.device.release(self.tables.address[seq.slot][self._beyond(seq, now.length)])
        seq.reserved = 0
        self._drop_shadow(seq)
        for row in seq.prefix:
            row.users -= 1
        seq.prefix = []
        self._stop_selecting(seq)
        self.tables.length[seq.slot] = 0
        self.recent.drop(seq.slot)
        self._free_slots.append(seq.slot)
        if seq.origin:
            self._reclaim(seq.origin)

    def keep_rows(self, seq: SequenceCache, at_most: int) -> int:
        """Copies further exact rows of a request that has ended to its shadow, for :meth:`close_keeping`.

        Returns:
            Rows copied; fewer than ``at_most``: there are no more, the host has no room for them, or they are damaged.
        """
        self.abandon(seq)
        self._stop_selecting(seq)
        have = seq.shadow.rows if seq.shadow else 0
        row_bytes = self.host.pages_needed(None, Format.RAW, self._row_blocks) * self.host.page_bytes
        rows = min(self._exact_rows(seq) - have, self.host.room_bytes // row_bytes, at_most)
        if rows <= 0:
            return 0
        try:
            self._extend_shadow(seq, rows)
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
        rows = self._exact_rows(seq)
        shadow, seq.shadow = seq.shadow, None
        self.close(seq)
        if shadow is None:
            return None
        shadow.cut(rows)
        return shadow if shadow.rows else None

    def _exact_rows(self, seq: SequenceCache) -> int:
        """Rows from the first on that are as the full cache computed them, in all tables or in the shadow."""
        exact = seq.seen if seq.exact_tokens is None else seq.exact_tokens
        return min(exact // BLOCK_TOKENS, max(seq.shadow.rows if seq.shadow else 0, self._raw_rows(seq)))

    def _raw_rows(self, seq: SequenceCache) -> int:
        """Rows from the first on that all tables hold raw, and nothing was evicted from."""
        if seq.evicted:
            return 0
        rows = seq.seen // BLOCK_TOKENS
        rounded = (self.tables.format[seq.slot, :, :, :rows] != Format.RAW).any(axis=(0, 1))
        return int(rounded.argmax()) if rounded.any() else rows

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
        self._note_peak(seq)
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
        if seq.staging:
            fork.staging = self._staging(fork)
            try:
                fork.staging.resize(needed(now))
            except TierFullError:
                fork.staging.close()
                self.device.release(addresses)
                raise
            fork.staging.follow(now)
        self.backend.store(Tier.DEVICE, addresses, self.backend.load(Tier.DEVICE, now.address[tail], Format.RAW))
        tables = self.tables
        self._free_slots.pop()
        for name in ("address", "format", "tier", "length", "position", "mass", "votes"):
            values = getattr(tables, name)
            values[slot] = values[seq.slot]
        self.recent.copy(seq.slot, slot)
        tables.address[slot, :, :, : tail.shape[2]][tail] = addresses
        fork.novelty = list(seq.novelty)
        fork.lots[Tier.DEVICE, Format.RAW] = lot
        self._read_coded(fork)
        if seq.selective:
            self._select(fork, seq.selective.stage, seq.selective.pool.format, anew=True)
        if not seq.forks:
            held = [arena.lots_of(now.on(tier)) for tier, arena in self._tiers.items()]
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

    # -- growth --------------------------------------------------------------------------------------------------------

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
            self.device.require(_NOTHING, [(None, Format.RAW, self._row_blocks)] * rows)
            for row in range(first, first + rows):
                fresh = self.device.allocate(self.device.open_lot(Format.RAW), self._row_blocks)
                tables.address[slot, :, :, row] = fresh.reshape(length.shape)
        else:
            index = np.arange(tables.address.shape[3])
            new = (index >= before[..., None]) & (index < after[..., None])
            lot = self._lot(seq, Tier.DEVICE, Format.RAW)
            tables.address[slot][new] = self.device.allocate(lot, int(grown.sum()))
        last = int(after.max())
        index = np.arange(first, last)
        new = (index >= before[..., None]) & (index < after[..., None])
        tables.format[slot, :, :, first:last][new] = Format.RAW
        tables.tier[slot, :, :, first:last][new] = Tier.DEVICE
        seq.reserved = tokens
        self._note_peak(seq, extra_rows=after - block_count(length))

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

    def settle(self, seq: SequenceCache) -> None:
        """Brings the request's masses and votes in the tables up to date with the steps it has taken part in."""
        self.backend.settle(np.array([seq.slot], np.int32))
        if seq.coded:
            seq.coded.settle()

    def reading(self, sequences: Sequence[SequenceCache]) -> StepReading:
        """Readers of a decode step over these requests."""
        coded = {row: seq.coded for row, seq in enumerate(sequences) if seq.coded}
        readers = {
            row: tuple(reader for reader in (seq.staging, *seq.readers, seq.coded) if reader)
            for row, seq in enumerate(sequences)
        }
        return StepReading(readers, len(sequences), self.shape, coded)

    def context(self, seq: SequenceCache) -> CacheContext:
        """Reader of what a request keeps, layer by layer: of a prompt that is being computed, its exact keys and
        values."""
        return CacheContext(self.sources(seq), blocks_of(self.tables, seq.slot), self._positions(seq), seq.selective)

    def sources(self, seq: SequenceCache) -> Sources:
        """Reads and rebuilds a request's tokens wherever they are."""
        return Sources(self.blocks, seq.staging)

    def exact_context(self, seq: SequenceCache, tokens: int) -> TokenContext | None:
        """Reader of the exact keys and values of a request's first ``tokens`` tokens, kept or not. Changes nothing.

        Whole rows come from the shadow where there is one, all other tokens from the tables.

        Returns:
            None where something was rounded or dropped that the shadow does not have.
        """
        if seq.lost:
            return None
        tables, slot, heads = self.tables, seq.slot, (self.shape.layers, self.shape.kv_heads)
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
        return TokenContext(self.sources(seq), address, fmt, tier, row, tokens)

    def evacuate(self, seq: SequenceCache, pipeline: Pipeline | None = None) -> int:
        """Moves a prompt's oldest finished rows to the host tier, as many as it has room for; returns how many.

        Without it, the device would hold the whole raw prompt before a pipeline that compresses it takes effect. Where
        ``pipeline`` will have them on disk and needs no exact copy on the host, they go there at once.
        """
        if seq.evicted and seq.shadow is None:  # rows are not whole any more
            return 0
        self.abandon(seq)
        styles = self.styles(seq, pipeline) if pipeline else ()
        if pipeline and not pipeline.wants_shadow and not seq.shadow and Tier.DISK in tiers_in(styles):
            for away in off_device(styles):
                try:
                    return self._to_disk(seq, away)
                except TierFullError:
                    continue  # in the end, as far as the host has room
        away = seq.shadow.rows if seq.shadow else 0
        self._extend_shadow(seq, at_most=self.host.room_bytes // self.worst_bytes(1))
        assert seq.shadow is not None
        now = blocks_of(self.tables, seq.slot)
        device_tokens = seq.seen - seq.shadow.rows * BLOCK_TOKENS
        older_to_host = Style(places=((device_tokens, Tier.HOST),))
        self._commit(seq, restyle(now, self._positions(seq), [older_to_host] * self.shape.layers))
        return seq.shadow.rows - away

    def _to_disk(self, seq: SequenceCache, styles: Sequence[Style]) -> int:
        """Moves a prompt's finished rows off the device, some of them to disk; returns how many."""
        now = blocks_of(self.tables, seq.slot)
        self._commit(seq, restyle(now, self._positions(seq), styles))
        left = (now.tier == Tier.DEVICE) & (blocks_of(self.tables, seq.slot).tier != Tier.DEVICE)
        return int(left.sum()) // self._row_blocks

    # -- pipelines -----------------------------------------------------------------------------------------------------

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
        self.settle(seq)
        seq.preparation = seq.preparation or Preparation(pipeline, seq.shadow.rows if seq.shadow else None)
        try:
            if self._to_be_copied(seq, pipeline):
                self._copy_rows(seq, pipeline)
            while True:
                try:
                    self._commit_and_clear(seq, self._arrange(seq, pipeline, occasion))
                    break
                except TierFullError as full:
                    missing_bytes = full.needed_bytes - full.free_bytes
                    if full.tier is not Tier.DEVICE or not (self.prefixes.drop(missing_bytes) or self._take_back(seq)):
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
        copied = self._to_be_copied(seq, pipeline)
        if copied:
            seq.preparation.copied_rows = seq.seen // BLOCK_TOKENS
        if not (pipeline.evictor or (seq.evicted and seq.shadow)):
            styles = self.styles(seq, pipeline)
            target = restyle(blocks_of(self.tables, seq.slot), self._positions(seq), styles)
            seq.preparation.plan(target, by_shadow=copied and not seq.evicted)
        return seq.preparation

    def left_to_prepare(self, seq: SequenceCache) -> Counter[tuple[Tier, BlockFormat]]:
        """Blocks that :meth:`prepare` has yet to build, by tier and format."""
        assert seq.preparation is not None
        left = seq.preparation.left()
        rows = seq.preparation.copied_rows - (seq.shadow.rows if seq.shadow else 0)
        if rows > 0:
            left[Tier.HOST, Format.RAW] += rows * self._row_blocks
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
            at_most = max(1, most(Tier.HOST, Format.RAW) // self._row_blocks)
            self._copy_rows(seq, preparation.pipeline, min(at_most, preparation.copied_rows - rows))
            assert seq.shadow is not None
            if seq.shadow.rows == rows:  # no room for a copy that is about to be given up
                preparation.copied_rows = rows
            return Slice(Tier.HOST, Format.RAW, (seq.shadow.rows - rows) * self._row_blocks)
        kind = preparation.next_kind
        if kind is None:
            return None
        piece = preparation.next_piece(max(1, most(*kind)))
        blocks = len(piece.layer)
        owners = Owners(piece.layer, piece.head, piece.position)
        self._prefer_exact(seq, piece.source, owners, np.full(blocks, piece.format, np.uint8))
        notes = self._notes(seq, piece.format, piece.layer, piece.head, piece.index)
        addresses = self._build(seq, piece.source, *kind, owners, notes, self._allocate_ahead)
        preparation.add(addresses)
        self._note_peak(seq)
        return Slice(piece.tier, piece.format, blocks)

    def abandon(self, seq: SequenceCache) -> None:
        """Gives back what was built ahead of a switch: the request is as if there had been none."""
        preparation, seq.preparation = seq.preparation, None
        if preparation is None:
            return
        for tier, arena in self._tiers.items():
            arena.release(preparation.on(tier))
        if preparation.shadow_rows is None:
            self._drop_shadow(seq)
        elif seq.shadow:
            seq.shadow.cut(preparation.shadow_rows)

    def _allocate_ahead(self, lot: Lot, tier: Tier, blocks: int) -> I32:
        """Memory for blocks beside those in force, at the cost of prefixes that nobody uses."""
        while True:
            try:
                return self._arenas[tier].allocate(lot, blocks)
            except TierFullError as full:
                if tier is not Tier.DEVICE or not self.prefixes.drop(full.needed_bytes - full.free_bytes):
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
        self._count_moves(source, tier, fmt)
        if tier is Tier.DISK:
            assert self.disk is not None
            return self.disk.write(self._pieces(seq, source, fmt, owners, notes), fmt)
        lot, blocks = self._lot(seq, tier, fmt), len(source.address)
        addresses = allocate(lot, tier, blocks) if allocate else self._arenas[tier].allocate(lot, blocks)
        try:
            self.sources(seq).transcode(source, fmt, tier, addresses, owners, notes)
        except BaseException:
            self._arenas[tier].release(addresses)
            raise
        return addresses

    def _pieces(
        self, seq: SequenceCache, source: TokenSource, fmt: BlockFormat, owners: Owners, notes: Notes | None
    ) -> Iterator[torch.Tensor]:
        """New blocks in pieces of a size to be written at once."""
        most = max(1, WRITE_BYTES // self.shape.block_bytes(fmt))
        for start in range(0, len(source.address), most):
            some = np.arange(start, min(start + most, len(source.address)))
            yield self.sources(seq).encode(pick(source, some), fmt, owners[some], notes and notes[some])

    def _count_moves(self, source: TokenSource, tier: Tier, fmt: BlockFormat) -> None:
        """Blocks by where they come from and where they go, in bytes of what is stored there."""
        for origin, blocks in zip(*np.unique(source.tier[:, 0], return_counts=True), strict=True):
            self.recalls.moved_bytes[Tier(origin), tier] += int(blocks) * self.shape.block_bytes(fmt)

    def views(self, seq: SequenceCache, tokens: Tokens) -> Views:
        """What evictors may look at of these tokens of a request."""
        return Views(
            tokens,
            seq.seen,
            self.scaling,
            self.sources(seq),
            partial(self.recent.read, seq.slot),
            self.device.data.device,
            self.profile,
            seq.reconstruction,
            seq.novelty,
        )

    def _arrange(self, seq: SequenceCache, pipeline: Pipeline, occasion: Occasion) -> Arrangement:
        evictor, styles = pipeline.evictor, self.styles(seq, pipeline)
        going_on = evictor is not None and evictor.evicts_while_prefilling and occasion is Occasion.PROMPT
        settle = occasion is Occasion.SETTLE or going_on
        restore = seq.evicted and not settle and seq.shadow is not None and seq.shadow.covers(seq.seen)
        if evictor and (not settle or evictor.evicts_while_decoding):
            tokens = self._everything(seq) if restore else tokens_of(self.tables, seq.slot)
            views = self.views(seq, tokens)
            full = int(tokens.valid.sum(axis=2).max(initial=0)) > evictor.budget(seq.seen)
            if evictor.evicts_while_prefilling and self.catalyse and full:
                views = replace(views, queries=self.catalyse(seq))
            keep = choose(evictor, views)
            if restore or not keep[tokens.valid].all():
                merging = None if restore else seq.merging
                if evictor.merges and not keep[tokens.valid].all():
                    merging = self._merge(seq, evictor, views, keep, merging)
                target = regroup(tokens, keep, styles)
                target.merging = merging
                return target
        elif restore:
            tokens = self._everything(seq)
            return regroup(tokens, tokens.valid, styles)
        return restyle(blocks_of(self.tables, seq.slot), self._positions(seq), styles)

    def _merge(self, seq: SequenceCache, evictor: Evictor, views: Views, keep: Mask, before: Merging | None) -> Merging:
        """Writes what the kept tokens become to blocks of their own, and has the views' tokens read from there."""
        tokens, heads = views.tokens, (self.shape.layers, self.shape.kv_heads)
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
        whole = torch.zeros(2, len(address) * BLOCK_TOKENS, self.shape.head_dim).to(found.k)
        whole[0, :count], whole[1, :count] = found.k, found.v
        payload = whole.view(2, len(address), -1).transpose(0, 1).flatten(1).view(torch.uint8)
        padding = self.shape.block_bytes(Format.RAW) - payload.shape[1]
        self.backend.store(tier, address, torch.nn.functional.pad(payload, (0, padding)))
        at = np.arange(count)
        tokens.row = tokens.row.copy()  # it may be a view that repeats one row
        tokens.address[found.place] = address[at // BLOCK_TOKENS]
        tokens.row[found.place] = (at % BLOCK_TOKENS).astype(np.uint8)
        tokens.format[found.place], tokens.tier[found.place] = Format.RAW, tier
        return Merging(merged, found.threshold, {tier: address})

    def _allocate_scratch(self, seq: SequenceCache, blocks: int) -> tuple[I32, Tier]:
        """Memory for raw blocks that lie beside those in force for a moment, where there is room for them."""
        try:
            address = self.device.allocate(self._lot(seq, Tier.DEVICE, Format.RAW), blocks)
            seq.peak = seq.peak.peak_with(self._measure(seq).plus_raw_device_blocks(self.shape, blocks))
            return address, Tier.DEVICE
        except TierFullError:
            return self.host.allocate(self._lot(seq, Tier.HOST, Format.RAW), blocks), Tier.HOST

    def _commit_and_clear(self, seq: SequenceCache, target: Arrangement) -> None:
        """Commits, and gives back what was written for it and is not part of a table."""
        scratch = target.merging.scratch if target.merging else {}
        try:
            self._commit(seq, target)
        except BaseException:
            for tier, address in scratch.items():
                self._arenas[tier].release(address)
            raise
        for tier, address in scratch.items():
            self._arenas[tier].release(_without(address, target.blocks.on(tier)))
        if target.moved is not None:
            seq.merging = target.merging and replace(target.merging, scratch={})

    def _commit(self, seq: SequenceCache, target: Arrangement) -> None:
        if seq.damaged:
            raise DamagedCacheError("blocks on disk were damaged; the request's tokens are to be computed again")
        now, new = blocks_of(self.tables, seq.slot), target.blocks
        self._refer_to_shadow(seq, target)
        vain = seq.preparation.place(now, target) if seq.preparation else dict.fromkeys(Tier, _NOTHING)
        build = new.valid & (new.address == BUILD)
        layer, head, index = np.nonzero(build)
        owners = Owners(layer, head, target.source_position)
        self._prefer_exact(seq, target.source, owners, new.format[build])
        groups: dict[tuple[Tier, BlockFormat], Mask] = {}
        for code in np.unique(new.tier[build].astype(int) * MOST_FORMATS + new.format[build]).tolist():
            tier, fmt = Tier(code // MOST_FORMATS), format_of(code % MOST_FORMATS)
            groups[tier, fmt] = build & (new.tier == tier) & (new.format == fmt)
        released = {tier: np.concatenate([_without(now.on(tier), new.on(tier)), vain[tier]]) for tier in Tier}
        wanted = {key: int(mask.sum()) for key, mask in groups.items()}
        raw_device, beyond = (Tier.DEVICE, Format.RAW), self._beyond(seq, new.length)
        if target.moved is not None and seq.reserved:  # other ends of tables: the room behind them moves along
            spare = self.tables.address[seq.slot][self._beyond(seq, now.length)]
            released[Tier.DEVICE] = np.concatenate([released[Tier.DEVICE], spare])
            wanted[raw_device] = wanted.get(raw_device, 0) + int(beyond.sum())
        room = needed(new)
        staging = seq.staging or (self._staging(seq) if room else None)
        if staging:
            released[Tier.HOST] = np.concatenate([released[Tier.HOST], staging.surplus(room)])
        direct = {}
        for tier, arena in self._tiers.items():
            here = [(seq.lots.get(key), key[1], blocks) for key, blocks in wanted.items() if key[0] is tier]
            if staging and tier is Tier.HOST:
                here += staging.missing(room)
            arena.require(released[tier], here)
            direct[tier] = tier is Tier.DISK or self._arenas[tier].has_room(here)

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
                    self._count_moves(source, tier, fmt)
                    built[tier, fmt] = self.sources(seq).encode(source, fmt, owners[mine], notes)
        except BaseException:
            for tier, addresses in done:
                self._tiers[tier].release(addresses)
            raise
        if target.moved is not None and seq.shadow is not None:
            before = tokens_of(self.tables, seq.slot)
            seq.shadow.remember(before.position, before.valid, before.mass, before.votes)

        if staging:
            staging.quiet()
        for tier, arena in self._tiers.items():
            arena.release(released[tier])
        for (tier, fmt), blocks in built.items():
            addresses = self._arenas[tier].allocate(self._lot(seq, tier, fmt), len(blocks))
            self.backend.store(tier, addresses, blocks)
            new.address[groups[tier, fmt]] = addresses
        if staging:
            staging.resize(room)
            staging.follow(new)
            seq.staging = staging if room else None
        self._swap_tables(seq, target)
        if target.moved is not None and beyond.any():
            addresses = self.device.allocate(self._lot(seq, *raw_device), int(beyond.sum()))
            self.tables.address[seq.slot][beyond] = addresses
            self.tables.format[seq.slot][beyond], self.tables.tier[seq.slot][beyond] = Format.RAW, Tier.DEVICE
        self._release_prefixes(seq)
        self._read_coded(seq)
        self._note_peak(seq)

    def _staging(self, seq: SequenceCache) -> Staging:
        """An empty staging area for a request, which takes memory as it is resized."""
        assert self.disk is not None
        gpu = self.device.data.device.type != "cpu"
        return Staging(self.disk, self.host, self.tables, seq.slot, self.recalls, partial(self._recover, seq), gpu)

    def _recover(self, seq: SequenceCache, where: tuple[int, int, int], fmt: BlockFormat, address: int) -> bool:
        """Builds a full block anew at a host address, from the exact copy. False: it does not have these tokens."""
        shadow = seq.shadow
        layer, head, index = where
        position = self.tables.position[seq.slot, layer, head, index * BLOCK_TOKENS :][:BLOCK_TOKENS]
        if shadow is None or position[-1] >= shadow.rows * BLOCK_TOKENS:
            return False
        source = TokenSource(
            shadow.address[position // BLOCK_TOKENS, layer, head][None],
            np.full((1, BLOCK_TOKENS), Format.RAW, np.uint8),
            np.full((1, BLOCK_TOKENS), Tier.HOST, np.uint8),
            (position % BLOCK_TOKENS).astype(np.uint8)[None],
        )
        of_layer, of_head, place = (np.array([number]) for number in where)
        owners, notes = Owners(of_layer, of_head, position[None]), self._notes(seq, fmt, of_layer, of_head, place)
        self.blocks.transcode(source, fmt, Tier.HOST, np.array([address], np.int32), owners, notes)
        return True

    def _swap_tables(self, seq: SequenceCache, target: Arrangement) -> None:
        tables, slot, blocks = self.tables, seq.slot, target.blocks
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

    def _notes(
        self, seq: SequenceCache, fmt: BlockFormat, layer: I64, head: I64, index: I64, moved: Tokens | None = None
    ) -> Notes | None:
        """What a codec may know of blocks to build, which will be in these places [N]; None for kernels' formats."""
        if isinstance(fmt, Format):
            return None
        tables = self.tables
        mass, votes = (moved.mass, moved.votes) if moved else (tables.mass[seq.slot], tables.votes[seq.slot])
        by_block = (*mass.shape[:2], -1, BLOCK_TOKENS)
        return Notes(
            mass.reshape(by_block)[layer, head, index],
            votes.reshape(by_block)[layer, head, index].astype(np.float32),
            seq.seen,
            partial(self.recent.read, seq.slot),
        )

    def _read_coded(self, seq: SequenceCache) -> None:
        """Gives a request whose tables have coded blocks their reader, and no other."""
        coded = (self.tables.format[seq.slot] >= len(Format)) & self._valid(seq)
        seq.coded = CodedReader(self.blocks, self.tables, seq.slot) if coded.any() else None

    def _after(self, seq: SequenceCache, pipeline: Pipeline, occasion: Occasion) -> None:
        """Settles what a pipeline means for exactness and for reading, and drops a shadow that nothing needs."""
        if isinstance(pipeline.placer, Selector):
            fmt = largest_format(pipeline, self.shape)
            self._select(seq, pipeline.placer, fmt, anew=occasion is not Occasion.SETTLE)
        else:
            self._stop_selecting(seq)
        if not pipeline.near:
            seq.readers = tuple(reader for reader in seq.readers if not isinstance(reader, NearReader))
        elif not any(isinstance(reader, NearReader) for reader in seq.readers):
            seq.readers = (*seq.readers, NearReader(self._near, self.tables, seq.slot))
        lossy = seq.evicted or bool(self.tables.format[seq.slot][self._valid(seq)].any())
        if (lossy or pipeline.selects or pipeline.near) and seq.exact_tokens is None:
            seq.exact_tokens = seq.seen
        if lossy and pipeline.loss_class is LossClass.PERMANENT:
            seq.lost = True
        if seq.shadow and not pipeline.wants_shadow:
            on_host = blocks_of(self.tables, seq.slot).on(Tier.HOST)
            if len(self.host.owned(on_host)) == len(on_host):
                self._drop_shadow(seq)
            elif pipeline.loss_class is LossClass.PERMANENT:
                seq.shadow.hand_over(on_host)
                seq.shadow = None
            else:
                seq.shadow.trim(on_host)

    # -- reading -------------------------------------------------------------------------------------------------------

    def _select(self, seq: SequenceCache, stage: Selector, fmt: BlockFormat, anew: bool) -> None:
        """Has a stage choose what queries read from here on."""
        reader = seq.selective
        if reader is None or reader.stage != stage or reader.pool.format is not fmt:
            self._stop_selecting(seq)
            reader = SelectiveReader(stage, fmt, seq.slot, self.blocks, self.device, self.recalled)
            seq.readers = (*seq.readers, reader)
            self._selecting[seq.slot] = reader
        reader.changed(anew)

    def _stop_selecting(self, seq: SequenceCache) -> None:
        if reader := self._selecting.pop(seq.slot, None):
            reader.close()
            seq.readers = tuple(other for other in seq.readers if other is not reader)

    def pool_bytes(self) -> int:
        """Device bytes of all pools of recalled blocks: what :meth:`give_up_pools` gives back."""
        return sum(reader.pool.nbytes for reader in self._selecting.values())

    def give_up_pools(self, wanted_bytes: int) -> int:
        """Takes pools of recalled blocks, which only save time, until so many bytes are free; returns those freed."""
        freed = 0
        for reader in sorted(self._selecting.values(), key=lambda reader: reader.pool.nbytes, reverse=True):
            if freed >= wanted_bytes:
                break
            freed += reader.pool.nbytes
            reader.close()
        return freed

    # -- exact copies --------------------------------------------------------------------------------------------------

    def _to_be_copied(self, seq: SequenceCache, pipeline: Pipeline) -> bool:
        """Whether a switch to ``pipeline`` begins with bringing the exact copy up to date."""
        return seq.shadow is not None or (pipeline.wants_shadow and not seq.lost)

    def _copy_rows(self, seq: SequenceCache, pipeline: Pipeline, at_most: int | None = None) -> None:
        """Extends the exact copy ahead of a switch; lack of room is none if the switch gives the copy up."""
        try:
            self._extend_shadow(seq, at_most)
        except TierFullError:
            if pipeline.loss_class is not LossClass.PERMANENT:
                raise

    def _extend_shadow(self, seq: SequenceCache, at_most: int | None = None) -> None:
        """Brings the shadow up to the last whole row, or ``at_most`` rows further."""
        shadow = seq.shadow or Shadow(self.host, seq.max_tokens)
        first, rows = shadow.rows, seq.seen // BLOCK_TOKENS - shadow.rows
        rows = rows if at_most is None else min(rows, at_most)
        if rows > 0:
            tables, slot = self.tables, seq.slot
            # The last tokens of every table are the last positions, whatever was evicted before them.
            offset = tables.length[slot] - seq.seen  # [L, H] from a position to its place in the table
            position = np.arange(first * BLOCK_TOKENS, (first + rows) * BLOCK_TOKENS).reshape(rows, 1, 1, BLOCK_TOKENS)
            index = position + offset[..., None]  # [rows, L, H, 32]
            layer, head = (axis[None, ..., None] for axis in np.indices(offset.shape))
            block = index // BLOCK_TOKENS
            flat = (rows * self._row_blocks, BLOCK_TOKENS)
            source = TokenSource(
                tables.address[slot, layer, head, block].reshape(flat),
                tables.format[slot, layer, head, block].reshape(flat),
                tables.tier[slot, layer, head, block].reshape(flat),
                (index % BLOCK_TOKENS).astype(np.uint8).reshape(flat),
            )
            of_layer, of_head = (np.broadcast_to(axis, index.shape)[..., 0].ravel() for axis in (layer, head))
            owners = Owners(of_layer, of_head, np.broadcast_to(position, index.shape).reshape(flat).astype(np.int32))
            shadow.add_rows(self.sources(seq), source, owners, rows)
        seq.shadow = shadow

    def _everything(self, seq: SequenceCache) -> Tokens:
        """All tokens of a request, those evicted included: from its shadow, and from its tables beyond the last row."""
        shadow = seq.shadow
        assert shadow is not None
        now = tokens_of(self.tables, seq.slot)
        shadow.remember(now.position, now.valid, now.mass, now.votes)
        assert shadow.mass is not None
        assert shadow.votes is not None
        heads = (self.shape.layers, self.shape.kv_heads)
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

    def _prefer_exact(self, seq: SequenceCache, source: TokenSource, owners: Owners, wanted: U8) -> None:
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

    def _refer_to_shadow(self, seq: SequenceCache, target: Arrangement) -> None:
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

    def _drop_shadow(self, seq: SequenceCache) -> None:
        if seq.shadow:
            seq.shadow.close()
            seq.shadow = None

    # -- accounting ----------------------------------------------------------------------------------------------------

    def use(self, seq: SequenceCache) -> CacheUse:
        """Bytes a request takes now, its peak included."""
        now = self._measure(seq)
        return now.with_peak(seq.peak)

    def loss_class(self, seq: SequenceCache, pipeline: Pipeline) -> LossClass:
        """The loss class of a request: its pipeline's, or permanent once something is gone."""
        return LossClass.PERMANENT if seq.lost else pipeline.loss_class

    def worst_bytes(self, tokens: int) -> int:
        """Device bytes that so many raw tokens take, in whole pages."""
        pages = self.device.pages_needed(None, Format.RAW, self._row_blocks)
        return -(-tokens // BLOCK_TOKENS) * pages * self.device.page_bytes

    def capacity_bytes(self) -> int:
        """Bytes of the raw rows that fit the tiers together: what one request alone can take."""
        row_bytes = self.worst_bytes(1)
        return sum(arena.budget_bytes // row_bytes for arena in self._arenas.values()) * row_bytes

    def device_tokens_at_least(self, seq: SequenceCache, fmt: BlockFormat) -> int:
        """Last tokens of the longest table that must stay on the device if the host tier takes all it has room for.

        Args:
            seq: the request.
            fmt: the format its older blocks would have on the host.
        """
        now = blocks_of(self.tables, seq.slot)
        rows = self.host.room_bytes // (self.host.pages_needed(None, fmt, self._row_blocks) * self.host.page_bytes)
        away = int((now.valid & (now.tier == Tier.HOST)).sum(axis=2).min())
        return max(0, -(-int(now.length.max(initial=0)) // BLOCK_TOKENS) - away - rows) * BLOCK_TOKENS

    def refuses(self, pipeline: Pipeline) -> str | None:
        """Why no request can have a pipeline here; None: they can, as far as there is room."""
        placer = pipeline.placer
        if placer and not self.disk and Tier.DISK in tiers_in(styles_of(pipeline, self.shape, 0, self.profile)):
            return f"stage {placer.name!r} needs a disk tier, and this worker has none (its disk_budget_bytes is 0)"
        return None

    def _measure(self, seq: SequenceCache) -> CacheUse:
        now = blocks_of(self.tables, seq.slot)
        own = len(self.host.owned(now.on(Tier.HOST)))
        referred = len(now.on(Tier.HOST)) - own
        shadow_bytes = seq.shadow.nbytes - referred * self.shape.block_bytes(Format.RAW) if seq.shadow else 0
        use = measure(self.shape, now.valid, now.format, now.tier, seq.seen, shadow_bytes)
        if seq.staging:
            use = replace(use, host_bytes=use.host_bytes + seq.staging.nbytes)
        if seq.selective:
            use = use.plus_device_bytes(*seq.selective.nbytes())
        ahead = seq.preparation
        return (
            use.plus_built_ahead(self.shape, ahead.format[: ahead.built], ahead.tier[: ahead.built]) if ahead else use
        )

    def note_scratch(self, seq: SequenceCache, scratch: SequenceCache) -> None:
        """Counts the raw device blocks of another cache, which works for this request, in its peak."""
        blocks = int(block_count(self.tables.length[scratch.slot] + scratch.reserved).sum())
        seq.peak = seq.peak.peak_with(self._measure(seq).plus_raw_device_blocks(self.shape, blocks))

    def _note_peak(self, seq: SequenceCache, extra_rows: I32 | None = None) -> None:
        now = self._measure(seq)
        if extra_rows is not None:  # reserved, but not yet counted by the tables' lengths
            now = now.plus_raw_device_blocks(self.shape, int(extra_rows.sum()))
        seq.peak = seq.peak.peak_with(now)

    def styles(self, seq: SequenceCache, pipeline: Pipeline) -> tuple[Style, ...]:
        """How a pipeline wants a request's blocks, by layer."""
        return styles_of(pipeline, self.shape, seq.seen, self.profile)

    # -- small helpers -------------------------------------------------------------------------------------------------

    def _lot(self, seq: SequenceCache, tier: Tier, fmt: BlockFormat) -> Lot:
        return seq.lots.setdefault((tier, fmt), self._arenas[tier].open_lot(fmt))

    def _valid(self, seq: SequenceCache) -> Mask:
        return np.arange(self.tables.address.shape[3]) < block_count(self.tables.length[seq.slot])[..., None]

    def _beyond(self, seq: SequenceCache, length: I32) -> Mask:
        """[L, H, B] which blocks are reserved behind tables of that length."""
        index = np.arange(self.tables.address.shape[3])
        return (index >= block_count(length)[..., None]) & (index < block_count(length + seq.reserved)[..., None])

    def _positions(self, seq: SequenceCache) -> I32:
        count = int(self.tables.length[seq.slot].max(initial=0))
        return self.tables.position[seq.slot, :, :, :count]

    def _take_back(self, seq: SequenceCache) -> bool:
        """Withdraws published rows that only this request uses, so that a switch can free them. False: none there."""
        mine = [row for row in seq.prefix if row.users == 1]
        for row in mine:
            self.prefixes.withdraw(row)
        seq.prefix = [row for row in seq.prefix if row.users]
        return bool(mine)

    def _release_prefixes(self, seq: SequenceCache) -> None:
        """Stops counting as a user of published rows that its tables no longer refer to."""
        if not seq.prefix:
            return
        used = {lot.id for lot in self.device.lots_of(blocks_of(self.tables, seq.slot).on(Tier.DEVICE))}
        for row in seq.prefix:
            if row.lot.id not in used:
                row.users -= 1
        seq.prefix = [row for row in seq.prefix if row.lot.id in used]


_NOTHING = np.zeros(0, np.int32)


def _without(addresses: I32, others: I32) -> I32:
    """Those of the addresses that are not among the others."""
    # By sorting: numpy's choice for integers is a table over the whole range, and an arena's is wide.
    return addresses[np.isin(addresses, others, invert=True, kind="sort")]


class CacheContext:
    """Keys and values that a request keeps, wherever and however its blocks are stored."""

    def __init__(
        self, sources: Sources, blocks: Blocks, position: I32, selective: SelectiveReader | None = None
    ) -> None:
        self._sources = sources
        self._blocks = blocks
        self.selective = selective
        self.position = position.copy()
        """[layers, kv_heads, tokens] original positions; not defined beyond ``length``."""
        self.tokens = int(blocks.length.max(initial=0))
        self.length = blocks.length
        """[layers, kv_heads] tokens kept; what :meth:`read` gives beyond them is not defined."""

    def read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer, each [kv_heads, tokens, head_dim], ``tokens`` being the longest table's."""
        blocks = self._blocks
        heads, count = blocks.address.shape[1:]
        spread = (heads * count, BLOCK_TOKENS)

        def repeat(values: Any) -> Any:
            return np.repeat(values[layer].reshape(-1), BLOCK_TOKENS).reshape(spread)

        row = np.broadcast_to(np.arange(BLOCK_TOKENS, dtype=np.uint8), spread).copy()
        address = np.where(blocks.valid[layer].reshape(-1, 1), repeat(blocks.address), np.int32(-1))
        source = TokenSource(address, repeat(blocks.format), repeat(blocks.tier), row)
        position = np.zeros((heads, count * BLOCK_TOKENS), np.int32)
        position[:, : self.tokens] = self.position[layer]
        owners = Owners(np.full(heads * count, layer), np.arange(heads).repeat(count), position.reshape(spread))
        k, v = self._sources.read(source, owners)  # [heads * count, 32, D]
        whole = (heads, count * BLOCK_TOKENS, -1)
        return k.reshape(whole)[:, : self.tokens], v.reshape(whole)[:, : self.tokens]


class TokenContext:
    """Keys and values of a request's tokens, each named by block and row: arrays [layers, kv_heads, whole blocks]."""

    def __init__(self, sources: Sources, address: I32, fmt: U8, tier: U8, row: U8, tokens: int) -> None:
        self._sources = sources
        self._places = (address, fmt, tier, row)
        self.selective: SelectiveReader | None = None
        self.tokens = tokens
        self.length = np.full(address.shape[:2], tokens, np.int32)
        self.position = np.broadcast_to(np.arange(tokens, dtype=np.int32), (*address.shape[:2], tokens))

    def read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer, each [kv_heads, tokens, head_dim]."""
        heads, width = self._places[0].shape[1:]
        source = TokenSource(*(values[layer].reshape(-1, BLOCK_TOKENS) for values in self._places))
        position = np.broadcast_to(np.arange(width, dtype=np.int32), (heads, width)).reshape(-1, BLOCK_TOKENS)
        owners = Owners(np.full(len(position), layer), np.arange(heads).repeat(width // BLOCK_TOKENS), position)
        k, v = self._sources.read(source, owners)  # [heads * blocks, 32, D]
        whole = (heads, width, -1)
        return k.reshape(whole)[:, : self.tokens], v.reshape(whole)[:, : self.tokens]
