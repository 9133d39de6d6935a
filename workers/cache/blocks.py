"""Reading and building blocks of any format: kernels do what they know, codecs the rest, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from kernels.api import F32, I32, Backend, Tables, TokenSource
from kernels.backends import make_backend
from kernels.layout import BLOCK_TOKENS, MEMORY_TIERS, UNIT_BYTES, BlockFormat, Format, Tier
from workers.cache.arrangement import ROWS, Mask, pick
from workers.cache.formats import CodedFormat, format_of
from workers.profile.profile import ModelProfile
from workers.stages.base import BlockBatch, BlockPlaces, CodedBlocks

I64 = npt.NDArray[np.int64]
Queries = Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]
"""Of a layer, at most so many: see ``workers.cache.recent.RecentQueries.read``."""


@dataclass(frozen=True)
class Owners:
    """Whose N blocks of tokens are read or built: tokens change their blocks, never their head."""

    layer: npt.NDArray[np.integer]  # [N]
    head: npt.NDArray[np.integer]  # [N]
    position: I32  # [N, 32] original positions; anything where there is no token

    def __getitem__(self, index: npt.NDArray[np.generic]) -> Owners:
        return Owners(self.layer[index], self.head[index], self.position[index])


@dataclass(frozen=True)
class Notes:
    """What else codecs may go by when they encode a request's N blocks."""

    mass: F32  # [N, 32]
    votes: F32  # [N, 32]
    seen: int
    queries: Queries

    def __getitem__(self, index: npt.NDArray[np.generic]) -> Notes:
        return replace(self, mass=self.mass[index], votes=self.votes[index])


class BlockStore:
    """Blocks of one worker's tiers.

    Args:
        name: of the kernel backend.
        backend: the kernels over these tiers.
        profile: the model's, for codecs that need it.
    """

    def __init__(self, name: str, backend: Backend, profile: ModelProfile | None = None) -> None:
        self.profile = profile
        self.backend = backend
        self.shape = backend.shape
        self._name = name

    def read(self, source: TokenSource, owners: Owners) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``kernels.api.Backend.read``: K and V [N, 32, D] in the model's dtype, out of blocks of any format."""
        coded = _coded(source)
        if not coded.any():
            return self.backend.read(source)
        known = TokenSource(np.where(coded, np.int32(-1), source.address), source.format, source.tier, source.row)
        k, v = self.backend.read(known)
        for fmt, tier, mine in _kinds(source, coded):
            address, inverse = np.unique(source.address[mine], return_inverse=True)
            block, row = np.nonzero(mine)[0], source.row[mine]
            layer, head = (np.zeros(len(address), np.int64) for _ in range(2))
            layer[inverse], head[inverse] = owners.layer[block], owners.head[block]
            position = np.zeros((len(address), BLOCK_TOKENS), np.int32)
            position[inverse, row] = owners.position[mine]
            codes = self.backend.load(tier, address.astype(np.int32), fmt).to(k.device)
            places = self._places(Owners(layer, head, position), k.device)
            numbers = fmt.codec.decode(codes[:, : fmt.payload_bytes(self.shape)], places)
            into = torch.from_numpy(mine).to(k.device)
            at = torch.from_numpy(inverse).to(k.device), torch.from_numpy(row.astype(np.int64)).to(k.device)
            k[into], v[into] = (part[at].to(k.dtype) for part in numbers)
        return k, v

    def encode(self, source: TokenSource, fmt: BlockFormat, owners: Owners, notes: Notes | None = None) -> torch.Tensor:
        """As ``kernels.api.Backend.encode``: builds uint8 [N, block_bytes] of any format, from blocks of any format.

        ``notes`` are needed for coded ones. A block whose tokens are one block of the wanted format, in order, is
        copied byte for byte.
        """
        if isinstance(fmt, Format) and not _coded(source).any():
            return self.backend.encode(source, fmt)
        built = torch.zeros(len(source.address), self.shape.block_bytes(fmt), dtype=torch.uint8)
        built = built.to(self.backend.arenas[Tier.DEVICE].device)
        same = whole_blocks(source) & (source.format[:, 0] == fmt)
        for tier in MEMORY_TIERS:
            here = np.flatnonzero(same & (source.tier[:, 0] == tier))
            if len(here):
                built[torch.from_numpy(here)] = self.backend.load(tier, source.address[here, 0], fmt).to(built.device)
        rest = np.flatnonzero(~same)
        if len(rest):
            k, v = self.read(pick(source, rest), owners[rest])
            blocks = self._encode(k, v, fmt, owners[rest], notes, rest)
            built[torch.from_numpy(rest), : blocks.shape[1]] = blocks
        return built

    def transcode(
        self,
        source: TokenSource,
        fmt: BlockFormat,
        tier: Tier,
        address: I32,
        owners: Owners,
        notes: Notes | None = None,
    ) -> None:
        """:meth:`encode` straight to unit offsets ``address`` [N] of a tier's arena, of blocks that are not in the
        source."""
        if isinstance(fmt, Format) and not _coded(source).any():
            self.backend.transcode(source, fmt, tier, address)
        else:
            self.backend.store(tier, address, self.encode(source, fmt, owners, notes))

    def coded(self, tables: Tables, slot: int, layer: int, head: I64, index: I64, fmt: CodedFormat) -> CodedBlocks:
        """The encoded blocks [N] of one codec of a layer, each named by head and place in its table."""
        address, tier = tables.address[slot, layer, head, index], tables.tier[slot, layer, head, index]
        position = tables.position[slot, layer].reshape(len(tables.position[slot, layer]), -1, BLOCK_TOKENS)
        size, backend = fmt.payload_bytes(self.shape), self.backend
        device = backend.arenas[Tier.DEVICE].device

        def codes() -> torch.Tensor:
            kinds = np.unique(tier)
            if len(kinds) == 1:
                return backend.load(Tier(int(kinds[0])), address, fmt).to(device)[:, :size]
            blocks = torch.empty(len(address), size, dtype=torch.uint8, device=device)
            for kind in kinds:
                mine = np.flatnonzero(tier == kind)
                loaded = backend.load(Tier(int(kind)), address[mine], fmt)
                blocks[torch.from_numpy(mine)] = loaded.to(device)[:, :size]
            return blocks

        memory = None
        if device.type == "cpu":
            bases = np.array([arena.data_ptr() for arena in backend.arenas], np.int64)
            memory = torch.from_numpy(bases[tier] + address.astype(np.int64) * UNIT_BYTES)
        places = self._places(Owners(np.full(len(head), layer), head, position[head, index]), device)
        return CodedBlocks(self.shape, places.layer, places.head, places.position, codes, memory, profile=self.profile)

    def _encode(
        self, k: torch.Tensor, v: torch.Tensor, fmt: BlockFormat, owners: Owners, notes: Notes | None, index: I64
    ) -> torch.Tensor:
        """K and V [n, 32, D] as blocks of a format, uint8 [n, bytes]; ``index`` [n] of them in the notes."""
        if isinstance(fmt, CodedFormat):
            assert notes is not None
            places = self._places(owners, k.device)
            mass, votes = (torch.from_numpy(part[index]).to(k.device) for part in (notes.mass, notes.votes))
            return fmt.codec.encode(
                BlockBatch(
                    self.shape,
                    places.layer,
                    places.head,
                    places.position,
                    k.float(),
                    v.float(),
                    mass,
                    votes,
                    notes.seen,
                    notes.queries,
                    profile=self.profile,
                )
            )
        raw = torch.cat([part.contiguous().flatten(1).view(torch.uint8) for part in (k, v)], 1)
        if fmt is Format.RAW:
            return raw
        assert isinstance(fmt, Format)
        # Kernels build blocks from blocks: these numbers are raw ones for a while.
        size = self.shape.block_bytes(Format.RAW)
        raw = functional.pad(raw, (0, size - raw.shape[1]))
        nothing = torch.empty(0, dtype=torch.uint8, device=self.backend.arenas[Tier.HOST].device)
        scratch = make_backend(
            self._name, self.shape, (raw.flatten(), nothing), Tables.allocate(1, self.shape, BLOCK_TOKENS)
        )
        spread = np.ones((len(raw), BLOCK_TOKENS), np.uint8)
        address = (np.arange(len(raw), dtype=np.int32) * (size // UNIT_BYTES))[:, None] * spread
        return scratch.encode(TokenSource(address.astype(np.int32), spread * 0, spread * 0, spread * ROWS), fmt)

    def _places(self, owners: Owners, device: torch.device) -> BlockPlaces:
        layer, head, position = (
            torch.from_numpy(np.asarray(part, np.int64)).to(device)
            for part in (owners.layer, owners.head, np.maximum(owners.position, 0))
        )
        return BlockPlaces(self.shape, layer, head, position, profile=self.profile)


def whole_blocks(source: TokenSource) -> Mask:
    """[N] which blocks' tokens are one block of any format, in order."""
    first = source.address[:, :1]
    same = (source.address == first) & (source.tier == source.tier[:, :1]) & (source.row == ROWS) & (first >= 0)
    return np.asarray((same & (source.format == source.format[:, :1])).all(1), np.bool_)


def _coded(source: TokenSource) -> Mask:
    """[N, 32] which tokens are in blocks that kernels do not read."""
    return np.asarray((source.format >= len(Format)) & (source.address >= 0), np.bool_)


def _kinds(source: TokenSource, coded: Mask) -> Iterator[tuple[CodedFormat, Tier, Mask]]:
    """Format, tier and tokens [N, 32] of each kind of coded blocks that a source has."""
    for kind in np.unique(source.format[coded].astype(int) * len(Tier) + source.tier[coded]).tolist():
        number, tier = divmod(kind, len(Tier))
        fmt = format_of(number)
        assert isinstance(fmt, CodedFormat)
        yield fmt, Tier(tier), coded & (source.format == number) & (source.tier == tier)
