"""Attention over some of a query's tokens, in a form that can be merged with attention over the others.

A softmax falls apart into any parts: each is its own normalised output and the log of its sum of exponentials, and
parts merge by these logs alone, in any order and grouping. So FlashAttention merges tiles (arXiv 2205.14135),
FlashDecoding splits of a long table, and FlashInfer calls it an attention state (arXiv 2501.01005). Here a part may be
what another processor computed beside its own memory (``kernels.api.Backend.attend``).

A state of fixed size is one too: linear attention keeps sum(f(k) v) and sum(f(k)), of which a query makes a numerator
and a denominator; as a ``Partial`` its output is numerator / denominator, its lse log(denominator).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

LOG2_E = math.log2(math.e)
"""What scores come times, for the kernels' powers of 2 instead of e."""


@dataclass(frozen=True)
class Partial:
    """R queries' attention over some of their tokens.

    Raises:
        ValueError: for numbers other than float32, or sizes that do not belong together.
    """

    output: torch.Tensor  # float32 [R, query_heads, D] normalised over these tokens; 0 where there are none
    lse: torch.Tensor  # float32 [R, query_heads] natural log of the sum of exp(score); -inf where there are no tokens

    def __post_init__(self) -> None:
        for name, x, dimensions in (("output", self.output, 3), ("lse", self.lse, 2)):
            if x.dtype is not torch.float32 or x.dim() != dimensions:
                raise ValueError(f"{name}: {x.dtype} {tuple(x.shape)}, must be float32 with {dimensions} dimensions")
        if self.lse.shape != self.output.shape[:2]:
            raise ValueError(f"lse: {tuple(self.lse.shape)}, must be {tuple(self.output.shape[:2])} as the output's")


def stack(parts: Sequence[Partial], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [P, R, query_heads, D] and lses [P, R, query_heads] of P > 0 parts, on a device.

    The caller does not wait for copies from pinned memory to a GPU; only such copies can be captured in a graph.
    """
    behind = device.type != "cpu"  # in RAM a tensor must be there when it is used
    outputs = [part.output.to(device, non_blocking=behind) for part in parts]
    lses = [part.lse.to(device, non_blocking=behind) for part in parts]
    if len(parts) == 1:
        return outputs[0].contiguous()[None], lses[0].contiguous()[None]
    return torch.stack(outputs), torch.stack(lses)


def weights(lses: torch.Tensor) -> torch.Tensor:
    """Each part's share [P, ...] of the whole, by their lses [P, ...]: sums to 1, or to 0 where no part has tokens."""
    return lses.softmax(0).masked_fill(lses == -torch.inf, 0.0)


def merge(parts: Sequence[Partial]) -> Partial:
    """The attention over the tokens of all parts, which have none in common; exact for lses of any size, -inf too.

    Raises:
        ValueError: if there are no parts.
    """
    if not parts:
        raise ValueError("parts: got none, need at least one")
    outputs, lses = stack(parts, parts[0].output.device)
    return Partial((weights(lses)[..., None] * outputs).sum(0), lses.logsumexp(0))
