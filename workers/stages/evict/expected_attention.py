"""Expected Attention: what queries to come will pay, by how the model's queries are spread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kernels.layout import BLOCK_TOKENS
from kvpilot.bounds import Bounds
from workers.profile.profile import LayerProfile
from workers.profile.rotary import rotate
from workers.stages.base import LayerView, Share, budgets, parameter, shadow

FUTURE_TOKENS = 512
SINKS = 4


@dataclass(frozen=True)
class ExpectedAttention(Share):
    """Per head the tokens to which the next 512 queries are expected to pay most, times the norm of their values.

    Queries before their rotation are taken as normal, with the mean and covariance of the model's profile. Both are
    moved over the next 512 positions by the mean of the rotations there; then the expected weight of a key k is
    exp(mu k s + k' Sigma k s^2 / 2), s being the model's factor on scores. Weights are normalised over a head's tokens,
    the first 4 aside, and averaged over the query group; ``epsilon`` is added before the values' norm comes in.

    Unlike in the paper, mean and covariance are the model's, found once from text, not those of the prompt's own
    queries, and tokens are chosen again once per 32 generated tokens.

    Source: Devoto et al., Expected Attention: KV Cache Compression by Estimating Attention from Future Queries
    Distribution, arXiv 2510.00636. Query-agnostic.
    """

    name: ClassVar[str] = "expected_attention"
    summary: ClassVar[str] = "Tokens that coming queries will attend to, by the spread of the model's queries."
    needs: ClassVar[tuple[str, ...]] = ("query_mean", "query_cov")
    epsilon: float = parameter(0.0, Bounds(least=0, most=1), "share of attention", minor=True)
    budgets: str = budgets()
    shadow: bool = shadow()

    def protected(self, seen: int) -> tuple[int, int]:
        """Sinks, which the statistics know nothing of, and the last block."""
        return SINKS, BLOCK_TOKENS

    def score(self, layer: LayerView) -> torch.Tensor:
        """Expected attention times value norm."""
        assert layer.profile is not None
        mean, cov = future_queries(layer.profile, layer.seen)
        keys, values = (part.float() for part in layer.read())  # [H, T, D]
        heads, _, dim = keys.shape
        mean, cov = mean.view(heads, -1, dim), cov.view(heads, -1, dim, dim)  # by query group
        spread = torch.einsum("htd,hgde,hte->hgt", keys, cov, keys)
        expected = mean @ keys.mT * layer.scaling + spread * layer.scaling**2 / 2  # [H, G, T]
        counted = layer.valid & (layer.position >= SINKS)
        weight = expected.masked_fill(~counted[:, None], -torch.inf).softmax(-1).nan_to_num(0.0).mean(1)
        scores: torch.Tensor = (weight + self.epsilon) * values.norm(dim=-1)
        return scores


def future_queries(profile: LayerProfile, seen: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [Q, D] and covariance [Q, D, D] of queries, moved by the mean rotation of the next positions."""
    mean, cov = profile.tensor("query_mean"), profile.tensor("query_cov")
    cos, sin = profile.rope(torch.arange(seen, seen + FUTURE_TOKENS, device=mean.device))
    cos, sin = cos.mean(0), sin.mean(0)
    half = rotate(cov, cos, sin).mT  # columns, then rows
    return rotate(mean, cos, sin), rotate(half, cos, sin)
