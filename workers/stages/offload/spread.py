"""FlexGen's placement: a request's cache spread over device, host and disk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from kernels.layout import BLOCK_TOKENS, Tier
from kvpilot.bounds import Bounds
from workers.stages.base import LayerPlace, LossClass, Placer, Places, parameter

STEP_TOKENS = 4 * BLOCK_TOKENS
"""Blocks go down a tier so many tokens at a time: a file a step, and no file of a few blocks for every block."""


_ROUNDING = 1e-6
"""Tokens; 1 - 0.3 - 0.3 is a little less than 0.4."""


def tier_share(default: float) -> Any:
    """The parameter that says how much of all tokens seen a tier has."""
    return parameter(default, Bounds(least=0, most=1), "share of all tokens seen")


@dataclass(frozen=True)
class Spread(Placer):
    """The newest ``device`` of all tokens seen stay on the device, the next ``host`` on the host, the oldest on disk.

    As tokens come, the borders between tiers move up, 128 tokens at a time, so a tier may have up to as many more than
    its share; blocks only ever go down. A share that is on disk is read as ``disk`` reads. Nothing is dropped or
    rounded: the logits are those of the same blocks on the device, bit for bit. Shares are of what was seen: where an
    evictor keeps less of it, the device fills first.

    ``kvpilot place`` finds the shares for given budgets.

    Source: Sheng et al., FlexGen, arXiv 2303.06865: cache shares of GPU, CPU and disk. There the cache is split between
    heads, here between tokens by age; weights and activations stay where they are.
    """

    name: ClassVar[str] = "spread"
    summary: ClassVar[str] = "The newest share of the tokens on the device, the next on the host, the oldest on disk."
    device: float = tier_share(0.5)
    host: float = tier_share(0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device + self.host > 1 + 1e-9:
            raise ValueError(
                f"parameters 'device' and 'host' of stage {self.name!r}: {self.device} and {self.host} given;"
                " accepted: at most 1 together (the rest is on disk)"
            )

    @property
    def loss_class(self) -> LossClass:
        """Exact."""
        return LossClass.EXACT

    @property
    def disk(self) -> float:
        """What is on disk."""
        rest = 1 - self.device - self.host
        return rest if rest > 1e-9 else 0.0

    def device_tokens(self) -> int | None:
        """At least the last block; :meth:`places` says more. None where the device has all."""
        return None if self.device == 1 else BLOCK_TOKENS

    def places(self, layer: LayerPlace) -> Places:
        """Borders at whole steps from the first token on."""
        found = []
        for tier, share in ((Tier.HOST, self.host + self.disk), (Tier.DISK, self.disk)):
            if share:
                older = min(share * layer.seen, max(0, layer.seen - BLOCK_TOKENS))
                found.append((layer.seen - math.floor((older + _ROUNDING) / STEP_TOKENS) * STEP_TOKENS, tier))
        return tuple(found)

    def with_device_tokens(self, recent: int, seen: int) -> Spread:
        """The same shares but for the device's, part of which goes to the host."""
        device = min(self.device, math.floor(1e6 * recent / seen) / 1e6)
        return Spread(device, min(1.0, round(self.device + self.host - device, 6)))
