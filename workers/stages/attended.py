"""Softmax over blocks of tokens of several KV heads, from their scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Attended:
    """Attention of one token's queries over N blocks; H KV heads, G query heads that read each."""

    output: torch.Tensor  # float32 [H, G, D] normalised over these blocks; 0 where a head has none
    lse: torch.Tensor  # float32 [H, G] natural log of the sum of exp(score); -inf where a head has none
    score: torch.Tensor  # float32 [N, G, 32] scaled


def attend_blocks(
    score: torch.Tensor, head: torch.Tensor, heads: int, weigh: Callable[[torch.Tensor], torch.Tensor]
) -> Attended:
    """The attention that scores mean.

    Args:
        score: float32 [N, G, 32] scaled.
        head: int64 [N] whose block each is.
        heads: how many KV heads there are.
        weigh: gives each block's values weighted by [N, G, 32] and summed over its tokens, float32 [N, G, D].
    """
    group = score.shape[1]
    highest = score.new_full((heads, group), -torch.inf)
    highest.scatter_reduce_(0, head[:, None].expand(-1, group), score.amax(-1), "amax")
    powers = (score - highest[head][..., None]).exp()
    total = score.new_zeros(heads, group).index_add_(0, head, powers.sum(-1))
    weighted = weigh(powers)
    output = weighted.new_zeros(heads, group, weighted.shape[-1]).index_add_(0, head, weighted)
    there = total > 0
    output = output / total.masked_fill(~there, 1.0)[..., None]
    return Attended(output, torch.where(there, highest + total.log(), -torch.inf), score)
