"""TurboQuant: vectors are rotated at random, and each coordinate is quantised by the best scalar quantiser for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from kernels.cpu_levels import attend_levels
from kernels.cpu_threads import team
from kernels.layout import BLOCK_TOKENS, CacheShape
from kernels.partials import LOG2_E
from kvpilot.bounds import Bounds
from workers.stages.attended import Attended, attend_blocks
from workers.stages.base import BlockBatch, BlockPlaces, Coded, CodedBlocks, parameter, shadow
from workers.stages.compress.packing import pack, packed_bytes, unpack

SEED = 2504_19874
"""Of the rotations: one for each head_dim, the same in every process."""
_CELLS, _ROUNDS = 1 << 16, 4000


@dataclass(frozen=True)
class TurboQuant(Coded):
    """Keys and values as codes of rotated unit vectors, and their lengths.

    A unit vector that is rotated at random has coordinates of a known distribution, (1 - x^2)^((D - 3) / 2) on
    [-1, 1], whatever it was before: no scales, zeros or calibration are needed, outliers are spread over all
    coordinates, and the quantiser with the least mean squared error (Lloyd-Max) is worked out once for each D. Queries
    are rotated too, so scores are made of codes, and the sum of values is rotated back once a query.

    Stored: codes of keys and of values, of ``bits`` each, [32, D]; norms of keys and of values f16 [32] each.

    Source: Zandieh et al., TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate, arXiv 2504.19874.
    Deviations: the variant of least squared error for keys and values; the one with an unbiased inner product, which
    spends a bit on the residual's sign sketch, is not here, nor are more bits for outlier channels (3.5 bits).
    """

    name: ClassVar[str] = "turboquant"
    summary: ClassVar[str] = "Older blocks as 3- or 4-bit codes of randomly rotated vectors, without scales."
    bits: int = parameter(4, Bounds(choices=(3, 4)))
    shadow: bool = shadow()

    def refuses(self, shape: CacheShape) -> str | None:
        """Coordinates of short vectors are not as the quantiser expects them."""
        return f"head_dim {shape.head_dim} is below 16" if shape.head_dim < 16 else None

    def nbytes(self, shape: CacheShape) -> int:
        """See ``Coded``."""
        return 2 * BLOCK_TOKENS * (2 + packed_bytes(shape.head_dim, self.bits))

    def encode(self, blocks: BlockBatch) -> torch.Tensor:
        """See ``Coded``."""
        turn = rotation(blocks.shape.head_dim).to(blocks.k.device)
        bounds = _between(levels(blocks.shape.head_dim, self.bits)).to(blocks.k.device)
        norms, codes = [], []
        for x in (blocks.k, blocks.v):
            norm = x.norm(dim=-1, keepdim=True)  # [N, 32, 1]
            unit = x @ turn / norm.masked_fill(norm == 0, 1.0)
            norms.append(norm.clamp(max=_HALF_MAX).half().flatten(1).view(torch.uint8))
            codes.append(pack(torch.bucketize(unit, bounds), self.bits).flatten(1))
        return torch.cat([*codes, *norms], 1)

    def decode(self, codes: torch.Tensor, blocks: BlockPlaces) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``Coded``."""
        back = rotation(blocks.shape.head_dim).to(codes.device).mT
        k, v = self._rotated(codes, blocks.shape)
        return k @ back, v @ back

    def attend(self, q: torch.Tensor, blocks: CodedBlocks, scaling: float) -> Attended:
        """See ``Coded``. Keys and values stay rotated, and in RAM a block is read where it lies."""
        turn = rotation(blocks.shape.head_dim).to(q.device)
        if blocks.memory is not None:
            table = _pairs(blocks.shape.head_dim, self.bits)
            scaled = (q @ turn * (scaling * LOG2_E)).numpy()
            parts = attend_levels(team(), blocks.memory.numpy(), blocks.head.numpy(), self.bits, scaled, table)
            output, lse, score = (torch.from_numpy(part) for part in parts)
            return Attended(output @ turn.mT, lse, score)
        k, v = self._rotated(blocks.codes(), blocks.shape)
        score = (q @ turn)[blocks.head] @ k.mT * scaling
        found = attend_blocks(score, blocks.head, len(q), lambda powers: powers @ v)
        return Attended(found.output @ turn.mT, found.lse, found.score)

    def _rotated(self, codes: torch.Tensor, shape: CacheShape) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [N, 32, D], rotated."""
        table = levels(shape.head_dim, self.bits).to(codes.device)
        row = packed_bytes(shape.head_dim, self.bits)
        norms = codes[:, 2 * BLOCK_TOKENS * row :].view(torch.float16).float().view(-1, 2, BLOCK_TOKENS, 1)
        packed = codes[:, : 2 * BLOCK_TOKENS * row].reshape(-1, 2, BLOCK_TOKENS, row)
        numbers = table[unpack(packed, self.bits, shape.head_dim)] * norms
        return numbers[:, 0], numbers[:, 1]


_HALF_MAX = 65504.0


@cache
def rotation(dim: int) -> torch.Tensor:
    """A random rotation, float32 [dim, dim]; rows are turned by multiplying from the right."""
    numbers = np.random.default_rng(SEED + dim).standard_normal((dim, dim))
    q, r = np.linalg.qr(numbers)
    return torch.from_numpy((q * np.sign(np.diag(r))).astype(np.float32))  # Haar: signs are made unique


@cache
def levels(dim: int, bits: int) -> torch.Tensor:
    """Lloyd-Max levels float32 [2 ** bits], rising, of a coordinate of a random unit vector."""
    edges = np.linspace(-1, 1, _CELLS + 1)
    x = (edges[1:] + edges[:-1]) / 2
    density = np.exp((dim - 3) / 2 * np.log1p(-x * x))
    mass, moment = (np.concatenate([[0.0], part.cumsum()]) for part in (density, density * x))  # up to each edge
    found = np.interp((np.arange(1 << bits) + 0.5) / (1 << bits) * mass[-1], mass, edges)
    for _ in range(_ROUNDS):
        between = np.concatenate([[-1.0], (found[1:] + found[:-1]) / 2, [1.0]])
        found = np.diff(np.interp(between, edges, moment)) / np.diff(np.interp(between, edges, mass))
    return torch.from_numpy(found.astype(np.float32))


@cache
def _pairs(dim: int, bits: int) -> npt.NDArray[np.uint64]:
    """All pairs of levels as 64 bits, [4 ** bits]; the low code's is the first."""
    table = levels(dim, bits).numpy()
    low, high = np.arange(4**bits) % 2**bits, np.arange(4**bits) >> bits
    return np.stack([table[low], table[high]], 1).view(np.uint64).ravel()


def _between(table: torch.Tensor) -> torch.Tensor:
    """Where one level ends and the next begins."""
    return (table[1:] + table[:-1]) / 2
