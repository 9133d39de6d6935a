"""MiniCache: keys and values of two neighbouring layers as one direction and two lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional

from kernels.layout import BLOCK_TOKENS, BlockFormat, CacheShape, Format, Tier
from kvpilot.bounds import Bounds
from workers.stages.base import (
    Ages,
    BlockBatch,
    BlockPlaces,
    Codec,
    Coded,
    Evictor,
    LayerPlace,
    Placer,
    Stage,
    parameter,
    shadow,
)


@dataclass(frozen=True)
class MiniCache(Codec):
    """From the middle of the model on, layers are merged in pairs: older blocks of both share their directions.

    Of each token of a KV head, the two key vectors (and the two value vectors) are replaced by one direction, on the
    great circle from the later layer's to the earlier's (SLERP) at ``t``, with the length that each vector had. Of each
    block the ``retained`` share of the tokens whose two directions are furthest apart keep both vectors as they are,
    chosen for keys and for values apart. A last layer without another stays raw, and so do blocks whose tokens are not
    the same in both layers, as an earlier pipeline without an exact copy may leave them.

    Stored in the earlier layer's block: its vectors along the shared direction, in the model's dtype, as large as a raw
    block. In the later layer's: the lengths float32 [2, 32], retained vectors in the model's dtype [2, n, D], and their
    places in the block uint8 [2, n], in whole words; the direction it takes from the other block. With 16-bit numbers
    and 64 channels both together take 0.56 of two raw blocks.

    Source: Liu et al., MiniCache: KV Cache Compression in Depth Dimension for Large Language Models, arXiv 2405.14366.
    Deviations: the retained are a fixed number of each block of 32 tokens, not those beyond a threshold between a
    text's least and greatest distance (its gamma, 0.05, gives the share); a generated token is merged when its block
    is 32 tokens old, not at once. What is merged is not quantised: the 41 % less that the paper tells are with 4 bits.
    """

    name: ClassVar[str] = "minicache"
    summary: ClassVar[str] = "Older blocks of two neighbouring layers, from the middle on, share their directions."
    t: float = parameter(0.6, Bounds(choices=(0.4, 0.5, 0.6, 0.7)), "of the way from the later layer to the earlier")
    retained: float = parameter(0.05, Bounds(choices=(0.0, 0.05, 0.1, 0.2)), "share of the tokens kept as they are")
    start: float = parameter(0.5, Bounds(choices=(0.5, 0.75)), "share of the layers before the first pair")
    shadow: bool = shadow()

    @property
    def format(self) -> BlockFormat:
        """The earlier layer's."""
        return Earlier(self.t, self.retained).format

    def by_age(self) -> Ages:
        """Both formats of a pair."""
        return (BLOCK_TOKENS, self.format), (BLOCK_TOKENS, Later(self.t, self.retained).format)

    def ages(self, layer: LayerPlace) -> Ages:
        """The one of the layer's part in its pair; none before the first pair and behind the last."""
        place = layer.index - self._first(layer.shape)
        if not 0 <= place < (layer.shape.layers - self._first(layer.shape)) // 2 * 2:
            return ()
        return (self.by_age()[place % 2],)

    def _first(self, shape: CacheShape) -> int:
        """The first layer of the first pair; there is one."""
        return min(int(self.start * shape.layers), shape.layers - 2)

    def refuses(self, shape: CacheShape) -> str | None:
        """There must be two."""
        return "it has one layer, and layers are merged in pairs" if shape.layers < 2 else None

    def refuses_beside(self, other: Stage) -> str | None:
        """Both layers must keep the same tokens, and be there when one is read."""
        if isinstance(other, Evictor) and not other.alike:
            return "two layers are merged token by token, and it keeps other tokens in each"
        if isinstance(other, Placer) and other.tier is Tier.DISK:
            return "a merged layer is read with its partner, and from disk layers come one at a time"
        if isinstance(other, Placer) and other.selects:
            return "a merged layer is read with its partner, and of each other blocks would be read"
        return None


@dataclass(frozen=True)
class _Half(Coded):
    """What both blocks of a pair have in common."""

    t: float = parameter(0.6)
    retained: float = parameter(0.05)

    @property
    def kept(self) -> int:
        """Tokens of a block whose keys, and as many whose values, are kept as they are."""
        return round(self.retained * BLOCK_TOKENS)

    def _pair(self, blocks: BlockBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values [N, 2, 32, D] of both layers, the earlier one first, and the places int64 [N, 2, kept, D] of
        those that are kept."""
        own, other = torch.stack((blocks.k, blocks.v), 1), torch.stack(blocks.the_partners(), 1)
        earlier, later = (own, other) if self.partner > 0 else (other, own)
        # the direction of what has no length could not be stored along it
        apart = angle(earlier, later).masked_fill(earlier.norm(dim=-1, keepdim=True) == 0, torch.inf)
        place = apart.argsort(dim=2, descending=True, stable=True)[:, :, : self.kept]
        return earlier, later, place.expand(-1, -1, -1, own.shape[3])


@dataclass(frozen=True)
class Earlier(_Half):
    """The earlier layer's block of a pair."""

    name: ClassVar[str] = "minicache_earlier"
    partner: ClassVar[int] = 1

    def nbytes(self, shape: CacheShape) -> int:
        """See ``Coded``."""
        return shape.payload_bytes(Format.RAW)

    def encode(self, blocks: BlockBatch) -> torch.Tensor:
        """See ``Coded``."""
        earlier, later, place = self._pair(blocks)
        merged = slerp(later, earlier, self.t) * earlier.norm(dim=-1, keepdim=True)
        return _bytes(merged.scatter(2, place, earlier.gather(2, place)), blocks.shape)

    def decode(self, codes: torch.Tensor, blocks: BlockPlaces) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``Coded``."""
        numbers = _numbers(codes, blocks.shape, BLOCK_TOKENS)
        return numbers[:, 0], numbers[:, 1]


@dataclass(frozen=True)
class Later(_Half):
    """The later layer's."""

    name: ClassVar[str] = "minicache_later"
    partner: ClassVar[int] = -1

    def _parts(self, shape: CacheShape) -> list[int]:
        """Bytes of lengths, retained vectors and their places, in whole words."""
        places = 2 * self.kept
        return [2 * BLOCK_TOKENS * 4, places * shape.head_dim * shape.dtype.itemsize, places, -places % 4]

    def nbytes(self, shape: CacheShape) -> int:
        """See ``Coded``."""
        return sum(self._parts(shape))

    def encode(self, blocks: BlockBatch) -> torch.Tensor:
        """See ``Coded``."""
        _, later, place = self._pair(blocks)
        lengths = later.norm(dim=-1).flatten(1).view(torch.uint8)
        kept = _bytes(later.gather(2, place), blocks.shape)
        places = place[..., 0].flatten(1).to(torch.uint8)
        return torch.cat([lengths, kept, functional.pad(places, (0, -places.shape[1] % 4))], 1)

    def decode(self, codes: torch.Tensor, blocks: BlockPlaces) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``Coded``."""
        lengths, kept, place, _ = torch.split(codes, self._parts(blocks.shape), 1)
        length = lengths.view(torch.float32).reshape(len(codes), 2, BLOCK_TOKENS, 1)
        merged = _unit(torch.stack(blocks.the_partners(), 1)) * length
        numbers = _numbers(kept, blocks.shape, self.kept)
        merged.scatter_(2, place.long().view(len(codes), 2, self.kept, 1).expand(numbers.shape), numbers)
        return merged[:, 0], merged[:, 1]


def angle(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Angles between vectors [..., D], in radians [..., 1]; precise for small ones too."""
    a, b = _unit(a), _unit(b)
    between: torch.Tensor = 2 * torch.atan2((a - b).norm(dim=-1, keepdim=True), (a + b).norm(dim=-1, keepdim=True))
    return between


def slerp(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """Unit vectors [..., D] at ``t`` of the way from the directions of a to those of b, on the great circle.

    Opposite directions have no such way, and equal ones need none: there it is the straight line.
    """
    between = angle(a, b)
    sine = between.sin()
    straight = sine < 1e-6
    of_a, of_b = (
        torch.where(straight, share, (share * between).sin() / sine.masked_fill(straight, 1.0)) for share in (1 - t, t)
    )
    return _unit(of_a * _unit(a) + of_b * _unit(b))


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors [..., D] of length 1; zeros stay zeros."""
    return functional.normalize(vectors, dim=-1, eps=1e-30)


def _bytes(numbers: torch.Tensor, shape: CacheShape) -> torch.Tensor:
    """Numbers [N, ...] in the model's dtype, uint8 [N, bytes]."""
    most = torch.finfo(shape.dtype).max
    return numbers.clamp(-most, most).to(shape.dtype).flatten(1).view(torch.uint8)


def _numbers(codes: torch.Tensor, shape: CacheShape, tokens: int) -> torch.Tensor:
    """And back, float32 [N, 2, tokens, D]."""
    return codes.view(shape.dtype).float().reshape(len(codes), 2, tokens, shape.head_dim)
