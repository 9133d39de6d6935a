"""Swap: what its codes hold, what files of them take, and that requests read what was written."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.api import Tables, TokenSource
from kernels.layout import BLOCK_TOKENS, CacheShape, Format, Tier
from kernels.reference import ReferenceBackend
from tests.tiny import Drive, prompt, run
from tests.workers.test_codecs import batch
from tests.workers.test_switch import IDS, check_tables, logits_now
from workers.cache.arena import TierFullError
from workers.cache.disk import CorruptBlockError, DiskFullError, DiskStore
from workers.cache.disk_tier import DiskTier
from workers.cache.packed import CodePacking
from workers.cache.sequence_cache import Occasion
from workers.engine.engine import Engine
from workers.expected import expected_use
from workers.stages.base import LossClass
from workers.stages.compress.coarse import KEY_STEP, VALUE_STEP, Coarse
from workers.stages.registry import build

WIDE = CacheShape(layers=1, kv_heads=2, query_heads=4, head_dim=64, dtype=torch.float32)
SHAPES = {
    "wide": WIDE,
    "odd": CacheShape(layers=3, kv_heads=2, query_heads=6, head_dim=24, dtype=torch.bfloat16),
    "narrow": CacheShape(layers=2, kv_heads=1, query_heads=4, head_dim=32, dtype=torch.float16),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_bits = pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])


def coded(shape: CacheShape, bits: int, count: int = 40, seed: int = 0) -> np.ndarray:
    """Blocks as they lie in memory, uint8 [count, block_bytes]."""
    blocks = Coarse(bits).encode(batch(shape, count, seed))
    return torch.nn.functional.pad(blocks, (0, shape.block_bytes(Format.INT8) - blocks.shape[1])).numpy()


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.blocks"))


def header_bytes(path: Path) -> int:
    blocks = struct.unpack("<8s4I", path.read_bytes()[:24])[3]
    return 24 + 12 * blocks + 8


def payload_bytes(folder: Path) -> int:
    """What all files hold beside their headers."""
    return sum(path.stat().st_size - header_bytes(path) for path in files(folder))


def flip(path: Path) -> None:
    """Turns a bit of a file's first block."""
    data = bytearray(path.read_bytes())
    data[header_bytes(path) + 300] ^= 16
    path.write_bytes(data)


# -- codes -------------------------------------------------------------------------------------------------------------


def plainly(x: np.ndarray, middle: np.ndarray, step: np.ndarray, groups: list[tuple[slice, slice]]) -> np.ndarray:
    """x [32, D] as it is stored: multiples of a group's step from where code 0 is, number by number in float64."""
    out = np.empty_like(x)
    for rows, columns in groups:
        part, centre = x[rows, columns], middle[rows, columns]
        scale = np.float64(np.float16(max(step[rows, columns].max(), np.abs(part - centre).max() / 127)))
        zero = np.float64(np.float16(centre.flat[0] - 128 * scale))
        out[rows, columns] = zero + scale * np.clip(np.rint((part - zero) / scale), 0, 255)
    return out


@every_bits
@every_shape
def test_what_is_decoded_is_what_the_steps_leave(shape: CacheShape, bits: int) -> None:
    blocks, d = batch(shape, 5, seed=2), shape.head_dim
    codec = Coarse(bits)
    codes = codec.encode(blocks)
    assert codes.shape == (5, shape.payload_bytes(Format.INT8))
    channels = [(slice(None), slice(c, c + 1)) for c in range(d)]
    of_tokens = [(slice(t, t + 1), slice(g, g + 32)) for t in range(BLOCK_TOKENS) for g in range(0, d, 32)]
    for got, x, groups in zip(codec.decode(codes, blocks), (blocks.k, blocks.v), (channels, of_tokens), strict=True):
        for n in range(5):
            numbers, keys = x[n].double().numpy(), groups is channels
            middle = np.broadcast_to(numbers.mean(0) if keys else 0.0, numbers.shape)
            spread = np.sqrt(((numbers - middle) ** 2).mean(None if keys else 1, keepdims=True))
            step = np.broadcast_to((KEY_STEP if keys else VALUE_STEP) / 2**bits * spread, numbers.shape)
            want = plainly(numbers, middle, step, groups)
            # a scale or zero that float32 puts on another side of a float16's boundary moves what hangs on it
            differ = np.abs(got[n].double().numpy() - want)
            assert np.median(differ) < 1e-4
            assert (differ <= 1.1 * step + np.abs(numbers).max() / 127).all()


@every_shape
def test_kernels_read_the_codes_as_int8(shape: CacheShape) -> None:
    """The layout is theirs: what they dequantise is what the codec decodes."""
    stored = torch.from_numpy(coded(shape, 4, 6, seed=3))
    size = stored.shape[1]
    arenas = (stored.flatten().clone(), torch.empty(0, dtype=torch.uint8))
    backend = ReferenceBackend(shape, arenas, Tables.allocate(1, shape, BLOCK_TOKENS))
    spread = np.ones((6, BLOCK_TOKENS), np.uint8)
    address = (np.arange(6, dtype=np.int32) * (size // 256))[:, None] * spread
    rows = spread * np.arange(BLOCK_TOKENS, dtype=np.uint8)
    k, v = backend.read(TokenSource(address.astype(np.int32), spread * Format.INT8, spread * 0, rows))
    want = Coarse(4).decode(stored[:, : shape.payload_bytes(Format.INT8)], batch(shape, 6, seed=3))
    for got, expected in zip((k, v), want, strict=True):
        assert torch.equal(got, expected.to(shape.dtype))


def test_more_bits_lose_less_and_take_more() -> None:
    blocks = batch(WIDE, 40)
    lost, taken = [], []
    for bits in (2, 3, 4, 5, 6):
        k, v = Coarse(bits).decode(Coarse(bits).encode(blocks), blocks)
        lost.append(float((k - blocks.k).norm() / blocks.k.norm() + (v - blocks.v).norm() / blocks.v.norm()))
        taken.append(sum(map(len, CodePacking(WIDE).pack(coded(WIDE, bits)))) / 40)
    assert lost == sorted(lost, reverse=True)
    assert taken == sorted(taken)
    assert taken[2] < WIDE.payload_bytes(Format.INT4) < WIDE.block_bytes(Format.INT8)


@pytest.mark.parametrize("value", [0.0, 1e-9, 3.0, 7e4, float("inf"), float("nan")])
def test_any_numbers_can_be_stored(value: float) -> None:
    blocks = batch(WIDE, 2)
    blocks.k[:], blocks.v[0, 3, 5] = value, value
    k, v = Coarse(4).decode(Coarse(4).encode(blocks), blocks)
    assert k.isfinite().all()
    assert v.isfinite().all()
    most = float(np.clip(np.nan_to_num(value, posinf=16384.0), -16384, 16384))
    torch.testing.assert_close(k, torch.full_like(k, most), rtol=1e-3, atol=1e-6)


# -- packed ------------------------------------------------------------------------------------------------------------


@every_shape
@every_bits
def test_packed_blocks_come_back_bit_for_bit_and_are_smaller(shape: CacheShape, bits: int) -> None:
    packing, blocks = CodePacking(shape), coded(shape, bits)
    packed = packing.pack(blocks)
    assert np.mean([len(block) for block in packed]) < shape.payload_bytes(Format.INT8)
    np.testing.assert_array_equal(packing.unpack([np.frombuffer(block, np.uint8) for block in packed]), blocks)


@every_shape
def test_so_do_any_bytes(shape: CacheShape) -> None:
    packing, rng = CodePacking(shape), np.random.default_rng(4)
    blocks = rng.integers(0, 256, (30, shape.block_bytes(Format.INT8)), np.uint8)
    blocks[3], blocks[4] = 0, 255
    packed = packing.pack(blocks)
    np.testing.assert_array_equal(packing.unpack([np.frombuffer(block, np.uint8) for block in packed]), blocks)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    store = DiskStore(tmp_path, 1 << 20)
    yield store
    store.close()


def test_the_store_packs_and_says_what_it_takes(store: DiskStore, tmp_path: Path) -> None:
    blocks = coded(WIDE, 3)
    noise = np.random.default_rng(5).integers(0, 256, (2, blocks.shape[1]), np.uint8)  # packing makes it no smaller
    blocks = np.concatenate([blocks, noise])
    batch_ = store.write(blocks, CodePacking(WIDE))
    batch_.written.result()
    assert batch_.sizes[-1] == batch_.sizes[-2] == batch_.block_bytes == blocks.shape[1]
    assert (batch_.sizes[:-2] < 0.5 * blocks.shape[1]).all()
    assert store.used_bytes == batch_.nbytes == sum(path.stat().st_size for path in files(tmp_path))
    assert store.counts.written_bytes == store.used_bytes
    assert int(batch_.sizes.sum()) == payload_bytes(tmp_path)
    np.testing.assert_array_equal(store.read(batch_).result(), blocks)
    wanted = np.array([41, 3, 4, 5, 0, 40, 3])
    before = store.counts.read_bytes
    np.testing.assert_array_equal(store.read(batch_, wanted).result(), blocks[wanted])
    assert store.counts.read_bytes - before == int(batch_.sizes[wanted].sum())
    store.free(batch_)
    assert store.used_bytes == 0


def test_damage_in_a_packed_block_is_named_and_leaves_the_others(store: DiskStore, tmp_path: Path) -> None:
    blocks = coded(WIDE, 4)
    batch_ = store.write(blocks, CodePacking(WIDE))
    batch_.written.result()
    (path,) = files(tmp_path)
    data = bytearray(path.read_bytes())
    data[header_bytes(path) + int(batch_.sizes[:7].sum()) + 400] ^= 1  # in the eighth
    path.write_bytes(data)
    with pytest.raises(CorruptBlockError) as error:
        store.read(batch_).result()
    assert error.value.blocks == [7]
    others = np.delete(np.arange(40), 7)
    np.testing.assert_array_equal(store.read(batch_, others).result(), blocks[others])
    data[24 + 8 * 40 + 3] ^= 1  # a size
    path.write_bytes(data)
    with pytest.raises(CorruptBlockError, match="header"):
        store.read(batch_, others).result()


def test_the_budget_is_charged_with_the_most_until_blocks_are_written(tmp_path: Path) -> None:
    blocks = coded(WIDE, 3, 100)
    store = DiskStore(tmp_path, int(1.9 * blocks.size))
    try:
        held = []
        for _ in range(3):  # of which one and a bit would have fitted as they lie in memory
            held.append(store.write(blocks, CodePacking(WIDE)))
            assert store.used_bytes <= store.budget_bytes
            held[-1].written.result()
        with pytest.raises(DiskFullError):  # the fourth could, packed; that it will be is not known yet
            store.write(blocks, CodePacking(WIDE))
        assert store.used_bytes == sum(b.nbytes for b in held) == sum(p.stat().st_size for p in files(tmp_path))
    finally:
        store.close()


def test_the_tier_knows_what_each_of_its_blocks_takes(store: DiskStore, tmp_path: Path) -> None:
    tier, fmt = DiskTier(store, WIDE), Coarse(4).format
    numbers = tier.write(iter([torch.from_numpy(coded(WIDE, 4, 20, seed)) for seed in (1, 2)]), fmt)
    plain = tier.write(iter([torch.from_numpy(coded(WIDE, 4, 5))]), Format.INT8)
    assert tier.stored_bytes(plain).sum() == 5 * WIDE.block_bytes(Format.INT8)
    assert tier.stored_bytes(np.concatenate([numbers, plain])).sum() == payload_bytes(tmp_path)
    sizes = [len(block) for seed in (1, 2) for block in CodePacking(WIDE).pack(coded(WIDE, 4, 20, seed))]
    assert tier.stored_bytes(numbers).tolist() == sizes


# -- pipelines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "loss", "wants", "same_as"),
    [
        ("swap", LossClass.RECOVERABLE, True, "swap(shadow=false, bits=4)"),
        ("swap(shadow=false)", LossClass.PERMANENT, False, "swap"),
        ("kivi | swap(shadow=false)", LossClass.RECOVERABLE, True, "kivi"),
        ("kivi(shadow=false) | swap", LossClass.PERMANENT, False, "kivi"),
        ("window | swap(shadow=false)", LossClass.PERMANENT, False, "window | swap"),
    ],
)
def test_it_loses_what_it_rounds_itself(text: str, loss: LossClass, wants: bool, same_as: str) -> None:
    pipeline = build(text, WIDE)
    assert (pipeline.loss_class, pipeline.wants_shadow) == (loss, wants)
    assert pipeline.logits_key == build(same_as, WIDE).logits_key
    assert build("swap(bits=3)", WIDE).logits_key != build("swap", WIDE).logits_key != build("full", WIDE).logits_key


# -- requests ----------------------------------------------------------------------------------------------------------

SWAP = "swap(recent=64, bits=4)"
BARE = "swap(recent=64, bits=4, shadow=false)"


def decoding(engine: Engine, pipeline: str, tokens: int = 10) -> Drive:
    drive = Drive(engine)
    drive.submit("job", IDS, 48, pipeline=pipeline)
    drive.until(lambda: drive.generated("job") >= tokens)
    drive.engine._live["job"].pinned = None
    return drive


def test_kernels_read_what_the_codes_mean(engines) -> None:
    """Without a copy, a switch to full makes raw blocks of what was stored: the logits stay, but for rounding."""
    drive = decoding(engines(), BARE)
    swapped = logits_now(drive, "job")
    drive.direct("job", "full", epoch=1)
    torch.testing.assert_close(logits_now(drive, "job"), swapped, rtol=1e-4, atol=1e-4)
    plain = decoding(engines(), "full")
    assert not torch.allclose(logits_now(plain, "job"), swapped, rtol=1e-4, atol=1e-4)


def test_a_switch_there_and_back_restores_the_logits(engines, folder: Path) -> None:
    drive = decoding(engines(), "full")
    before = logits_now(drive, "job")
    for epoch, pipeline in enumerate((SWAP, "swap(recent=64, bits=2)", "int8 | disk(recent=64)", SWAP, "full"), 1):
        drive.direct("job", pipeline, epoch=epoch)
        check_tables(drive)
    assert torch.equal(logits_now(drive, "job"), before)
    assert not files(folder)


@pytest.mark.parametrize("settings", [{}, {"step_tokens": 45}, {"kernel_backend": "reference"}], ids=str)
def test_tokens_do_not_depend_on_chunks_or_kernels(engines, settings: dict[str, object]) -> None:
    expected = run(engines(), {"job": IDS}, 48, pipeline=BARE)["job"].token_ids
    assert run(engines(**settings), {"job": IDS}, 48, pipeline=BARE)["job"].token_ids == expected


def test_neighbours_do_not_meet(engines) -> None:
    def among(neighbours: list[str]) -> list:
        drive = Drive(engines())
        for n, pipeline in enumerate([BARE, *neighbours]):
            drive.submit(f"n{n}", prompt(200 + 30 * n, n), 40, pipeline=pipeline, top_logprobs=3)
        return drive.finish()["n0"].tokens

    assert among([SWAP, "disk(recent=64)", "full"]) == among(["full"] * 3)


def test_reported_bytes_are_those_of_the_files(engines, folder: Path) -> None:
    engine = engines(step_tokens=64)
    drive = decoding(engine, BARE)
    for generated in (10, 40):  # blocks that have grown old meanwhile come on top
        drive.until(lambda generated=generated: drive.generated("job") >= generated)
        reported = engine._reporter.cache_bytes(engine._live["job"])
        assert reported.disk_bytes == payload_bytes(folder) > 0
        assert engine.cache.disk.used_bytes == sum(path.stat().st_size for path in files(folder))
    most = expected_use(build(BARE, engine.shape), engine.shape, engine._live["job"].cache.seen).disk_bytes
    assert 0.4 * most < reported.disk_bytes < most


def test_with_a_codec_its_blocks_go_as_they_are(engines, folder: Path) -> None:
    engine = engines()
    drive = decoding(engine, "kivi(bits=4) | swap(recent=64)")
    tables, slot = engine.cache.tables, engine._live["job"].cache.slot
    away = tables.tier[slot] == Tier.DISK
    assert set(np.unique(tables.format[slot][away])) == {Format.INT4}
    assert payload_bytes(folder) == int(away.sum()) * engine.shape.block_bytes(Format.INT4)
    drive.finish()


def test_a_flipped_bit_is_made_good_from_the_exact_copy(engines, folder: Path) -> None:
    clean = run(engines(), {"job": IDS}, 48, pipeline=SWAP, top_logprobs=3)["job"].tokens
    engine = engines()
    drive = Drive(engine)
    drive.submit("job", IDS, 48, pipeline=SWAP, top_logprobs=3)
    drive.until(lambda: drive.generated("job") >= 10)
    flip(files(folder)[0])
    outcome = drive.finish()["job"]
    assert engine._disk.counts.corrupt_blocks > 0
    assert outcome.tokens == clean
    assert not outcome.finished.usage.preemptions


def test_without_one_the_request_is_computed_again(engines, folder: Path) -> None:
    engine = engines()
    drive = decoding(engine, BARE)
    flip(files(folder)[0])
    outcome = drive.finish()["job"]
    assert engine._disk.counts.corrupt_blocks > 0
    assert outcome.finished.usage.preemptions == 1
    assert len(outcome.token_ids) == 48
    assert not files(folder)


def test_a_disk_without_room_refuses_and_changes_nothing(engines) -> None:
    engine = engines(disk_budget_bytes=20_000)
    drive = decoding(engine, "full")
    before = logits_now(drive, "job")
    cache = engine._live["job"].cache
    with pytest.raises(TierFullError) as full:
        engine.cache.apply(cache, build(BARE, engine.shape), Occasion.SWITCH)
    assert full.value.tier is Tier.DISK
    assert engine.cache.disk.used_bytes == 0
    assert torch.equal(logits_now(drive, "job"), before)
