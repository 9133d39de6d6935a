"""Reads of a request whose queries read only some blocks: selection, marks in the tables, recall from the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kernels.api import F32, I32, U8, Tables, TokenSource
from kernels.layout import BLOCK_TOKENS, BlockFormat, CacheShape, Tier
from kernels.partials import Partial
from workers.cache.arena import Arena
from workers.cache.arrangement import ROWS, Mask
from workers.cache.blocks import BlockStore, Owners
from workers.cache.digests import Digests, digest
from workers.cache.pool import RecallPool
from workers.cache.recalls import Recalls
from workers.profile.profile import ModelProfile
from workers.stages.base import LayerPlace
from workers.stages.selecting import BlockView, Digest, Selector


@dataclass
class Saved:
    """What a layer's tables say when nobody reads."""

    layer: int
    address: I32  # [H, B]
    tier: U8  # [H, B]


@dataclass
class _Asked:
    """The last query of a layer, and what it read."""

    q: torch.Tensor  # [query_heads, D]
    read: torch.Tensor  # bool [H, B]


def layers_of(stage: Selector, shape: CacheShape, profile: ModelProfile | None) -> Mask:
    """Bool [L] in which layers queries choose what they read."""
    places = (LayerPlace(index, shape, 0, profile.layer(index) if profile else None) for index in range(shape.layers))
    return np.array([stage.selects_in(place) for place in places])


class SelectiveReader:
    """Has a stage choose the blocks of each layer that a query reads, and brings them to the device.

    A ``workers.cache.reading.Reader`` of one request's tables.

    Args:
        stage: what chooses.
        fmt: the format that older blocks have, or raw.
        slot: the request's slot.
        blocks, device: the worker's blocks and its device arena.
        recalls: is added to.
    """

    def __init__(
        self, stage: Selector, fmt: BlockFormat, slot: int, blocks: BlockStore, device: Arena, recalls: Recalls
    ) -> None:
        self.stage = stage
        self.format = fmt
        self._slot = slot
        self._blocks = blocks
        self._backend = backend = blocks.backend
        self._tables: Tables = backend.tables
        self._shape: CacheShape = backend.shape
        self._device = device.data.device
        self._recalls = recalls
        self._layers = layers_of(stage, self._shape, blocks.profile)
        self.digests = Digests(stage.digests, self._shape, self._layers, self._device)
        self.pool = RecallPool(device, backend, self._shape, self._layers, fmt, recalls)
        self._asked: dict[int, _Asked] = {}
        self._guessed: dict[int, _Asked] = {}
        self._saved: Saved | None = None

    # -- between steps -------------------------------------------------------------------------------------------------

    def changed(self, anew: bool = False) -> int:
        """The request's tables have changed by more than new tokens.

        Args:
            anew: whether what earlier queries read is to be forgotten.

        Returns:
            Bytes that the device lacks for what the stage cannot do without; then it is to be called again.
        """
        tables, slot = self._tables, self._slot
        before: I32 = self.digests.count
        self.digests.check(tables, slot)
        self.pool.forget(self.digests.count)
        others = np.any(self.digests.count < before, axis=1)  # [L] other blocks are in the places of those read
        for layer in range(self._shape.layers):
            if anew or others[layer]:
                self._asked.pop(layer, None)
            if self._layers[layer]:
                self._digest(layer)
        self.pool.resize(self.stage.pool_blocks(int(self._older(tables.length[slot]).max())))
        return 0

    def nbytes(self) -> tuple[int, int]:
        """Bytes on the device of digests and pool, and as if raw blocks held a 16-bit dtype."""
        digests, digests_16bit = self.digests.nbytes()
        fmt, blocks = self.pool.format, self.pool.blocks
        pooled, pooled_16bit = blocks * self._shape.block_bytes(fmt), blocks * self._shape.block_bytes_16bit(fmt)
        return digests + pooled, digests_16bit + pooled_16bit

    def close(self) -> None:
        """Gives its memory back."""
        self.pool.close()

    def moved(self, now: Callable[[I32], I32]) -> None:
        """Blocks of the device have moved; ``now`` says where to."""
        self.pool.moved(now)

    def settle(self) -> None:
        """Brings masses and votes in the tables up to date, where it counts some by itself."""

    # -- decode steps --------------------------------------------------------------------------------------------------

    def foresee(self, layer: int, q: torch.Tensor, scaling: float) -> None:
        """Takes a guess [1, query_heads, D] of a layer's query before it comes, and fetches what that would read."""
        if not self._layers[layer]:
            return
        length = self._tables.length[self._slot, layer]
        self._digest(layer)
        read = self._choose(layer, q[0], length, scaling, self._asked.get(layer))
        self._guessed[layer] = _Asked(q[0], read)
        if read.numel():
            self._bring(layer, on_host(read), length, ahead=True)

    def before(self, layer: int, q: torch.Tensor, scaling: float) -> Partial | None:
        """See ``workers.cache.reading.Reader.before``."""
        if not self._layers[layer]:
            return None
        tables, slot = self._tables, self._slot
        length = tables.length[slot, layer]
        self._digest(layer)
        guess = self._guessed.pop(layer, None)
        asked = None if self.stage.guesses else q[0]
        chosen = guess.read if guess else self._choose(layer, asked, length, scaling, self._asked.get(layer))
        if not chosen.numel():
            return None
        self._asked[layer] = guess or _Asked(q[0], chosen)
        read, blocks = on_host(chosen), chosen.shape[1]
        older = np.arange(blocks) < self._older(length)[:, None]
        self._recalls.note_chosen(int((read & older).sum()), int((~read).sum()))
        here = (slot, layer, slice(None), slice(0, blocks))
        self._saved = Saved(layer, tables.address[here].copy(), tables.tier[here].copy())
        found = self._bring(layer, read, length)
        if found is not None:
            np.copyto(tables.address[here], found, where=found >= 0)
            tables.tier[here][found >= 0] = Tier.DEVICE
        tables.tier[here][~read] = Tier.DISK
        return None

    def after(self, layer: int) -> None:
        """See ``workers.cache.reading.Reader.after``."""
        saved, self._saved = self._saved, None
        if saved is not None:
            here = (self._slot, layer, slice(None), slice(0, saved.address.shape[1]))
            self._tables.address[here], self._tables.tier[here] = saved.address, saved.tier

    def _bring(self, layer: int, read: Mask, length: I32, ahead: bool = False) -> I32 | None:
        """Recalls what is read of the host's blocks; [H, B] addresses on the device, -1 for blocks not recalled. None:
        nothing that is read lives there."""
        blocks = read.shape[1]
        away = read & (self._tables.tier[self._slot, layer, :, :blocks] == Tier.HOST)
        away &= np.arange(blocks) < self._older(length)[:, None]
        return self.pool.bring(self._tables, self._slot, layer, away, ahead) if away.any() else None

    # -- what a query reads --------------------------------------------------------------------------------------------

    def _older(self, length: I32) -> I32:
        """[H] how many blocks of tables of that length a query may skip."""
        return np.asarray(np.maximum(length - self.stage.always(), 0) // BLOCK_TOKENS, np.int32)

    def _choose(
        self,
        layer: int,
        q: torch.Tensor | None,
        length: I32,
        scaling: float,
        asked: _Asked | None,
        digests: dict[Digest, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """What a query reads of the blocks it may skip: bool [H, B]; beyond a shorter table's, True.

        Args:
            layer: which.
            q: [query_heads, D]; None: everything.
            length: [H] tokens of each table.
            scaling: factor on the scores.
            asked: the query before.
            digests: of more blocks than the tables have.
        """
        older = self._older(length)
        blocks = int(older.max(initial=0))
        valid = np.arange(blocks) < older[:, None]
        if q is None or not blocks:
            return torch.ones(valid.shape, dtype=torch.bool, device=self._device)
        budget = np.array([self.stage.budget(int(count)) for count in older], np.int64)
        known = self._tables.tier[self._slot, layer, :, :blocks]
        tier = np.zeros(valid.shape, np.uint8)
        tier[:, : known.shape[1]] = known
        view = BlockView(
            index=layer,
            layers=self._shape.layers,
            valid=self._tensor(valid),
            budget=self._tensor(budget),
            tier=self._tensor(tier),
            scaling=scaling,
            digests=digests or self.digests.of(layer, blocks),
            votes=lambda: self._tensor(self._votes(layer, blocks)),
            asked_before=asked.q if asked else None,
            read_before=asked.read if asked else None,
        )
        read = self.stage.select(view, q)
        if read.shape != view.valid.shape or read.dtype is not torch.bool:
            raise ValueError(
                f"stage {self.stage.name!r}: what is read must be bool {tuple(view.valid.shape)},"
                f" not {read.dtype} {tuple(read.shape)}"
            )
        return read | ~view.valid

    def _votes(self, layer: int, blocks: int) -> F32:
        """[H, B] votes of a layer's first blocks; 0 for blocks that the tables do not have."""
        self._backend.settle(np.array([self._slot], np.int32))
        votes = self._tables.votes[self._slot, layer].reshape(self._shape.kv_heads, -1, BLOCK_TOKENS)[:, :blocks]
        found = np.zeros((len(votes), blocks), np.float32)
        found[:, : votes.shape[1]] = votes.astype(np.float32).sum(axis=2)
        return found

    def _digest(self, layer: int) -> None:
        """Brings a layer's digests up to date."""
        older = self._older(self._tables.length[self._slot, layer])
        self.digests.extend(self._tables, self._slot, layer, older, self._keys)

    def _keys(self, layer: int, head: I32, block: I32) -> torch.Tensor:
        """Keys [N, 32, D] of blocks by head [N] and place in the table [N]."""
        return self._read(layer, head, block)[0]

    def _read(self, layer: int, head: I32, block: I32) -> tuple[torch.Tensor, torch.Tensor]:
        """Their keys and values, each [N, 32, D]."""
        tables, where = self._tables, (self._slot, layer, head, block)
        spread = (len(head), BLOCK_TOKENS)
        columns = (tables.address[where], tables.format[where], tables.tier[where])
        address, fmt, tier = (np.repeat(column, BLOCK_TOKENS).reshape(spread) for column in columns)
        position = tables.position[self._slot, layer].reshape(self._shape.kv_heads, -1, BLOCK_TOKENS)[head, block]
        owners = Owners(np.full(len(head), layer), head, position)
        return self._blocks.read(TokenSource(address, fmt, tier, np.broadcast_to(ROWS, spread).copy()), owners)

    def _tensor(self, values: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device)

    # -- scoring -------------------------------------------------------------------------------------------------------

    def as_read(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        """A layer's kept keys [H, T, D] as queries find them, where that is not as they are stored."""
        return keys

    def visible(self, layer: int, q: torch.Tensor | None, keys: torch.Tensor, scaling: float) -> torch.Tensor | None:
        """Which of its table's tokens each of S known tokens would read, in decode steps that move no block.

        Args:
            layer: which.
            q: [query_heads, S, D] their queries, or the guesses of them; None: they read everything.
            keys: [H, T + S, D] of the tokens kept, up to the longest table's T, and of the S tokens.
            scaling: factor on the scores.

        Returns:
            bool [H, S, T + S], of which later tokens are not taken out. None: everything.
        """
        if q is None or not self._layers[layer]:
            return None
        length = self._tables.length[self._slot, layer]
        steps = q.shape[1]
        kept, last = keys.shape[1] - steps, self._older(length + steps)
        blocks = int(last.max())
        if not blocks:
            return None
        self._digest(layer)
        # place of each table's tokens among the keys: the new ones stand behind the longest table
        index = np.arange(blocks * BLOCK_TOKENS)
        behind = np.where(index < length[:, None], index, index - length[:, None] + kept)
        place = self._tensor(np.minimum(behind, keys.shape[1] - 1))  # [H, B * 32]
        in_order = keys.gather(1, place[..., None].expand(-1, -1, keys.shape[2]))
        digests = digest(in_order.view(len(length), blocks, BLOCK_TOKENS, -1), self.stage.digests)
        count = self.digests.count[layer]
        for kind, own in self.digests.of(layer, blocks).items():
            for head, known in enumerate(count):  # of rounded blocks and raw ones digests differ a little
                digests[kind][head, :known] = own[head, :known]
        seen = torch.ones(len(length), steps, keys.shape[1], dtype=torch.bool, device=keys.device)
        asked = self._asked.get(layer)
        for step in range(steps):
            here = length + step + 1
            width = int(self._older(here).max())
            if not width:
                continue
            mine = {kind: values[:, :width] for kind, values in digests.items()}
            read = self._choose(layer, q[:, step], here, scaling, asked, mine)
            asked = _Asked(q[:, step], read)
            of_tokens = read.repeat_interleave(BLOCK_TOKENS, dim=1)
            seen[:, step].scatter_(1, place[:, : of_tokens.shape[1]], of_tokens)
        return seen


def on_host(read: torch.Tensor) -> Mask:
    """What is read, [H, B], where tables are."""
    found: Mask = read.cpu().numpy()
    return found
