"""Codes as coarse as they may be, for an entropy coder: the layout of int8 with steps by the spread of the numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kernels.layout import BLOCK_TOKENS, GROUP, CacheShape, Format
from kvpilot.bounds import Bounds
from workers.stages.base import BlockBatch, BlockPlaces, Coded, parameter

KEY_STEP, VALUE_STEP = 3.2, 4.8
"""Standard deviations that a step has, times 2 ** bits. Chosen on SmolLM2-135M: finer keys lose less at the same bytes,
and with these `bits=4` loses about what ``kivi(bits=4)`` does."""
MIDDLE = 128
"""The code of a channel's mean, for keys, or of 0, for values."""
MOST = 16384.0
"""The greatest magnitude of a number: zeros, 128 steps away, are float16."""
_COARSEST = 256.0


@dataclass(frozen=True)
class Coarse(Coded):
    """Blocks as ``int8`` lays them out, whose codes are few in number so that they take about ``bits`` bits each once
    they are entropy-coded (``workers.cache.packed``); kernels read them as int8.

    A step is as long for all keys of a block, and for all values of a token: by their standard deviation, keys from
    their channel's mean. Where 127 steps do not reach a group's farthest number, its steps are longer. Numbers beyond
    +-16,384 count as that.

    No pipeline names it: it is the format of ``swap``.
    """

    name: ClassVar[str] = "coarse"
    summary: ClassVar[str] = "Blocks laid out as int8, with codes for an entropy coder."
    plain: ClassVar[Format] = Format.INT8
    bits: int = parameter(4, Bounds(choices=(2, 3, 4, 5, 6)))

    def nbytes(self, shape: CacheShape) -> int:
        """As many as ``int8``, before entropy coding."""
        return shape.payload_bytes(Format.INT8)

    def encode(self, blocks: BlockBatch) -> torch.Tensor:
        """See ``Coded``."""
        k, v = (part.nan_to_num(0.0, MOST, -MOST).clamp(-MOST, MOST) for part in (blocks.k, blocks.v))
        mean = k.mean(1)  # [N, D]
        spread = (k - mean[:, None]).square().mean((1, 2)).sqrt()  # [N]
        k_scale = self._scale(KEY_STEP, spread[:, None], (k - mean[:, None]).abs().amax(1))  # [N, D]
        v_scale = self._scale(VALUE_STEP, v.square().mean(2).sqrt()[..., None], _grouped(v).abs().amax(3))  # [N, 32, G]
        k_zero, v_zero = ((middle - MIDDLE * scale).half() for middle, scale in ((mean, k_scale), (0.0, v_scale)))
        parts = (
            _codes(k, k_scale[:, None], k_zero[:, None]),
            _codes(v, *(_by_channel(part, v) for part in (v_scale, v_zero))),
            *(part.half() for part in (k_scale, k_zero, v_scale, v_zero)),
        )
        return torch.cat([part.flatten(1).view(torch.uint8) for part in parts], 1)

    def _scale(self, step: float, spread: torch.Tensor, farthest: torch.Tensor) -> torch.Tensor:
        """Steps of groups whose farthest number is so far from their middle, as they are stored."""
        wanted = (spread * (step / 2**self.bits)).clamp(max=_COARSEST)
        return torch.maximum(wanted, farthest / (MIDDLE - 1)).half().float()

    def decode(self, codes: torch.Tensor, blocks: BlockPlaces) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``Coded``."""
        d, count, numbers = blocks.shape.head_dim, len(codes), BLOCK_TOKENS * blocks.shape.head_dim
        k_code, v_code, constants = torch.split(codes, [numbers, numbers, codes.shape[1] - 2 * numbers], dim=1)
        k_scale, k_zero, of_values = torch.split(
            constants.contiguous().view(torch.float16).float(), [d, d, constants.shape[1] // 2 - 2 * d], dim=1
        )
        k, v = (part.view(count, BLOCK_TOKENS, d).float() for part in (k_code.contiguous(), v_code.contiguous()))
        v_scale, v_zero = (_by_channel(part, v) for part in of_values.view(count, 2, BLOCK_TOKENS, -1).unbind(1))
        return k * k_scale[:, None] + k_zero[:, None], v * v_scale + v_zero


def _codes(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """uint8 codes of x [N, 32, D]; of a group whose scale is 0, 0."""
    steps = (x - zero.float()) / scale.masked_fill(scale == 0, torch.inf)
    return steps.round().clamp(0, 2 * MIDDLE - 1).to(torch.uint8)


def _grouped(v: torch.Tensor) -> torch.Tensor:
    """Values [N, 32, D] in their groups [N, 32, G, 32]; a short last group is filled up with zeros."""
    return torch.nn.functional.pad(v, (0, -v.shape[2] % GROUP)).view(*v.shape[:2], -1, GROUP)


def _by_channel(of_group: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What each group [N, 32, G] has, for each of its channels: [N, 32, D]."""
    return of_group.repeat_interleave(GROUP, dim=2)[..., : v.shape[2]]
