"""What a predictor is: one batched call over the rows of all live requests and their candidate pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from models.features import F64, Family


@dataclass(frozen=True)
class Prediction:
    """Of N rows."""

    divergence: F64
    """[N] nats per token over the next horizon, as likely too high as too low."""
    bound: F64
    """[N] nats per token that are exceeded with probability ``alpha`` at most; 0 for exact pipelines."""
    long_range: F64
    """[N] probability that the next horizon needs tokens beyond the local window; equal for all rows of a request."""


class Predictor(Protocol):
    """Predicts the divergence of pipelines."""

    @property
    def version(self) -> str:
        """Name of the bundle; ends up in every directive it leads to."""
        ...

    @property
    def schema_hash(self) -> str:
        """Feature schema it was trained on."""
        ...

    @property
    def alpha(self) -> float:
        """Share of windows that may exceed their bound."""
        ...

    def predict(self, rows: F64, families: Sequence[Family]) -> Prediction:
        """Predicts for rows [N, features] of these families [N]; rows of exact pipelines get zeros."""
        ...
