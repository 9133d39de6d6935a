"""Attention of decode steps over a request's coded blocks: those that a codec reads, since kernels do not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kernels.api import F32, I32, U8, VOTE_DECAY, DecodePlan, Tables
from kernels.layout import BLOCK_TOKENS, Format, Tier
from kernels.partials import Partial, merge
from workers.cache.arrangement import Mask
from workers.cache.blocks import I64, BlockStore
from workers.cache.formats import CodedFormat, as_read, format_of
from workers.stages.base import CodedBlocks


@dataclass
class _Kind:
    """All coded blocks of one codec in a layer, and what they received since the last settlement."""

    format: CodedFormat
    head: I64  # [N], rising
    index: I64  # [N] place in the table
    mass: F32  # [N, 32]
    votes: F32  # [N, 32]
    read: Mask | None = None  # [N] which were read in this step; None: all
    score: torch.Tensor | None = None  # [those read, G, 32] of this step
    found: tuple[I32, U8, CodedBlocks] | None = None  # where those read were at last: address, tier
    share: F32 | None = None  # [N] of attention in this step, mean over the query group


class CodedReader:
    """Reads what a request has in codecs' own formats. As a ``workers.cache.reading.Reader`` the last to be asked.

    Good for as long as the same blocks of the tables are coded, until the next switch; where they lie may change.

    Args:
        blocks: the worker's blocks.
        tables: the block tables.
        slot: the request's.
    """

    def __init__(self, blocks: BlockStore, tables: Tables, slot: int) -> None:
        self._blocks = blocks
        self._tables = tables
        self._slot = slot
        self._layers = [self._kinds(layer) for layer in range(blocks.shape.layers)]

    def _kinds(self, layer: int) -> list[_Kind]:
        length = self._tables.length[self._slot, layer]
        numbers = self._tables.format[self._slot, layer]
        numbers = np.where(np.arange(numbers.shape[1]) < length[:, None] // BLOCK_TOKENS, as_read(numbers), 0)
        found = []
        for number in np.unique(numbers[numbers >= len(Format)]).tolist():
            fmt = format_of(number)
            assert isinstance(fmt, CodedFormat)
            head, index = np.nonzero(numbers == number)
            nothing = np.zeros((2, len(head), BLOCK_TOKENS), np.float32)
            found.append(_Kind(fmt, head, index, nothing[0], nothing[1]))
        return found

    def before(self, layer: int, q: torch.Tensor, scaling: float) -> Partial | None:
        """See ``workers.cache.reading.Reader``."""
        parts = []
        for kind in self._layers[layer]:
            there = self._tables.tier[self._slot, layer, kind.head, kind.index] != Tier.DISK
            kind.read = None if there.all() else there
            head, index = (kind.head, kind.index) if kind.read is None else (kind.head[there], kind.index[there])
            if not len(head):
                continue
            blocks = self._find(kind, layer, head, index)
            queries = q[0].float().view(self._blocks.shape.kv_heads, -1, q.shape[-1])
            found = kind.format.codec.attend(queries, blocks, scaling)
            kind.score = found.score
            parts.append(Partial(found.output.view(1, q.shape[1], -1), found.lse.view(1, -1)))
        return merge(parts) if len(parts) > 1 else parts[0] if parts else None

    def _find(self, kind: _Kind, layer: int, head: I64, index: I64) -> CodedBlocks:
        """The blocks to read, which mostly are where they were in the last step."""
        address = self._tables.address[self._slot, layer, head, index]
        tier = self._tables.tier[self._slot, layer, head, index]
        if kind.found and np.array_equal(kind.found[0], address) and np.array_equal(kind.found[1], tier):
            return kind.found[2]
        blocks = self._blocks.coded(self._tables, self._slot, layer, head, index, kind.format)
        kind.found = address, tier, blocks
        return blocks

    def after(self, layer: int) -> None:
        """See ``workers.cache.reading.Reader``."""

    def count(self, layer: int, lse: torch.Tensor) -> None:
        """Takes note of what the layer's blocks received of a step.

        Args:
            layer: which.
            lse: [query_heads] natural log of the sum of exp(score) over everything.
        """
        of_head = lse.view(self._blocks.shape.kv_heads, -1, 1)
        for kind in self._layers[layer]:
            kind.votes *= np.float32(VOTE_DECAY)
            kind.share = np.zeros(len(kind.head), np.float32)
            if kind.score is None:
                continue
            read = slice(None) if kind.read is None else np.flatnonzero(kind.read)
            head = torch.from_numpy(kind.head[read]).to(lse.device)
            received = (kind.score - of_head[head]).exp_().sum(1).cpu().numpy()  # [N, 32]
            kind.mass[read] += received
            kind.votes[read] += received
            kind.share[read] = received.sum(1) / of_head.shape[1]
            kind.score = None

    def add_block_mass(self, plan: DecodePlan, row: int) -> None:
        """Adds what blocks received to a finished step's block masses, in which the request has that row."""
        for layer, kinds in enumerate(self._layers):
            for kind in kinds:
                if kind.share is not None:
                    plan.block_mass[layer, row, kind.head, kind.index] += kind.share

    def settle(self) -> None:
        """Brings masses and votes in the tables up to date, which the kernels' own settlement has let fade."""
        tables, slot = self._tables, self._slot
        for layer, kinds in enumerate(self._layers):
            for kind in kinds:
                for name, added in (("mass", kind.mass), ("votes", kind.votes)):
                    values = getattr(tables, name)[slot, layer]
                    by_block = values.reshape(len(values), -1, BLOCK_TOKENS)
                    by_block[kind.head, kind.index] += added.astype(by_block.dtype)
                    added[:] = 0
