"""Codecs that bring their own format: what they store, what is read of it, and what becomes of requests meanwhile."""

from __future__ import annotations

import dataclasses
import math
from functools import cache

import numpy as np
import pytest
import torch

from kernels.api import VOTE_DECAY
from kernels.layout import BLOCK_TOKENS, UNIT_BYTES, CacheShape, Format, Tier
from tests.tiny import Drive, prompt, reference, run, tiny_engine, tiny_loaded, tiny_model, tiny_profile
from tests.workers.plain_codecs import PLAIN, PlainBlock
from tests.workers.test_conformance import SHAPES, World, make_cache, make_world
from tests.workers.test_switch import check_tables, decoding, logits_now
from workers.cache.formats import CodedFormat, coded_format, format_of, formats
from workers.cache.sequence_cache import Occasion
from workers.engine.attention import DecodeAttention
from workers.engine.runner import LoadedModel
from workers.profile.measure import measure
from workers.profile.profile import names_of
from workers.stages.base import BlockBatch, Coded, CodedBlocks
from workers.stages.registry import build, coded_stages

CODECS = tuple(PLAIN)
WIDE = CacheShape(layers=1, kv_heads=2, query_heads=4, head_dim=64, dtype=torch.float32)
BOUNDS = {
    "think": 0.65,
    "zipcache": 0.4,
    "gear(bits=4, rank=2, outliers=0.02)": 0.12,
    "gear(bits=2, rank=4, outliers=0.0)": 0.5,
    "lowrank(rank=0.5)": 0.9,
    "kvquant": 1.0,
    "lowrank(rank=0.75)": 0.75,
    "turboquant(bits=4)": 0.11,
    "turboquant(bits=3)": 0.21,
}
"""Most of the norm of random numbers that is lost, of keys and values each."""


def tolerance(text: str) -> float:
    """Of numbers up to about 20. What some codecs store is computed before it becomes a float16, whose last bit, up to
    a 64th here, may fall either way."""
    return 2e-2 if text.startswith(("gear", "lowrank", "kvquant")) else 1e-4


every_codec = pytest.mark.parametrize("text", CODECS)
every_shape = pytest.mark.parametrize("shape", [*SHAPES.values(), WIDE], ids=[*SHAPES, "wide"])


def codec_of(text: str, shape: CacheShape) -> Coded:
    codec = build(text, shape, names_of(tiny_profile(shape))).codec
    assert isinstance(codec, Coded)
    return codec


def batch(shape: CacheShape, blocks: int = 5, seed: int = 0) -> BlockBatch:
    """Random blocks in the model's dtype; every few channels are much larger than the others, as keys' are."""
    generator = torch.Generator().manual_seed(seed)
    scale = 1 + 6 * (torch.arange(shape.head_dim) % 7 == 3)
    k, v = (torch.randn(blocks, BLOCK_TOKENS, shape.head_dim, generator=generator) * scale for _ in range(2))
    queries = torch.randn(shape.layers, shape.query_heads, BLOCK_TOKENS, shape.head_dim, generator=generator)
    position = torch.arange(blocks * BLOCK_TOKENS).view(blocks, -1)
    return BlockBatch(
        shape,
        torch.arange(blocks) % shape.layers,
        (torch.arange(blocks) % shape.kv_heads).sort().values,
        position,
        k.to(shape.dtype).float(),
        v.to(shape.dtype).float(),
        torch.rand(blocks, BLOCK_TOKENS, generator=generator),
        torch.rand(blocks, BLOCK_TOKENS, generator=generator),
        blocks * BLOCK_TOKENS + BLOCK_TOKENS,
        lambda layer, last: (queries[layer, :, -last:], torch.arange(BLOCK_TOKENS)[-last:]),
        profile=tiny_profile(shape),
    )


def plain(text: str, blocks: BlockBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of the batch by the reference, float64 [N, 32, D]."""
    out = []
    for n in range(len(blocks.k)):
        group = blocks.shape.queries_per_kv_head
        q = blocks.queries(int(blocks.layer[n]), 32)[0].view(blocks.shape.kv_heads, group, -1, blocks.shape.head_dim)
        numbers = (part.double().numpy() for part in (blocks.k[n], blocks.v[n], q[blocks.head[n]], blocks.votes[n]))
        profile, place = tiny_profile(blocks.shape), (blocks.layer[n], blocks.head[n])
        bases = (profile.tensor(name)[place].double().numpy() for name in ("key_basis", "value_basis"))
        frequency = profile.rope.module.inv_freq.double().numpy()
        levels = (
            {n: profile.tensor(f"{part}_levels_{n}")[place].double().numpy() for n in (4, 8, 16)}
            for part in ("key", "value")
        )
        known = PlainBlock(*numbers, blocks.position[n].numpy(), blocks.seen, *bases, frequency, *levels)
        out.append(PLAIN[text](known))
    k, v = zip(*out, strict=True)
    return torch.from_numpy(np.stack(k)), torch.from_numpy(np.stack(v))


# -- one codec ---------------------------------------------------------------------------------------------------------


def test_every_codec_with_its_own_format_has_a_reference() -> None:
    assert {text.split("(")[0] for text in PLAIN} == set(coded_stages())


@every_codec
@every_shape
def test_what_is_decoded_is_what_the_reference_says(text: str, shape: CacheShape) -> None:
    blocks = batch(shape, 3, seed=1)
    codec = codec_of(text, shape)
    codes = codec.encode(blocks)
    assert codes.dtype is torch.uint8
    assert codes.shape == (3, codec.nbytes(shape))
    for got, want, exact in zip(codec.decode(codes, blocks), plain(text, blocks), (blocks.k, blocks.v), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=tolerance(text))
        lost = float((got - exact).norm() / exact.norm())
        assert lost < (BOUNDS.get(text) or BOUNDS[codec.name]) * (1 if shape.head_dim > 16 else 1.3)


@every_codec
@every_shape
@pytest.mark.parametrize("in_memory", [True, False], ids=["in RAM", "elsewhere"])
def test_attention_over_codes_is_attention_over_what_the_reference_decodes(
    text: str, shape: CacheShape, in_memory: bool
) -> None:
    blocks, codec = batch(shape, 6, seed=1), codec_of(text, shape)
    blocks.layer[:] = 0
    heads, group = shape.kv_heads, shape.queries_per_kv_head
    head = torch.tensor([0, 0, 0, 0, heads - 1, heads - 1])  # tables of different lengths
    blocks.head[:] = head
    k, v = plain(text, blocks)
    size = -(-codec.nbytes(shape) // UNIT_BYTES) * UNIT_BYTES
    memory = torch.zeros(6, size, dtype=torch.uint8)
    memory[:, : codec.nbytes(shape)] = codec.encode(blocks)
    places = torch.arange(6) * size + memory.data_ptr() if in_memory else None
    coded = CodedBlocks(
        shape,
        blocks.layer,
        head,
        blocks.position,
        lambda: memory[:, : codec.nbytes(shape)],
        places,
        profile=blocks.profile,
    )
    q = torch.randn(heads, group, shape.head_dim, generator=torch.Generator().manual_seed(3)) * 2
    found = codec.attend(q, coded, 0.2)
    for h in range(heads):
        mine = torch.nonzero(head == h).flatten().tolist()
        for g in range(group):
            scores = torch.tensor([[0.2 * float(q[h, g].double() @ k[n, t]) for t in range(32)] for n in mine])
            powers = [[math.exp(float(score)) for score in row] for row in scores.double()]
            total = sum(map(sum, powers))
            wanted = sum(
                (powers[i][t] * v[n, t] for i, n in enumerate(mine) for t in range(32)),
                torch.zeros(shape.head_dim, dtype=torch.float64),
            )
            if not mine:
                assert found.lse[h, g] == -torch.inf
                assert not found.output[h, g].any()
                continue
            torch.testing.assert_close(found.output[h, g].double(), wanted / total, rtol=1e-4, atol=tolerance(text))
            assert float(found.lse[h, g]) == pytest.approx(math.log(total), abs=tolerance(text))
            torch.testing.assert_close(found.score[mine, g], scores.float(), rtol=1e-4, atol=tolerance(text))


@every_codec
def test_blocks_do_not_depend_on_those_built_with_them(text: str) -> None:
    blocks, codec = batch(WIDE, 4), codec_of(text, WIDE)
    parts = (
        {name: getattr(blocks, name)[n : n + 1] for name in ("layer", "head", "position", "k", "v", "mass", "votes")}
        for n in range(4)
    )
    rest = {"seen": blocks.seen, "queries": blocks.queries, "profile": blocks.profile}
    alone = [codec.encode(BlockBatch(WIDE, **part, **rest)) for part in parts]
    assert torch.equal(torch.cat(alone), codec.encode(blocks))


@every_codec
def test_zeros_stay_zeros(text: str) -> None:
    blocks, codec = batch(WIDE, 2), codec_of(text, WIDE)
    blocks.k[:], blocks.v[:] = 0, 0
    k, v = codec.decode(codec.encode(blocks), blocks)
    assert not v.any()
    assert not k.any() or codec.name == "kvquant"  # whose keys are the model's levels, of which none need be zero


def test_bits_that_are_stored_are_bits_that_are_saved() -> None:
    raw = WIDE.payload_bytes(Format.RAW)
    assert codec_of("think(channels=0.5)", WIDE).nbytes(WIDE) == raw * 3 // 4 + 32
    half = CacheShape(1, 2, 4, 64, torch.float16)
    assert codec_of("turboquant(bits=4)", half).nbytes(half) == 2 * 32 * (64 // 2 + 2)
    assert codec_of("turboquant(bits=3)", half).nbytes(half) == 2 * 32 * (64 * 3 // 8 + 2)


# -- numbers and names -------------------------------------------------------------------------------------------------


def test_equal_codecs_share_a_number() -> None:
    one, other = (codec_of(text, WIDE) for text in ("think(channels=0.7)", "think(channels=0.7, shadow=false)"))
    assert one.format is other.format is coded_format(one)
    assert one.format is not codec_of("think(channels=0.8)", WIDE).format
    assert one.format >= len(Format)
    assert format_of(int(one.format)) is one.format
    assert formats()[one.format].name.lower() == "think(channels=0.7)"


# -- a request's cache -------------------------------------------------------------------------------------------------


@every_codec
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("evictor", ["", "snapkv(keep=0.5, budgets=ada) | "], ids=["all", "unequal heads"])
def test_a_decode_step_reads_everything_and_counts_everything(text: str, shape: CacheShape, evictor: str) -> None:
    """Output, masses, votes and block masses of a step over raw and coded blocks on both tiers."""
    world = make_world(make_cache(shape))
    world.apply(f"{evictor}{text} | host(recent=96)", Occasion.PROMPT)
    cache, seq, tables = world.cache, world.seq, world.cache.tables
    generator = torch.Generator().manual_seed(5)

    def random(heads: int) -> torch.Tensor:
        return torch.randn(1, heads, 1, shape.head_dim, generator=generator).to(shape.dtype)

    cache.reserve(seq, 2)
    for _ in range(2):
        cache.advance(seq, 1)
        before = tables.mass[seq.slot].copy(), tables.votes[seq.slot].astype(np.float32)
        reading = cache.reading([seq])
        plan = cache.backend.plan(np.array([seq.slot], np.int32), changing=bool(reading))
        attention = DecodeAttention(cache, plan, reading)
        wanted = {}
        for layer in range(shape.layers):
            q, k, v = random(shape.query_heads), random(shape.kv_heads), random(shape.kv_heads)
            output = attention.attend(layer, q, k, v, 0.25)[0, 0]
            for head in range(shape.kv_heads):
                group = slice(head * shape.queries_per_kv_head, (head + 1) * shape.queries_per_kv_head)
                keys, values = (part.double() for part in exactly(world, layer, head))
                shares = (q[0, group, 0].double() @ keys.T * 0.25).softmax(-1)
                close = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 6e-2}[shape.dtype]
                torch.testing.assert_close(output[group].double(), shares @ values, rtol=1e-2, atol=close)
                wanted[layer, head] = shares.numpy()
        cache.backend.finish(plan)
        reading.finish(plan)
        cache.settle(seq)
        for (layer, head), shares in wanted.items():
            received, at = shares.sum(0), (seq.slot, layer, head)
            kept = len(received)
            np.testing.assert_allclose(tables.mass[at][:kept], before[0][layer, head, :kept] + received, atol=2e-4)
            votes = before[1][layer, head, :kept] * VOTE_DECAY + received
            np.testing.assert_allclose(tables.votes[at][:kept], votes, rtol=2e-3, atol=2e-4)
            of_blocks = np.pad(received, (0, -kept % 32)).reshape(-1, 32).sum(1) / len(shares)
            np.testing.assert_allclose(plan.block_mass[layer, 0, head, : len(of_blocks)], of_blocks, atol=2e-4)
    assert {world.blocks(0, 0)[0][1], world.blocks(0, 0)[-2][1]} == {Tier.HOST, Tier.DEVICE}
    world.close()


def exactly(world: World, layer: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a table in float32: raw ones as they are, coded ones as their codec decodes them."""
    parts = []
    kept = world.positions(layer, head)
    raw = world.read(layer, head)
    for index, (fmt, tier, address) in enumerate(world.blocks(layer, head)):
        rows = slice(index * BLOCK_TOKENS, (index + 1) * BLOCK_TOKENS)
        if not isinstance(fmt, CodedFormat):
            parts.append(tuple(part[rows].float() for part in raw))
            continue
        arena = world.cache.device if tier is Tier.DEVICE else world.cache.host
        start = address * UNIT_BYTES
        codes = arena.data[start : start + fmt.codec.nbytes(world.shape)]
        places = batch(world.shape, 1)
        places.layer[:], places.head[:], places.position[:] = layer, head, torch.tensor(kept[rows])
        parts.append(tuple(part[0] for part in fmt.codec.decode(codes[None].clone(), places)))
    k, v = zip(*parts, strict=True)
    return torch.cat(k), torch.cat(v)


@every_codec
def test_a_move_between_tiers_copies_bytes(text: str) -> None:
    world = make_world()
    world.apply(text, Occasion.PROMPT)
    before = [contents(world, layer, head) for layer, head in world.heads]
    world.append(3)  # other queries and masses: a block built anew might be another
    world.apply(f"{text} | host(recent=64)")
    assert [contents(world, layer, head) for layer, head in world.heads] == before
    world.apply(text)
    assert [contents(world, layer, head) for layer, head in world.heads] == before
    world.close()


def contents(world: World, layer: int, head: int) -> list[bytes]:
    """The bytes of a table's coded blocks."""
    found = []
    for fmt, tier, address in world.blocks(layer, head):
        if isinstance(fmt, CodedFormat):
            arena = world.cache.device if tier is Tier.DEVICE else world.cache.host
            start = address * UNIT_BYTES
            found.append(arena.data[start : start + fmt.codec.nbytes(world.shape)].numpy().tobytes())
    return found


@every_codec
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("other", ["kivi(bits=4, shadow=false)", "full", "int8(shadow=false) | host(recent=32)"])
def test_without_a_shadow_other_formats_are_built_from_what_is_decoded(text: str, backend: str, other: str) -> None:
    world = make_world(make_cache(backend=backend))
    world.apply(text.replace(")", ", shadow=false)"), Occasion.PROMPT)
    decoded = {where: exactly(world, *where) for where in world.heads}
    world.apply(other)
    for where, (k, v) in decoded.items():
        assert not any(isinstance(fmt, CodedFormat) for fmt, _, _ in world.blocks(*where))
        for got, want in zip(world.read(*where), (k, v), strict=True):
            lost = (got.float() - want).norm() / want.norm()
            assert lost < (0.12 if "kivi" in other else 0.01)
    assert world.seq.coded is None
    world.close()


# -- an engine ---------------------------------------------------------------------------------------------------------

IDS = prompt(301, 3)


@cache
def profiled() -> LoadedModel:
    """The tiny model with a profile."""
    loaded = tiny_loaded()
    return dataclasses.replace(loaded, profile=measure(loaded, [prompt(400, seed) for seed in range(2)], "0" * 64))


@cache
def expected() -> list[int]:
    return reference(tiny_model(attention="sdpa"), IDS, 48)


@pytest.mark.parametrize("between", ["kivi(bits=4)", "int8 | host(recent=64)", "snapkv(keep=0.5) | kivi(bits=2)"])
@every_codec
def test_fused_formats_there_and_back_restore_the_logits_bit_for_bit(text: str, between: str) -> None:
    drive = decoding(tokens=3, loaded=profiled())
    before = logits_now(drive, "job")
    for epoch, pipeline in enumerate((text, between, text, "full"), start=1):
        ack = drive.direct("job", pipeline, epoch=epoch)
        assert ack.applied.to_pipeline == pipeline
        check_tables(drive)
        assert torch.equal(logits_now(drive, "job"), before) == (pipeline == "full")
    assert len(drive.finish()["job"].token_ids) == 48


@every_codec
def test_an_engine_serves_it_whatever_the_chunks_and_neighbours(text: str) -> None:
    alone = [run(tiny_engine(profiled(), step_tokens=n), {"job": IDS}, 48, pipeline=text)["job"] for n in (45, 1000)]
    assert alone[0].token_ids == alone[1].token_ids
    usage = alone[0].finished.cache
    assert usage.device_bytes < usage.full_cache_bytes
    drive = Drive(tiny_engine(profiled()))
    drive.submit("job", IDS, 48, pipeline=text)
    drive.submit("other", IDS, 48, pipeline="full")
    drive.submit("third", prompt(200), 48, pipeline="kivi(bits=4)")
    outcomes = drive.finish()
    assert outcomes["job"].token_ids == alone[0].token_ids
    assert outcomes["other"].token_ids == expected()
