"""Where a batch's caches are to lie so that a decode step reads them soonest: FlexGen's linear program, for caches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from scipy.optimize import linprog

from kernels.layout import BLOCK_TOKENS, CacheShape, Format, Tier
from workers.cache.staging import SLOTS
from workers.expected import expected_use
from workers.stages.base import Codec, Pipeline
from workers.stages.offload.spread import STEP_TOKENS, Spread

_DIGITS = 4
_PREFER_FASTER = 1e-6
"""Weight of tiers among placements that take the same time."""


class DoesNotFitError(ValueError):
    """The tiers together are too small."""


@dataclass(frozen=True)
class Demand:
    """What a batch's caches take, in bytes."""

    blocks: float
    """That may be on any tier."""
    device: float = 0
    """On the device besides, whatever is where."""
    host: float = 0
    """On the host besides."""
    host_per_disk: float = 0
    """On the host for each byte on disk: what it passes through."""


@dataclass(frozen=True)
class Placement:
    """Shares of the blocks by tier, which sum to 1, and how long a step takes to read all of them."""

    device: float
    host: float
    disk: float
    seconds: float


def solve(demand: Demand, budget: Mapping[Tier, float], bytes_per_s: Mapping[Tier, float]) -> Placement:
    """The shares that minimise the time to read every block once, within the budgets.

    One pass of the kernels reads the blocks on the device at its rate, and those on the host and those from disk, which
    pass through it, at the host's; meanwhile others are read from disk: the slower of both counts.

    Source: Sheng et al., FlexGen, arXiv 2303.06865, section 4.3. Left out: weights and activations, which stay where
    they are; what a new token writes, a thousandth of what is read; the choice of batch sizes. There copies from the
    host run beside the device's own work; here attention reads the host in place, and both times add up.

    Args:
        demand: of the batch.
        budget: bytes of each tier.
        bytes_per_s: rate of each tier; of one without budget it does not matter.

    Raises:
        DoesNotFitError: no shares keep the budgets, saying what is missing.
        ValueError: a tier with a budget has no rate above 0, naming it.
    """
    for tier in Tier:
        if budget[tier] > 0 and not bytes_per_s[tier] > 0:
            raise ValueError(f"tier {tier.name.lower()}: {bytes_per_s[tier]:g} bytes/s given; accepted: more than 0")
    room = {tier: budget[tier] / demand.blocks for tier in Tier}
    pace = {tier: max(bytes_per_s.values()) / bytes_per_s[tier] if budget[tier] > 0 else 0.0 for tier in Tier}
    device, host, disk = (pace[tier] for tier in Tier)
    found = linprog(
        # shares of device, host and disk, and the time, in that of the fastest tier for all blocks
        c=[0, _PREFER_FASTER, 2 * _PREFER_FASTER, 1],
        A_ub=[
            [1, 0, 0, 0],
            [0, 1, demand.host_per_disk, 0],
            [0, 0, 1, 0],
            [device, host, host, -1],
            [0, 0, disk, -1],
        ],
        b_ub=[
            room[Tier.DEVICE] - demand.device / demand.blocks,
            room[Tier.HOST] - demand.host / demand.blocks,
            max(0.0, room[Tier.DISK] - 2 * 10**-_DIGITS),  # what rounding down may bring there
            0,
            0,
        ],
        A_eq=[[1, 1, 1, 0]],
        b_eq=[1],
    )
    if not found.success:
        needed, there = demand.blocks + demand.device + demand.host, sum(budget.values())
        raise DoesNotFitError(
            f"{math.ceil(needed)} bytes of caches and what they need beside them do not fit {math.floor(there)} bytes"
            f" of device, host and disk; wherever blocks are, {math.ceil(demand.device)} are needed on the device and"
            f" {math.ceil(demand.host)} on the host, and there {demand.host_per_disk:.2g} for each on disk"
        )
    on_device, on_host, on_disk = (min(1.0, max(0.0, float(share))) for share in found.x[:3])
    seconds = step_seconds([on_device, on_host, on_disk], demand.blocks, bytes_per_s)
    return Placement(on_device, on_host, on_disk, seconds)


def step_seconds(shares: list[float], blocks: float, bytes_per_s: Mapping[Tier, float]) -> float:
    """How long a step takes to read so many bytes of blocks, by their shares on device, host and disk."""

    def time(share: float, tier: Tier) -> float:
        return share * blocks / bytes_per_s[tier] if share else 0.0

    device, host, disk = shares
    return max(time(device, Tier.DEVICE) + time(host + disk, Tier.HOST), time(disk, Tier.DISK))


def demand_of(codec: Codec | None, shape: CacheShape, context_tokens: int, batch: int) -> Demand:
    """What so many requests of so many tokens take under a codec, or raw; ``spread``'s steps are allowed for.

    Raises:
        ValueError: a codec of several formats, naming it: equal shares would not take equal bytes.
    """
    if codec and (type(codec).ages is not Codec.ages or len(codec.by_age()) > 1):
        raise ValueError(f"stage {codec.name!r} has several formats; accepted: a codec of one format for all layers")
    use = expected_use(Pipeline((codec,)) if codec else Pipeline(), shape, context_tokens)
    row = shape.layers * shape.kv_heads * shape.block_bytes(codec.format if codec else Format.RAW)
    moved = max(0, context_tokens - BLOCK_TOKENS) // BLOCK_TOKENS * row
    step = STEP_TOKENS // BLOCK_TOKENS * row
    return Demand(
        blocks=batch * context_tokens / BLOCK_TOKENS * row,
        device=batch * (use.device_bytes - moved + step),
        host=batch * (use.shadow_bytes + step),
        host_per_disk=SLOTS / shape.layers,
    )


def pipeline_of(codec: Codec | None, found: Placement) -> Pipeline:
    """The pipeline that places blocks so; shares are rounded down, to the slower tier."""
    device = math.floor(found.device * 10**_DIGITS + 1e-6) / 10**_DIGITS
    disk = round(found.disk, _DIGITS)
    host = math.floor(found.host * 10**_DIGITS + 1e-6) / 10**_DIGITS if disk else round(1 - device, _DIGITS)
    stages = (codec, Spread(device, host) if device < 1 else None)
    kept = tuple(stage for stage in stages if stage)
    return Pipeline(kept) if kept else Pipeline()
