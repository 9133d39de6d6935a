"""Low rank: keys before their rotation, and values, as coordinates in the directions that a model uses most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kernels.layout import BLOCK_TOKENS, CacheShape
from kvpilot.bounds import Bounds
from workers.stages.attended import Attended, attend_blocks
from workers.stages.base import BlockBatch, BlockPlaces, Coded, CodedBlocks, parameter, shadow


@dataclass(frozen=True)
class LowRank(Coded):
    """Of keys and values the ``rank * D`` coordinates in the basis that the model's profile has for each KV head.

    Keys lose little so before their rotation by position only: rotated, each direction wanders over all others. They
    are turned back, projected, and turned forth again when they are read. Values are never built: their coordinates
    are weighted and summed, and a query's sum is turned into a value once.

    Stored: coordinates of keys [32, rank * D], then of values, f16.

    Source: Chang et al., Palu: Compressing KV-Cache with Low-Rank Projection, arXiv 2407.21118. Deviations: bases are
    those of each head's keys and values on text, not factors of the projections' weights, and there is one for each
    head, not for a group of heads; the rank is the same everywhere; no quantisation of the coordinates.
    """

    name: ClassVar[str] = "lowrank"
    summary: ClassVar[str] = "Older blocks as coordinates in the directions that the model's keys and values use most."
    needs: ClassVar[tuple[str, ...]] = ("key_basis", "value_basis")
    rank: float = parameter(0.5, Bounds(choices=(0.25, 0.5, 0.75)), "share of head_dim")
    shadow: bool = shadow()

    def width(self, shape: CacheShape) -> int:
        """Coordinates of a key, or of a value."""
        return max(1, int(self.rank * shape.head_dim))

    def nbytes(self, shape: CacheShape) -> int:
        """See ``Coded``."""
        return 2 * BLOCK_TOKENS * self.width(shape) * 2

    def encode(self, blocks: BlockBatch) -> torch.Tensor:
        """See ``Coded``."""
        before = blocks.the_profile.rope.undo(blocks.k, blocks.position)
        parts = (before @ self._basis("key_basis", blocks), blocks.v @ self._basis("value_basis", blocks))
        return torch.cat([part.clamp(-65504.0, 65504.0).half().flatten(1).view(torch.uint8) for part in parts], 1)

    def decode(self, codes: torch.Tensor, blocks: BlockPlaces) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``Coded``."""
        keys, values = self._coordinates(codes, blocks.shape)
        return self._keys(keys, blocks), values @ self._basis("value_basis", blocks).mT

    def attend(self, q: torch.Tensor, blocks: CodedBlocks, scaling: float) -> Attended:
        """See ``Coded``."""
        keys, values = self._coordinates(blocks.codes(), blocks.shape)
        score = q[blocks.head] @ self._keys(keys, blocks).mT * scaling
        found = attend_blocks(score, blocks.head, len(q), lambda powers: powers @ values)
        basis = blocks.the_profile.tensor("value_basis")[blocks.layer[0]].to(q.device)  # [H, D, D]
        return Attended(found.output @ basis[..., : self.width(blocks.shape)].mT, found.lse, found.score)

    def _keys(self, coordinates: torch.Tensor, blocks: BlockPlaces) -> torch.Tensor:
        """Keys [N, 32, D], rotated, of coordinates [N, 32, rank * D]."""
        return blocks.the_profile.rope.rotate(coordinates @ self._basis("key_basis", blocks).mT, blocks.position)

    def _coordinates(self, codes: torch.Tensor, shape: CacheShape) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of keys and of values, each [N, 32, rank * D]."""
        numbers = codes.view(torch.float16).float().view(len(codes), 2, BLOCK_TOKENS, self.width(shape))
        return numbers[:, 0], numbers[:, 1]

    def _basis(self, name: str, blocks: BlockPlaces) -> torch.Tensor:
        """[N, D, rank * D] of each block's head."""
        basis = blocks.the_profile.tensor(name).to(blocks.head.device)
        return basis[blocks.layer, blocks.head][..., : self.width(blocks.shape)]
