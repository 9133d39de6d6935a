"""FlexGen's shares: where each block is, what settling moves, and what becomes of a request under pressure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.layout import BLOCK_TOKENS, CacheShape, Tier
from tests.tiny import Drive, prompt, run, tiny_engine, tiny_loaded
from workers.cache.disk import DiskStore
from workers.cache.kvcache import KVCache
from workers.cache.sequence_cache import Occasion, SequenceCache
from workers.engine.engine import Engine
from workers.engine.memory import with_less_on_device
from workers.errors import ProblemError
from workers.stages.base import Pipeline
from workers.stages.offload.spread import Spread
from workers.stages.registry import build

SHAPE = CacheShape(layers=3, kv_heads=2, query_heads=6, head_dim=16, dtype=torch.float32)
SPREAD = "spread(device=0.3, host=0.3)"
SHARES = ((30, 30), (50, 50), (0, 50), (0, 0), (100, 0), (25, 70), (70, 0))
"""Percent on the device and on the host."""
TEXT = prompt(1400, 5)


def tiers_of(tokens: int, on_device: int, on_host: int) -> list[Tier]:
    """Where each block of a table of so many tokens belongs, counted in whole steps of four blocks from the first."""
    steps = (tokens - BLOCK_TOKENS) // 128
    off_device = (
        next(n for n in range(steps, -1, -1) if 128 * n * 100 <= (100 - on_device) * tokens) if steps > 0 else 0
    )
    on_disk = (
        next(n for n in range(steps, -1, -1) if 128 * n * 100 <= (100 - on_device - on_host) * tokens)
        if steps > 0
        else 0
    )
    blocks = -(-tokens // BLOCK_TOKENS)
    return [
        Tier.DISK if block < 4 * on_disk else Tier.HOST if block < 4 * off_device else Tier.DEVICE
        for block in range(blocks)
    ]


class Request:
    """A cache with one request in it, of random numbers."""

    def __init__(self, folder: Path, tokens: int) -> None:
        self.disk = DiskStore(folder, 32 << 20)
        self.cache = KVCache(SHAPE, 32 << 20, 32 << 20, 1, 4096, "m", torch.device("cpu"), "cpu", disk=self.disk)
        self.seq: SequenceCache = self.cache.open(4096)
        self.generator = torch.Generator().manual_seed(tokens)
        self.grow(tokens)

    def grow(self, tokens: int) -> None:
        start = self.seq.seen
        self.cache.reserve(self.seq, tokens)
        self.cache.advance(self.seq, tokens)
        for layer in range(SHAPE.layers):
            k, v = torch.randn(2, SHAPE.kv_heads, tokens, SHAPE.head_dim, generator=self.generator)
            self.cache.backend.write(self.seq.slot, layer, start, k, v)

    def table(self, name: str) -> np.ndarray:
        """[L, H, blocks]"""
        return getattr(self.cache.tables, name)[self.seq.slot, :, :, : -(-self.seq.seen // BLOCK_TOKENS)].copy()


@pytest.fixture
def request_of(tmp_path: Path) -> Iterator[Callable[[int], Request]]:
    made: list[Request] = []

    def make(tokens: int) -> Request:
        made.append(Request(tmp_path, tokens))
        return made[-1]

    yield make
    for request in made:
        request.cache.close(request.seq)
        assert request.cache.device.used_bytes == request.cache.host.used_bytes == request.disk.used_bytes == 0
        request.disk.close()


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("on_device", "on_host"), SHARES)
@pytest.mark.parametrize("tokens", [1, 159, 1000])
def test_every_block_is_in_its_share(request_of, on_device: int, on_host: int, tokens: int) -> None:
    request = request_of(tokens)
    pipeline = Pipeline((Spread(on_device / 100, on_host / 100),))
    request.cache.apply(request.seq, pipeline, Occasion.PROMPT)
    assert (request.table("tier") == tiers_of(tokens, on_device, on_host)).all()
    if tokens == 1000:
        use = request.cache.use(request.seq)
        assert bool(use.disk_bytes) == (on_device + on_host < 88)
        assert bool(use.host_bytes) == (on_device < 100)  # what is on disk passes through there


def test_settling_moves_blocks_down_at_the_borders_only_a_file_of_several_rows_at_a_time(request_of) -> None:
    request = request_of(960)
    pipeline, rows = build(SPREAD, SHAPE), SHAPE.layers * SHAPE.kv_heads
    request.cache.apply(request.seq, pipeline, Occasion.PROMPT)
    steps = set()
    for _ in range(40):
        tiers, addresses, files = request.table("tier"), request.table("address"), len(request.cache.disk._files)
        request.grow(BLOCK_TOKENS)
        request.cache.apply(request.seq, pipeline, Occasion.SETTLE)
        assert (request.table("tier") == tiers_of(request.seq.seen, 30, 30)).all()
        before = tiers.shape[2]
        now = request.table("tier")[:, :, :before]
        assert (now >= tiers).all()  # down, never up
        moved = now != tiers
        assert np.array_equal(request.table("address")[:, :, :before][~moved], addresses[~moved])
        to_disk, to_host = (int((moved & (now == tier)).sum()) // rows for tier in (Tier.DISK, Tier.HOST))
        assert {to_disk, to_host} <= {0, 4}
        assert len(request.cache.disk._files) - files == bool(to_disk)
        steps.add((to_disk, to_host))
    assert steps == {(0, 0), (4, 0), (0, 4)} or steps == {(0, 0), (4, 0), (0, 4), (4, 4)}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("spread(device=0.7, host=0.4)", "parameters 'device' and 'host' of stage 'spread': 0.7 and 0.4 given"),
        ("spread(device=-0.1)", "parameter 'device' of stage 'spread'"),
    ],
)
def test_bad_shares_are_named(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build(text, SHAPE)


# -- served ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    """Makes engines with a disk tier, and stops them in the end."""
    made: list[Engine] = []

    def make(**settings: object) -> Engine:
        defaults = {"disk_folder": tmp_path, "disk_budget_bytes": 64 << 20}
        made.append(tiny_engine(tiny_loaded(num_hidden_layers=3), **(defaults | settings)))
        return made[-1]

    yield make
    for engine in made:
        engine.stop(1.0)


@pytest.mark.parametrize("step_tokens", [96, 1000])
def test_where_blocks_are_changes_no_token_and_no_probability(engines, step_tokens: int) -> None:
    jobs, size = {"job": TEXT[:700]}, {"step_tokens": step_tokens}
    full, spread = (run(engines(**size), jobs, 70, pipeline=text, top_logprobs=3)["job"] for text in ("full", SPREAD))
    assert spread.tokens == full.tokens
    coded, spread = (
        run(engines(**size), jobs, 70, pipeline=text, top_logprobs=3)["job"]
        for text in ("kivi(bits=4)", f"kivi(bits=4, shadow=false) | {SPREAD}")
    )
    assert spread.tokens == coded.tokens


def test_switches_on_the_way_change_nothing(engines) -> None:
    expected = run(engines(), {"job": TEXT[:700]}, 60)["job"].token_ids
    drive = Drive(engines())
    drive.submit("job", TEXT[:700], 60)
    for epoch, text in enumerate((SPREAD, "host(recent=64)", "spread(device=0, host=0.5)", "disk", SPREAD, "full"), 1):
        drive.until(lambda epoch=epoch: drive.generated("job") >= 8 * epoch)
        drive.direct("job", text, epoch)
    assert drive.finish()["job"].token_ids == expected


def test_a_worker_without_a_disk_refuses_what_needs_one_and_serves_the_rest() -> None:
    engine = tiny_engine()
    assert "spread" not in [stage.name for stage in engine.hello().model.stages if stage.unfit]
    with pytest.raises(ProblemError, match="stage 'spread' needs a disk tier, and this worker has none"):
        run(engine, {"job": TEXT[:300]}, 4, pipeline=SPREAD)
    run(tiny_engine(), {"job": TEXT[:300]}, 4, pipeline="spread(device=0.3, host=0.7)")


# -- pressure --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seen", [300, 1000, 4001])
def test_less_on_the_device_is_more_on_the_host(seen: int) -> None:
    less = with_less_on_device(build(f"kivi(bits=4) | {SPREAD}", SHAPE), 128, seen)
    assert less.codec == build("kivi(bits=4)", SHAPE).codec
    placer = less.placer
    assert isinstance(placer, Spread)
    assert placer.device * seen <= 128
    assert placer.disk == pytest.approx(0.4)
    assert with_less_on_device(less, 10_000, seen) == less


def test_a_full_device_takes_memory_from_it(engines) -> None:
    """Two requests that fit only if more of them is on the host: the first gives way, and nothing else changes."""
    row = 3 * 2 * 4096 * 2
    engine = engines(device_budget_bytes=44 * row // 2, host_budget_bytes=64 * row)
    drive = Drive(engine)
    drive.submit("first", TEXT[:800], 60, pipeline="spread(device=0.8, host=0.1)")
    drive.until(lambda: drive.generated("first") >= 2)
    drive.submit("second", TEXT[100:900], 60, pipeline="full")
    found = drive.finish()
    switches = found["first"].switches
    assert switches
    assert all("spread(device=0." in switch.to_pipeline for switch in switches)
    for name, text in (("first", TEXT[:800]), ("second", TEXT[100:900])):
        assert found[name].token_ids == run(engines(), {"job": text}, 60)["job"].token_ids
        assert not found[name].finished.usage.preemptions


def test_a_prompt_too_long_for_the_device_is_computed_on_the_way_down(engines) -> None:
    """A share of 0.9 is for when it is there: until then its rows wait on the host, and on disk when that is full."""
    row = 3 * 2 * 4096
    sizes = {"device_budget_bytes": 24 * row, "host_budget_bytes": 24 * row, "step_tokens": 128}
    drive = Drive(engines(**sizes))
    drive.submit("job", TEXT[:1000], 20, pipeline="kivi(bits=4, shadow=false) | spread(device=0.5, host=0.3)")
    found = drive.finish()["job"]
    same = run(engines(), {"job": TEXT[:1000]}, 20, pipeline="kivi(bits=4, shadow=false)")["job"]
    assert found.token_ids == same.token_ids
    assert not found.finished.usage.preemptions
