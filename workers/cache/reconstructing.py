"""Reads of a request whose older keys are made again on the device, from factors, while values come from the host."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional

from kernels.api import F32, I32, U8, VOTE_DECAY, Backend, DecodePlan, Tables
from kernels.layout import BLOCK_TOKENS, UNIT_BYTES, BlockFormat, CacheShape, Format, Tier
from kernels.partials import Partial
from workers.cache.arena import Arena
from workers.cache.arrangement import Mask
from workers.cache.blocks import BlockStore
from workers.cache.formats import format_of
from workers.cache.pool import I64, RecallPool
from workers.cache.recall import Saved, SelectiveReader, on_host
from workers.cache.recalls import Recalls
from workers.cache.records import Piece, Records, load_piece
from workers.stages.attended import attend_blocks
from workers.stages.selecting import CHUNK_TOKENS, BlockView, Digest, Reconstructing, Selector

CHUNKS = BLOCK_TOKENS // CHUNK_TOKENS
"""Chunks of a block."""
DIRECTIONS = 64
"""Directions of a basis, in the channels of one head, that lie together: as many numbers as a raw block has."""
Values = Callable[[int, I64, I64], tuple[torch.Tensor, int]]


class ReconstructingReader(SelectiveReader):
    """Attends over a request's older blocks by itself, by chunks, and hides them from the kernels.

    Of the blocks that are older when tables change (``changed``) it makes, layer by layer, what the stage wants on the
    device. Where that has no room for it, and for blocks that grow older until the next change, kernels read them as
    they are. All that it keeps lies in the device's arena. See ``SelectiveReader`` for the arguments.
    """

    def __init__(
        self,
        stage: Reconstructing,
        fmt: BlockFormat,
        slot: int,
        blocks: BlockStore,
        device: Arena,
        recalls: Recalls,
    ) -> None:
        super().__init__(stage, fmt, slot, blocks, device, recalls)
        assert blocks.profile is not None
        self.reconstructs = stage
        self._rope = blocks.profile.rope
        self._arena = device
        shape, chunk_numbers = self._shape, CHUNK_TOKENS * self._shape.head_dim
        self._width = stage.width(shape)
        heads, most = (shape.layers, shape.kv_heads), self._tables.format.shape[3]
        self._bases = Records(device, self._backend, DIRECTIONS * shape.head_dim)
        self._factors = Records(device, self._backend, CHUNK_TOKENS * self._width)
        self._landmarks = Records(device, self._backend, CHUNKS * shape.head_dim)
        self._exact = Records(device, self._backend, 2 * chunk_numbers)
        self._basis_at: I32 = np.full((*heads, -(-self._width // DIRECTIONS)), -1, np.int32)
        self._factors_at: I32 = np.full((shape.layers, most * CHUNKS), -1, np.int32)  # of all heads together
        self._landmarks_at: I32 = np.full((*heads, most), -1, np.int32)  # of a block's chunks
        self._exact_at: I32 = np.full((*heads, most * CHUNKS), -1, np.int32)  # keys, then values
        self._based_on = np.zeros(shape.layers, np.int64)
        """Blocks of the longest table that each layer's basis was found from; 0: it has none."""
        self.pool: RecallPool = ValuePool(
            device, self._backend, shape, self._layers, Piece(chunk_numbers), recalls, self._values
        )
        self._read_now: dict[int, tuple[torch.Tensor, I64, I64]] = {}  # scores [N, G, 8], head, chunk
        self._received: list[F32] = []  # of each layer [2, H, C, 8]: mass, votes
        self._share: dict[int, F32] = {}  # [H, B] of attention in this step, mean over the query group

    # -- between steps -------------------------------------------------------------------------------------------------

    def changed(self, anew: bool = False) -> int:
        """See ``SelectiveReader``."""
        tables, slot, layers = self._tables, self._slot, range(self._shape.layers)
        before: I32 = self.digests.count
        self.digests.check(tables, slot)
        older = self._older(tables.length[slot])  # [L, H]
        for layer in layers:
            others = bool((self.digests.count[layer] < before[layer]).any())
            if anew or others or older[layer].max() >= 2 * self._based_on[layer]:
                self._forget(layer)
        self.pool.forget(self.digests.count * CHUNKS)
        lacking_pages, self._received = 0, []
        for layer in layers:
            index = np.arange(int(older[layer].max()))
            missing = (index >= self.digests.count[layer][:, None]) & (index < older[layer][:, None])
            pages = self._pages(layer, *np.nonzero(missing))
            if pages * self._arena.page_bytes > self._arena.free_bytes:
                lacking_pages += pages
            else:
                self.digests.extend(tables, slot, layer, older[layer], self._take_in)
            chunks = int(self.digests.count[layer].max()) * CHUNKS
            self._received.append(np.zeros((2, self._shape.kv_heads, chunks, CHUNK_TOKENS), np.float32))
        if lacking_pages:
            return lacking_pages * self._arena.page_bytes - self._arena.free_bytes
        self.pool.resize(self.stage.pool_blocks(int(self.digests.count.max()) * CHUNKS))
        return 0

    def nbytes(self) -> tuple[int, int]:
        """Bytes on the device of all that it keeps, and as if raw numbers had 16 bits."""
        kinds = (
            (self._bases, int((self._basis_at >= 0).sum())),
            (self._factors, int((self._factors_at >= 0).sum())),
            (self._landmarks, int((self._landmarks_at >= 0).sum())),
            (self._exact, int((self._exact_at >= 0).sum())),
            (self.pool, self.pool.blocks),
        )
        return (
            sum(self._shape.block_bytes(kind.format) * count for kind, count in kinds),
            sum(self._shape.block_bytes_16bit(kind.format) * count for kind, count in kinds),
        )

    def close(self) -> None:
        """Gives its memory back."""
        super().close()
        for kind in (self._bases, self._factors, self._landmarks, self._exact):
            kind.close()

    def moved(self, now: Callable[[I32], I32]) -> None:
        """See ``SelectiveReader``."""
        super().moved(now)
        for at in (self._basis_at, self._factors_at, self._landmarks_at, self._exact_at):
            at[:] = now(at)

    def _forget(self, layer: int) -> None:
        """Gives back what is there of a layer."""
        self.digests.count[layer] = self._based_on[layer] = 0
        for records, at in (
            (self._bases, self._basis_at),
            (self._factors, self._factors_at),
            (self._landmarks, self._landmarks_at),
            (self._exact, self._exact_at),
        ):
            records.release(at[layer][at[layer] >= 0])
            at[layer] = -1

    def _pages(self, layer: int, head: I64, block: I64) -> int:
        """Pages that are missing for what is to be kept of further blocks [N] of a layer."""
        if not len(head):
            return 0
        return (
            self._bases.missing_pages(int((self._basis_at[layer] < 0).sum()))
            + self._factors.missing_pages(int((self._factors_at[layer, _chunks(np.unique(block))] < 0).sum()))
            + self._landmarks.missing_pages(len(head))
            + self._exact.missing_pages(int(self._more_exact(layer, head).sum()))
        )

    def _more_exact(self, layer: int, head: I64 | I32) -> I64:
        """[H] how many chunks of further blocks of these heads [N] are to be kept exactly."""
        blocks = self.digests.count[layer] + np.bincount(head, minlength=self._shape.kv_heads)
        wanted = np.array([self.reconstructs.exact_chunks(int(count) * CHUNKS) for count in blocks])
        more: I64 = wanted - (self._exact_at[layer] >= 0).sum(1)
        return more

    def _take_in(self, layer: int, head: I32, block: I32) -> torch.Tensor:
        """Makes what is kept of further blocks [N] of a layer, for which there is room; returns their keys."""
        shape = self._shape
        k, v = self._read(layer, head, block)
        first, rows = int(block.min()), int(block.max()) - int(block.min()) + 1
        turned_back = self._rope.undo(k, self._tensor(self._positions(layer, BLOCK_TOKENS)[head, block]))
        keys = torch.zeros(rows, BLOCK_TOKENS, shape.kv_heads, shape.head_dim, device=self._device)
        keys[self._tensor(block - first), :, self._tensor(head)] = turned_back
        together = keys.view(
            rows * BLOCK_TOKENS, -1
        )  # [tokens, H * D], 0 of heads that have a token no more, or already
        if not self._based_on[layer]:
            moment = sum(part.double().mT @ part.double() for part in torch.split(together, 4096))
            self._put_basis(layer, self.reconstructs.basis(torch.as_tensor(moment), self._width))
            self._based_on[layer] = rows
        factors = (together @ self._basis(layer).flatten(0, 1)).view(rows * CHUNKS, -1)
        chunk = _chunks(np.unique(block))
        factors, at = factors[self._tensor(chunk - first * CHUNKS)], self._factors_at[layer, chunk]
        there = at >= 0  # of other heads, whose tables are longer
        if there.any():
            mine = self._tensor(there)
            self._factors.write(at[there], self._factors.read(at[there]).float() + factors[mine])
        self._factors_at[layer, chunk[~there]] = self._factors.add(factors[self._tensor(~there)])
        chunked = k.view(-1, CHUNK_TOKENS, shape.head_dim)  # [N * 4, 8, D]
        landmarks = chunked.float().mean(1).to(k.dtype)
        self._landmarks_at[layer, head, block] = self._landmarks.add(landmarks.view(len(head), -1))
        self._keep_exact(layer, head, block, self.reconstructs.fit(chunked, landmarks), k, v)
        return k

    def _keep_exact(
        self, layer: int, head: I32, block: I32, fit: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """Keeps the chunks that fit [N * 4] worst, as many of each head as there are to be more."""
        of_head, chunk, fits = np.repeat(head, CHUNKS), _chunks(block), fit.cpu().numpy()
        kept = []
        for which, more in enumerate(self._more_exact(layer, head)):
            mine = np.flatnonzero(of_head == which)
            kept.append(mine[np.argsort(fits[mine], kind="stable")[: max(0, int(more))]])
        worst = np.concatenate(kept)
        both = torch.cat([part.view(len(fits), -1)[self._tensor(worst)] for part in (k, v)], 1)
        self._exact_at[layer, of_head[worst], chunk[worst]] = self._exact.add(both)

    # -- what is kept --------------------------------------------------------------------------------------------------

    def _put_basis(self, layer: int, basis: torch.Tensor) -> None:
        heads, dim, parts = self._basis_at.shape[1], self._shape.head_dim, self._basis_at.shape[2]
        padded = functional.pad(basis.float(), (0, parts * DIRECTIONS - self._width))
        pieces = padded.view(heads, dim, parts, DIRECTIONS).transpose(1, 2).reshape(heads * parts, -1)
        self._basis_at[layer] = self._bases.add(pieces).reshape(heads, parts)

    def _basis(self, layer: int) -> torch.Tensor:
        """float32 [H, D, width] of a layer."""
        heads, parts = self._basis_at.shape[1:]
        pieces = self._bases.read(self._basis_at[layer].ravel()).float()
        whole = pieces.view(heads, parts, self._shape.head_dim, DIRECTIONS).transpose(1, 2).flatten(2)
        return whole[..., : self._width]

    def _reconstruct(self, layer: int, head: I64, chunk: I64) -> torch.Tensor:
        """Rotated keys [N, 8, D] in the model's dtype, of chunks [N] of heads [N] in rising order."""
        size = (len(head), CHUNK_TOKENS, self._shape.head_dim)
        rows = self._factors.read(self._factors_at[layer, chunk]).float().view(len(head) * CHUNK_TOKENS, -1)
        tokens = np.bincount(head, minlength=self._shape.kv_heads) * CHUNK_TOKENS
        of_heads = torch.split(rows, tokens.tolist())
        keys = torch.cat([mine @ basis.mT for mine, basis in zip(of_heads, self._basis(layer), strict=True)]).view(size)
        position = self._tensor(self._positions(layer, CHUNK_TOKENS)[head, chunk])
        return self._rope.rotate(keys, position).to(self._shape.dtype)

    def _positions(self, layer: int, tokens: int) -> I64:
        """[H, parts, tokens] original positions of a layer's tokens, in parts of so many."""
        position: I64 = self._tables.position[self._slot, layer].astype(np.int64)
        return position.reshape(len(position), -1, tokens)

    def _values(self, layer: int, head: I64, chunk: I64) -> tuple[torch.Tensor, int]:
        """Values [N, 8 * D] of chunks from where their blocks lie, and the bytes that come for them if that is the
        host: of a raw block the chunk's alone, else the whole block's."""
        shape, numbers = self._shape, CHUNK_TOKENS * self._shape.head_dim
        block, part = np.divmod(chunk, CHUNKS)
        address, fmt, tier = (
            column[self._slot, layer, head, block]
            for column in (self._tables.address, self._tables.format, self._tables.tier)
        )
        found = torch.empty(len(head), numbers, dtype=shape.dtype, device=self._device)
        moved_bytes = 0
        for which, on in {
            (int(a), int(b)) for a, b in zip(part[fmt == Format.RAW], tier[fmt == Format.RAW], strict=True)
        }:
            mine = np.flatnonzero((fmt == Format.RAW) & (part == which) & (tier == on))
            begin = (BLOCK_TOKENS * shape.head_dim + which * numbers) * shape.dtype.itemsize
            unit, skip = begin // UNIT_BYTES, begin % UNIT_BYTES // shape.dtype.itemsize
            piece = Piece(skip + numbers)
            here = (address[mine] + unit).astype(np.int32)
            found[self._tensor(mine)] = load_piece(self._backend, on, here, piece, skip).to(self._device)
            moved_bytes += len(mine) * shape.block_bytes(piece)
        coded = np.flatnonzero(fmt != Format.RAW)
        if len(coded):
            whole, place = np.unique(np.stack([head[coded], block[coded]]), axis=1, return_inverse=True)
            _, v = self._read(layer, *whole.astype(np.int32))
            chunks = v.view(-1, CHUNKS, numbers)[self._tensor(place.ravel()), self._tensor(part[coded])]
            found[self._tensor(coded)] = chunks.to(shape.dtype)
            formats = self._tables.format[self._slot, layer, whole[0], whole[1]]
            moved_bytes += sum(shape.block_bytes(format_of(int(number))) for number in formats)
        return found, moved_bytes

    # -- decode steps --------------------------------------------------------------------------------------------------

    def before(self, layer: int, q: torch.Tensor, scaling: float) -> Partial | None:
        """See ``workers.cache.reading.Reader``: attends over chunks of the older blocks, and hides these."""
        covered = self.digests.count[layer]
        blocks = int(covered.max())
        if not blocks:
            return None
        valid = np.arange(blocks * CHUNKS) < (covered * CHUNKS)[:, None]
        exact = self._exact_at[layer, :, : blocks * CHUNKS] >= 0
        chosen = on_host(self._chosen(layer, q[0], scaling, valid & ~exact))
        self._recalls.note_chosen(int((chosen | exact).sum()), int((valid & ~chosen & ~exact).sum()))
        head, chunk = np.nonzero(chosen)
        keys, values = self._reconstruct(layer, head, chunk), self._bring_values(layer, chosen, head, chunk)
        exact_head, exact_chunk = np.nonzero(exact)
        kept = self._exact.read(self._exact_at[layer, exact_head, exact_chunk]).view(
            len(exact_head), 2, *keys.shape[1:]
        )
        keys, values = torch.cat([keys, kept[:, 0]]).float(), torch.cat([values, kept[:, 1]]).float()
        head, chunk = np.concatenate([head, exact_head]), np.concatenate([chunk, exact_chunk])
        queries = q[0].float().view(self._shape.kv_heads, -1, q.shape[-1])
        of_head = self._tensor(head)
        score = queries[of_head] @ keys.mT * scaling  # [N, G, 8]
        found = attend_blocks(score, of_head, len(queries), lambda powers: powers @ values)
        self._read_now[layer] = score, head, chunk
        here = (self._slot, layer, slice(None), slice(0, blocks))
        self._saved = Saved(layer, self._tables.address[here].copy(), self._tables.tier[here].copy())
        self._tables.tier[here][np.arange(blocks) < covered[:, None]] = Tier.DISK
        return Partial(found.output.view(1, q.shape[1], -1), found.lse.view(1, -1))

    def _chosen(self, layer: int, q: torch.Tensor, scaling: float, valid: Mask) -> torch.Tensor:
        """Which chunks of those that may be chosen, [H, C], a query [query_heads, D] reads: bool [H, C]."""
        shape, blocks = self._shape, valid.shape[1] // CHUNKS
        covered = self.digests.count[layer]
        landmarks = torch.zeros(shape.kv_heads, blocks, CHUNKS * shape.head_dim, dtype=shape.dtype, device=self._device)
        head, block = np.nonzero(np.arange(blocks) < covered[:, None])
        landmarks[self._tensor(head), self._tensor(block)] = self._landmarks.read(
            self._landmarks_at[layer, head, block]
        )
        view = BlockView(
            index=layer,
            layers=shape.layers,
            valid=self._tensor(valid),
            budget=self._tensor(np.array([self.stage.budget(int(count) * CHUNKS) for count in covered], np.int64)),
            tier=self._tensor(np.repeat(self._tables.tier[self._slot, layer, :, :blocks], CHUNKS, axis=1)),
            scaling=scaling,
            digests={Digest.MEAN: landmarks.view(shape.kv_heads, blocks * CHUNKS, -1)},
            votes=lambda: self._tensor(self._votes(layer, blocks)).repeat_interleave(CHUNKS, 1) / CHUNKS,
        )
        return self.stage.select(view, q)

    def _bring_values(self, layer: int, chosen: Mask, head: I64, chunk: I64) -> torch.Tensor:
        """Values [N, 8, D] of the chosen chunks, through the pool as far as it has room."""
        tier = np.repeat(self._tables.tier[self._slot, layer, :, : chosen.shape[1] // CHUNKS], CHUNKS, axis=1)
        away = chosen & (tier == Tier.HOST)
        pooled = self.pool.bring(self._tables, self._slot, layer, away)[head, chunk]
        values = torch.empty(
            len(head), CHUNK_TOKENS * self._shape.head_dim, dtype=self._shape.dtype, device=self._device
        )
        there, elsewhere = np.flatnonzero(pooled >= 0), np.flatnonzero(pooled < 0)
        if len(there):
            assert isinstance(self.pool.format, Piece)
            piece = load_piece(self._backend, Tier.DEVICE, pooled[there], self.pool.format)
            values[self._tensor(there)] = piece
        if len(elsewhere):
            values[self._tensor(elsewhere)], _ = self._values(layer, head[elsewhere], chunk[elsewhere])
        return values.view(len(head), CHUNK_TOKENS, -1)

    # -- masses (see workers.cache.reading.Counter) --------------------------------------------------------------------

    def count(self, layer: int, lse: torch.Tensor) -> None:
        """Takes note of what chunks received of a step in which everything has this lse [query_heads]."""
        if layer not in self._read_now:
            return
        score, head, chunk = self._read_now.pop(layer)
        of_head = lse.view(self._shape.kv_heads, -1, 1)
        received = (score - of_head[self._tensor(head)]).exp().sum(1).cpu().numpy()  # [N, 8]
        mass, votes = self._received[layer]
        votes *= np.float32(VOTE_DECAY)
        mass[head, chunk] += received
        votes[head, chunk] += received
        share = np.zeros((len(mass), mass.shape[1] // CHUNKS), np.float32)
        np.add.at(share, (head, chunk // CHUNKS), received.sum(1) / of_head.shape[1])
        self._share[layer] = share

    def add_block_mass(self, plan: DecodePlan, row: int) -> None:
        """Adds what blocks received to a finished step's block masses, in which the request has that row."""
        for layer, share in self._share.items():
            plan.block_mass[layer, row, :, : share.shape[1]] += share
        self._share = {}

    def settle(self) -> None:
        """Brings masses and votes in the tables up to date, which the kernels' own settlement has let fade."""
        for layer, (mass, votes) in enumerate(self._received):
            for name, added in (("mass", mass), ("votes", votes)):
                values = getattr(self._tables, name)[self._slot, layer]
                tokens = added.shape[1] * CHUNK_TOKENS
                values[:, :tokens] += added.reshape(len(added), tokens).astype(values.dtype)
                added[:] = 0

    # -- scoring -------------------------------------------------------------------------------------------------------

    def as_read(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        """See ``SelectiveReader``: those of chunks that are not exact are reconstructed."""
        covered = self.digests.count[layer]
        chunks = int(covered.max()) * CHUNKS
        head, chunk = np.nonzero(np.arange(chunks) < (covered * CHUNKS)[:, None])
        inexact = self._exact_at[layer, head, chunk] < 0
        head, chunk = head[inexact], chunk[inexact]
        if not len(head):
            return keys
        found = keys.clone()
        older = found[:, : chunks * CHUNK_TOKENS].view(len(keys), chunks, CHUNK_TOKENS, -1)
        older[self._tensor(head), self._tensor(chunk)] = self._reconstruct(layer, head, chunk)
        return found

    def visible(self, layer: int, q: torch.Tensor | None, keys: torch.Tensor, scaling: float) -> torch.Tensor | None:
        """See ``SelectiveReader``. What is older was so before the first of the tokens."""
        covered = self.digests.count[layer]
        chunks = int(covered.max()) * CHUNKS
        if q is None or not chunks:
            return None
        steps, valid = q.shape[1], np.arange(chunks) < (covered * CHUNKS)[:, None]
        choosable = valid & (self._exact_at[layer, :, :chunks] < 0)
        seen = torch.ones(len(valid), steps, keys.shape[1], dtype=torch.bool, device=keys.device)
        always = self._tensor(~choosable)
        for step in range(steps):
            read = self._chosen(layer, q[:, step], scaling, choosable) | always
            seen[:, step, : chunks * CHUNK_TOKENS] = read.repeat_interleave(CHUNK_TOKENS, dim=1)
        return seen


class ValuePool(RecallPool):
    """A pool of the values of chunks: what it is asked for by chunk, it gets from ``values``."""

    def __init__(
        self,
        arena: Arena,
        backend: Backend,
        shape: CacheShape,
        layers: Mask,
        fmt: Piece,
        recalls: Recalls,
        values: Values,
    ) -> None:
        super().__init__(arena, backend, shape, layers, fmt, recalls)
        self._values = values

    def _fit(self, formats_: U8, blocks: I64) -> Mask:
        return np.ones(len(blocks), bool)

    def _fetch(self, tables: Tables, slot: int, layer: int, what: I64) -> None:
        head, place, chunk = what.T
        if not len(what):
            return
        values, moved_bytes = self._values(layer, head, chunk)
        packed = values.view(torch.uint8)
        packed = functional.pad(packed, (0, self._shape.block_bytes(self.format) - packed.shape[1]))
        self._backend.store(Tier.DEVICE, self._address[layer, head, place], packed)
        self._recalls.note_moved(Tier.HOST, Tier.DEVICE, moved_bytes)


def kept_bytes(stage: Reconstructing, shape: CacheShape, older: I32) -> tuple[int, int]:
    """Device bytes of what is kept of so many older blocks of each table [L, H], with a pool for all that a query
    reads, and as if the model's dtype had 16 bits."""
    longest = older.max(axis=1)  # [L]
    width, dim = stage.width(shape), shape.head_dim
    exact = sum(stage.exact_chunks(int(count) * CHUNKS) for count in older.ravel())
    places = stage.pool_blocks(int(older.max(initial=0)) * CHUNKS) * older.size
    pieces = (
        (DIRECTIONS * dim, int((longest > 0).sum()) * shape.kv_heads * -(-width // DIRECTIONS)),
        (CHUNK_TOKENS * width, int(longest.sum()) * CHUNKS),
        (CHUNKS * dim, int(older.sum())),
        (2 * CHUNK_TOKENS * dim, exact),
        (CHUNK_TOKENS * dim, places),
    )
    return (
        sum(shape.block_bytes(Piece(numbers)) * count for numbers, count in pieces),
        sum(shape.block_bytes_16bit(Piece(numbers)) * count for numbers, count in pieces),
    )


def make_reader(
    stage: Selector, fmt: BlockFormat, slot: int, blocks: BlockStore, device: Arena, recalls: Recalls
) -> SelectiveReader:
    """What reads as a stage wants; arguments are those of ``SelectiveReader``."""
    if isinstance(stage, Reconstructing):
        return ReconstructingReader(stage, fmt, slot, blocks, device, recalls)
    return SelectiveReader(stage, fmt, slot, blocks, device, recalls)


def _chunks(block: I64 | I32) -> I64:
    """The chunks of blocks [N]: [N * 4]."""
    found: I64 = (np.asarray(block, np.int64)[:, None] * CHUNKS + np.arange(CHUNKS)).ravel()
    return found
