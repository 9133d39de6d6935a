"""Which layers of a model spread their attention over many tokens: TailorKV quantises those, and recalls the others."""

from __future__ import annotations

from typing import Any

from kvpilot.bounds import Bounds
from workers.profile.profile import missing
from workers.stages.base import LayerPlace, parameter

NEEDS = ("concentration",)


def concentration() -> Any:
    """The parameter that tells dense layers from sparse ones."""
    return parameter(0.85, Bounds(least=0, most=1), "attention to the sixteenth of tokens paid most, below: dense")


def is_dense(layer: LayerPlace, threshold: float) -> bool:
    """Whether queries of a layer pay less than ``threshold`` to the sixteenth of all tokens that they pay most to.

    Raises:
        ValueError: there is no profile to tell.
    """
    if layer.profile is None:
        raise ValueError(missing(NEEDS, ()))
    return float(layer.profile.tensor("concentration")) < threshold
