"""ZipCache: more bits for the tokens that are looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kernels.api import VOTE_DECAY
from kernels.layout import BLOCK_TOKENS, CacheShape
from kvpilot.bounds import Bounds
from workers.stages.base import BlockBatch, BlockPlaces, Coded, parameter, shadow
from workers.stages.compress.packing import pack, packed_bytes, unpack


@dataclass(frozen=True)
class ZipCache(Coded):
    """Of each block, the ``share`` of tokens with the greatest saliency has ``bits_high`` a number, the others
    ``bits_low``.

    A token's saliency is the attention that about the last 64 queries paid to it over what those of them could pay that
    came after it: without that, old tokens would win by having been there longer. Numbers are divided by the square
    root of their channel's greatest magnitude in the block, and quantised token by token, with a scale and a zero each:
    so channels with outliers do not take the levels from the others, and there is no group of scales in every token.

    Stored, for keys and for values: channel factors f16 [D], scales f16 [32], zeros f16 [32], codes of the salient
    tokens, then of the others, rows packed; and which tokens are salient, a bit each.

    Source: He et al., ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token Identification, arXiv
    2405.14256. Deviations: the share is one of each block, not of all tokens; saliency is taken when a block is built,
    from recent queries instead of sampled ones, and stays; keys are quantised like values.
    """

    name: ClassVar[str] = "zipcache"
    summary: ClassVar[str] = "Older blocks as integers, with more bits for the tokens that recent queries look at."
    bits_high: int = parameter(4, Bounds(choices=(4, 8)))
    bits_low: int = parameter(2, Bounds(choices=(2, 3)))
    share: float = parameter(0.5, Bounds(choices=(0.25, 0.5, 0.75)), "share of a block's tokens with more bits")
    shadow: bool = shadow()

    @property
    def salient(self) -> int:
        """Tokens of a block that have more bits."""
        return round(self.share * BLOCK_TOKENS)

    def refuses(self, shape: CacheShape) -> str | None:
        """Constants would outweigh the codes."""
        return f"head_dim {shape.head_dim} is below 16" if shape.head_dim < 16 else None

    def nbytes(self, shape: CacheShape) -> int:
        """See ``Coded``."""
        return BLOCK_TOKENS // 8 + 2 * sum(self._parts(shape))

    def encode(self, blocks: BlockBatch) -> torch.Tensor:
        """See ``Coded``."""
        since = (blocks.seen - blocks.position).clamp(min=1)
        saliency = blocks.votes / (1 - VOTE_DECAY**since)  # up to a factor, the same for all
        order = saliency.argsort(dim=1, descending=True, stable=True)
        salient = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, : self.salient], True)
        parts = [pack(salient, 1)]
        for x in (blocks.k, blocks.v):
            channel = _rounded(x.abs().amax(1).sqrt())[:, None]  # [N, 1, D]
            even = x / channel.masked_fill(channel == 0, 1.0)
            zero = _rounded(even.amin(-1, keepdim=True))  # [N, 32, 1]
            levels = torch.where(salient, 2**self.bits_high - 1, 2**self.bits_low - 1)[..., None]
            scale = _rounded((even.amax(-1, keepdim=True) - zero) / levels)
            codes = ((even - zero) / scale.masked_fill(scale == 0, 1.0)).round().clamp(min=0).minimum(levels)
            constants = (part.half().flatten(1).view(torch.uint8) for part in (channel, scale, zero))
            rows = (
                pack(codes[chosen].view(len(x), -1, x.shape[-1]), bits).flatten(1)
                for chosen, bits in ((salient, self.bits_high), (~salient, self.bits_low))
            )
            parts += [*constants, *rows]
        return torch.cat(parts, 1)

    def decode(self, codes: torch.Tensor, blocks: BlockPlaces) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``Coded``."""
        d, sizes = blocks.shape.head_dim, self._parts(blocks.shape)
        mask, *parts = torch.split(codes, [BLOCK_TOKENS // 8, *sizes, *sizes], dim=1)
        salient = unpack(mask, 1, BLOCK_TOKENS).bool()
        found = []
        for first in (0, len(sizes)):
            constants = (part.contiguous().view(torch.float16).float() for part in parts[first : first + 3])
            channel, scale, zero = constants
            numbers = torch.empty(len(codes), BLOCK_TOKENS, d, device=codes.device)
            high, low = parts[first + 3 : first + 5]
            for chosen, packed, bits in ((salient, high, self.bits_high), (~salient, low, self.bits_low)):
                rows = packed.reshape(-1, packed_bytes(d, bits))
                numbers[chosen] = unpack(rows, bits, d).float()
            found.append((numbers * scale[..., None] + zero[..., None]) * channel[:, None])
        return found[0], found[1]

    def _parts(self, shape: CacheShape) -> list[int]:
        """Bytes of what is stored of keys, or of values: factors, scales, zeros, salient codes, other codes."""
        d, others = shape.head_dim, BLOCK_TOKENS - self.salient
        high, low = self.salient * packed_bytes(d, self.bits_high), others * packed_bytes(d, self.bits_low)
        return [2 * d, 2 * BLOCK_TOKENS, 2 * BLOCK_TOKENS, high, low]


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """As it is stored."""
    return x.clamp(-65504.0, 65504.0).half().float()
