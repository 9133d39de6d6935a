"""KVQuant: keys before their rotation, on levels that were fitted to each channel of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from kernels.layout import BLOCK_TOKENS, CacheShape
from kvpilot.bounds import Bounds
from workers.stages.base import BlockBatch, BlockPlaces, Coded, parameter, shadow
from workers.stages.compress.packing import pack, packed_bytes, places_of, stored_places, unpack

OUTLIERS = 0.01
"""Share of a block's numbers that are stored as they are."""


@dataclass(frozen=True)
class KVQuant(Coded):
    """Numbers as codes of non-uniform levels from the model's profile, and the 1 % that fit these worst as they are.

    Keys are turned back to before their rotation by position, where channels keep their ranges: each channel has its
    own levels, and no scales are stored. Values have levels for each head, within the range of each token. Outliers are
    the keys farthest from their level and the values farthest from their token's mean, which do not count in its range.

    Stored: of keys codes [32, D] in packed rows, outliers f16 [n] and their places uint16 [n]; of values the same, and
    each token's least and greatest f16 [32] each.

    Source: Hooper et al., KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache Quantization, arXiv
    2401.18079. Deviations: levels are fitted by square error without the loss's sensitivity; outliers are the worst
    of each block, not beyond thresholds of a channel or token; of the first token, which attention sinks to, only its
    outliers are exact, not all of it.
    """

    name: ClassVar[str] = "kvquant"
    summary: ClassVar[str] = "Older blocks on levels fitted to the model, keys before their rotation, 1 % as it is."
    needs: ClassVar[tuple[str, ...]] = tuple(f"{part}_levels_{n}" for part in ("key", "value") for n in (4, 8, 16))
    bits: int = parameter(3, Bounds(choices=(2, 3, 4)))
    shadow: bool = shadow()

    def refuses(self, shape: CacheShape) -> str | None:
        """A place has 16 bits."""
        return f"head_dim {shape.head_dim} is above 1024" if shape.head_dim > 1024 else None

    def nbytes(self, shape: CacheShape) -> int:
        """See ``Coded``."""
        return sum(self._parts(shape))

    def encode(self, blocks: BlockBatch) -> torch.Tensor:
        """See ``Coded``."""
        keys = blocks.the_profile.rope.undo(blocks.k, blocks.position)
        table = self._levels("key", blocks)  # [N, 1, D, levels]
        code = _nearest(keys, table)
        near = table.expand(-1, BLOCK_TOKENS, -1, -1).gather(3, code[..., None])[..., 0]
        parts = [pack(code, self.bits).flatten(1), *self._outliers(keys, (keys - near).abs())]

        values = blocks.v
        far = (values - values.mean(-1, keepdim=True)).abs()
        place = self._worst(far)
        inside = torch.ones_like(far, dtype=torch.bool).flatten(1).scatter_(1, place, False).view(far.shape)
        low = values.masked_fill(~inside, torch.inf).amin(-1)
        high = values.masked_fill(~inside, -torch.inf).amax(-1)
        there = high >= low  # a token all of whose numbers are outliers has no range
        ends = torch.stack([torch.where(there, low, 0.0), torch.where(there, high, 0.0)], 1)
        ends = ends.clamp(-65504.0, 65504.0).half()  # [N, 2, 32]
        middle, half = _range(ends.float())
        scaled = (values - middle) / half.masked_fill(half == 0, 1.0)
        code = _nearest(scaled, self._levels("value", blocks))
        parts += [pack(code, self.bits).flatten(1), *self._outliers(values, far), ends.flatten(1).view(torch.uint8)]
        return torch.cat(parts, 1)

    def decode(self, codes: torch.Tensor, blocks: BlockPlaces) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``Coded``."""
        parts = torch.split(codes, self._parts(blocks.shape), dim=1)
        key, key_outliers, key_places, value, value_outliers, value_places, ends = parts
        keys = _with(self._numbers(key, "key", blocks), key_outliers, key_places)
        middle, half = _range(ends.contiguous().view(torch.float16).float().view(-1, 2, BLOCK_TOKENS))
        values = _with(self._numbers(value, "value", blocks) * half + middle, value_outliers, value_places)
        return blocks.the_profile.rope.rotate(keys, blocks.position), values

    def _numbers(self, packed: torch.Tensor, part: str, blocks: BlockPlaces) -> torch.Tensor:
        """The levels [N, 32, D] of packed codes."""
        d = blocks.shape.head_dim
        code = unpack(packed.reshape(len(packed), BLOCK_TOKENS, -1), self.bits, d)
        table = self._levels(part, blocks).expand(-1, BLOCK_TOKENS, d, -1)
        return table.gather(3, code[..., None])[..., 0]

    def _levels(self, part: str, blocks: BlockPlaces) -> torch.Tensor:
        """Rising, [N, 1, D or 1, levels]."""
        table = blocks.the_profile.tensor(f"{part}_levels_{2**self.bits}").to(blocks.head.device)
        return table[blocks.layer, blocks.head].view(len(blocks.head), 1, -1, 2**self.bits)

    def _outliers(self, x: torch.Tensor, badness: torch.Tensor) -> list[torch.Tensor]:
        """Bytes of the numbers of x [N, 32, D] that are worst off, and of their places."""
        place = self._worst(badness)
        number = x.flatten(1).gather(1, place).clamp(-65504.0, 65504.0).half()
        return [number.view(torch.uint8), stored_places(place)]

    def _worst(self, badness: torch.Tensor) -> torch.Tensor:
        count = _count(badness.shape[2])
        return badness.flatten(1).argsort(dim=1, descending=True, stable=True)[:, :count]

    def _parts(self, shape: CacheShape) -> list[int]:
        """Bytes of what is stored, in order."""
        one = [BLOCK_TOKENS * packed_bytes(shape.head_dim, self.bits), *[2 * _count(shape.head_dim)] * 2]
        return [*one, *one, 4 * BLOCK_TOKENS]


def _count(d: int) -> int:
    return math.ceil(OUTLIERS * BLOCK_TOKENS * d)


def _nearest(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Which of the levels, in the last dimension of ``table``, is nearest to each number of x: int64."""
    between = (table[..., 1:] + table[..., :-1]) / 2
    code = torch.zeros(x.shape, dtype=torch.int64, device=x.device)
    for bound in between.unbind(-1):
        code += x > bound
    return code


def _range(ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Middle and half width, each [N, 32, 1], of ranges [N, 2, 32]."""
    low, high = ends[:, 0, :, None], ends[:, 1, :, None]
    return (low + high) / 2, (high - low) / 2


def _with(x: torch.Tensor, outliers: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """x [N, 32, D] with its outliers, as they are stored, in their places."""
    numbers = outliers.contiguous().view(torch.float16).float()
    return x.flatten(1).scatter(1, places_of(places), numbers).view(x.shape)
