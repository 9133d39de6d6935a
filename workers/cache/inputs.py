"""What a request's layers were given for their keys and values, noted on the host, so that these can be made again.

Inputs are noted in rows of 32 tokens of all layers. A layer's row [32, width] lies in pieces [32, 2 D] of the host's
arena, each as large as a raw block, so that it goes the way that raw blocks go (``workers.cache.staging``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from kernels.api import I32, Backend
from kernels.layout import BLOCK_TOKENS, UNIT_BYTES, Format, Tier
from workers.cache.arena import Arena
from workers.cache.arrangement import ROWS, Blocks
from workers.cache.records import Piece, load_piece

I64 = npt.NDArray[np.int64]
_SLACK = 1e-9  # of a share that stands for a whole number of rows


class Remaker(Protocol):
    """Makes keys and values from inputs."""

    width: int
    """Channels of an input."""
    refusal: str | None
    """Why it cannot be done with the model, if so."""

    def make(self, layer: int, inputs: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated keys, and values, [kv_heads, N, D] of inputs [N, width] of a layer at positions int64 [N]."""
        ...


def pieces_of(width: int, head_dim: int) -> int:
    """Pieces of a layer's row, the last of which may be padded."""
    return -(-width // (2 * head_dim))


def rows_of(share: float, rows: int) -> int:
    """How many of so many rows a share of them is, rounded down."""
    return int(share * rows + _SLACK)


class LayerInputs:
    """One request's inputs, of the tokens that are computed from here on: as many rows as it may have, and as the host
    has room for without anybody's giving way.

    Args:
        arena: the host's.
        backend: kernels.
        remaker: the model's.
        max_tokens: most tokens of the request.
    """

    def __init__(self, arena: Arena, backend: Backend, remaker: Remaker, max_tokens: int) -> None:
        shape = arena.shape
        self.most_rows = 0
        """How many rows it may have."""
        self.pieces = pieces_of(remaker.width, shape.head_dim)
        """Of a layer's row."""
        self.lot = arena.open_lot(Format.RAW)
        self._arena = arena
        self._memory = arena.data.numpy()
        self._backend = backend
        self._remaker = remaker
        self._channels = 2 * shape.head_dim  # of a piece
        rows = -(-max_tokens // BLOCK_TOKENS) + 1
        self._address: I32 = np.full((rows, shape.layers, self.pieces), -1, np.int32)
        self._noted = np.zeros(rows, np.int64)  # tokens from each row's first on

    @property
    def rows(self) -> int:
        """Rows that are noted, or have been begun."""
        return int((self._address[:, 0, 0] >= 0).sum())

    @property
    def nbytes(self) -> int:
        """Bytes of its pieces."""
        return self.rows * int(self._address[0].size) * self._arena.shape.block_bytes(Format.RAW)

    def note(self, layer: int, start: int, inputs: torch.Tensor) -> None:
        """Takes in a layer's inputs [N, width] of the tokens at positions from ``start`` on; layers follow in order."""
        end, spans = start + len(inputs), []
        for row in range(start // BLOCK_TOKENS, -(-end // BLOCK_TOKENS)):
            first, last = (min(max(at - row * BLOCK_TOKENS, 0), BLOCK_TOKENS) for at in (start, end))
            if self._takes(layer, row, first):
                spans.append((row, first, last))
        if not spans:
            return
        width = self.pieces * self._channels
        padded = functional.pad(inputs.to(self._arena.shape.dtype), (0, width - inputs.shape[1])).cpu()
        values = padded.contiguous().view(torch.uint8).numpy().reshape(len(inputs), self.pieces, -1)
        size = values.shape[2]
        for row, first, last in spans:
            at = row * BLOCK_TOKENS - start
            for piece, address in enumerate(self._address[row, layer].tolist()):
                begin = address * UNIT_BYTES
                target = self._memory[begin + first * size : begin + last * size].reshape(-1, size)
                target[:] = values[at + first : at + last, piece]
            if layer == self._arena.shape.layers - 1:
                self._noted[row] = max(self._noted[row], last)

    def _takes(self, layer: int, row: int, first: int) -> bool:
        """Whether a row is noted that goes on with that token of it."""
        there = self._address[row, 0, 0] >= 0
        if layer == first == 0 and not there and self.rows < self.most_rows:
            blocks = self._address[row].size
            pages = self._arena.pages_needed(self.lot, Format.RAW, blocks)
            there = pages * self._arena.page_bytes <= self._arena.free_bytes
            if there:
                self._address[row] = self._arena.allocate(self.lot, blocks).reshape(self._address[row].shape)
        return bool(there and self._noted[row] >= first)

    def plan(self, blocks: Blocks, position: I32, share: float) -> Remaking | None:
        """What of a request's blocks on the host is to be made again: in each layer the first rows, up to a share of
        what is there, that were noted whole and of which every head has a raw block with just these tokens.

        Args:
            blocks: of the request.
            position: [L, H, T] original positions of its tokens.
            share: of the blocks on the host.

        Returns:
            None: nothing.
        """
        layers, heads, count = blocks.address.shape
        tokens = np.full((layers, heads, count * BLOCK_TOKENS), -1, np.int32)
        tokens[:, :, : position.shape[2]] = position[:, :, : tokens.shape[2]]
        tokens = tokens.reshape(layers, heads, count, BLOCK_TOKENS)
        row = tokens[..., 0] // BLOCK_TOKENS
        there = blocks.full & (blocks.tier == Tier.HOST)
        fit = there & (blocks.format == Format.RAW) & (row >= 0) & (self._noted[row] == BLOCK_TOKENS)
        fit &= (tokens == (row * BLOCK_TOKENS)[..., None] + ROWS).all(axis=-1)
        for layer in range(layers):
            rows, of_heads = np.unique(row[layer][fit[layer]], return_counts=True)
            chosen = rows[of_heads == heads][: rows_of(share, int(there[layer].sum()) // heads)]
            fit[layer] &= np.isin(row[layer], chosen)
        return Remaking(self, np.where(fit, row, -1)) if fit.any() else None

    def address(self, layer: int, rows: I32) -> I32:
        """Where the pieces [R * pieces] of a layer's rows [R] lie."""
        found: I32 = self._address[rows, layer].reshape(-1)
        return found

    def make(self, layer: int, head: I64, row: I32, pieces: I32, into: I32) -> None:
        """Makes raw blocks [N] on the device, of these heads and rows of a layer.

        Args:
            layer: which.
            head, row: [N] which blocks.
            pieces: where on the device the pieces of all these rows, in rising order, lie.
            into: [N] where the blocks go, which may be where pieces are.
        """
        shape = self._backend.shape
        rows, place = np.unique(row, return_inverse=True)
        found = load_piece(self._backend, Tier.DEVICE, pieces, Piece(BLOCK_TOKENS * self._channels))
        by_token = found.view(len(rows), self.pieces, BLOCK_TOKENS, self._channels).transpose(1, 2)
        inputs = by_token.flatten(2)[..., : self._remaker.width].flatten(0, 1)  # [R * 32, width]
        position = torch.from_numpy((rows[:, None] * BLOCK_TOKENS + ROWS).reshape(-1).astype(np.int64))
        k, v = self._remaker.make(layer, inputs, position.to(inputs.device))
        of_rows = (shape.kv_heads, len(rows), BLOCK_TOKENS * shape.head_dim)
        both = torch.cat([k.reshape(of_rows), v.reshape(of_rows)], dim=2)
        which = (torch.from_numpy(index).to(both.device) for index in (head, place.reshape(-1)))
        packed = both[tuple(which)].view(torch.uint8)  # [N, bytes]
        packed = functional.pad(packed, (0, shape.block_bytes(Format.RAW) - packed.shape[1]))
        self._backend.store(Tier.DEVICE, into, packed)

    def close(self) -> None:
        """Gives its memory back."""
        self._arena.close_lot(self.lot)


@dataclass(frozen=True)
class Remaking:
    """Which blocks are made again, as long as the request's tables stay as they are."""

    inputs: LayerInputs
    row: I32
    """[L, H, B] of which row each block is made; -1: it is copied."""

    @property
    def beyond(self) -> int:
        """How many more pieces than blocks a layer may bring."""
        rows, heads = int((self.row[:, 0] >= 0).sum(axis=1).max()), int(self.row.shape[1])
        return rows * max(0, self.inputs.pieces - heads)
