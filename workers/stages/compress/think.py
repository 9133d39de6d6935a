"""ThinK: the key channels that queries use least are not stored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional

from kernels.layout import BLOCK_TOKENS, CacheShape
from kvpilot.bounds import Bounds
from workers.stages.attended import Attended, attend_blocks
from workers.stages.base import BlockBatch, BlockPlaces, Coded, CodedBlocks, parameter, shadow

OBSERVED_QUERIES = 32


@dataclass(frozen=True)
class ThinK(Coded):
    """Of each block's keys only the channels with the greatest ``|Q_i| |K_i|`` are there, in the model's dtype.

    Q_i is what the last 32 queries of all query heads of the group have in channel i, K_i what the block's 32 keys
    have: the norm of their outer product is how much of the scores a channel makes, at most. Values stay whole.
    A dropped channel adds nothing to a score, and its bytes are not there: with 0.6 of them a block takes 0.8 of raw.

    Stored: K [32, kept], V [32, D], indexes of the kept channels uint8 [kept], in
    whole words.

    Source: Xu et al., ThinK: Thinner Key Cache by Query-Driven Pruning, arXiv 2407.21018. Deviations: channels are
    chosen for each block of a head, when it is built, not once a head for the whole prompt; so tokens that are
    generated are pruned as well. Values are not pruned.
    """

    name: ClassVar[str] = "think"
    summary: ClassVar[str] = "Older blocks without the key channels that queries use least; values whole."
    channels: float = parameter(0.6, Bounds(choices=(0.4, 0.5, 0.6, 0.7, 0.8)), "share of key channels that stay")
    shadow: bool = shadow()

    def kept(self, shape: CacheShape) -> int:
        """Key channels that stay."""
        return max(1, math.floor(self.channels * shape.head_dim))

    def refuses(self, shape: CacheShape) -> str | None:
        """An index is a byte."""
        return f"head_dim {shape.head_dim} is above 256" if shape.head_dim > 256 else None

    def nbytes(self, shape: CacheShape) -> int:
        """See ``Coded``."""
        kept = self.kept(shape)
        return BLOCK_TOKENS * (kept + shape.head_dim) * shape.dtype.itemsize + kept + -kept % 4

    def encode(self, blocks: BlockBatch) -> torch.Tensor:
        """See ``Coded``."""
        q = blocks.queries_of_blocks(OBSERVED_QUERIES)  # [N, G, n, D]
        weight = q.flatten(1, 2).norm(dim=1) * blocks.k.norm(dim=1)  # [N, D]
        channel = weight.argsort(dim=1, descending=True, stable=True)[:, : self.kept(blocks.shape)].sort(dim=1).values
        k = blocks.k.gather(2, channel[:, None].expand(-1, BLOCK_TOKENS, -1))
        numbers = (part.to(blocks.shape.dtype).flatten(1).view(torch.uint8) for part in (k, blocks.v))
        return torch.cat([*numbers, functional.pad(channel.to(torch.uint8), (0, -channel.shape[1] % 4))], 1)

    def decode(self, codes: torch.Tensor, blocks: BlockPlaces) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``Coded``."""
        k, v, channel = self._parts(codes, blocks.shape)
        whole = torch.zeros(v.shape, device=v.device)
        return whole.scatter_(2, channel[:, None].expand(-1, BLOCK_TOKENS, -1), k.float()), v.float()

    def attend(self, q: torch.Tensor, blocks: CodedBlocks, scaling: float) -> Attended:
        """See ``Coded``. Of a query only the channels are read that a block has."""
        k, v, channel = self._parts(blocks.codes(), blocks.shape)
        chosen = q[blocks.head].gather(2, channel[:, None].expand(-1, q.shape[1], -1))  # [N, G, kept]
        score = chosen @ k.float().mT * scaling
        return attend_blocks(score, blocks.head, len(q), lambda powers: powers @ v.float())

    def _parts(self, codes: torch.Tensor, shape: CacheShape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """K [N, 32, kept] and V [N, 32, D] in the model's dtype, channels int64 [N, kept]."""
        kept, size = self.kept(shape), shape.dtype.itemsize
        parts = [BLOCK_TOKENS * kept * size, BLOCK_TOKENS * shape.head_dim * size, kept, -kept % 4]
        k, v, channel, _ = torch.split(codes, parts, dim=1)
        blocks = (len(codes), BLOCK_TOKENS, -1)
        return k.view(shape.dtype).reshape(blocks), v.view(shape.dtype).reshape(blocks), channel.long()
