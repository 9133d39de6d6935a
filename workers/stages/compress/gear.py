"""GEAR: what quantisation gets wrong is stored too, as a matrix of low rank and a few outliers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import torch

from kernels.layout import BLOCK_TOKENS, CacheShape
from kvpilot.bounds import Bounds
from workers.stages.base import BlockBatch, BlockPlaces, Coded, parameter, shadow
from workers.stages.compress.packing import pack, packed_bytes, places_of, stored_places, unpack

SEED = 2403_05527
_TURNS = 3
"""Of the power iteration; each brings the basis closer to the residual's greatest directions."""


@dataclass(frozen=True)
class Gear(Coded):
    """Keys by channel and values by token as integers, plus a residual of low rank, and outliers as they are.

    Outliers are the numbers farthest from the mean of their channel (keys) or token (values); the range of the codes
    is that of the others. Of what the codes miss of these, the matrix [32, D] of rank ``rank`` that a few turns of
    power iteration find is added.

    Stored, for keys and for values: codes of ``bits`` [32, D] in packed rows, scales and zeros f16 [D] or [32], the
    residual's factors f16 [32, rank] and [D, rank], outliers f16 [n] and their places uint16 [n].

    Source: Kang et al., GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless Generative Inference of LLM,
    arXiv 2403.05527. Deviations: all three parts are of a block of 32 tokens of one head, so of lower rank than the
    paper's, which are of the whole prompt; outliers are the most extreme of a block, not of each channel or token.
    """

    name: ClassVar[str] = "gear"
    summary: ClassVar[str] = "Older blocks as integers, with a residual of low rank and a few outliers."
    bits: int = parameter(4, Bounds(choices=(2, 3, 4)))
    rank: int = parameter(2, Bounds(choices=(1, 2, 4)))
    outliers: float = parameter(
        0.02, Bounds(choices=(0.0, 0.01, 0.02, 0.05)), "share of the numbers stored as they are"
    )
    shadow: bool = shadow()

    def refuses(self, shape: CacheShape) -> str | None:
        """The residual would be as large as what it mends; a place has 16 bits."""
        if not 16 <= shape.head_dim <= 1024:
            return f"head_dim {shape.head_dim} is not within 16 to 1024"
        return None

    def nbytes(self, shape: CacheShape) -> int:
        """See ``Coded``."""
        return sum(self._parts(shape, shape.head_dim)) + sum(self._parts(shape, BLOCK_TOKENS))

    def encode(self, blocks: BlockBatch) -> torch.Tensor:
        """See ``Coded``."""
        return torch.cat([*self._encode(blocks.k, 1), *self._encode(blocks.v, 2)], 1)

    def _encode(self, x: torch.Tensor, along: int) -> list[torch.Tensor]:
        """Bytes of x [N, 32, D], quantised in groups along a dimension."""
        far = (x - x.mean(along, keepdim=True)).abs().flatten(1)
        place = far.argsort(dim=1, descending=True, stable=True)[:, : self._outliers(x.shape[2])]
        is_outlier = torch.zeros_like(far, dtype=torch.bool).scatter_(1, place, True).view(x.shape)
        low = x.masked_fill(is_outlier, torch.inf).amin(along, keepdim=True)
        high = x.masked_fill(is_outlier, -torch.inf).amax(along, keepdim=True)
        there = high >= low  # a group of outliers alone has no range
        low, high = torch.where(there, low, 0.0), torch.where(there, high, 0.0)
        zero, levels = _rounded(low), 2**self.bits - 1
        scale = _rounded((high - zero) / levels)
        code = ((x - zero) / scale.masked_fill(scale == 0, 1.0)).round().clamp(0, levels)
        left = (x - code * scale - zero).masked_fill(is_outlier, 0.0)
        right = start(x.shape[2], self.rank).to(x.device).expand(len(x), -1, -1)  # [N, D, rank]
        for _ in range(_TURNS):
            basis = torch.linalg.qr(left @ right).Q  # [N, 32, rank]
            right = left.mT @ basis
        numbers = (scale, zero, basis, right, x.flatten(1).gather(1, place).clamp(-65504.0, 65504.0))
        return [
            pack(code, self.bits).flatten(1),
            *(part.half().flatten(1).view(torch.uint8) for part in numbers),
            stored_places(place),
        ]

    def decode(self, codes: torch.Tensor, blocks: BlockPlaces) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``Coded``."""
        d = blocks.shape.head_dim
        of_keys, of_values = self._parts(blocks.shape, d), self._parts(blocks.shape, BLOCK_TOKENS)
        parts = torch.split(codes, [*of_keys, *of_values], dim=1)
        return self._decode(parts[: len(of_keys)], 1, d), self._decode(parts[len(of_keys) :], 2, d)

    def _decode(self, parts: tuple[torch.Tensor, ...], along: int, d: int) -> torch.Tensor:
        packed, *halves, places = parts
        scale, zero, basis, right, outlier = (part.contiguous().view(torch.float16).float() for part in halves)
        count = len(packed)
        code = unpack(packed.reshape(count, BLOCK_TOKENS, -1), self.bits, d).float()
        x = code * scale.unsqueeze(along) + zero.unsqueeze(along)
        x = x + basis.view(count, BLOCK_TOKENS, -1) @ right.view(count, d, -1).mT
        return x.flatten(1).scatter(1, places_of(places), outlier).view(count, BLOCK_TOKENS, d)

    def _outliers(self, d: int) -> int:
        return math.ceil(self.outliers * BLOCK_TOKENS * d)

    def _parts(self, shape: CacheShape, groups: int) -> list[int]:
        """Bytes of what is stored of keys, or of values, in the order in which it is."""
        d, outliers = shape.head_dim, self._outliers(shape.head_dim)
        codes = BLOCK_TOKENS * packed_bytes(d, self.bits)
        factors = [2 * BLOCK_TOKENS * self.rank, 2 * d * self.rank]
        return [codes, 2 * groups, 2 * groups, *factors, 2 * outliers, 2 * outliers]


@cache
def start(dim: int, rank: int) -> torch.Tensor:
    """Where the power iteration starts: random, but always the same; float32 [dim, rank]."""
    return torch.from_numpy(np.random.default_rng(SEED).standard_normal((dim, rank)).astype(np.float32))


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """As it is stored."""
    return x.clamp(-65504.0, 65504.0).half().float()
