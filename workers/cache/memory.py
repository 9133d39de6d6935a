"""What the cache of a worker lives in, and what all that work on it need to know of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

import numpy as np
import torch

from kernels.api import I32, Backend, Tables, TokenSource
from kernels.backends import make_backend
from kernels.layout import BLOCK_TOKENS, BlockFormat, CacheShape, Format, Tier
from workers.cache.accounting import CacheUse, measure
from workers.cache.arena import Arena, Lot
from workers.cache.arrangement import Mask, Tokens, block_count, blocks_of, of_blocks
from workers.cache.blocks import BlockStore, Notes, Owners
from workers.cache.disk import DiskStore
from workers.cache.disk_tier import DiskTier
from workers.cache.formats import CodedFormat
from workers.cache.inputs import Remaker
from workers.cache.movers import DiskMover, HostMover, Mover
from workers.cache.partners import Partners
from workers.cache.prefix import PrefixIndex
from workers.cache.preparation import I64
from workers.cache.recalls import Recalls
from workers.cache.recent import RecentQueries
from workers.cache.selection import Queries
from workers.cache.sequence_cache import SequenceCache
from workers.cache.sources import Sources
from workers.cache.staging import Staging
from workers.cache.style import Style, styles_of
from workers.profile.profile import ModelProfile
from workers.stages.base import Pipeline


class CacheMemory:
    """Tiers, tables, kernels, and what is kept beside them; where a request's blocks are in it.

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
        lendable: bytes of the weights of each layer that may lend its memory to the device tier; they are to lie in the
            device arena's regions.
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
        lendable: Sequence[int] = (),
    ) -> None:
        self.shape = shape
        self.profile = profile
        self.device = Arena(Tier.DEVICE, device_bytes, shape, device, lendable)
        self.host = Arena(Tier.HOST, host_bytes, shape, torch.device("cpu"))
        self.tables = Tables.allocate(slots, shape, max_tokens)
        self.backend: Backend = make_backend(backend, shape, (self.device.data, self.host.data), self.tables)
        nothing = torch.empty(0, dtype=torch.uint8)
        self.near = make_backend("cpu", shape, (nothing, self.host.data), self.tables)
        """Kernels beside the host tier, which read nothing else."""
        self.blocks = BlockStore(backend, self.backend, profile)
        self.prefixes = PrefixIndex(self.device, model)
        self.recent = RecentQueries(shape, device)
        self.scaling = shape.head_dim**-0.5
        """The model's factor on attention scores; its attention says if it is another one."""
        self.catalyse: Callable[[SequenceCache], Queries] | None = None
        """Runs a catalyst prompt behind a request, without a trace, and gives its queries; None: no model, or none
        that has words. The last queries then stand in."""
        self.remaker: Remaker | None = None
        """Makes keys and values again from what the model's layers were given for them. None: there is no model."""
        self.disk = DiskTier(disk, shape) if disk else None
        self.recalls = Recalls()
        """Of all requests since the start, those that are over included."""
        self.arenas = {Tier.DEVICE: self.device, Tier.HOST: self.host}
        self.by_tier: dict[Tier, Arena | DiskTier] = {**self.arenas, **({Tier.DISK: self.disk} if self.disk else {})}
        self._movers: dict[Tier, Mover] = {Tier.HOST: HostMover(self.host, self.device)}
        if self.disk:
            self._movers[Tier.DISK] = DiskMover(self.disk, self.host, device)
        self._free_slots = list(range(slots - 1, -1, -1))
        self._open: dict[int, SequenceCache] = {}  # by slot
        self.row_blocks = shape.layers * shape.kv_heads
        """Blocks of 32 tokens in all tables."""

    @property
    def open_sequences(self) -> Collection[SequenceCache]:
        """The requests that have a cache now."""
        return self._open.values()

    @property
    def tiers(self) -> tuple[Arena | DiskTier, ...]:
        """What blocks live on, the fastest first."""
        return tuple(self.by_tier.values())

    def settle(self, seq: SequenceCache) -> None:
        """Brings the request's masses and votes in the tables up to date with the steps it has taken part in."""
        self.backend.settle(np.array([seq.slot], np.int32))
        if seq.coded:
            seq.coded.settle()
        if seq.selective:
            seq.selective.settle()

    def sources(self, seq: SequenceCache) -> Sources:
        """Reads and rebuilds a request's tokens wherever they are."""
        return Sources(self.blocks, seq.staging, Partners(self.tables, seq.slot))

    def styles(self, seq: SequenceCache, pipeline: Pipeline) -> tuple[Style, ...]:
        """How a pipeline wants a request's blocks, by layer."""
        return styles_of(pipeline, self.shape, seq.seen, self.profile)

    def notes(
        self, seq: SequenceCache, fmt: BlockFormat, layer: I64, head: I64, index: I64, moved: Tokens | None = None
    ) -> Notes | None:
        """What a codec may know of blocks to build, which will be in these places [N]; None for kernels' formats."""
        if not isinstance(fmt, CodedFormat):
            return None
        tables = self.tables
        mass, votes = (moved.mass, moved.votes) if moved else (tables.mass[seq.slot], tables.votes[seq.slot])
        by_block = (*mass.shape[:2], -1, BLOCK_TOKENS)
        return Notes(
            mass.reshape(by_block)[layer, head, index],
            votes.reshape(by_block)[layer, head, index].astype(np.float32),
            seq.seen,
            partial(self.recent.read, seq.slot),
            self._tokens(seq, (layer + fmt.codec.partner, head, index), moved) if fmt.codec.partner else None,
            self.sources(seq).read,
        )

    def _tokens(
        self, seq: SequenceCache, place: tuple[I64, I64, I64], moved: Tokens | None
    ) -> tuple[TokenSource, Owners]:
        """The tokens of full blocks that will be in these places [N]: of those that moved, else of the tables."""
        tables, slot = self.tables, seq.slot
        position = (moved.position if moved else tables.position[slot]).reshape(
            *tables.length[slot].shape, -1, BLOCK_TOKENS
        )
        owners = Owners(place[0], place[1], position[place])
        if not moved:
            return of_blocks(*(column[slot][place] for column in (tables.address, tables.format, tables.tier))), owners
        columns = (moved.address, moved.format, moved.tier, moved.row)
        return TokenSource(*(column.reshape(position.shape)[place] for column in columns)), owners

    def area(self, seq: SequenceCache, home: Tier) -> Staging:
        """An empty staging area for a request's blocks on a tier, which takes memory as it is resized."""
        return Staging(self._movers[home], self.tables, seq.slot, seq.recalls, partial(self._recover, seq))

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
        owners, notes = Owners(of_layer, of_head, position[None]), self.notes(seq, fmt, of_layer, of_head, place)
        self.blocks.transcode(source, fmt, Tier.HOST, np.array([address], np.int32), owners, notes)
        return True

    def count_moves(
        self, seq: SequenceCache, source: TokenSource, tier: Tier, fmt: BlockFormat, numbers: I32 | None = None
    ) -> None:
        """Counts blocks that were built, each as coming from where its first token was; from disk all come through the
        host, which has been counted. ``numbers`` are those of blocks that are on disk now."""
        origins = np.minimum(source.tier[:, 0], Tier.HOST)
        sizes = np.full(len(origins), self.shape.block_bytes(fmt))
        if numbers is not None and self.disk:
            sizes = self.disk.stored_bytes(numbers)
        for origin in np.unique(origins):
            seq.recalls.note_moved(Tier(origin), tier, int(sizes[origins == origin].sum()))

    def worst_bytes(self, tokens: int) -> int:
        """Device bytes that so many raw tokens take, in whole pages."""
        pages = self.device.pages_needed(None, Format.RAW, self.row_blocks)
        return -(-tokens // BLOCK_TOKENS) * pages * self.device.page_bytes

    def measure(self, seq: SequenceCache) -> CacheUse:
        """Bytes a request takes now, without its peak."""
        now = blocks_of(self.tables, seq.slot)
        own = len(self.host.owned(now.on(Tier.HOST)))
        referred = len(now.on(Tier.HOST)) - own
        shadow_bytes = seq.shadow.nbytes - referred * self.shape.block_bytes(Format.RAW) if seq.shadow else 0
        stored = self._stored_bytes(now.on(Tier.DISK))
        use = measure(self.shape, now.valid, now.format, now.tier, seq.seen, shadow_bytes, stored)
        for area in seq.areas.values():
            use = use.plus_area(area.tier, *area.nbytes)
        if seq.inputs:
            use = use.plus_host_bytes(seq.inputs.nbytes)
        if seq.selective:
            use = use.plus_device_bytes(*seq.selective.nbytes())
        if ahead := seq.preparation:
            built, stored = slice(ahead.built), self._stored_bytes(ahead.on(Tier.DISK))
            use = use.plus_built_ahead(self.shape, ahead.format[built], ahead.tier[built], stored)
        return use

    def _stored_bytes(self, numbers: I32) -> int:
        """What blocks on disk take there."""
        return int(self.disk.stored_bytes(numbers).sum()) if self.disk else 0

    def note_peak(self, seq: SequenceCache, extra_rows: I32 | None = None) -> None:
        """Counts in the peak what a request takes now, and blocks [L, H] that are reserved behind its tables."""
        now = self.measure(seq)
        if extra_rows is not None:  # reserved, but not yet counted by the tables' lengths
            now = now.plus_raw_device_blocks(self.shape, int(extra_rows.sum()))
        seq.peak = seq.peak.peak_with(now)

    def lot(self, seq: SequenceCache, tier: Tier, fmt: BlockFormat) -> Lot:
        """A request's own lot of a format on a tier."""
        return seq.lots.setdefault((tier, fmt), self.arenas[tier].open_lot(fmt))

    def valid(self, seq: SequenceCache) -> Mask:
        """[L, H, B] which entries of a request's tables are blocks."""
        return np.arange(self.tables.address.shape[3]) < block_count(self.tables.length[seq.slot])[..., None]

    def beyond(self, seq: SequenceCache, length: I32) -> Mask:
        """[L, H, B] which blocks are reserved behind tables of that length."""
        index = np.arange(self.tables.address.shape[3])
        return (index >= block_count(length)[..., None]) & (index < block_count(length + seq.reserved)[..., None])

    def positions(self, seq: SequenceCache) -> I32:
        """[L, H, T] original positions of the tokens in a request's tables."""
        count = int(self.tables.length[seq.slot].max(initial=0))
        return self.tables.position[seq.slot, :, :, :count]
