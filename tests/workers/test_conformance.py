"""What every stage must do, whoever wrote it: run over all that are registered.

Each passes every check alone; a few that stand for their kind pass them together, and each is applied, decoded with and
undone in their company, so that a further stage costs a fraction of a second. The stages of installed packages are
among them; to see one alone: ``pytest tests/workers/test_conformance.py -k NAME``.

Keys and values are random numbers written straight into a cache; no model is needed to see what becomes of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.api import TokenSource
from kernels.layout import BLOCK_TOKENS, GROUP, BlockFormat, CacheShape, Format, Tier
from kvpilot.pipeline import PipelineError
from tests.tiny import tiny_profile
from workers.cache.accounting import CacheUse
from workers.cache.arena import TierFullError
from workers.cache.blocks import Owners
from workers.cache.disk import DiskStore
from workers.cache.formats import CodedFormat, format_of
from workers.cache.kvcache import KVCache
from workers.cache.sequence_cache import Occasion, SequenceCache
from workers.engine.attention import DecodeAttention
from workers.profile.profile import names_of
from workers.stages.base import Codec, Evictor, Kind, LayerPlace, LossClass, Lossy, Pipeline, Placer, Stage
from workers.stages.budgets import PER_HEAD, RULES
from workers.stages.registry import build, stages
from workers.stages.selecting import Digest

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SHAPES = {
    "mha": CacheShape(layers=2, kv_heads=2, query_heads=2, head_dim=16, dtype=torch.float32),
    "gqa": CacheShape(layers=3, kv_heads=2, query_heads=6, head_dim=24, dtype=torch.bfloat16),
    "mqa": CacheShape(layers=2, kv_heads=1, query_heads=4, head_dim=32, dtype=torch.float16),
}
SHAPE = SHAPES["gqa"]
TOKENS = 301  # a partly filled last block, and more than any default budget but window's
MOST = 2 * BLOCK_TOKENS  # the largest default of a count that is left as it is
LEVELS = {Format.INT8: 255, Format.INT4: 15, Format.INT2: 3}


def small(stage: type[Stage], **more: object) -> Stage:
    """A stage with parameters that bite at ``TOKENS``: whole numbers at most 64, where they may be, and little of the
    attention, which random keys spread widely."""
    numbers = {
        field.name: MOST
        for field in dataclasses.fields(stage)
        if type(field.default) is int and field.default > MOST and field.metadata["bounds"].accept(MOST)
    }
    shares = {"recovered": 0.4} if "recovered" in {field.name for field in dataclasses.fields(stage)} else {}
    return stage(**(numbers | shares | more))


REPRESENTATIVES = {Kind.EVICT: ("window", "snapkv"), Kind.COMPRESS: ("kivi",), Kind.OFFLOAD: ("host",)}
"""Those that stand for their kind where stages meet; of evictors one that goes on while decoding, one that does not."""


def given(stage: type[Stage], more: dict[str, object]) -> Stage:
    names = {field.name for field in dataclasses.fields(stage)}
    return small(stage, **{name: value for name, value in more.items() if name in names})


def alone(**more: object) -> list[str]:
    """A pipeline of each stage; ``more`` goes to stages that take it."""
    return [Pipeline((given(stage, more),)).text for stage in stages().values() if stage.kind is not Kind.FULL]


def together(**more: object) -> list[str]:
    """The representatives in twos and threes: how kinds go together, which a stage of one kind does not change."""
    kinds = [(None, *(given(stages()[name], more) for name in names)) for names in REPRESENTATIVES.values()]
    found = (tuple(filter(None, each)) for each in itertools.product(*kinds))
    return [Pipeline(each).text for each in found if len(each) > 1]


def in_company() -> list[str]:
    """Each stage with a representative of every other kind, the last that it goes with."""
    found = []
    for stage in (small(stage) for stage in stages().values() if stage.kind is not Kind.FULL):
        by_kind = {stage.kind: stage}
        for kind, names in REPRESENTATIVES.items():
            others = (small(stages()[name]) for name in names)
            fit = [other for other in others if not (stage.refuses_beside(other) or other.refuses_beside(stage))]
            by_kind = {kind: fit[-1]} | by_kind
        found.append(Pipeline(tuple(by_kind[kind] for kind in Kind if kind in by_kind)).text)
    return found


ALONE = alone()
PIPELINES = ALONE + together()
COMPANIES = in_company()
PERMANENT = [text for text in alone(shadow=False) + together(shadow=False) if "shadow=false" in text]
RULED = [small(stage, budgets=rule) for stage in stages().values() if hasattr(stage, "budgets") for rule in RULES]
every_stage = pytest.mark.parametrize("stage", stages().values(), ids=stages())
every_pipeline = pytest.mark.parametrize("text", PIPELINES)
every_pipeline_and_company = pytest.mark.parametrize("text", list(dict.fromkeys(PIPELINES + COMPANIES)))
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@dataclass
class World:
    """A cache, one request in it, and the numbers that were written."""

    cache: KVCache
    seq: SequenceCache
    k: torch.Tensor  # [layers, kv_heads, seen, D] by position
    v: torch.Tensor

    @property
    def shape(self) -> CacheShape:
        return self.cache.shape

    @property
    def heads(self) -> list[tuple[int, int]]:
        return list(itertools.product(range(self.shape.layers), range(self.shape.kv_heads)))

    def place(self, layer: int) -> LayerPlace:
        return LayerPlace(layer, self.shape, self.seq.seen, self.cache.profile.layer(layer))

    def pipeline(self, text: str) -> Pipeline:
        try:
            return build(text, self.shape, names_of(self.cache.profile))
        except PipelineError as error:
            if "cannot serve this model" in str(error):
                pytest.skip(str(error))
            raise

    def apply(self, text: str, occasion: Occasion = Occasion.SWITCH) -> None:
        self.cache.apply(self.seq, self.pipeline(text), occasion)

    def append(self, count: int, seed: int = 0) -> None:
        """So many decode steps with random queries, keys and values."""
        shape, generator = self.shape, torch.Generator().manual_seed(seed)
        for _ in range(count):
            self.cache.reserve(self.seq, 1)
            self.cache.advance(self.seq, 1)
            reading = self.cache.reading([self.seq])
            plan = self.cache.backend.plan(np.array([self.seq.slot], np.int32), changing=bool(reading))
            attention = DecodeAttention(self.cache, plan, reading)
            k = torch.randn(shape.layers, shape.kv_heads, shape.head_dim, generator=generator).to(shape.dtype)
            v = torch.randn(shape.layers, shape.kv_heads, shape.head_dim, generator=generator).to(shape.dtype)
            q = torch.randn(shape.layers, shape.query_heads, shape.head_dim, generator=generator).to(shape.dtype)
            for layer in range(shape.layers):
                numbers = (part[layer, None, :, None] for part in (q, k, v))
                attention.attend(layer, *numbers, shape.head_dim**-0.5)
            reading.finish(plan)
            self.cache.recent.note(self.seq.slot, self.seq.seen - 1, q[:, :, None])
            self.k, self.v = torch.cat([self.k, k[:, :, None]], 2), torch.cat([self.v, v[:, :, None]], 2)

    def positions(self, layer: int, head: int) -> list[int]:
        tables, where = self.cache.tables, (self.seq.slot, layer, head)
        return tables.position[where][: tables.length[where]].tolist()

    def blocks(self, layer: int, head: int) -> list[tuple[BlockFormat, Tier, int]]:
        """Format, tier and address of each block of a table."""
        tables, where = self.cache.tables, (self.seq.slot, layer, head)
        count = math.ceil(int(tables.length[where]) / BLOCK_TOKENS)
        return [
            (format_of(tables.format[where][block]), Tier(tables.tier[where][block]), int(tables.address[where][block]))
            for block in range(count)
        ]

    def read(self, layer: int, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [kept, D] of a table."""
        blocks = self.blocks(layer, head)
        spread = np.ones((len(blocks), BLOCK_TOKENS), np.int64)
        formats, tiers, addresses = (np.array(column).reshape(-1, 1) * spread for column in zip(*blocks, strict=True))
        rows = np.broadcast_to(np.arange(BLOCK_TOKENS, dtype=np.uint8), spread.shape).copy()
        source = TokenSource(addresses.astype(np.int32), formats.astype(np.uint8), tiers.astype(np.uint8), rows)
        kept = len(self.positions(layer, head))
        position = np.resize(np.array(self.positions(layer, head), np.int32), spread.shape)  # anything beyond the end
        owners = Owners(np.full(len(blocks), layer), np.full(len(blocks), head), position)
        k, v = (
            part.reshape(-1, self.shape.head_dim)[:kept] for part in self.cache.sources(self.seq).read(source, owners)
        )
        return k, v

    def snapshot(self, addresses: bool = True) -> list:
        """All of the request's tables as plain values, and what the blocks hold."""
        tables, slot, found = self.cache.tables, self.seq.slot, []
        for layer, head in self.heads:
            kept = int(tables.length[slot, layer, head])
            blocks = [block if addresses else block[:2] for block in self.blocks(layer, head)]
            masses = [masses[slot, layer, head, :kept].tobytes() for masses in (tables.mass, tables.votes)]
            contents = [part.contiguous().view(torch.uint8).numpy().tobytes() for part in self.read(layer, head)]
            found.append((self.positions(layer, head), blocks, masses, contents))
        return found

    def close(self) -> None:
        """Ends the request; nothing of it is left."""
        self.cache.close(self.seq)
        self.cache.prefixes.drop(1 << 40)
        assert self.cache.device.used_bytes == 0
        assert self.cache.host.used_bytes == 0
        assert self.cache.disk is not None
        assert self.cache.disk.used_bytes == 0


FOLDER = tempfile.TemporaryDirectory()
STORES: list[DiskStore] = []
"""Opened in a test and closed after it."""


def make_cache(shape: CacheShape = SHAPE, backend: str = "cpu", host_bytes: int = 4 << 20) -> KVCache:
    STORES.append(DiskStore(Path(FOLDER.name), 4 << 20))
    sizes, profile = (4 << 20, host_bytes, 2, 512), tiny_profile(shape)
    return KVCache(shape, *sizes, "m", torch.device("cpu"), backend, profile, STORES[-1])


@pytest.fixture(autouse=True)
def _no_files_stay() -> Iterator[None]:
    yield
    while STORES:
        STORES.pop().close()


def make_world(cache: KVCache | None = None, tokens: int = TOKENS, seed: int = 0, chunk: int = 0) -> World:
    """A request whose prompt is computed; with ``chunk``, in pieces that go to the host as they are finished."""
    cache = cache or make_cache()
    shape, generator = cache.shape, torch.Generator().manual_seed(seed)
    size = (shape.layers, shape.kv_heads, tokens, shape.head_dim)
    # A few channels are much larger than the others, as keys' are.
    scale = torch.rand(shape.head_dim, generator=generator) * 8
    k, v = ((torch.randn(size, generator=generator) * scale).to(shape.dtype) for _ in range(2))
    seq = cache.open(512)
    for start in range(0, tokens, chunk or tokens):
        end = min(tokens, start + (chunk or tokens))
        cache.reserve(seq, end - start)
        cache.advance(seq, end - start)
        for layer in range(shape.layers):
            cache.backend.write(seq.slot, layer, start, k[layer, :, start:end], v[layer, :, start:end])
        if chunk:
            cache.evacuate(seq)
    queries = torch.randn(shape.layers, shape.query_heads, tokens, shape.head_dim, generator=generator)
    cache.recent.note(seq.slot, 0, queries.to(shape.dtype))
    seq.reconstruction = torch.rand(size[:3], generator=generator).numpy()  # as if a model had repeated the prompt
    for name in ("mass", "votes"):
        masses = torch.rand(size[:3], generator=generator).numpy()
        getattr(cache.tables, name)[seq.slot, :, :, :tokens] = masses
    return World(cache, seq, k, v)


# -- what a stage declares -------------------------------------------------------------------------------------------


@every_stage
def test_it_is_a_frozen_dataclass_of_parameters_only(stage: type[Stage]) -> None:
    assert dataclasses.is_dataclass(stage)
    assert stage.__dataclass_params__.frozen
    instance = stage()
    assert set(vars(instance)) == {field.name for field in dataclasses.fields(stage)}
    assert all(type(value) in (int, float, bool, str) for value in vars(instance).values())
    assert instance == stage()
    assert hash(instance) == hash(stage())
    for field in dataclasses.fields(stage):
        assert field.metadata["bounds"].accept(field.default)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(instance, field.name, field.default)


@every_stage
def test_it_says_what_it_is(stage: type[Stage]) -> None:
    kinds = {Kind.EVICT: Evictor, Kind.COMPRESS: Codec, Kind.OFFLOAD: Placer}
    assert isinstance(stage(), kinds.get(stage.kind, Stage))
    assert stage.name.isidentifier()
    assert stage.__doc__
    assert stage.summary.endswith(".")
    assert isinstance(stage().loss_class, LossClass)
    assert None in [stage().refuses(shape) for shape in SHAPES.values()]


@every_stage
def test_a_lossy_stage_can_keep_a_shadow(stage: type[Stage]) -> None:
    """A stage that only has queries read less, or otherwise, loses nothing that a copy could bring back."""
    if stage().loss_class is LossClass.EXACT or not isinstance(stage(), Lossy):
        assert stage().loss_class is not LossClass.PERMANENT
        assert "shadow" not in {field.name for field in dataclasses.fields(stage)}
        assert not Pipeline((stage(),)).wants_shadow
    else:
        assert stage(shadow=True).loss_class is LossClass.RECOVERABLE
        assert stage(shadow=False).loss_class is LossClass.PERMANENT


@pytest.mark.parametrize("name", [name for name, stage in stages().items() if stage.kind is Kind.EVICT])
@pytest.mark.parametrize("seen", [32, 33, 63, 64, 301, 5000])
def test_an_evictor_protects_a_block_and_asks_for_no_more_than_its_budget(name: str, seen: int) -> None:
    stage = small(stages()[name])
    sinks, recent = stage.protected(seen)
    assert recent >= BLOCK_TOKENS
    assert sinks >= 0
    assert sinks + recent <= max(stage.budget(seen), 2 * BLOCK_TOKENS)


# -- what becomes of the tokens --------------------------------------------------------------------------------------


@every_shape
@every_pipeline
def test_budget_order_recent_tokens_and_contents(text: str, shape: CacheShape) -> None:
    world = make_world(make_cache(shape))
    world.apply(text, Occasion.PROMPT)
    check(world, text)
    world.close()


@every_pipeline
def test_the_same_while_decoding(text: str) -> None:
    world = make_world()
    evictor = world.pipeline(text).evictor
    world.apply(text, Occasion.PROMPT)
    most = evictor.budget(TOKENS) if evictor else TOKENS
    for step in range(1, 70):
        world.append(1, seed=step)
        if world.seq.seen % BLOCK_TOKENS == 0:
            world.apply(text, Occasion.SETTLE)
            check(world, text, 0 if not evictor or evictor.evicts_while_decoding else step)
        kept = {len(world.positions(layer, head)) for layer, head in world.heads}
        decoding = evictor is not None and evictor.evicts_while_decoding
        assert max(kept) <= (evictor.budget(world.seq.seen) + BLOCK_TOKENS - 1 if decoding else most + step)
    check(world, text, 69, settled=False)
    world.close()


def check(world: World, text: str, grown: int = 0, settled: bool = True) -> None:
    """Every table of a request under a pipeline, token by token."""
    pipeline, seen = world.pipeline(text), world.seq.seen
    evictor, codec, placer = pipeline.evictor, pipeline.codec, pipeline.placer
    for layer, head in world.heads:
        kept, blocks = world.positions(layer, head), world.blocks(layer, head)
        assert kept == sorted(set(kept))
        assert kept[-BLOCK_TOKENS:] == list(range(seen - BLOCK_TOKENS, seen))
        if evictor is None:
            assert kept == list(range(seen))
        else:
            sinks, _ = evictor.protected(seen)
            assert kept[:sinks] == list(range(sinks))
            if settled:
                budget = budget_of(evictor, world, layer, head)
                assert len(kept) <= (evictor.budget(seen) if budget is None else budget) + grown
                assert grown or budget is None or len(kept) == min(seen, max(budget, sum(evictor.protected(seen))))
        k, v = world.read(layer, head)
        for block, (fmt, tier, _) in enumerate(blocks):
            rows = slice(block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS)
            behind = len(kept) - rows.stop  # tokens younger than the whole block
            if behind < BLOCK_TOKENS:
                assert (fmt, tier) == (Format.RAW, Tier.DEVICE) or (behind >= 0 and placer and fmt is Format.RAW)
            elif settled:
                ages = codec.ages(world.place(layer)) if codec else ()
                aged = [own for tokens, own in ages if behind >= tokens]
                assert fmt is (aged or [Format.RAW])[-1]
                stays = placer.device_tokens() if placer else None
                assert tier is (Tier.DEVICE if placer is None or stays is None or behind < stays else placer.tier)
            at = torch.tensor(kept[rows])
            if (merging := world.seq.merging) is not None and not world.pipeline(text).is_full:
                # of what took others up only the rest can be compared, and where it was not rounded with them
                merged = torch.tensor([t < merging.merged.shape[2] and merging.merged[layer, head, t] for t in at])
                if fmt is not Format.RAW and merged.any():
                    continue
                same = ~merged
                assert torch.equal(k[rows][same], world.k[layer, head, at[same]])
                assert torch.equal(v[rows][same], world.v[layer, head, at[same]])
                continue
            check_contents(k[rows], world.k[layer, head, at], fmt, by_channel=True)
            check_contents(v[rows], world.v[layer, head, at], fmt, by_channel=False)
    check_bytes(world)


def budget_of(evictor: Evictor, world: World, layer: int, head: int) -> int | None:
    """What a head is to keep; None where only the text tells."""
    if evictor.rule != PER_HEAD:
        return evictor.budget(world.seq.seen)
    budget = evictor.head_budget(world.seq.seen, world.cache.profile.layer(layer))
    return None if budget is None else int(budget[head])


def check_contents(got: torch.Tensor, want: torch.Tensor, fmt: BlockFormat, by_channel: bool) -> None:
    """Raw: bit for bit. Integers: at most one step of the group away. fp8: at most half a step of its 3 mantissa bits,
    or of its smallest numbers. (And what the dtype rounds.) Codecs' own: closer to what was stored than nothing is;
    their tests say how close."""
    if isinstance(fmt, CodedFormat):
        assert float((got.double() - want.double()).norm()) < float(want.double().norm())
        return
    if fmt is Format.RAW:
        assert torch.equal(got, want)
        return
    got, want = got.double(), want.double()
    groups = [want.T] if by_channel else want.split(GROUP, dim=1)  # each row of each is quantised as one
    steps = torch.cat([step(part, fmt) for part in groups], 1)
    rounding = want.abs().max() * 2**-7
    assert bool(((got - want).abs() <= (steps.T if by_channel else steps) + rounding).all())


def step(group: torch.Tensor, fmt: Format) -> torch.Tensor:
    """How far numbers of a group, the last axis, may be from what is stored for them."""
    if fmt is Format.FP8:
        smallest = group.abs().amax(1, keepdim=True) / 448 * 2**-10
        return torch.maximum(group.abs() * 2**-4, smallest)
    return ((group.amax(1) - group.amin(1)) / LEVELS[fmt])[:, None].expand_as(group)


def check_bytes(world: World) -> None:
    """The reported bytes, counted again from the tables block by block."""
    shape, cache, seq = world.shape, world.cache, world.seq
    use, count = cache.use(seq), dict.fromkeys(Tier, 0)
    wide, tables, referred = 0, 0, 0
    shadow = set(seq.shadow.address[: seq.shadow.rows].ravel().tolist()) if seq.shadow else set()
    for layer, head in world.heads:
        for fmt, tier, address in world.blocks(layer, head):
            count[tier] += shape.block_bytes(fmt)
            wide += shape.block_bytes_16bit(fmt) if tier is Tier.DEVICE else 0
            referred += tier is Tier.HOST and address in shadow
            tables += 4 + 1 + 1 + 32 * (4 + 4 + 2)
    extra, extra_16bit = read_bytes(world)
    rows = math.ceil(seq.seen / BLOCK_TOKENS) * len(world.heads)
    raw = shape.block_bytes(Format.RAW)
    assert use.device_bytes == count[Tier.DEVICE] + tables + extra
    assert use.host_bytes == count[Tier.HOST] + staged(world)
    assert use.disk_bytes == count[Tier.DISK]
    assert use.shadow_bytes == (len(shadow) - referred) * raw
    assert use.full_bytes == rows * (raw + 4 + 1 + 1 + 32 * 10)
    assert use.device_bytes_16bit == wide + tables + extra_16bit
    assert use.peak_device_bytes >= use.device_bytes
    assert use.peak_device_bytes_16bit >= use.device_bytes_16bit
    assert cache.device.used_bytes >= count[Tier.DEVICE]
    assert cache.host.used_bytes >= use.host_bytes + use.shadow_bytes


def staged(world: World) -> int:
    """Bytes on the host for what passes through it from disk: twice the layer with most."""
    layers: dict[int, Counter[Format]] = {}
    for layer, head in world.heads:
        on_disk = [fmt for fmt, tier, _ in world.blocks(layer, head) if tier is Tier.DISK]
        layers.setdefault(layer, Counter()).update(on_disk)
    most = {fmt: max(count[fmt] for count in layers.values()) for fmt in Format}
    return 2 * sum(count * world.shape.block_bytes(fmt) for fmt, count in most.items())


def read_bytes(world: World) -> tuple[int, int]:
    """Device bytes of what reads a request's blocks, counted again, and as if raw numbers had 16 bits."""
    shape, reader = world.shape, world.seq.selective
    if reader is None:
        return 0, 0
    heads, places = len(world.heads), reader.pool.places
    lengths = world.cache.tables.length[world.seq.slot]
    blocks = max(0, int(lengths.max()) - reader.stage.always()) // BLOCK_TOKENS
    room = math.ceil(blocks / 16) * 16 * heads
    wide = sum(shape.head_dim for kind in reader.stage.digests if kind is not Digest.RADIUS)
    narrow = 4 * (Digest.RADIUS in reader.stage.digests)
    pooled, pooled_16bit = (of(reader.pool.format) for of in (shape.block_bytes, shape.block_bytes_16bit))
    return (
        room * (wide * shape.dtype.itemsize + narrow) + heads * places * pooled,
        room * (wide * 2 + narrow) + heads * places * pooled_16bit,
    )


@every_pipeline_and_company
def test_applying_twice_is_applying_once(text: str) -> None:
    world = make_world()
    world.apply(text, Occasion.PROMPT)
    once = world.snapshot()
    world.apply(text, Occasion.SETTLE)
    assert world.snapshot() == once
    world.apply(text)  # a switch may build blocks anew from the shadow, but they are the same
    assert [entry[:1] + entry[2:] for entry in world.snapshot(addresses=False)] == [e[:1] + e[2:] for e in once]
    arenas = world.cache.device, world.cache.host  # files: every batch goes as a whole
    used = [arena.used_bytes for arena in arenas]
    codec, evictor = world.pipeline(text).codec, world.pipeline(text).evictor
    # blocks nearly as large as raw ones fill pages less evenly; tables of different lengths leave holes until the same
    # number again of their few pages is taken, and then no more
    coded = codec is not None and isinstance(codec.format, CodedFormat)
    spare_pages = 6 if evictor and evictor.rule == PER_HEAD else 3 if coded else 1
    for _ in range(16):
        world.apply(text)
        for arena, before in zip(arenas, used, strict=True):  # new blocks are built beside the old: other pages' ends
            assert abs(arena.used_bytes - before) <= spare_pages * arena.page_bytes
    check(world, text)


# -- there and back --------------------------------------------------------------------------------------------------


@every_shape
@every_pipeline
def test_a_switch_there_and_back_restores_every_bit(text: str, shape: CacheShape) -> None:
    world = make_world(make_cache(shape))
    before = world.snapshot(addresses=False)
    world.apply(text)
    world.apply("full")
    assert world.snapshot(addresses=False) == before
    assert world.seq.shadow is None
    assert not world.seq.evicted
    assert not world.seq.lost
    assert world.cache.host.used_bytes == 0
    check(world, "full")


@every_pipeline_and_company
def test_so_does_one_after_decoding_on_the_way(text: str) -> None:
    world = make_world()
    world.apply(text)
    for step in range(1, 40):
        world.append(1, seed=step)
        if world.seq.seen % BLOCK_TOKENS == 0:
            world.apply(text, Occasion.SETTLE)
    world.apply("full")
    check(world, "full")
    world.close()


@pytest.mark.parametrize("seed", range(6))
def test_a_walk_through_many_pipelines_loses_nothing(seed: int) -> None:
    rng, world = np.random.default_rng(seed), make_world(tokens=100 + 41 * seed)
    for step in range(12):
        text = str(rng.choice([*ALONE, *COMPANIES, "full"]))
        world.apply(text)
        check_order(world)
        check_bytes(world)
        for _ in range(int(rng.integers(0, 20))):
            world.append(1, seed=step)
            if world.seq.seen % BLOCK_TOKENS == 0:
                world.apply(text, Occasion.SETTLE)
    world.apply("full")
    check(world, "full")
    world.close()


@pytest.mark.parametrize("stage", RULED, ids=lambda stage: str(stage.spec()))
def test_shares_of_layers_and_heads_there_and_back(stage: Evictor) -> None:
    """Whatever rule shares out what is kept, it adds up, in tables of different lengths that decoding extends."""
    world, text = make_world(), Pipeline((stage,)).text
    before = world.snapshot(addresses=False)
    world.apply(text, Occasion.PROMPT)
    kept = [len(world.positions(layer, head)) for layer, head in world.heads]
    assert abs(sum(kept) - len(kept) * stage.budget(TOKENS)) <= len(kept) / 2  # layers are rounded
    once = world.snapshot()
    world.apply(text, Occasion.SETTLE)
    assert world.snapshot() == once
    check_order(world)
    check_bytes(world)
    world.apply("full")
    assert world.snapshot(addresses=False) == before
    for occasion in (Occasion.SWITCH, *[Occasion.SETTLE] * 2):
        world.append(BLOCK_TOKENS)
        world.apply(text, occasion)
        check_order(world)
        check_bytes(world)
    world.apply("full")
    check(world, "full")
    world.close()


def check_order(world: World) -> None:
    seen = world.seq.seen
    for layer, head in world.heads:
        kept = world.positions(layer, head)
        assert kept == sorted(set(kept))
        assert kept[-BLOCK_TOKENS:] == list(range(seen - BLOCK_TOKENS, seen))


@pytest.mark.parametrize("text", PERMANENT)
@pytest.mark.parametrize("chunk", [0, 64], ids=["from the device", "from the host"])
def test_without_a_shadow_there_is_none(text: str, chunk: int) -> None:
    """Nor does one stay behind that the prompt's way over the host tier has made."""
    world = make_world(chunk=chunk)
    world.apply(text, Occasion.PROMPT)
    assert world.seq.shadow is None
    assert world.seq.lost
    assert world.cache.loss_class(world.seq, world.pipeline("full")) is LossClass.PERMANENT
    use = world.cache.use(world.seq)
    assert use.shadow_bytes == 0
    assert world.pipeline(text).placer or world.cache.host.used_bytes == 0
    check(world, text)
    kept = [world.positions(layer, head) for layer, head in world.heads]
    world.apply("full")
    assert [world.positions(layer, head) for layer, head in world.heads] == kept  # gone is gone
    world.close()


@pytest.mark.parametrize("text", PERMANENT)
def test_a_shadow_is_dropped_when_a_pipeline_does_without(text: str) -> None:
    world = make_world()
    world.apply("h2o | kivi | host(recent=32)")
    assert world.seq.shadow
    world.apply(text)
    assert world.seq.shadow is None
    assert world.cache.use(world.seq).shadow_bytes == 0
    check_order(world)
    check_bytes(world)
    world.close()


def test_blocks_that_refer_to_a_shadow_outlive_it() -> None:
    """The prompt's way over the host has made a shadow, and the first block stays there as it is."""
    text = "window(sinks=32, recent=64, shadow=false) | host(recent=32)"
    world = make_world(chunk=64)
    assert world.seq.shadow
    world.apply(text, Occasion.PROMPT)
    assert world.seq.shadow is None
    assert world.cache.use(world.seq).shadow_bytes == 0
    assert world.cache.use(world.seq).host_bytes > 0
    check(world, text)
    world.append(1)
    world.apply("full")
    assert world.positions(0, 0) == [*range(32), *range(TOKENS - 64, TOKENS + 1)]
    check_bytes(world)
    world.close()


# -- on the side -----------------------------------------------------------------------------------------------------


@every_pipeline
def test_the_way_over_the_host_tier_changes_nothing(text: str) -> None:
    """Prompts that are computed in chunks go to the host chunk by chunk."""
    at_once, in_chunks = make_world(), make_world(chunk=45)
    for world in (at_once, in_chunks):
        world.apply(text, Occasion.PROMPT)
    assert at_once.snapshot(addresses=False) == in_chunks.snapshot(addresses=False)
    check(in_chunks, text)
    in_chunks.close()


@every_pipeline
def test_neighbours_are_left_alone(text: str) -> None:
    cache = make_cache()
    mine, other = make_world(cache, seed=1), make_world(cache, seed=2)
    before = other.snapshot()
    mine.apply(text)
    assert other.snapshot() == before
    mine.apply("full")
    mine.cache.close(mine.seq)
    assert other.snapshot() == before
    other.close()


@every_pipeline
def test_without_room_nothing_changes(text: str) -> None:
    world = make_world(make_cache(host_bytes=40 << 10), tokens=480)  # too little for a shadow or for the older blocks
    pipeline = world.pipeline(text)
    stays = pipeline.placer.device_tokens() if pipeline.placer else None
    if not pipeline.wants_shadow and (stays is None or stays > 352):
        pytest.skip("of 480 tokens, it leaves all but two rows of blocks or so on the device")
    before, device = world.snapshot(), world.cache.device.used_bytes
    with pytest.raises(TierFullError) as full:
        world.apply(text)
    assert full.value.tier is Tier.HOST
    assert world.snapshot() == before
    assert (world.cache.device.used_bytes, world.cache.host.used_bytes) == (device, 0)
    assert world.seq.shadow is None
    check(world, "full")
    world.close()


def test_a_shadow_made_for_a_switch_that_fails_does_not_stay() -> None:
    rows = TOKENS // BLOCK_TOKENS * SHAPE.layers * SHAPE.kv_heads
    world = make_world(make_cache(host_bytes=rows * SHAPE.block_bytes(Format.RAW)))  # the shadow fits, no more
    before = world.snapshot()
    with pytest.raises(TierFullError):
        world.apply("kivi(bits=4) | host(recent=32)")
    assert world.snapshot() == before
    assert world.seq.shadow is None
    assert world.cache.host.used_bytes == 0
    world.apply("kivi(bits=4)")
    assert world.cache.host.free_bytes == 0


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 64])
@every_pipeline
def test_short_requests_are_served_too(text: str, tokens: int) -> None:
    world = make_world(tokens=tokens)
    before = world.snapshot(addresses=False)
    world.apply(text, Occasion.PROMPT)
    world.apply(text)
    world.apply("full")
    assert world.snapshot(addresses=False) == before
    world.close()


@pytest.mark.parametrize("text", [*stages(), PIPELINES[-1]])
def test_backends_agree_to_the_last_bit_of_every_table(text: str) -> None:
    worlds = [make_world(make_cache(backend=name)) for name in ("cpu", "reference")]
    for world in worlds:
        world.apply(text, Occasion.PROMPT)
        check(world, text)
    assert worlds[0].snapshot() == worlds[1].snapshot()


def test_an_unused_cache_counts_nothing() -> None:
    cache = make_cache()
    assert cache.use(cache.open(100)) == CacheUse()
