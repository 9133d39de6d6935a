"""Requests with blocks on disk: the same output, budgets kept, damage found and made good, nothing left behind."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.layout import BLOCK_TOKENS, Format, Tier
from kvpilot.v1 import generation_pb2, job_pb2
from tests.tiny import Drive, prompt, run, tiny_engine
from tests.workers.test_switch import IDS, check_tables, logits_now
from workers.cache.arena import TierFullError
from workers.cache.disk import DiskStore
from workers.cache.disk_tier import DiskTier
from workers.cache.sequence_cache import Occasion
from workers.engine.engine import Engine
from workers.errors import ABORTED, INVALID_ARGUMENT, RESOURCE_EXHAUSTED, ProblemError
from workers.stages.registry import build

LAYERS = 5
"""More than staging areas have slots, and an odd number."""
PAIRS = (
    ("disk(recent=64)", "full"),
    ("int8 | disk(recent=64)", "int8"),
    ("kivi(bits=4, shadow=false) | disk(recent=32)", "kivi(bits=4, shadow=false)"),
    ("snapkv(keep=0.5) | disk(recent=64)", "snapkv(keep=0.5)"),
    ("h2o(keep=0.5) | kivi(bits=4) | disk(recent=64)", "h2o(keep=0.5) | kivi(bits=4)"),
    ('snapkv(keep=0.5, budgets="ada") | disk(recent=64)', 'snapkv(keep=0.5, budgets="ada")'),
)
DISK = "disk(recent=64)"


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.blocks"))


def decoding(engine: Engine, pipeline: str, tokens: int = 10) -> Drive:
    drive = Drive(engine)
    drive.submit("job", IDS, 48, pipeline=pipeline)
    drive.until(lambda: drive.generated("job") >= tokens)
    drive.engine._live["job"].pinned = None
    return drive


def flip(path: Path, block_bytes: int, block: int = 0) -> None:
    """Turns a bit in the middle of a block of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) - (block + 1) * block_bytes + block_bytes // 2] ^= 16
    path.write_bytes(data)


HARMS = ("flip", "cut", "gone")


def do_harm(path: Path, harm: str, block_bytes: int) -> None:
    """To a block of a file, to its end, or to all of it."""
    if harm == "flip":
        flip(path, block_bytes)
    elif harm == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.unlink()


# -- the same output -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("on_disk", "on_device"), PAIRS)
def test_disk_changes_no_token_and_no_probability(engines, folder: Path, on_disk: str, on_device: str) -> None:
    outcomes = []
    for pipeline in (on_disk, on_device):
        drive = Drive(engines())
        drive.submit("job", IDS, 80, pipeline=pipeline, top_logprobs=3)
        drive.until(lambda drive=drive: drive.generated("job") >= 70)
        assert bool(files(folder)) == (pipeline == on_disk)
        outcomes.append(drive.finish()["job"])
    assert outcomes[0].tokens == outcomes[1].tokens
    assert not files(folder)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_every_bit_of_the_logits_is_full_s(engines, backend: str) -> None:
    rows = []
    for pipeline in (DISK, "full"):
        drive = decoding(engines(kernel_backend=backend), pipeline, 40)
        rows.append(logits_now(drive, "job"))
    assert torch.equal(*rows)


def test_neighbours_on_all_tiers_do_not_meet(engines) -> None:
    def among(pipelines: list[str]) -> dict[str, list]:
        drive = Drive(engines())
        for n, pipeline in enumerate(pipelines):
            drive.submit(f"n{n}", prompt(200 + 30 * n, n), 48, pipeline=pipeline, top_logprobs=3)
        return {name: outcome.tokens for name, outcome in drive.finish().items()}

    assert among([DISK, "host(recent=64)", "disk(recent=32)", "full"]) == among(["full"] * 4)


@pytest.mark.parametrize("step_tokens", [45, 96, 1000])
def test_output_does_not_depend_on_the_chunk_size(engines, step_tokens: int) -> None:
    expected = run(engines(), {"job": IDS}, 48)["job"]
    assert run(engines(step_tokens=step_tokens), {"job": IDS}, 48, pipeline=DISK)["job"].token_ids == expected.token_ids


def test_every_tier_switches_to_every_other_and_home(engines) -> None:
    """Logits of exact pipelines never change; those of a lossy one are its own wherever its blocks are."""
    drive = decoding(engines(), "full")
    exact, coded = (
        ("full", "host(recent=64)", DISK),
        ("kivi(bits=4)", "kivi(bits=4) | host(recent=64)", f"kivi | {DISK}"),
    )
    expected = logits_now(drive, "job")
    drive.direct("job", coded[0], epoch=1)
    lossy = logits_now(drive, "job")
    for epoch, pipeline in enumerate(itertools.chain(*itertools.permutations((*exact, *coded), 2)), start=2):
        drive.direct("job", pipeline, epoch=epoch)
        check_tables(drive)
        assert torch.equal(logits_now(drive, "job"), expected if pipeline in exact else lossy)
    drive.direct("job", "full", epoch=epoch + 1)
    assert torch.equal(logits_now(drive, "job"), expected)
    assert drive.engine.cache.host.used_bytes == drive.engine.cache.disk.used_bytes == 0


def test_a_walk_over_the_tiers_while_tokens_come_changes_none(engines) -> None:
    expected = run(engines(), {"job": IDS}, 200)["job"].token_ids
    drive = Drive(engines())
    drive.submit("job", IDS, 200)
    walk = (DISK, "host(recent=64)", "full", "disk(recent=32)", "kivi(bits=4)", "full", f"kivi | {DISK}", DISK, "full")
    for epoch, pipeline in enumerate(walk, start=1):
        drive.until(lambda epoch=epoch: drive.generated("job") >= 20 * epoch)
        if "kivi" not in pipeline:
            drive.direct("job", pipeline, epoch=epoch)
            continue
        drive.direct("job", pipeline, epoch=epoch)  # there and back between two steps, or tokens would differ
        drive.direct("job", DISK, epoch=100 * epoch)
        walk_on = drive.engine._live["job"]
        walk_on.epoch = epoch
    assert drive.finish()["job"].token_ids == expected


@pytest.mark.parametrize(
    ("first", "second"), [("full", DISK), (DISK, "full"), (f"int8 | {DISK}", DISK), (DISK, "int8")]
)
def test_a_switch_is_prepared_ahead_over_steps(engines, folder: Path, first: str, second: str) -> None:
    drive = decoding(engines(switch_step_share=0, switch_least_blocks=8), first)
    answer = drive.order("job", second)
    assert not answer.done()
    drive.until(answer.done)
    assert answer.result(timeout=0).applied.to_pipeline == second
    check_tables(drive)
    prepared = logits_now(drive, "job")
    at_once = decoding(engines(), first, drive.generated("job"))
    at_once.direct("job", second)
    if "int8" not in first + second:  # else steps on the way, of which there were others, were lossy
        assert torch.equal(prepared, logits_now(at_once, "job"))
    assert len(drive.finish()["job"].token_ids) == 48


def test_a_preparation_that_is_abandoned_leaves_no_file(engines, folder: Path) -> None:
    drive = decoding(engines(switch_step_share=0, switch_least_blocks=8), "full")
    drive.order("job", DISK)
    drive.engine.step()
    assert files(folder)
    drive.order("job", "full", epoch=2)
    drive.until(lambda: not files(folder))
    assert drive.engine.cache.disk.used_bytes == 0


def test_a_fork_reads_the_same_blocks(engines, folder: Path) -> None:
    drive = decoding(engines(), DISK)
    cache, seq = drive.engine.cache, drive.engine._live["job"].cache
    before = logits_now(drive, "job")
    written = len(files(folder))
    fork = cache.fork(seq)
    assert len(files(folder)) == written
    for own in (fork, seq):
        cache.reserve(own, 1)
    logits, _ = drive.engine._runner.decode([fork, seq], [drive.engine._live["job"].token_ids[-1]] * 2)
    assert torch.equal(logits[0], logits[1])
    torch.testing.assert_close(logits[:1], before, rtol=1e-4, atol=1e-4)  # a batch of two rounds otherwise
    cache.apply(fork, build("full", cache.shape), Occasion.SWITCH)
    cache.close(fork)
    assert len(files(folder)) == written
    assert not seq.damaged


def test_audits_and_signals_read_what_is_on_disk(engines) -> None:
    settings = {"audit_every_tokens": 8, "audit_tokens": 8, "audit_budget": 100.0}
    audits = []
    for pipeline in (f"kivi(bits=4) | {DISK}", "kivi(bits=4)"):
        drive = Drive(engines(**settings))
        drive.submit("job", IDS, 48, pipeline=pipeline)
        drive.finish()
        found = [audit for report in drive.reports for state in report.requests for audit in state.audits]
        audits.append([(audit.at_token, audit.divergence) for audit in found])
    assert len(audits[0]) >= 2
    assert audits[0] == audits[1]


# -- budgets ---------------------------------------------------------------------------------------------------------


def test_blocks_are_written_once(engines, folder: Path) -> None:
    """A prompt's blocks as soon as they are computed, later ones as they grow old."""
    drive = decoding(engines(step_tokens=64), DISK)
    counts, cache = drive.engine._disk.counts, drive.engine.cache
    rows = (len(IDS) - 64) // BLOCK_TOKENS
    block = cache.shape.block_bytes(Format.RAW)
    assert cache.use(drive.engine._live["job"].cache).disk_bytes == rows * LAYERS * 2 * block
    early = set(files(folder))
    drive.until(lambda: drive.generated("job") >= 40)
    assert early <= set(files(folder))
    assert cache.use(drive.engine._live["job"].cache).disk_bytes == (rows + 1) * LAYERS * 2 * block
    headers = sum(path.stat().st_size for path in files(folder)) - (rows + 1) * LAYERS * 2 * block
    assert counts.written_bytes == (rows + 1) * LAYERS * 2 * block + headers


def test_a_prompt_too_long_for_memory_goes_to_disk_as_it_is_computed(engines) -> None:
    """48 rows on disk, in memory that holds 20."""
    engine = engines()
    row = engine.cache.worst_bytes(1)
    small = engines(device_budget_bytes=12 * row, host_budget_bytes=40 * row, step_tokens=64, max_context_tokens=1700)
    ids = prompt(1500, 5)
    drive = Drive(small)
    drive.submit("job", ids, 16, pipeline=DISK)
    most = 0
    while not (drive.outcomes.get("job") and drive.outcomes["job"].events[-1].HasField("finished")):
        assert small.step()
        most = max(most, small.cache.host.used_bytes)
    assert not drive.outcomes["job"].finished.usage.preemptions
    assert drive.outcomes["job"].token_ids == run(engine, {"job": ids}, 16)["job"].token_ids
    slots = 2 / LAYERS * (1500 + 16) / BLOCK_TOKENS * row  # two layers of the request
    assert 0 < most <= slots + small.cache.host.page_bytes


def test_a_full_disk_refuses_a_switch_and_changes_nothing(engines, folder: Path) -> None:
    drive = decoding(engines(disk_budget_bytes=64 << 10), "full")
    before = logits_now(drive, "job")
    with pytest.raises(ProblemError) as refused:
        drive.direct("job", DISK)
    assert refused.value.problem.code == RESOURCE_EXHAUSTED
    assert "disk tier" in refused.value.problem.message
    assert torch.equal(logits_now(drive, "job"), before)
    assert not files(folder)
    assert drive.engine.cache.host.used_bytes == 0


def test_a_full_disk_while_decoding_keeps_blocks_where_they_are(engines) -> None:
    engine = engines()
    row_files = LAYERS * 2 * engine.shape.block_bytes(Format.RAW) + 1000
    rows = (len(IDS) - 64) // BLOCK_TOKENS
    drive = decoding(engines(disk_budget_bytes=rows * row_files), DISK)
    drive.until(lambda: drive.generated("job") >= 45)
    assert not drive.engine._live["job"].settled
    assert drive.engine.cache.disk.used_bytes <= rows * row_files
    expected = run(engines(), {"job": IDS}, 48)["job"].token_ids
    assert drive.finish()["job"].token_ids == expected


def test_no_room_for_the_staging_area_is_no_room(engines, folder: Path) -> None:
    drive = decoding(engines(host_budget_bytes=2 * 80 << 10), "full")
    host = drive.engine.cache.host
    host.allocate(host.open_lot(Format.RAW), host.free_bytes // drive.engine.shape.block_bytes(Format.RAW) - 1)
    with pytest.raises(ProblemError, match="host tier"):
        drive.direct("job", DISK)
    assert not files(folder)


def test_a_file_system_without_room_is_a_full_tier(tmp_path: Path, engines, monkeypatch) -> None:
    """The budget had room, the device had not: what was written of it goes."""
    drive = decoding(engines(), "full")

    def full(path: Path, *_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(ProblemError, match="disk tier"):
        drive.direct("job", DISK)
    monkeypatch.undo()
    assert drive.engine.cache.disk.used_bytes == 0
    drive.direct("job", DISK, epoch=2)
    assert drive.engine.cache.disk.used_bytes > 0


def test_without_a_disk_tier_the_stage_is_refused_with_the_reason(engines) -> None:
    engine = engines(disk_budget_bytes=0)
    job = generation_pb2.GenerateRequest(token_ids=generation_pb2.TokenIds(ids=IDS), pipeline=DISK)
    with pytest.raises(ProblemError) as refused:
        engine.submit(job_pb2.Job(job_id="job", request=job))
    assert refused.value.problem.code == INVALID_ARGUMENT
    assert refused.value.problem.violations[0].field == "pipeline"
    assert "disk_budget_bytes" in refused.value.problem.violations[0].description
    drive = decoding(engine, "full")
    with pytest.raises(ProblemError, match="disk_budget_bytes"):
        drive.direct("job", DISK)
    (stage,) = [stage for stage in engine.hello().model.stages if stage.name == "disk"]
    assert "disk_budget_bytes" in stage.unfit
    assert [tier.name for tier in engine.hello().tiers] == ["device", "host"]
    with pytest.raises(ValueError, match="default_pipeline"):
        engines(disk_budget_bytes=0, default_pipeline=DISK)


def test_hello_and_reports_tell_of_the_tier(engines) -> None:
    drive = decoding(engines(), DISK)
    tiers = {tier.name: tier for tier in drive.engine.hello().tiers}
    assert tiers["disk"].budget_bytes == 64 << 20
    assert tiers["disk"].bandwidth_bytes_per_s > 0
    (stage,) = [stage for stage in drive.engine.hello().model.stages if stage.name == "disk"]
    assert not stage.unfit
    uses = {tier.name: tier for tier in drive.engine._reporter.worker_state(1, 0).tiers}
    assert uses["disk"].used_bytes == drive.engine.cache.disk.used_bytes > 0
    assert drive.engine._reporter.cache_bytes(drive.engine._live["job"]).disk_bytes > 0


# -- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, -1])
@pytest.mark.parametrize("pipeline", [DISK, "kivi(bits=4, shadow=false) | disk(recent=32)"])
def test_a_flipped_bit_without_a_copy_has_the_request_computed_again(engines, folder, pipeline, which: int) -> None:
    engine = engines()
    clean = run(engines(), {"job": IDS}, 48, pipeline=pipeline)["job"].token_ids
    drive = decoding(engine, pipeline)
    drive.submit("other", prompt(150, 9), 48, pipeline="full")
    drive.until(lambda: drive.generated("other") >= 5)
    fmt = build(pipeline, engine.shape).codec.format if "kivi" in pipeline else Format.RAW
    flip(files(folder)[which], engine.shape.block_bytes(fmt), block=1)
    outcomes = drive.finish()
    assert engine._disk.counts.corrupt_blocks > 0
    assert outcomes["job"].finished.usage.preemptions == 1
    if pipeline == DISK:
        assert outcomes["job"].token_ids == clean
    assert len(outcomes["job"].token_ids) == 48
    alone = run(engines(), {"other": prompt(150, 9)}, 48, pipeline="full")["other"]
    assert outcomes["other"].token_ids == alone.token_ids  # though it was in the same steps
    assert not outcomes["other"].finished.usage.preemptions


def test_a_flipped_bit_is_made_good_from_the_exact_copy(engines, folder: Path) -> None:
    pipeline = f"kivi(bits=4) | {DISK}"
    clean = run(engines(), {"job": IDS}, 48, pipeline=pipeline, top_logprobs=3)["job"].tokens
    engine = engines()
    drive = Drive(engine)
    drive.submit("job", IDS, 48, pipeline=pipeline, top_logprobs=3)
    drive.until(lambda: drive.generated("job") >= 10)
    flip(files(folder)[0], engine.shape.block_bytes(Format.INT4), block=3)
    outcome = drive.finish()["job"]
    assert engine._disk.counts.corrupt_blocks > 0
    assert outcome.tokens == clean
    assert not outcome.finished.usage.preemptions


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("by_steps", [True, False])
def test_what_was_made_good_is_whole_the_next_time(engines, folder: Path, harm: str, by_steps: bool) -> None:
    """Whoever finds the damage first: a decode step, or what reads blocks in pieces."""
    engine = engines()
    drive = decoding(engine, f"kivi(bits=4) | {DISK}")
    cache, seq, counts = engine.cache, engine._live["job"].cache, engine._disk.counts

    def read() -> torch.Tensor:
        context = cache.context(seq)
        return torch.stack([part[:, : len(IDS)] for layer in range(LAYERS) for part in context.read(layer)])

    expected, written = read(), len(files(folder))
    do_harm(files(folder)[0], harm, engine.shape.block_bytes(Format.INT4))
    for _ in range(2):
        engine.step() if by_steps else read()
    found = counts.corrupt_blocks
    assert found > 0
    assert len(files(folder)) > written - 1
    for _ in range(3):
        engine.step()
        assert torch.equal(read(), expected)
    assert counts.corrupt_blocks == found
    assert not drive.finish()["job"].finished.usage.preemptions
    assert not files(folder)
    assert cache.disk.used_bytes == 0


@pytest.mark.parametrize("target", ["full", "kivi(bits=4)", "snapkv(keep=0.5)"])
def test_a_switch_that_finds_damage_is_refused_and_the_request_begins_again(engines, folder, target: str) -> None:
    clean = run(engines(), {"job": IDS}, 48, pipeline=DISK)["job"].token_ids
    engine = engines()
    drive = decoding(engine, DISK)
    flip(files(folder)[0], engine.shape.block_bytes(Format.RAW))
    used = engine.cache.device.used_bytes
    with pytest.raises(ProblemError) as refused:
        drive.direct("job", target)
    assert refused.value.problem.code == ABORTED
    assert engine.cache.device.used_bytes == used
    outcome = drive.finish()["job"]
    assert outcome.token_ids == clean
    assert outcome.finished.usage.preemptions == 1
    assert outcome.finished.pipeline == DISK


@pytest.mark.parametrize("harm", HARMS)
def test_damage_during_the_prompt(engines, folder: Path, harm: str) -> None:
    clean = run(engines(), {"job": IDS}, 16, pipeline=DISK)["job"].token_ids
    engine = engines(step_tokens=64)
    drive = Drive(engine)
    drive.submit("job", IDS, 16, pipeline=DISK)
    drive.until(lambda: len(files(folder)) >= 2)
    assert engine._live["job"].to_compute
    do_harm(files(folder)[0], harm, engine.shape.block_bytes(Format.RAW))
    outcome = drive.finish()["job"]
    assert outcome.token_ids == clean
    assert outcome.finished.usage.preemptions == 1
    assert not files(folder)


def test_a_replay_that_finds_damage_measures_again(engines, folder: Path) -> None:
    def replayed(harm: bool) -> list[float]:
        drive = Drive(engines())
        replay = generation_pb2.Replay(at_tokens=[200], pipelines=[DISK, f"int8 | {DISK}"], measured_under=[DISK])
        request = generation_pb2.GenerateRequest(token_ids=generation_pb2.TokenIds(ids=IDS), replay=replay)
        drive.engine.submit(job_pb2.Job(job_id="job", request=request))
        if harm:
            drive.until(lambda: bool(files(folder)))
            flip(files(folder)[0], drive.engine.shape.block_bytes(Format.RAW))
        drive.finish()
        assert bool(drive.engine._disk.counts.corrupt_blocks) == harm
        (event,) = [e.replayed for e in drive.outcomes["job"].events if e.HasField("replayed")]
        return [pipeline.divergence for pipeline in event.pipelines]

    clean = replayed(harm=False)
    assert clean[0] == 0.0
    assert replayed(harm=True) == clean


def test_a_turn_that_ends_with_damage_parks_nothing_of_it(engines, folder: Path) -> None:
    engine = engines()
    drive = Drive(engine)
    drive.submit("job", IDS, 48, pipeline=DISK, session_id="talk")
    drive.until(lambda: drive.generated("job") >= 5)
    flip(files(folder)[0], engine.shape.block_bytes(Format.RAW))
    engine.cancel("job")
    drive.finish()
    assert engine._disk.counts.corrupt_blocks > 0
    assert engine.sessions.disk_bytes == engine.sessions.host_bytes == 0
    assert engine.cache.host.used_bytes == engine.cache.disk.used_bytes == 0


def test_a_turn_on_disk_is_parked_and_resumed(engines) -> None:
    engine = engines()
    drive = Drive(engine)
    drive.submit("first", IDS, 16, pipeline=DISK, session_id="talk")
    answer = drive.finish()["first"].token_ids
    ids = [*IDS, *answer, *prompt(40, 8)]
    drive.submit("second", ids, 16, pipeline=DISK, session_id="talk")
    outcome = drive.finish()["second"]
    assert outcome.finished.usage.reused_prompt_tokens >= len(IDS) // BLOCK_TOKENS * BLOCK_TOKENS
    assert outcome.token_ids == run(engines(), {"job": ids}, 16)["job"].token_ids


def test_sessions_on_disk_give_way_to_blocks(engines) -> None:
    row = engines().cache.worst_bytes(1)
    engine = engines(disk_budget_bytes=11 * row, session_host_s=0.0)
    drive = Drive(engine)
    drive.submit("turn", IDS, 4, session_id="talk")
    drive.finish()
    while not engine.sessions.disk_bytes:
        engine.step()
    assert engine.sessions.disk_bytes > 8 * row
    drive.submit("job", prompt(301, 4), 48, pipeline=DISK)
    drive.until(lambda: drive.generated("job") >= 5)
    assert engine.cache.use(engine._live["job"].cache).disk_bytes == 7 * row
    assert engine.sessions.disk_bytes == 0
    drive.finish()


# -- the tier itself -------------------------------------------------------------------------------------------------


@pytest.fixture
def tier(folder: Path) -> Iterator[DiskTier]:
    store = DiskStore(folder, 1 << 20)
    yield DiskTier(store, tiny_engine().shape)
    store.close()


def some_blocks(tier: DiskTier, count: int, seed: int) -> torch.Tensor:
    size = (count, tier.shape.block_bytes(Format.INT8))
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_numbers_are_good_until_their_blocks_are_released(tier: DiskTier, folder: Path) -> None:
    """Whatever was written and released before: each number gives its own block."""
    rng, held = np.random.default_rng(1), {}
    for turn in range(60):
        blocks = [some_blocks(tier, int(rng.integers(1, 9)), 1000 * turn + piece) for piece in range(2)]
        numbers = tier.write(iter(blocks), Format.INT8)
        held.update(zip(numbers.tolist(), torch.cat(blocks), strict=True))
        going = rng.permutation(list(held))[: int(rng.integers(0, len(held)))].astype(np.int32)
        tier.release(going)
        for number in going.tolist():
            del held[number]
        asked = rng.permutation(list(held)).astype(np.int32)
        rows = np.zeros((len(asked), blocks[0].shape[1]), np.uint8)
        assert tier.read(asked, list(rows)).result() == []
        assert np.array_equal(rows, torch.stack([held[number] for number in asked.tolist()]).numpy())
    tier.release(np.array(list(held), np.int32))
    assert tier.used_bytes == 0
    assert not files(folder)


def test_what_does_not_fit_leaves_nothing(tier: DiskTier, folder: Path) -> None:
    with pytest.raises(TierFullError) as full:
        tier.write((some_blocks(tier, 100, seed) for seed in range(100)), Format.INT8)
    assert full.value.tier is Tier.DISK
    assert tier.used_bytes == 0
    assert not files(folder)


def test_damaged_blocks_are_named(tier: DiskTier, folder: Path) -> None:
    blocks = [some_blocks(tier, 4, seed) for seed in range(3)]
    numbers = tier.write(iter(blocks), Format.INT8)
    flip(files(folder)[1], blocks[0].shape[1], block=1)  # the third of the second file
    asked = numbers[[11, 6, 0, 7]]
    rows = np.zeros((4, blocks[0].shape[1]), np.uint8)
    assert tier.read(asked, list(rows)).result() == [1]
    assert np.array_equal(rows[[0, 2, 3]], torch.cat(blocks)[[11, 0, 7]].numpy())


def test_a_block_is_written_again_under_its_number(tier: DiskTier, folder: Path) -> None:
    blocks = torch.cat([some_blocks(tier, 4, seed) for seed in range(3)]).numpy()
    numbers = tier.write((torch.from_numpy(part) for part in np.split(blocks, 3)), Format.INT8)
    size = blocks.shape[1]

    def damaged() -> list[int]:
        rows = np.zeros_like(blocks)
        found = tier.read(numbers, list(rows)).result()
        whole = np.delete(np.arange(12), found)
        assert np.array_equal(rows[whole], blocks[whole])
        return found

    files(folder)[1].unlink()
    assert sorted(damaged()) == [4, 5, 6, 7]
    used = tier.used_bytes
    assert tier.rewrite(int(numbers[6]), blocks[6])
    assert sorted(damaged()) == [4, 5, 7]
    assert size < tier.used_bytes - used < size + 256  # and a header
    flip(files(folder)[-1], size)
    assert sorted(damaged()) == [4, 5, 6, 7]
    for place in (7, 6, 4, 5):
        assert tier.rewrite(int(numbers[place]), blocks[place])
    assert damaged() == []
    assert 4 * size < tier.used_bytes - used < 4 * (size + 256)  # none is there twice
    tier.release(numbers[[6, 0]])
    assert tier.used_bytes - used < 3 * (size + 256)
    again = tier.write([some_blocks(tier, 1, 9)], Format.INT8)  # a number that was free is nobody's old block
    row = np.zeros(size, np.uint8)
    assert tier.read(again, [row]).result() == []
    assert np.array_equal(row, some_blocks(tier, 1, 9)[0].numpy())
    tier.release(np.concatenate([numbers[1:6], numbers[7:], again]))
    assert tier.used_bytes == 0
    assert not files(folder)


def test_without_room_a_damaged_block_stays_as_it_is(tier: DiskTier, folder: Path) -> None:
    blocks = some_blocks(tier, 1, 0)
    numbers = tier.write([blocks], Format.INT8)
    flip(files(folder)[0], blocks.shape[1])
    file_bytes = tier.used_bytes
    while tier.free_bytes >= file_bytes:
        tier.write([some_blocks(tier, 1, 1)], Format.INT8)
    used, there = tier.used_bytes, files(folder)
    assert not tier.rewrite(int(numbers[0]), blocks[0].numpy())
    assert tier.read(numbers, [np.zeros(blocks.shape[1], np.uint8)]).result() == [0]
    assert (tier.used_bytes, files(folder)) == (used, there)


# -- reading ahead ---------------------------------------------------------------------------------------------------


def test_every_block_is_counted_once_a_step(engines) -> None:
    drive = decoding(engines(), DISK)
    recalls, cache = drive.engine.cache.recalls, drive.engine.cache
    asked = recalls.asked[Tier.DISK]
    use = cache.use(drive.engine._live["job"].cache)
    blocks = use.disk_bytes // cache.shape.block_bytes(Format.RAW)
    before = asked.blocks
    bytes_before = recalls.moved_bytes[Tier.DISK, Tier.HOST]
    for _ in range(3):
        drive.engine.step()
    assert asked.blocks - before == 3 * blocks
    assert recalls.moved_bytes[Tier.DISK, Tier.HOST] - bytes_before == 3 * use.disk_bytes
    assert asked.hit_rate == 1 - asked.waited / asked.blocks
    assert recalls.summary()["disk_to_host_bytes"] == recalls.moved_bytes[Tier.DISK, Tier.HOST]
    assert recalls.summary()["disk_waited_blocks"] == asked.waited


def test_two_layers_stay_in_the_staging_area(folder: Path) -> None:
    """As many as it has slots: nothing is read twice between two upkeeps."""
    engine = tiny_engine(disk_folder=folder, disk_budget_bytes=1 << 20)
    drive = decoding(engine, DISK)
    read, there = engine._disk.counts.read_bytes, engine.cache.recalls.asked[Tier.DISK].there
    for _ in range(5):
        engine.step()
    assert engine._disk.counts.read_bytes == read
    blocks = engine.cache.use(engine._live["job"].cache).disk_bytes // engine.shape.block_bytes(Format.RAW)
    assert engine.cache.recalls.asked[Tier.DISK].there == there + 5 * blocks
    drive.finish()
    engine.stop(1.0)


# -- killed ----------------------------------------------------------------------------------------------------------

SERVES = """
import sys
from pathlib import Path
from tests.tiny import Drive, prompt, tiny_engine
engine = tiny_engine(disk_folder=Path(sys.argv[1]), disk_budget_bytes=1 << 20)
drive = Drive(engine)
drive.submit("job", prompt(301, 3), 48, pipeline="disk(recent=64)")
drive.until(lambda: drive.generated("job") >= 5)
print("decoding", flush=True)
sys.stdin.read()
"""


def test_a_killed_worker_s_files_go_when_the_next_one_comes(folder: Path) -> None:
    command = [sys.executable, "-P", "-c", SERVES, str(folder)]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{root / 'protos'}:{root}"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=root
    ) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "decoding\n"
        assert files(folder)
        living = DiskStore(folder, 1 << 20)  # another worker of the machine leaves them alone
        assert files(folder)
        living.close()
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    assert files(folder)
    engine = tiny_engine(disk_folder=folder, disk_budget_bytes=1 << 20)
    assert not files(folder)
    engine.stop(1.0)
    assert not list(folder.glob("worker-*"))
