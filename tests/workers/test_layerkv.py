"""Layers whose older blocks are fetched from the host: the same output, less of the device, prompts admitted sooner."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.layout import BLOCK_TOKENS, UNIT_BYTES, CacheShape, Format, Tier
from tests.tiny import Drive, prompt, run, tiny_engine, tiny_loaded
from tests.workers.test_lending import decoding as lending_decoding
from tests.workers.test_lending import engine as lending_engine
from tests.workers.test_lending import keep_lent, lend
from tests.workers.test_switch import IDS, check_tables, logits_now
from workers.cache.arena import Arena
from workers.cache.arrangement import blocks_of
from workers.cache.movers import HostMover, copies
from workers.cache.sequence_cache import Occasion
from workers.cache.staging import needed
from workers.engine.engine import Engine
from workers.errors import RESOURCE_EXHAUSTED, ProblemError
from workers.stages.base import LayerPlace
from workers.stages.offload.layerkv import LayerKV, least_resident, resident_layers
from workers.stages.registry import build

LAYERS = 5
LAYERKV = "layerkv(recent=64, resident=0.4)"
AWAY = [1, 3, 4]
"""Layers of five of which it has older blocks on the host."""
PAIRS = (
    (LAYERKV, "full"),
    ("layerkv(recent=32, resident=0)", "full"),
    ("layerkv(recent=64, resident=1)", "full"),
    (f"int8 | {LAYERKV}", "int8"),
    (f"gear | {LAYERKV}", "gear"),
    (f"snapkv(keep=0.5) | {LAYERKV}", "snapkv(keep=0.5)"),
    (f"h2o(keep=0.5) | kivi(bits=4, shadow=false) | {LAYERKV}", "h2o(keep=0.5) | kivi(bits=4, shadow=false)"),
    (f'snapkv(keep=0.5, budgets="ada") | {LAYERKV}', 'snapkv(keep=0.5, budgets="ada")'),
)


def engine(**settings: object) -> Engine:
    return tiny_engine(tiny_loaded(num_hidden_layers=LAYERS), **settings)


def decoding(pipeline: str, tokens: int = 10, **settings: object) -> Drive:
    drive = Drive(engine(**settings))
    drive.submit("job", IDS, 48, pipeline=pipeline)
    drive.until(lambda: drive.generated("job") >= tokens)
    drive.engine._live["job"].pinned = None
    return drive


# -- which layers ----------------------------------------------------------------------------------------------------


def away(layers: int, share: float) -> list[int]:
    shape = CacheShape(layers, 1, 1, 16, torch.float32)
    return [layer for layer in range(layers) if LayerKV(resident=share).places(LayerPlace(layer, shape, 1000))]


def gaps(layers: int, fetched: list[int]) -> list[int]:
    """How far each fetched layer is behind the one before, over the end of the step."""
    return [(b - a - 1) % layers + 1 for a, b in itertools.pairwise([fetched[-1], *fetched])]


def test_resident_layers_are_spread_evenly() -> None:
    assert away(8, 0.5) == [1, 3, 5, 7]
    assert away(LAYERS, 0.4) == AWAY
    assert away(4, 0.0) == [0, 1, 2, 3]
    assert away(4, 1.0) == []
    for layers, share in itertools.product(range(1, 33), (0.0, 0.1, 0.25, 1 / 3, 0.5, 0.8, 0.95)):
        fetched = away(layers, share)
        assert layers - len(fetched) == resident_layers(share, layers)
        if fetched:
            assert max(gaps(layers, fetched)) - min(gaps(layers, fetched)) <= 1


def waits(layers: int, fetched: list[int], fetch_s: float, layer_s: float) -> bool:
    """Whether a layer waits in the steps of a pipeline that starts each fetch as the layer fetched before begins."""
    now = ready = 0.0
    for step in range(6):
        for layer in range(layers):
            if layer in fetched:
                if step and now < ready - 1e-9:
                    return True
                now = max(now, ready)
                ready = now + fetch_s
            now += layer_s
    return False


@pytest.mark.parametrize("layers", [1, 2, 5, 12, 30])
@pytest.mark.parametrize("fetch_ms", [0.0, 0.9, 1.0, 1.1, 2.0, 3.7, 20.0, 400.0])
def test_the_fewest_resident_layers_with_which_none_waits(layers: int, fetch_ms: float) -> None:
    """As found by trying all numbers, a step being run layer by layer."""
    if fetch_ms > layers:
        expected = layers
    else:
        expected = next(n for n in range(layers) if not waits(layers, away(layers, n / layers), fetch_ms, 1.0))
    assert least_resident(layers, int(fetch_ms * 1e6), 1e9, 1e-3) == expected
    with pytest.raises(ValueError, match="bytes_per_s: 0"):
        least_resident(layers, 1, 0, 1.0)


# -- the same output -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fetched", "plain"), PAIRS)
def test_it_changes_no_token_and_no_probability(fetched: str, plain: str) -> None:
    outcomes = []
    for pipeline in (fetched, plain):
        drive = Drive(engine())
        drive.submit("job", IDS, 80, pipeline=pipeline, top_logprobs=3)
        outcomes.append(drive.finish()["job"])
        assert drive.engine.cache.host.used_bytes == 0
    assert outcomes[0].tokens == outcomes[1].tokens
    assert "layerkv" in outcomes[0].finished.pipeline  # nothing had to give way


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_every_bit_of_the_logits_is_full_s(backend: str) -> None:
    rows = [logits_now(decoding(text, 40, kernel_backend=backend), "job") for text in (LAYERKV, "full")]
    assert torch.equal(*rows)


def test_neighbours_on_all_tiers_do_not_meet(tmp_path: Path) -> None:
    def among(pipelines: list[str]) -> dict[str, list]:
        made = engine(disk_folder=tmp_path, disk_budget_bytes=64 << 20)
        drive = Drive(made)
        for n, pipeline in enumerate(pipelines):
            drive.submit(f"n{n}", prompt(200 + 30 * n, n), 40, pipeline=pipeline, top_logprobs=3)
        found = {name: outcome.tokens for name, outcome in drive.finish().items()}
        made.stop(1.0)
        return found

    mixed = [LAYERKV, "host(recent=64)", "disk(recent=64)", "layerkv(recent=32, resident=0)", "full"]
    assert among(mixed) == among(["full"] * 5)


@pytest.mark.parametrize("step_tokens", [45, 96])
def test_output_does_not_depend_on_the_chunk_size(step_tokens: int) -> None:
    expected = run(engine(), {"job": IDS}, 48)["job"].token_ids
    assert run(engine(step_tokens=step_tokens), {"job": IDS}, 48, pipeline=LAYERKV)["job"].token_ids == expected


def test_it_switches_to_every_other_kind_and_home(tmp_path: Path) -> None:
    """Logits of exact pipelines never change; others are what they are from wherever the switch comes."""
    drive = decoding("full", disk_folder=tmp_path, disk_budget_bytes=64 << 20)
    expected = logits_now(drive, "job")
    others = (
        "host(recent=64)",
        "disk(recent=64)",
        "layerkv(recent=32, resident=0)",
        "kivi(bits=4)",
        "snapkv(keep=0.5)",
        "neardata(recent=64)",
        "arkvale(recent=64)",
        f"int8 | {LAYERKV}",
        "window(recent=64) | host(recent=64)",
    )
    epoch = itertools.count(1)
    for other in others:
        drive.direct("job", other, epoch=next(epoch))
        directly = logits_now(drive, "job")
        for pipeline, wanted in ((LAYERKV, expected), (other, directly), (LAYERKV, expected), ("full", expected)):
            drive.direct("job", pipeline, epoch=next(epoch))
            check_tables(drive)
            assert torch.equal(logits_now(drive, "job"), wanted), (other, pipeline)
    assert drive.engine.cache.host.used_bytes == drive.engine.cache.disk.used_bytes == 0
    drive.engine.stop(1.0)


def test_switches_while_tokens_come_change_none() -> None:
    expected = run(engine(), {"job": IDS}, 150)["job"].token_ids
    drive = Drive(engine())
    drive.submit("job", IDS, 150)
    walk = (LAYERKV, "full", "layerkv(recent=32, resident=0)", "host(recent=64)", LAYERKV, "full")
    for epoch, pipeline in enumerate(walk, start=1):
        drive.until(lambda epoch=epoch: drive.generated("job") >= 20 * epoch)
        drive.direct("job", pipeline, epoch=epoch)
    assert drive.finish()["job"].token_ids == expected


def test_a_fork_has_an_area_of_its_own() -> None:
    drive = decoding(LAYERKV)
    cache, seq = drive.engine.cache, drive.engine._live["job"].cache
    used = cache.device.used_bytes
    fork = cache.fork(seq)
    assert fork.areas[Tier.HOST] is not seq.areas[Tier.HOST]
    for own in (fork, seq):
        cache.reserve(own, 1)
    logits, _ = drive.engine._runner.decode([fork, seq], [drive.engine._live["job"].token_ids[-1]] * 2)
    assert torch.equal(logits[0], logits[1])
    cache.apply(fork, build("full", cache.shape), Occasion.SWITCH)
    cache.close(fork)
    assert cache.device.used_bytes == used


# -- the way over the device -----------------------------------------------------------------------------------------


def test_kernels_read_nothing_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a layer is attended to its blocks are on the device, and before and after they are not."""
    drive = decoding(LAYERKV)
    cache, slot = drive.engine.cache, drive.engine._live["job"].cache.slot
    before = cache.tables.tier[slot].copy()
    assert [layer for layer in range(LAYERS) if (before[layer] == Tier.HOST).any()] == AWAY
    decode, seen = cache.backend.decode, []

    def watched(plan, layer, *rest):
        seen.append(cache.tables.tier[slot, layer].copy())
        return decode(plan, layer, *rest)

    monkeypatch.setattr(cache.backend, "decode", watched)
    drive.engine.step()
    assert len(seen) == LAYERS
    assert not any((tier == Tier.HOST).any() for tier in seen)
    assert np.array_equal(cache.tables.tier[slot], before)


def test_bytes_and_blocks_are_counted_as_they_come() -> None:
    """Three layers pass through room for two: each comes once a step."""
    drive = decoding(LAYERKV)
    cache, seq = drive.engine.cache, drive.engine._live["job"].cache
    use, block = cache.use(seq), cache.shape.block_bytes(Format.RAW)
    rows = use.host_bytes // block // len(AWAY) // cache.shape.kv_heads
    assert seq.areas[Tier.HOST].nbytes[0] == 2 * rows * cache.shape.kv_heads * block
    drive.engine.step()
    asked, moved = seq.recalls.asked[Tier.HOST].blocks, seq.recalls.moved_bytes[Tier.HOST, Tier.DEVICE]
    for _ in range(3):
        drive.engine.step()
    assert seq.recalls.asked[Tier.HOST].blocks - asked == 3 * use.host_bytes // block
    assert seq.recalls.moved_bytes[Tier.HOST, Tier.DEVICE] - moved == 3 * use.host_bytes
    assert seq.recalls.asked[Tier.HOST].in_place == 0


def test_without_room_for_the_area_a_switch_is_refused() -> None:
    """It would give back one layer's blocks and take room for two."""
    drive = decoding("full")
    cache, before = drive.engine.cache, logits_now(drive, "job")
    lot = cache.device.open_lot(Format.RAW)
    cache.device.allocate(lot, cache.device.free_bytes // cache.shape.block_bytes(Format.RAW))
    with pytest.raises(ProblemError, match="device tier") as refused:
        drive.direct("job", "layerkv(recent=64, resident=0.8)")
    assert refused.value.problem.code == RESOURCE_EXHAUSTED
    assert cache.host.used_bytes == 0
    cache.device.close_lot(lot)
    assert torch.equal(logits_now(drive, "job"), before)


@pytest.mark.parametrize("from_the_start", [True, False])
def test_pages_become_free(from_the_start: bool) -> None:
    """A row's blocks share pages: those of resident layers move together as the others leave."""
    drive = decoding(LAYERKV if from_the_start else "full", 40)
    if not from_the_start:
        drive.direct("job", LAYERKV)
    cache, seq = drive.engine.cache, drive.engine._live["job"].cache
    cache.prefixes.drop(cache.device.budget_bytes)
    there = cache.tables.tier[seq.slot, :, :, : -(-seq.seen // BLOCK_TOKENS)] == Tier.DEVICE
    held = int(there.sum()) * cache.shape.block_bytes(Format.RAW) + seq.areas[Tier.HOST].nbytes[0]
    assert cache.device.used_bytes - held < 3 * cache.device.page_bytes  # last pages of two lots and of the area


def test_the_area_moves_when_a_layer_wants_its_memory_back() -> None:
    worker = lending_engine(1)
    expected = run(lending_engine(0), {"job": IDS}, 48, top_logprobs=3)["job"].tokens
    keep_lent(worker)
    lend(worker)
    drive = lending_decoding(worker, LAYERKV)
    cache, seq, (region,) = worker.cache, worker._live["job"].cache, worker.cache.device.regions
    area, now = seq.areas[Tier.HOST], blocks_of(cache.tables, seq.slot)
    cache.device.release(area.surplus({}))
    area.resize({})
    filler, own_bytes = cache.device.open_lot(Format.RAW), cache.device.free_bytes - cache.device.region_bytes(region)
    cache.device.allocate(filler, own_bytes // cache.shape.block_bytes(Format.RAW))
    area.resize(needed(now, Tier.HOST))  # where there is still room
    area.follow(now)
    lent = slice(region.first, region.end)
    assert (cache.device._page_lot[lent] == area._lots[Format.RAW].id).any()
    drive.until(lambda: drive.generated("job") >= 20)
    cache.device.close_lot(filler)
    assert worker._lending.take_back()
    assert not cache.device._page_lot[lent].any()
    assert drive.finish()["job"].tokens == expected


# -- prompts ---------------------------------------------------------------------------------------------------------


def first_token_step(pipeline: str, rows: int) -> tuple[int, list[int]]:
    """After how many steps a second prompt, submitted with the first, has its first token; on a device of few rows."""
    row = engine().cache.worst_bytes(1)
    drive = Drive(engine(device_budget_bytes=rows * row, step_tokens=64))
    for name, seed in (("first", 3), ("second", 4)):
        drive.submit(name, prompt(301, seed), 64, pipeline=pipeline)
    steps = 0
    while not drive.generated("second"):
        assert drive.engine.step()
        steps += 1
    outcomes = drive.finish()
    assert not any(outcome.finished.usage.preemptions for outcome in outcomes.values())
    return steps, outcomes["second"].token_ids


def test_a_prompt_is_admitted_sooner_on_a_small_device() -> None:
    full, full_tokens = first_token_step("full", 12)
    fetched, tokens = first_token_step(LAYERKV, 12)
    assert tokens == full_tokens
    assert full > 64  # it waits until the first request is done
    assert fetched < 20  # it follows the first request's prompt


def test_blocks_of_a_prompt_leave_as_they_are_computed() -> None:
    """And only those of layers that will have them elsewhere."""
    drive = Drive(engine(step_tokens=64))
    drive.submit("job", IDS, 8, pipeline=LAYERKV)
    drive.until(lambda: drive.engine._live["job"].computed >= 192)
    assert drive.engine._live["job"].to_compute
    seq, tables = drive.engine._live["job"].cache, drive.engine.cache.tables
    assert seq.shadow is None
    blocks = tables.tier[seq.slot, :, 0, : 192 // BLOCK_TOKENS]
    for layer in range(LAYERS):
        assert (blocks[layer] == Tier.HOST).sum() == (4 if layer in AWAY else 0)


def test_a_prompt_too_long_for_the_device_goes_to_the_host_in_every_layer() -> None:
    """44 rows, of which the resident layers alone would take 18, on a device of 16."""
    row = engine().cache.worst_bytes(1)
    ids = prompt(1400, 5)
    small = engine(device_budget_bytes=16 * row, step_tokens=64)
    outcome = run(small, {"job": ids}, 16, pipeline=LAYERKV)["job"]
    assert not outcome.finished.usage.preemptions
    assert outcome.token_ids == run(engine(), {"job": ids}, 16)["job"].token_ids


def test_a_full_host_takes_what_it_has_room_for() -> None:
    row = engine().cache.worst_bytes(1)
    small = engine(host_budget_bytes=2 * row, step_tokens=64)
    outcome = run(small, {"job": IDS}, 16, pipeline=LAYERKV)["job"]
    assert outcome.token_ids == run(engine(), {"job": IDS}, 16)["job"].token_ids


def test_a_turn_is_parked_and_resumed() -> None:
    made = engine()
    drive = Drive(made)
    drive.submit("first", IDS, 16, pipeline=LAYERKV, session_id="talk")
    answer = drive.finish()["first"].token_ids
    ids = [*IDS, *answer, *prompt(40, 8)]
    drive.submit("second", ids, 16, pipeline=LAYERKV, session_id="talk")
    outcome = drive.finish()["second"]
    assert outcome.finished.usage.reused_prompt_tokens >= len(IDS) // BLOCK_TOKENS * BLOCK_TOKENS
    assert outcome.token_ids == run(engine(), {"job": ids}, 16)["job"].token_ids


def test_a_published_prefix_is_used_and_left_to_others() -> None:
    drive = Drive(engine())
    drive.submit("first", IDS, 16)
    expected = drive.finish()["first"].token_ids
    drive.submit("second", IDS, 16, pipeline=LAYERKV)
    drive.until(lambda: drive.generated("second") >= 5)
    cache, seq = drive.engine.cache, drive.engine._live["second"].cache
    older = (len(IDS) - 64) // BLOCK_TOKENS
    assert len(seq.prefix) == len(IDS) // BLOCK_TOKENS - older
    assert cache.prefixes.unused_bytes() == cache.worst_bytes(older * BLOCK_TOKENS)
    outcome = drive.finish()["second"]
    assert outcome.finished.usage.reused_prompt_tokens == len(IDS) // BLOCK_TOKENS * BLOCK_TOKENS
    assert outcome.token_ids == expected
    assert cache.host.used_bytes == 0


# -- movers ----------------------------------------------------------------------------------------------------------


def test_what_lies_together_is_copied_together() -> None:
    shape = CacheShape(2, 2, 2, 16, torch.float32)
    raw, coded = shape.block_units(Format.RAW), shape.block_units(Format.INT8)
    address = np.array([0, raw, 2 * raw, 10 * raw, 10 * raw + coded], np.int32)
    into = np.array([5 * raw, 6 * raw, 8 * raw, 20 * raw, 20 * raw + coded], np.int32)
    kinds = np.array([Format.RAW] * 3 + [Format.INT8] * 2, np.uint8)
    assert list(copies(shape, address, kinds, into)) == [
        (0, 5 * raw * UNIT_BYTES, 2 * raw * UNIT_BYTES),
        (2 * raw * UNIT_BYTES, 8 * raw * UNIT_BYTES, raw * UNIT_BYTES),
        (10 * raw * UNIT_BYTES, 20 * raw * UNIT_BYTES, 2 * coded * UNIT_BYTES),
    ]
    assert not list(copies(shape, address[:0], kinds[:0], into[:0]))


def test_moved_blocks_are_the_same_bytes() -> None:
    shape = CacheShape(2, 2, 2, 16, torch.float32)
    host, device = (Arena(tier, 1 << 18, shape, torch.device("cpu")) for tier in (Tier.HOST, Tier.DEVICE))
    generator = torch.Generator().manual_seed(1)
    host.data[:] = torch.randint(0, 256, host.data.shape, dtype=torch.uint8, generator=generator)
    rng, size = np.random.default_rng(1), shape.block_bytes(Format.RAW)
    places = [arena.allocate(arena.open_lot(Format.RAW), 20) for arena in (host, device)]
    address, into = (rng.permutation(own) for own in places)
    move = HostMover(host, device).move(address, np.zeros(20, np.uint8), into)
    assert move.result() == []
    assert move.done()
    for start, place in zip((address * UNIT_BYTES).tolist(), (into * UNIT_BYTES).tolist(), strict=True):
        assert torch.equal(device.data[place : place + size], host.data[start : start + size])
