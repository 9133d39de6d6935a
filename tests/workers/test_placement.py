"""The linear program against every placement of a grid, and its pipelines' bytes against the budgets."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from kernels.layout import CacheShape, Tier
from workers.expected import expected_use
from workers.placement import Demand, DoesNotFitError, Placement, demand_of, pipeline_of, solve
from workers.stages.offload.spread import Spread
from workers.stages.registry import build

SHAPE = CacheShape(layers=6, kv_heads=2, query_heads=4, head_dim=64, dtype=torch.bfloat16)
GRID = 50


def seconds(device: float, host: float, disk: float, blocks: float, rate: dict[Tier, float]) -> float:
    """What one pass over everything takes, byte by byte: the kernels' on two tiers, and files read meanwhile."""
    kernels = device * blocks / rate[Tier.DEVICE] + (host * blocks + disk * blocks) / rate[Tier.HOST]
    return max(kernels, disk * blocks / rate[Tier.DISK])


def fits(device: float, host: float, disk: float, demand: Demand, budget: dict[Tier, float]) -> bool:
    on_host = host * demand.blocks + disk * demand.blocks * demand.host_per_disk + demand.host
    on_device = device * demand.blocks + demand.device
    return (
        on_device <= budget[Tier.DEVICE] and on_host <= budget[Tier.HOST] and disk * demand.blocks <= budget[Tier.DISK]
    )


def grid() -> Iterator[tuple[float, float, float]]:
    for device, host in itertools.product(range(GRID + 1), repeat=2):
        if device + host <= GRID:
            yield device / GRID, host / GRID, (GRID - device - host) / GRID


@pytest.mark.parametrize("seed", range(60))
def test_no_placement_of_a_grid_is_faster_or_fits_where_none_is_found(seed: int) -> None:
    """Budgets of a third to twice of what there is, and rates in any order: a host faster than the device too."""
    rng = np.random.default_rng(seed)
    blocks = float(rng.uniform(1e6, 1e10))
    demand = Demand(blocks, *(blocks * rng.uniform(0, 0.1, 2)), host_per_disk=float(rng.choice([0.07, 0.3, 1.0])))
    budget = {tier: float(blocks * rng.choice([0.1, 0.3, 0.6, 1.3])) for tier in Tier}
    rate = {tier: float(10 ** rng.uniform(8, 12)) for tier in Tier}
    fitting = [place for place in grid() if fits(*place, demand, budget)]
    best = min((seconds(*place, blocks, rate) for place in fitting), default=None)
    try:
        found = solve(demand, budget, rate)
    except DoesNotFitError:
        assert best is None
        return
    shares = found.device, found.host, found.disk
    assert sum(shares) == pytest.approx(1)
    assert fits(*(share * (1 - 1e-6) for share in shares), demand, budget)
    assert found.seconds == pytest.approx(seconds(*shares, blocks, rate), rel=1e-6)
    if best is not None:  # a grid's best may fall short of the optimum by a step, and never beat it
        slowest = 1 / rate[Tier.DEVICE] + 1 / rate[Tier.HOST] + 1 / rate[Tier.DISK]
        slack = 2e-3 * best  # the disk's budget less a little for rounding, ties to the faster tier
        assert best - 3 * blocks / GRID * slowest <= found.seconds <= best + slack


def test_the_grid_has_both_answers() -> None:
    rates = dict.fromkeys(Tier, 1e9)
    assert solve(Demand(1e6), dict.fromkeys(Tier, 1e6), rates) == Placement(1, 0, 0, pytest.approx(1e-3))
    with pytest.raises(DoesNotFitError, match=r"1000000 bytes of caches .* do not fit 900000 bytes"):
        solve(Demand(1e6), dict.fromkeys(Tier, 3e5), rates)
    with pytest.raises(ValueError, match="tier disk: 0 bytes/s given; accepted: more than 0"):
        solve(Demand(1e6), dict.fromkeys(Tier, 1e6), rates | {Tier.DISK: 0})


def test_among_equals_the_faster_tier_is_preferred() -> None:
    """A CPU's device and host are one memory: nothing goes to the host that need not."""
    rates = {Tier.DEVICE: 1e10, Tier.HOST: 1e10, Tier.DISK: 1e9}
    found = solve(Demand(1e6), {Tier.DEVICE: 4e5, Tier.HOST: 9e5, Tier.DISK: 1e7}, rates)
    assert (found.device, found.host, found.disk) == pytest.approx((0.4, 0.6, 0), abs=1e-6)


def test_disk_takes_from_the_host_what_its_blocks_pass_through() -> None:
    rates = {Tier.DEVICE: 1e12, Tier.HOST: 1e10, Tier.DISK: 1e9}
    found = solve(Demand(1e6, host_per_disk=0.5), {Tier.DEVICE: 1e5, Tier.HOST: 6e5, Tier.DISK: 1e7}, rates)
    assert found.host + 0.5 * found.disk == pytest.approx(0.6)
    assert (found.device, found.host) == pytest.approx((0.1, 0.3))


CODECS = ("", "kivi(bits=4, shadow=false)", "kivi(bits=4)", "int8(shadow=false)", "gear")


@pytest.mark.parametrize("text", CODECS)
@pytest.mark.parametrize("context", [1000, 8192])
def test_its_pipeline_takes_what_the_budgets_allow_and_uses_them(text: str, context: int) -> None:
    codec = build(text, SHAPE).codec if text else None
    demand = demand_of(codec, SHAPE, context, batch=1)
    rates = {Tier.DEVICE: 1e12, Tier.HOST: 2e10, Tier.DISK: 1e9}
    budget = {
        Tier.DEVICE: demand.device + 0.3 * demand.blocks,
        Tier.HOST: demand.host + 0.4 * demand.blocks,
        Tier.DISK: demand.blocks,
    }
    found = solve(demand, budget, rates)
    pipeline = pipeline_of(codec, found)
    assert build(pipeline.text, SHAPE) == pipeline
    use = expected_use(pipeline, SHAPE, context)
    assert use.device_bytes <= budget[Tier.DEVICE]
    assert use.host_bytes + use.shadow_bytes <= budget[Tier.HOST]
    assert 0 < use.disk_bytes <= budget[Tier.DISK]
    if context > 5000:  # 128 tokens more or less do not count
        assert use.device_bytes > 0.9 * budget[Tier.DEVICE]


@pytest.mark.parametrize("batch", [1, 7])
def test_a_batch_takes_as_much_of_each(batch: int) -> None:
    codec = build("kivi(bits=4, shadow=false)", SHAPE).codec
    one, many = (demand_of(codec, SHAPE, 2000, batch=count) for count in (1, batch))
    assert many == Demand(batch * one.blocks, batch * one.device, batch * one.host, one.host_per_disk)


def test_what_fits_the_device_stays_there() -> None:
    codec = build("int8(shadow=false)", SHAPE).codec
    everything = dict.fromkeys(Tier, 1e12)
    found = solve(demand_of(codec, SHAPE, 2000, 1), everything, {Tier.DEVICE: 1e12, Tier.HOST: 1e10, Tier.DISK: 1e9})
    assert pipeline_of(codec, found).text == "int8(shadow=false)"
    assert pipeline_of(None, found).text == "full"


def test_without_a_disk_no_share_is_lost_to_rounding() -> None:
    found = Placement(1 / 3, 2 / 3, 0, 0.0)
    placer = pipeline_of(None, found).placer
    assert isinstance(placer, Spread)
    assert (placer.device, placer.host, placer.disk) == (0.3333, 0.6667, 0)


def test_a_codec_of_several_formats_is_refused() -> None:
    with pytest.raises(ValueError, match="stage 'aged' has several formats; accepted: a codec of one format"):
        demand_of(build("aged", SHAPE).codec, SHAPE, 1000, 1)
