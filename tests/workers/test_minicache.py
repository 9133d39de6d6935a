"""MiniCache: what a pair of layers stores and what is read of it, and that neither half is ever without the other."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from kernels.layout import BLOCK_TOKENS, CacheShape, Format, Tier
from kvpilot.pipeline import PipelineError
from tests.tiny import Drive, prompt, run, tiny_engine, tiny_loaded
from tests.workers.test_conformance import _no_files_stay, check_bytes, make_cache, make_world  # noqa: F401
from tests.workers.test_preparation import SLICED, memory, snapshot
from tests.workers.test_switch import IDS, PIPELINES, check_tables, decoding, logits_now
from workers.cache.formats import CodedFormat
from workers.cache.kvcache import Occasion
from workers.cache.style import Style, wanted
from workers.engine.attention import DecodeAttention
from workers.stages.base import BlockBatch, BlockPlaces, LayerPlace, Pipeline, Placer, Places
from workers.stages.compress.minicache import Earlier, Later, MiniCache
from workers.stages.registry import build

WIDE = CacheShape(layers=5, kv_heads=2, query_heads=4, head_dim=64, dtype=torch.float32)
"""Layers 2 and 3 are a pair; 4 is without another."""
NARROW = dataclasses.replace(WIDE, head_dim=24, dtype=torch.bfloat16)
HALF = dataclasses.replace(WIDE, dtype=torch.float16)
SHAPES = (WIDE, NARROW, HALF)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=["float32", "bfloat16", "float16"])
LAYERS = 4
FOUR = tiny_loaded(num_hidden_layers=LAYERS)
"""Layers 2 and 3 are a pair."""


# -- the reference -----------------------------------------------------------------------------------------------------


def plain(earlier: np.ndarray, later: np.ndarray, t: float, kept: int) -> tuple[np.ndarray, np.ndarray]:
    """What is to be read of a block's keys, or of its values, of both layers, float64 [32, D] each."""
    one, other, apart = earlier.copy(), later.copy(), []
    for token, (x, y) in enumerate(zip(earlier, later, strict=True)):
        long_x, long_y = math.sqrt(sum(x * x)), math.sqrt(sum(y * y))
        omega = math.acos(max(-1.0, min(1.0, sum(x * y) / (long_x * long_y))))
        first, second = (math.sin(share * omega) / math.sin(omega) if omega else share for share in (1 - t, t))
        direction = first * y / long_y + second * x / long_x
        one[token], other[token] = direction * long_x, direction * long_y
        apart.append((-omega, token))
    for _, token in sorted(apart)[:kept]:
        one[token], other[token] = earlier[token], later[token]
    return one, other


def pair(shape: CacheShape, blocks: int = 3, seed: int = 0) -> tuple[BlockBatch, BlockBatch]:
    """The blocks of two layers, alike as neighbours' are, that can see each other."""
    generator = torch.Generator().manual_seed(seed)
    size = (2, blocks, BLOCK_TOKENS, shape.head_dim)
    first = torch.randn(size, generator=generator) * (1 + 6 * (torch.arange(shape.head_dim) % 7 == 3))
    second = 1.7 * first + torch.randn(size, generator=generator) * torch.rand(size[:3], generator=generator)[..., None]
    earlier, later = (part.to(shape.dtype).float() for part in (first, second))

    def batch(layer: int, numbers: torch.Tensor, others: torch.Tensor) -> BlockBatch:
        nothing = torch.zeros(blocks, BLOCK_TOKENS)
        place = (torch.full((blocks,), layer), torch.zeros(blocks, dtype=torch.long), nothing.long())
        known = (*numbers, nothing, nothing, 1000)
        return BlockBatch(
            shape, *place, *known, lambda layer, last: pytest.fail("asked"), partners=lambda: tuple(others)
        )

    return batch(2, earlier, later), batch(3, later, earlier)


@every_shape
@pytest.mark.parametrize("t", [0.4, 0.6])
@pytest.mark.parametrize("retained", [0.0, 0.05, 0.2])
def test_what_is_read_is_what_the_reference_says(shape: CacheShape, t: float, retained: float) -> None:
    earlier, later = pair(shape)
    one, other = Earlier(t, retained), Later(t, retained)
    codes = one.encode(earlier), other.encode(later)
    assert [code.shape for code in codes] == [(3, one.nbytes(shape)), (3, other.nbytes(shape))]
    of_one = one.decode(codes[0], earlier)
    stored = BlockPlaces(shape, later.layer, later.head, later.position, partners=lambda: of_one)
    of_other = other.decode(codes[1], stored)
    kept = {0.0: 0, 0.05: 2, 0.2: 6}[retained]
    close = {torch.float32: (1e-4, 1e-5), torch.float16: (2e-3, 1e-3), torch.bfloat16: (2e-2, 2e-2)}[shape.dtype]
    for got_one, got_other, exact in zip(of_one, of_other, ("k", "v"), strict=True):
        for n in range(3):
            exact_one, exact_other = (getattr(blocks, exact)[n].double().numpy() for blocks in (earlier, later))
            want_one, want_other = plain(exact_one, exact_other, t, kept)
            np.testing.assert_allclose(got_one[n], want_one, rtol=close[0], atol=close[1])
            np.testing.assert_allclose(got_other[n], want_other, rtol=close[0], atol=close[1])
            untouched = (got_one[n].numpy() == exact_one).all(1) & (got_other[n].numpy() == exact_other).all(1)
            assert untouched.sum() == kept  # bit for bit
            lengths = np.linalg.norm(exact_other, axis=1)
            np.testing.assert_allclose(got_other[n].norm(dim=1), lengths, rtol=1e-5)  # its own, to what float32 is


def test_directions_that_are_equal_opposite_or_missing_are_no_trouble() -> None:
    earlier, later = pair(WIDE, blocks=1)
    k, other = earlier.k[0], later.k[0]
    other[0], other[1], other[2], k[3], other[4], k[4] = k[0] * 3, -k[1], 0, 0, 0, 0
    codec = Earlier(0.6, 0.1), Later(0.6, 0.1)
    earlier = dataclasses.replace(earlier, partners=lambda: (later.k, later.v))
    later = dataclasses.replace(later, partners=lambda: (earlier.k, earlier.v))
    of_one = codec[0].decode(codec[0].encode(earlier), earlier)
    stored = BlockPlaces(WIDE, later.layer, later.head, later.position, partners=lambda: of_one)
    got = codec[1].decode(codec[1].encode(later), stored)[0][0]
    torch.testing.assert_close(got[0], other[0])
    assert torch.equal(of_one[0][0][3], k[3])
    for token in (1, 3):  # the furthest apart, and one whose direction could not be stored: kept
        assert torch.equal(got[token], other[token])
    assert not got[[2, 4]].any()
    assert torch.isfinite(got).all()


def test_bytes_of_a_pair() -> None:
    """16-bit numbers, 64 channels: 36 units where two raw blocks take 64, so 44 % less; the paper has 41 %, of what it
    has merged and quantised."""
    raw, pairs = HALF.block_bytes(Format.RAW), MiniCache().by_age()
    assert MiniCache().format.codec.nbytes(HALF) == raw
    assert pairs[1][1].codec.nbytes(HALF) == 2 * 32 * 4 + 2 * 2 * 64 * 2 + 2 * 2
    assert sum(HALF.block_bytes(fmt) for _, fmt in pairs) == 36 * 256 == 2 * raw * 9 // 16


def test_layers_are_merged_from_the_middle_on() -> None:
    def pairs(layers: int, start: float) -> list[str]:
        shape = dataclasses.replace(WIDE, layers=layers)
        ages = [MiniCache(start=start).ages(LayerPlace(index, shape, 100)) for index in range(layers)]
        return ["raw" if not age else type(age[0][1].codec).__name__ for age in ages]

    assert pairs(5, 0.5) == ["raw", "raw", "Earlier", "Later", "raw"]
    assert pairs(30, 0.5) == ["raw"] * 15 + ["Earlier", "Later"] * 7 + ["raw"]
    assert pairs(32, 0.75) == ["raw"] * 24 + ["Earlier", "Later"] * 4
    assert pairs(3, 0.75) == ["raw", "Earlier", "Later"]
    assert pairs(2, 0.5) == ["Earlier", "Later"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("snapkv | minicache", "'minicache' does not go with 'snapkv': two layers are merged token by token"),
        ("minicache | disk", "'minicache' does not go with 'disk': .* from disk layers come one at a time"),
        ("minicache | quest", "'minicache' does not go with 'quest': .* of each other blocks would be read"),
    ],
)
def test_what_it_does_not_go_with_is_refused_and_why(text: str, why: str) -> None:
    with pytest.raises(PipelineError, match=why):
        build(text, WIDE)


def test_a_model_without_a_pair_is_refused() -> None:
    with pytest.raises(PipelineError, match="'minicache' cannot serve this model: it has one layer"):
        build("minicache", dataclasses.replace(WIDE, layers=1))


# -- a request's cache -------------------------------------------------------------------------------------------------


def merged(world) -> set[tuple[int, int]]:
    """Layers and places of blocks in a pair's formats; both halves are there, of the same tokens, or none."""
    found = set()
    for layer, head in world.heads:
        for index, (fmt, _, _) in enumerate(world.blocks(layer, head)):
            if isinstance(fmt, CodedFormat) and fmt.codec.partner:
                other = layer + fmt.codec.partner
                partner, _, _ = world.blocks(other, head)[index]
                assert isinstance(partner, CodedFormat)
                assert partner.codec.partner == -fmt.codec.partner
                rows = slice(index * BLOCK_TOKENS, (index + 1) * BLOCK_TOKENS)
                assert world.positions(layer, head)[rows] == world.positions(other, head)[rows]
                found.add((layer, index))
    return found


def check_pair(world, k: torch.Tensor, v: torch.Tensor, t: float = 0.6, raw: tuple[int, ...] = ()) -> None:
    """What is read of all tables is what the reference makes of numbers [layers, heads, tokens, D] of their tokens."""
    for head in range(world.shape.kv_heads):
        blocks = len(world.positions(2, head)) // BLOCK_TOKENS
        for numbers, part in ((k, 0), (v, 1)):
            got = [world.read(layer, head)[part] for layer in (2, 3)]
            for index in range(blocks):
                rows = slice(index * BLOCK_TOKENS, (index + 1) * BLOCK_TOKENS)
                exact = [numbers[layer, head, rows].double().numpy() for layer in (2, 3)]
                want = exact if index >= blocks - 1 or index in raw else plain(*exact, t, 2)
                for mine, wanted_ in zip(got, want, strict=True):
                    np.testing.assert_allclose(mine[rows], wanted_, rtol=1e-4, atol=1e-4)


def all_numbers(world) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of all tables, which are of one length, as they are read."""
    shape = (world.shape.layers, world.shape.kv_heads, -1, world.shape.head_dim)
    parts = zip(*(world.read(*where) for where in world.heads), strict=True)
    k, v = (torch.stack(part).view(shape) for part in parts)
    return k, v


@pytest.mark.parametrize("text", ["minicache", "minicache(shadow=false)", "minicache | host(recent=96)"])
def test_a_request_reads_what_the_reference_says_and_reports_what_it_takes(text: str) -> None:
    world = make_world(make_cache(WIDE))
    world.apply(text, Occasion.PROMPT)
    check_pair(world, world.k, world.v)
    assert merged(world) == {(layer, index) for layer in (2, 3) for index in range(8)}
    check_bytes(world)
    for layer in (0, 1, 4):
        assert torch.equal(world.read(layer, 0)[0], world.k[layer, 0])
    sizes = [WIDE.block_bytes_16bit(fmt) for layer in (2, 3) for fmt, _, _ in world.blocks(layer, 0)[:8]]
    assert sum(sizes) / (16 * WIDE.block_bytes_16bit(Format.RAW)) == 0.5625
    world.close()


def test_a_decode_step_attends_to_both_halves() -> None:
    world = make_world(make_cache(WIDE))
    world.apply("minicache | host(recent=96)", Occasion.PROMPT)
    cache, seq, generator = world.cache, world.seq, torch.Generator().manual_seed(5)
    cache.reserve(seq, 1)
    cache.advance(seq, 1)
    reading = cache.reading([seq])
    plan = cache.backend.plan(np.array([seq.slot], np.int32), changing=bool(reading))
    attention = DecodeAttention(cache, plan, reading)
    for layer in range(WIDE.layers):
        q, k, v = (torch.randn(1, heads, 1, 64, generator=generator) for heads in (4, 2, 2))
        output = attention.attend(layer, q, k, v, 0.1)[0, 0]
        for head in range(2):
            keys, values = (part.double() for part in world.read(layer, head))
            shares = (q[0, 2 * head : 2 * head + 2, 0].double() @ keys.T * 0.1).softmax(-1)
            torch.testing.assert_close(output[2 * head : 2 * head + 2].double(), shares @ values, rtol=1e-3, atol=1e-4)
    world.close()


@dataclass(frozen=True)
class ByLayer(Placer):
    """Older blocks of every other layer on the host: halves of pairs lie on different tiers."""

    name: ClassVar[str] = "by_layer"
    summary: ClassVar[str] = "."
    odd: int = dataclasses.field(
        default=0, metadata={"bounds": type("Any", (), {"accept": lambda self, value: True})()}
    )

    def device_tokens(self) -> int:
        return 64

    def places(self, layer: LayerPlace) -> Places:
        return ((64, Tier.HOST),) if layer.index % 2 == self.odd else ()


@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("shadow", [True, False])
def test_one_half_may_move_while_the_other_stays(odd: int, shadow: bool) -> None:
    world = make_world(make_cache(WIDE))
    codec = MiniCache(shadow=shadow)
    world.apply(Pipeline((codec,)).text, Occasion.PROMPT)
    before = all_numbers(world)
    stayed = [world.blocks(layer, 1) for layer in (2 + 1 - odd,)]
    world.cache.apply(world.seq, Pipeline((codec, ByLayer(odd))), Occasion.SWITCH)
    assert {tier for _, tier, _ in world.blocks(2 + odd, 0)[:7]} == {Tier.HOST}
    assert [world.blocks(layer, 1) for layer in (2 + 1 - odd,)] == stayed
    assert all(map(torch.equal, all_numbers(world), before))
    check_bytes(world)
    world.append(3)
    world.apply(Pipeline((codec,)).text)
    assert all(torch.equal(now[:, :, :301], then) for now, then in zip(all_numbers(world), before, strict=True))
    world.close()


@pytest.mark.parametrize("first", ["snapkv(keep=0.5, shadow=false)", "window(sinks=5, recent=100, shadow=false)"])
def test_blocks_that_are_not_of_the_same_tokens_stay_raw(first: str) -> None:
    world = make_world(make_cache(WIDE))
    world.apply(first, Occasion.PROMPT)
    kept = [world.read(*where) for where in world.heads]
    alike = {
        (layer, index)
        for index in range(len(world.positions(2, 0)) // BLOCK_TOKENS - 1)
        for layer in (2, 3)
        for rows in [slice(index * BLOCK_TOKENS, (index + 1) * BLOCK_TOKENS)]
        if any(world.positions(2, head)[rows] == world.positions(3, head)[rows] for head in (0, 1))
    }
    assert bool(alike) == first.startswith("window")
    world.apply("minicache(shadow=false)")
    assert merged(world) == alike
    check_bytes(world)
    for (layer, _), (k, v), got in zip(world.heads, kept, map(world.read, *zip(*world.heads)), strict=True):  # noqa: B905
        if layer not in (2, 3) or not alike:
            assert torch.equal(got[0], k)
            assert torch.equal(got[1], v)
    world.close()


def test_a_window_slides_over_pairs_with_and_without_an_exact_copy() -> None:
    for shadow in ("", ", shadow=false"):
        world = make_world(make_cache(WIDE))
        text = f"window(sinks=5, recent=128{shadow}) | minicache(t=0.5{shadow})"
        world.apply(text, Occasion.PROMPT)
        for step in range(70):
            world.append(1, seed=step)
            if world.seq.seen % BLOCK_TOKENS == 0:
                world.apply(text, Occasion.SETTLE)
                assert len(merged(world)) == 2 * (len(world.positions(2, 0)) // BLOCK_TOKENS - 1)
                check_bytes(world)
                at = torch.tensor(world.positions(2, 0))
                if not shadow:
                    check_pair(world, world.k[:, :, at], world.v[:, :, at], 0.5)
        world.close()


@pytest.mark.parametrize("other", ["minicache(t=0.4, shadow=false)", "kivi(bits=8, shadow=false)", "full"])
def test_without_an_exact_copy_others_are_built_from_what_is_read(other: str) -> None:
    world = make_world(make_cache(WIDE))
    world.apply("minicache(shadow=false)", Occasion.PROMPT)
    k, v = all_numbers(world)
    world.apply(other)
    if "minicache" in other:
        check_pair(world, k, v, 0.4)
    else:
        assert not merged(world)
        for got, want in zip(all_numbers(world), (k, v), strict=True):
            assert float((got - want).norm() / want.norm()) < (0.01 if "kivi" in other else 1e-9)
    world.close()


@pytest.mark.parametrize("shadow", ["", "(shadow=false)"])
def test_pairs_are_built_from_disk_piece_by_piece(shadow: str) -> None:
    world = make_world(make_cache(WIDE))
    world.apply("disk(recent=32)", Occasion.PROMPT)
    assert Tier.DISK in {tier for _, tier, _ in world.blocks(2, 0)}
    world.apply(f"minicache{shadow}")
    check_pair(world, world.k, world.v)
    assert len(merged(world)) == 16
    world.close()


def test_no_half_goes_to_disk() -> None:
    """Whatever a placer says that the check at submission knows nothing of."""
    length = np.full((5, 2), 320, np.int32)
    formats = [MiniCache().ages(LayerPlace(index, WIDE, 320)) for index in range(5)]
    styles = [Style(ages, ((160, Tier.DISK),) if layer == 3 else ()) for layer, ages in enumerate(formats)]
    fmt, tier = wanted(styles, length, 10)
    assert (fmt[2, 0] == fmt[3, 0]).tolist() == [True] * 5 + [False] * 4 + [True]
    assert not fmt[2:4, :, :5].any()
    assert (tier[3, :, :5] == Tier.DISK).all()


@pytest.mark.parametrize(
    "other", ["full", "minicache(t=0.4, shadow=false)", "minicache(shadow=false) | host(recent=64)"]
)
def test_a_fork_goes_its_own_way(other: str) -> None:
    world = make_world(make_cache(WIDE))
    world.apply("minicache(shadow=false)", Occasion.PROMPT)
    before, used = all_numbers(world), world.cache.device.used_bytes
    fork = dataclasses.replace(world, seq=world.cache.fork(world.seq))
    assert all(map(torch.equal, all_numbers(fork), before))
    fork.apply(other)
    fork.append(2)
    assert all(map(torch.equal, all_numbers(world), before))
    fork.cache.close(fork.seq)
    assert world.cache.device.used_bytes == used
    assert all(map(torch.equal, all_numbers(world), before))
    world.close()


# -- an engine ---------------------------------------------------------------------------------------------------------


def four(pipeline: str = "", tokens: int = 3, **settings: object) -> Drive:
    return decoding(pipeline, tokens, loaded=FOUR, **settings)


@pytest.fixture(scope="module")
def expected() -> list[int]:
    return run(tiny_engine(FOUR), {"job": IDS}, 48, pipeline="full")["job"].token_ids


@pytest.mark.parametrize("between", [*PIPELINES, "minicache(t=0.4)", "minicache | host(recent=64)"])
def test_switches_to_and_from_others_restore_the_logits_bit_for_bit(between: str) -> None:
    drive = four()
    before = logits_now(drive, "job")
    for epoch, pipeline in enumerate(("minicache", between, "minicache", "full"), start=1):
        drive.direct("job", pipeline, epoch=epoch)
        check_tables(drive)
        # host alone is exact
        assert torch.equal(logits_now(drive, "job"), before) == (pipeline in ("full", "host(recent=64)"))
    assert len(drive.finish()["job"].token_ids) == 48


def test_an_engine_serves_it_whatever_the_chunks_and_neighbours(expected: list[int]) -> None:
    alone = [run(tiny_engine(FOUR, step_tokens=n), {"job": IDS}, 48, pipeline="minicache")["job"] for n in (45, 1000)]
    assert alone[0].token_ids == alone[1].token_ids
    usage = alone[0].finished.cache
    assert usage.device_bytes < usage.full_cache_bytes
    drive = Drive(tiny_engine(FOUR))
    drive.submit("job", IDS, 48, pipeline="minicache")
    drive.submit("other", IDS, 48, pipeline="full")
    drive.submit("third", prompt(200), 48, pipeline="minicache(t=0.5) | host(recent=64)")
    outcomes = drive.finish()
    assert outcomes["job"].token_ids == alone[0].token_ids
    assert outcomes["other"].token_ids == expected


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("full", "minicache"),
        ("full", "minicache(shadow=false)"),
        ("minicache", "full"),
        ("kivi(bits=4)", "minicache | host(recent=64)"),
        ("minicache(shadow=false)", "minicache(t=0.4, shadow=false)"),
    ],
)
def test_prepared_in_slices_it_is_the_same_and_abandoned_it_leaves_no_byte(first: str, second: str) -> None:
    """Slices of 8 blocks: the halves of a pair are built in different ones."""
    drive = four(first, tokens=10)
    cache, seq = drive.engine.cache, drive.engine._live["job"].cache
    before, snap, logits = memory(drive), snapshot(drive), logits_now(drive, "job")
    stages, whole = 0, False
    while not whole:
        cache.begin(seq, build(second, drive.engine.shape))
        whole = None in [cache.prepare(seq, lambda tier, fmt: 8) for _ in range(stages)]
        cache.abandon(seq)
        assert memory(drive) == before
        assert snapshot(drive) == snap
        stages += 1
    assert stages > 2
    assert torch.equal(logits_now(drive, "job"), logits)

    drive = four(first, tokens=10, **SLICED)
    answer = drive.order("job", second)
    assert not answer.done()
    drive.until(answer.done)
    at_once = four(first, tokens=answer.result(timeout=0).applied.at_token)
    at_once.direct("job", second)
    at_once.engine.step()  # the step that committed the other also decoded
    assert snapshot(drive) == snapshot(at_once)
    check_tables(drive)
    assert drive.finish()["job"].token_ids == at_once.finish()["job"].token_ids


@pytest.mark.parametrize("shadow", ["", "(shadow=false)"])
def test_a_session_answers_its_next_turn_as_it_would_cold(expected: list[int], shadow: str) -> None:
    engine = tiny_engine(FOUR)
    first = run(engine, {"one": IDS[:200]}, 8, pipeline=f"minicache{shadow}", session_id="s")["one"]
    assert len(first.token_ids) == 8
    assert run(engine, {"two": IDS}, 48, pipeline="full", session_id="s")["two"].token_ids == expected
