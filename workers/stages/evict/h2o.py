"""H2O: heavy hitters and recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from workers.stages.base import budgets, shadow
from workers.stages.evict.heavy import HeavyHitters


@dataclass(frozen=True)
class H2O(HeavyHitters):
    """Half the budget to the tokens that received most attention so far, half to the most recent.

    The score is attention summed over all past queries and the KV head's query group. Where a request is switched to
    h2o in mid-generation, its prompt's masses count the last 64 prompt queries only (all of them where the request
    started with h2o). Evicts once per 32 generated tokens instead of at every step: a head holds up to 31 more.

    Source: Zhang et al., H2O: Heavy-Hitter Oracle for Efficient Generative Inference of LLMs, arXiv 2306.14048.
    """

    name: ClassVar[str] = "h2o"
    summary: ClassVar[str] = "Tokens that received most attention so far (heavy hitters) and the most recent ones."
    budgets: str = budgets()
    shadow: bool = shadow()
