"""ShadowKV, worked out a second time in float64 by loops and numpy's SVD; and what it moves, keeps and lives beside."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from kernels.layout import BLOCK_TOKENS, Format, Tier
from kvpilot.pipeline import PipelineError
from tests.tiny import Drive, prompt, run, tiny_engine, tiny_loaded, tiny_profile
from tests.workers.test_selecting import SHAPE, TEXT, Steps, numbers, step_numbers
from workers.cache.recalls import Asked
from workers.cache.sequence_cache import Occasion
from workers.engine.scoring import divergences
from workers.expected import expected_use
from workers.profile.measure import measure
from workers.profile.profile import names_of
from workers.stages.registry import build

pytestmark = pytest.mark.usefixtures("one_torch_thread")

CHUNK, RECENT, DIM = 8, 64, SHAPE.head_dim
GROUP, WIDTH = SHAPE.queries_per_kv_head, SHAPE.kv_heads * SHAPE.head_dim
HEADS = [(layer, head) for layer in range(SHAPE.layers) for head in range(SHAPE.kv_heads)]
SOME = "shadowkv(recent=64, share=0.3, rank=0.5, outliers=0.1)"
EVERYTHING = "shadowkv(recent=64, share=1, rank=1, outliers=0)"


def turned(key: np.ndarray, position: int, sign: int = 1) -> np.ndarray:
    """A key [D] turned by its position, or back."""
    out = np.zeros(DIM)
    for pair in range(DIM // 2):
        angle = sign * position / 10000 ** (2 * pair / DIM)
        a, b = key[pair], key[pair + DIM // 2]
        out[pair] = a * math.cos(angle) - b * math.sin(angle)
        out[pair + DIM // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


@dataclass
class Reference:
    """One layer: what is known of its first tokens, chunk by chunk. Keys and values [H, tokens, D] as they came."""

    k: np.ndarray
    v: np.ndarray
    rank: int
    outlier_share: float
    directions: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))  # [rank, H * D]
    outliers: list[list[int]] = field(default_factory=list)
    keys: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0)))  # [H, tokens, D] reconstructed
    based_on: int = 0

    def grow(self, blocks: int) -> None:
        """So many blocks are older now."""
        tokens, heads = blocks * BLOCK_TOKENS, len(self.k)
        if blocks == 0:
            return
        before = np.array(
            [np.concatenate([turned(self.k[head, at], at, -1) for head in range(heads)]) for at in range(tokens)]
        )  # [tokens, H * D]
        first = self.keys.shape[1] // CHUNK
        if blocks >= 2 * self.based_on:
            self.based_on, first = blocks, 0
            self.directions = np.linalg.svd(before)[2][: self.rank]
            self.outliers = [[] for _ in range(heads)]
        rough = before @ self.directions.T @ self.directions
        parts = rough.reshape(tokens, heads, DIM)
        self.keys = np.array([[turned(parts[at, head], at) for at in range(tokens)] for head in range(heads)])
        for head in range(heads):
            worst = []
            for chunk in range(first, tokens // CHUNK):
                keys, mean = self.chunk(self.k, head, chunk), self.landmark(head, chunk)
                cosines = [key @ mean / np.linalg.norm(key) / np.linalg.norm(mean) for key in keys]
                worst.append((min(cosines), chunk))
            more = math.ceil(self.outlier_share * tokens / CHUNK) - len(self.outliers[head])
            self.outliers[head] += [chunk for _, chunk in sorted(worst)[:more]]

    def chunk(self, of: np.ndarray, head: int, chunk: int) -> np.ndarray:
        return of[head, chunk * CHUNK : (chunk + 1) * CHUNK]

    def landmark(self, head: int, chunk: int) -> np.ndarray:
        return self.chunk(self.k, head, chunk).mean(0)

    def choose(self, q: np.ndarray, head: int, share: float) -> list[int]:
        """The chunks that the group's queries [G, D] read of a head, beside its outliers."""
        chunks = self.keys.shape[1] // CHUNK
        others = [chunk for chunk in range(chunks) if chunk not in self.outliers[head]]
        best = dict.fromkeys(others, 0.0)
        for query in q:
            powers = [math.exp(query @ self.landmark(head, chunk) * 0.25) for chunk in others]
            for chunk, power in zip(others, powers, strict=True):
                best[chunk] = max(best[chunk], power / sum(powers))
        return sorted(sorted(others, key=lambda chunk: -best[chunk])[: math.ceil(share * chunks)])

    def attend(self, q: np.ndarray, head: int, chosen: list[int]) -> np.ndarray:
        """[G, D] of a head's queries over chosen chunks, outliers and all that is not older."""
        older = self.keys.shape[1]
        keys, values = [self.k[head, older:]], [self.v[head, older:]]
        for chunk in chosen:
            keys.append(self.chunk(self.keys, head, chunk))
            values.append(self.chunk(self.v, head, chunk))
        for chunk in self.outliers[head]:
            keys.append(self.chunk(self.k, head, chunk))
            values.append(self.chunk(self.v, head, chunk))
        k, v, out = np.concatenate(keys), np.concatenate(values), []
        for query in q:
            powers = np.exp(k @ query * 0.25)
            out.append(powers @ v / powers.sum())
        return np.array(out)


def started(text: str = SOME, tokens: int = 400, **more: object) -> Steps:
    return Steps(*numbers(tokens), text, profile=tiny_profile(SHAPE), **more)


def read_chunks(steps: Steps, layer: int, head: int) -> list[int]:
    """What the last query read of a head."""
    _, heads, chunks = steps.seq.selective._read_now[layer]
    return sorted(chunks[heads == head].tolist())


@pytest.mark.parametrize(("text", "tokens"), [(SOME, 400), ("shadowkv(recent=64, share=0.2, rank=0.25)", 140)])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_it_reads_and_attends_as_the_definition_says(text: str, tokens: int, backend: str) -> None:
    """Over the ends of three blocks, which join with the directions there are; the shorter one is factored anew."""
    steps = started(text, tokens, backend=backend)
    stage = steps.pipeline.placer
    rank = round(stage.rank * WIDTH)
    layers = [
        Reference(steps.k[n].double().numpy(), steps.v[n].double().numpy(), rank, stage.outliers) for n in range(3)
    ]
    older, factored = (tokens - RECENT) // BLOCK_TOKENS, set()
    for of in layers:
        of.grow(older)
    for step in range(90):
        q, k, v = step_numbers(step)
        out, _ = steps.step(q, k, v)
        for layer, of in enumerate(layers):
            of.k, of.v = (part[layer].double().numpy() for part in (steps.k, steps.v))
            factored.add(of.based_on)
            for head in range(SHAPE.kv_heads):
                asked = q[layer, head * GROUP : (head + 1) * GROUP].double().numpy()
                chosen = of.choose(asked, head, stage.share)
                assert len(chosen) < of.keys.shape[1] // CHUNK / 2
                wanted = of.attend(asked, head, chosen)
                assert read_chunks(steps, layer, head) == sorted(chosen + of.outliers[head])
                np.testing.assert_allclose(out[layer, head * GROUP : (head + 1) * GROUP], wanted, rtol=0, atol=1e-4)
            if steps.seq.seen % BLOCK_TOKENS == 0:
                of.grow((steps.seq.seen - RECENT) // BLOCK_TOKENS)
    assert len(factored) == (1 if tokens == 400 else 2)


def test_all_of_it_is_the_full_cache() -> None:
    everything, full = started(EVERYTHING), started("full")
    for step in range(70):
        out, wanted = (steps.step(*step_numbers(step))[0] for steps in (everything, full))
        torch.testing.assert_close(out, wanted, rtol=0, atol=1e-5)
    assert everything.seq.recalls.read_blocks > 0 == everything.seq.recalls.skipped_blocks


def test_what_is_read_gains_mass_and_nothing_else_does() -> None:
    """With all chunks read, masses, votes and block masses are those of the full cache."""
    some, everything, full = started(), started(EVERYTHING), started("full")
    for steps in (some, everything, full):
        cache, seq = steps.cache, steps.seq
        for step in range(3):
            q, k, v = step_numbers(step)
            cache.reserve(seq, 1)
            cache.advance(seq, 1)
            reading = cache.reading([seq])
            plan = cache.backend.plan(np.array([seq.slot], np.int32), changing=bool(reading))
            for layer in range(SHAPE.layers):
                one = q[layer, None]
                parts, lse = reading.before(layer, one, 0.25), reading.lse(one)
                cache.backend.refresh(plan, layer)
                cache.backend.decode(plan, layer, one, k[layer, None], v[layer, None], 0.25, parts, lse)
                if steps is some and step == 0:
                    chunks = {head: read_chunks(some, layer, head) for head in range(SHAPE.kv_heads)}
                reading.count(layer, lse)
                reading.after(layer)
                if steps is some and step == 0:
                    cache.settle(seq)
                    mass = cache.tables.mass[seq.slot, layer, :, : 10 * BLOCK_TOKENS].reshape(2, -1, CHUNK).sum(-1)
                    assert all(np.flatnonzero(mass[head]).tolist() == chunks[head] for head in chunks)
            reading.finish(plan)
            steps.block_mass = plan.block_mass.copy()
        cache.settle(seq)
    for name, tolerance in (("mass", 1e-4), ("votes", 5e-3)):
        found, wanted = (getattr(steps.cache.tables, name)[steps.seq.slot][:, :, :403] for steps in (everything, full))
        np.testing.assert_allclose(found.astype(np.float32), wanted.astype(np.float32), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(everything.block_mass, full.block_mass, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(some.block_mass.sum(-1), 1, rtol=1e-4)


# -- bytes -----------------------------------------------------------------------------------------------------------


def test_only_values_travel_once_each_while_they_are_in_the_pool() -> None:
    steps, chunk_bytes = started(), CHUNK * DIM * 4
    pool = steps.seq.selective.pool
    assert pool.places == math.ceil(0.3 * 40)
    q, k, v = step_numbers(0)
    steps.step(q, k, v)
    chosen = steps.asked.waited
    exact = 4 * len(HEADS)  # a tenth of 40 chunks
    assert chosen == steps.seq.recalls.read_blocks - exact == len(HEADS) * pool.places
    assert steps.fetched_bytes == chosen * chunk_bytes
    steps.step(q, k, v)  # the same again
    assert steps.asked == Asked(there=chosen, waited=chosen)
    assert steps.fetched_bytes == chosen * chunk_bytes
    held, arena = pool.nbytes, steps.cache.device
    used = arena.used_bytes
    assert steps.cache.give_up_pools(1) == held == used - arena.used_bytes
    again, _ = steps.step(q, k, v)
    assert steps.asked.in_place == chosen
    pooled = started()
    for _ in range(3):
        wanted, _ = pooled.step(q, k, v)
    assert torch.equal(again, wanted)


def test_half_of_what_recalled_blocks_move_is_moved_for_as_many_tokens() -> None:
    """Both read a quarter of 1,536 tokens, none of which is in a pool yet."""
    moved = {}
    for text in ("arkvale(recent=64, share=0.25)", "shadowkv(recent=64, share=0.25, outliers=0)"):
        steps = started(text, 1600)
        steps.step(*step_numbers(0))
        moved[text] = steps.fetched_bytes
    whole, values = moved.values()
    assert whole == 2 * values > 0


def test_its_bytes_are_foretold_and_lie_within_the_devices_budget() -> None:
    for text in (SOME, "shadowkv", "kivi(bits=4) | shadowkv(recent=64)", "shadowkv(outliers=0, rank=1)"):
        for tokens in (40, 400, 1000):
            steps = started(text, tokens)
            expected = expected_use(steps.pipeline, SHAPE, tokens, tiny_profile(SHAPE))
            found = steps.cache.use(steps.seq)
            for name in ("device_bytes", "device_bytes_16bit", "host_bytes", "shadow_bytes"):
                assert getattr(found, name) == getattr(expected, name), (text, tokens, name)
            steps.cache.close(steps.seq)
            assert steps.cache.device.used_bytes == steps.cache.host.used_bytes == 0


def test_without_room_for_it_blocks_are_read_where_they_are() -> None:
    """The device has room for a prompt of 15 rows and little more when its older rows go; then more is given free."""
    row = len(HEADS) * SHAPE.block_bytes(Format.RAW)
    tight, host = started("host(recent=64)", 480, device_bytes=15 * row), started("host(recent=64)", 480)
    lot = tight.cache.device.open_lot(Format.RAW)
    held = tight.cache.device.allocate(lot, 11 * len(HEADS))
    for steps in (tight, host):
        steps.pipeline = build(
            "shadowkv(recent=64, rank=1)" if steps is tight else "host(recent=64)", SHAPE, frozenset({"rope"})
        )
        steps.cache.apply(steps.seq, steps.pipeline, Occasion.SWITCH)
    reader = tight.seq.selective
    assert not reader.digests.count.all()
    numbers_ = step_numbers(0)
    some, wanted = (steps.step(*numbers_)[0] for steps in (tight, host))
    for layer in np.flatnonzero(reader.digests.count.max(axis=1) == 0):
        assert torch.allclose(some[layer], wanted[layer], atol=1e-6)
    tight.cache.device.release(held)
    tight.cache.apply(tight.seq, tight.pipeline, Occasion.SETTLE)
    assert (reader.digests.count == (481 - 64) // BLOCK_TOKENS).all()


# -- with a model ----------------------------------------------------------------------------------------------------


def profiled():
    loaded = tiny_loaded()
    return dataclasses.replace(loaded, profile=measure(loaded, [prompt(400, seed) for seed in range(2)], "0" * 64))


PIPELINES = (
    SOME,
    "kivi(bits=8) | shadowkv(recent=64, share=0.3)",
    'snapkv(keep=0.6, budgets="ada") | shadowkv(recent=32, share=0.3, rank=0.75)',
    "h2o(keep=0.6) | shadowkv(recent=64, share=0.4)",
)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_scoring_many_tokens_at_once_reads_what_their_decode_steps_read(pipeline: str) -> None:
    engine, horizon = tiny_engine(profiled()), TEXT[330:390]
    cache, runner = engine.cache, engine._runner
    seq = cache.open(1000)
    cache.reserve(seq, 330)
    runner.prefill(seq, TEXT[:330], 330, all_queries=True)
    full = runner.score(cache.context(seq), 330, horizon)
    cache.apply(seq, build(pipeline, engine.shape, names_of(cache.profile)), Occasion.PROMPT)
    scored = runner.score(cache.context(seq), 330, horizon)
    decoded = []
    for token in horizon:
        cache.reserve(seq, 1)
        decoded.append(runner.decode([seq], [token])[0])
    torch.testing.assert_close(scored, torch.cat(decoded), rtol=0, atol=3e-4)
    assert float((scored - full).abs().max()) > 0.1


def test_full_rank_and_all_chunks_give_the_full_caches_logits() -> None:
    engine, horizon = tiny_engine(profiled()), TEXT[330:400]
    cache, runner = engine.cache, engine._runner
    found = []
    for text in ("full", EVERYTHING):
        pipeline, seq, rows = build(text, engine.shape, frozenset({"rope"})), cache.open(1000), []
        cache.reserve(seq, 330)
        runner.prefill(seq, TEXT[:330], 330, all_queries=False)
        cache.apply(seq, pipeline, Occasion.PROMPT)
        for token in horizon:
            cache.reserve(seq, 1)
            rows.append(runner.decode([seq], [token])[0])
            if seq.seen % BLOCK_TOKENS == 0:
                cache.apply(seq, pipeline, Occasion.SETTLE)
        found.append(torch.cat(rows))
    torch.testing.assert_close(*found, rtol=0, atol=5e-4)
    assert float(divergences(*(torch.log_softmax(rows, -1) for rows in found)).max()) < 1e-6


@pytest.mark.parametrize("other", ["full", "kivi(bits=4)", "arkvale(recent=64)", "host(recent=64)"])
def test_a_switch_in_mid_generation_comes_and_goes(other: str) -> None:
    """Behind the way over ShadowKV the tokens' keys and values are bit for bit those that were computed."""
    drive, kept = Drive(tiny_engine(profiled())), {}
    drive.submit("job", TEXT[:301], 110)
    cache = drive.engine.cache
    for epoch, (count, text) in enumerate(((5, other), (20, SOME), (60, other), (80, "full")), 1):
        drive.until(lambda count=count: drive.generated("job") >= count)
        seq = drive.engine._live["job"].cache
        if epoch in (2, 4):  # before ShadowKV, and when it is long gone
            kept[epoch] = [cache.exact_context(seq, 301).read(layer) for layer in range(2)]
        assert drive.direct("job", text, epoch).applied.at_token >= count
        assert (seq.selective is not None and seq.selective.stage.name == "shadowkv") == (text == SOME)
    for before, after in zip(*kept.values(), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert not seq.lost
    assert (cache.tables.tier[seq.slot, :, :, : seq.seen // BLOCK_TOKENS] == Tier.DEVICE).all()
    assert len(drive.finish()["job"].token_ids) == 110


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_neighbours_and_batches_do_not_matter(pipeline: str) -> None:
    loaded = profiled()
    alone = run(tiny_engine(loaded), {"job": TEXT[:301]}, 48, pipeline=pipeline)["job"].token_ids
    drive = Drive(tiny_engine(loaded))
    drive.submit("other", TEXT[100:500], 60)
    drive.submit("job", TEXT[:301], 48, pipeline=pipeline)
    drive.submit("third", TEXT[200:500], 60, pipeline="shadowkv(recent=32)")
    assert drive.finish()["job"].token_ids == alone


def test_unused_prefixes_make_room_for_it() -> None:
    """Rows that nobody uses fill the device when a request's older rows have gone."""
    engine = tiny_engine(profiled(), device_budget_bytes=64 * 4 * 4096, max_context_tokens=2048)
    run(engine, {"first": prompt(1900, 1)}, 2)
    assert engine.cache.prefixes.unused_bytes() > 0
    drive = Drive(engine)
    drive.submit("job", prompt(1500, 2), 40, pipeline="shadowkv(recent=64, rank=1)")
    drive.until(lambda: drive.generated("job") >= 2)
    assert (engine._live["job"].cache.selective.digests.count == (1500 - 64) // BLOCK_TOKENS).all()
    drive.finish()


def test_a_model_without_a_profile_is_told_what_to_do() -> None:
    with pytest.raises(PipelineError, match=r"rotary positions; `kvpilot model profile"):
        build("shadowkv", SHAPE)


def test_a_rank_that_no_page_holds_is_refused() -> None:
    wide = dataclasses.replace(SHAPE, kv_heads=64, query_heads=64)
    with pytest.raises(PipelineError, match="768 numbers a token are to stand for its keys; at most 512 can"):
        build("shadowkv(rank=0.75)", wide, frozenset({"rope"}))
