"""Stages that have each query read only some blocks: what is read, what that gives, and that it is lost by nobody."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kernels.layout import BLOCK_TOKENS, CacheShape, Format, Tier
from kvpilot.v1 import generation_pb2, job_pb2
from tests.tiny import Drive, prompt, run, tiny_engine
from workers.cache.kvcache import KVCache
from workers.cache.recalls import Asked
from workers.cache.sequence_cache import Occasion, SequenceCache
from workers.stages.registry import build

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SHAPE = CacheShape(layers=3, kv_heads=2, query_heads=6, head_dim=16, dtype=torch.float32)
TEXT = prompt(700, 5)


class Steps:
    """A cache with one request in it, of given keys and values [layers, kv_heads, tokens, D], and its decode steps."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, text: str, backend: str = "cpu", **cache: int) -> None:
        sizes = {"device_bytes": 8 << 20, "host_bytes": 8 << 20} | cache
        self.cache = KVCache(SHAPE, *sizes.values(), 2, 2048, "m", torch.device("cpu"), backend)
        self.k, self.v = k, v
        self.copies = 0
        self.seq: SequenceCache = self.cache.open(2048)
        self.cache.reserve(self.seq, k.shape[2])
        self.cache.advance(self.seq, k.shape[2])
        for layer in range(SHAPE.layers):
            self.cache.backend.write(self.seq.slot, layer, 0, k[layer], v[layer])
        self.pipeline = build(text, SHAPE)
        self.cache.apply(self.seq, self.pipeline, Occasion.PROMPT)

    @property
    def asked(self) -> Asked:
        """What was asked of the host."""
        return self.seq.recalls.asked[Tier.HOST]

    @property
    def fetched_bytes(self) -> int:
        """Bytes copied from the host to the pool."""
        return self.seq.recalls.moved_bytes[Tier.HOST, Tier.DEVICE]

    def step(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, list[np.ndarray]]:
        """Output [layers, query_heads, D] of a step's q, k, v [layers, heads, D], and which blocks each layer read."""
        cache, seq = self.cache, self.seq
        self.k, self.v = torch.cat([self.k, k[:, :, None]], 2), torch.cat([self.v, v[:, :, None]], 2)
        cache.reserve(seq, 1)
        cache.advance(seq, 1)
        reading = cache.reading([seq])
        plan = cache.backend.plan(np.array([seq.slot], np.int32), changing=bool(reading))
        out, read = [], []
        blocks = math.ceil(seq.seen / BLOCK_TOKENS)
        for layer in range(SHAPE.layers):
            before = cache.tables.address[seq.slot].copy(), cache.tables.tier[seq.slot].copy()
            reading.before(layer, q[layer, None], 0.25)
            cache.backend.refresh(plan, layer)
            read.append(cache.tables.tier[seq.slot, layer, :, :blocks] != Tier.DISK)
            self.check_copies(layer, *before)
            out.append(cache.backend.decode(plan, layer, q[layer, None], k[layer, None], v[layer, None], 0.25)[0])
            reading.after(layer)
            assert np.array_equal(cache.tables.address[seq.slot], before[0])
            assert np.array_equal(cache.tables.tier[seq.slot], before[1])
        if seq.seen % BLOCK_TOKENS == 0:
            cache.apply(seq, self.pipeline, Occasion.SETTLE)
        return torch.stack(out), read

    def check_copies(self, layer: int, address: np.ndarray, tier: np.ndarray) -> None:
        """What a layer's tables name in the place of a block is that block, bit for bit."""
        cache, here = self.cache, (self.seq.slot, layer)
        tables = cache.tables
        moved = (address[layer] != tables.address[here]) & (tables.tier[here] != Tier.DISK)
        for head, block in np.argwhere(moved):
            assert (tier[layer, head, block], tables.tier[here][head, block]) == (Tier.HOST, Tier.DEVICE)
            fmt = Format(int(tables.format[here][head, block]))
            places = address[layer, head, block], tables.address[here][head, block]
            original, copy = (
                cache.backend.load(which, np.array([place], np.int32), fmt)
                for which, place in zip((Tier.HOST, Tier.DEVICE), places, strict=True)
            )
            assert torch.equal(original, copy)
            self.copies += 1

    def attend(self, layer: int, q: torch.Tensor, read: np.ndarray) -> torch.Tensor:
        """Plain attention [query_heads, D] of a layer over the blocks that were read."""
        group, out = SHAPE.queries_per_kv_head, []
        for head, one in enumerate(q[layer].double()):
            tokens = torch.from_numpy(np.repeat(read[head // group], BLOCK_TOKENS))[: self.seq.seen]
            k, v = (part[layer, head // group].double()[tokens] for part in (self.k, self.v))
            out.append((k @ one * 0.25).softmax(0) @ v)
        return torch.stack(out).float()


def numbers(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values with directions that last a while, so that blocks differ."""
    generator = torch.Generator().manual_seed(seed)
    size = (SHAPE.layers, SHAPE.kv_heads, tokens, SHAPE.head_dim)
    slow = torch.randn(*size[:2], tokens // 20 + 1, SHAPE.head_dim, generator=generator).repeat_interleave(20, 2)
    return slow[:, :, :tokens] + torch.randn(size, generator=generator) / 2, torch.randn(size, generator=generator)


def step_numbers(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)
    q = torch.randn(SHAPE.layers, SHAPE.query_heads, SHAPE.head_dim, generator=generator)
    k, v = torch.randn(2, SHAPE.layers, SHAPE.kv_heads, SHAPE.head_dim, generator=generator)
    return q * 2, k, v


def quest_by_loops(steps: Steps, layer: int, q: torch.Tensor, share: float, dense: int) -> np.ndarray:
    """[H, B] what Quest reads, worked out block by block and channel by channel from the keys themselves."""
    seen, group = steps.seq.seen, SHAPE.queries_per_kv_head
    blocks, older = math.ceil(seen / BLOCK_TOKENS), (seen - BLOCK_TOKENS) // BLOCK_TOKENS
    read = np.ones((SHAPE.kv_heads, blocks), bool)
    if layer < dense:
        return read
    for head in range(SHAPE.kv_heads):
        bounds = []
        for block in range(older):
            keys = steps.k[layer, head, block * BLOCK_TOKENS : (block + 1) * BLOCK_TOKENS].tolist()
            of_group = []
            for query in q[layer, head * group : (head + 1) * group].tolist():
                channels = zip(query, zip(*keys, strict=True), strict=True)
                of_group.append(sum(max(x * min(column), x * max(column)) for x, column in channels))
            bounds.append(max(of_group))
        best = sorted(range(older), key=lambda block: (-bounds[block], -block))[: math.ceil(share * older)]
        read[head, :older] = np.isin(np.arange(older), best)
    return read


def test_quest_reads_what_a_plain_loop_says_and_attends_to_just_that() -> None:
    steps = Steps(*numbers(400), "quest(share=0.4, dense=1)")
    for step in range(70):  # over the ends of two blocks
        q, k, v = step_numbers(step)
        out, read = steps.step(q, k, v)
        for layer in range(SHAPE.layers):
            assert np.array_equal(read[layer], quest_by_loops(steps, layer, q, 0.4, 1))
            torch.testing.assert_close(out[layer], steps.attend(layer, q, read[layer]), rtol=0, atol=1e-5)
        assert all(mask.sum() < 0.6 * mask.size for mask in read[1:])


def test_reading_everything_is_reading_as_ever_bit_for_bit() -> None:
    everything, full = Steps(*numbers(400), "quest(share=1, dense=0)"), Steps(*numbers(400), "full")
    for step in range(40):
        assert torch.equal(everything.step(*step_numbers(step))[0], full.step(*step_numbers(step))[0])


@pytest.mark.parametrize("text", ["quest(share=0.4, dense=1)", "kivi(bits=4) | arkvale(recent=64, share=0.3)"])
def test_backends_read_the_same_blocks_and_agree(text: str) -> None:
    both = [Steps(*numbers(400), text, backend) for backend in ("cpu", "reference")]
    for step in range(40):
        (out, read), (other, other_read) = (steps.step(*step_numbers(step)) for steps in both)
        assert np.array_equal(read, other_read)
        torch.testing.assert_close(out, other, rtol=0, atol=1e-5)
    assert both[0].cache.recalls == both[1].cache.recalls


def test_tokens_that_are_not_read_get_nothing() -> None:
    steps = Steps(*numbers(400), "quest(share=0.4, dense=0)")
    slot = steps.seq.slot
    q, k, v = step_numbers(0)
    _, read = steps.step(q, k, v)
    steps.cache.settle(steps.seq)
    masses = steps.cache.tables.mass[slot, :, :, : 13 * BLOCK_TOKENS].reshape(*np.shape(read), BLOCK_TOKENS).sum(-1)
    assert np.array_equal(masses > 0, np.array(read))
    of_heads = np.full((SHAPE.layers, SHAPE.kv_heads), SHAPE.queries_per_kv_head)
    np.testing.assert_allclose(masses.sum(axis=2), of_heads, rtol=1e-5)


@pytest.mark.parametrize(("share", "found"), [(0.15, True), (0.05, False)])
def test_a_needle_is_found_where_its_block_is_among_those_read(share: float, found: bool) -> None:
    """Two blocks promise more than the needle's, by channels that no single key of theirs has together: with room for
    three old blocks it is read, with room for one it is not."""
    k, v = torch.zeros(2, SHAPE.layers, SHAPE.kv_heads, 20 * BLOCK_TOKENS, SHAPE.head_dim)
    k[:, :, 7 * BLOCK_TOKENS + 3, :2] = 5
    v[:, :, 7 * BLOCK_TOKENS + 3, 0] = 1
    for decoy in (2, 11):
        k[:, :, decoy * BLOCK_TOKENS, 0], k[:, :, decoy * BLOCK_TOKENS + 1, 1] = 6, 6
    q = torch.zeros(SHAPE.layers, SHAPE.query_heads, SHAPE.head_dim)
    q[:, :, :2] = 20
    steps = Steps(k, v, f"quest(share={share}, dense=0)")
    nothing = torch.zeros(SHAPE.layers, SHAPE.kv_heads, SHAPE.head_dim)
    out, read = steps.step(q, nothing, nothing)
    assert all(mask[:, 7].all() == found and mask.sum(axis=1).max() < 8 for mask in read)
    torch.testing.assert_close(out[:, :, 0], torch.full(out.shape[:2], float(found)), rtol=0, atol=1e-3)


# -- scoring ---------------------------------------------------------------------------------------------------------

SELECTING = (
    "quest(share=0.2, dense=0)",
    "quest(share=0.5, dense=1)",
    "snapkv(keep=0.6) | kivi(bits=8) | quest(share=0.3, dense=0)",
    'snapkv(keep=0.5, budgets="ada") | quest(share=0.4, dense=0)',
    'arkvale(recent=64, share=0.3, volume="ball")',
    "kivi(bits=8) | arkvale(recent=32, share=0.3)",
    "clo(recent=64, share=0.3, alike=0.5)",
    "infinigen(recent=64, share=0.3)",
    "conversation(recent=64, share=0.4)",
)


@pytest.mark.parametrize("pipeline", SELECTING)
@pytest.mark.parametrize("tokens", [301, 320])
def test_scoring_many_tokens_at_once_reads_what_their_decode_steps_read(pipeline: str, tokens: int) -> None:
    """Over the ends of several blocks, the scored tokens' own too; tables of different lengths are among them."""
    engine = tiny_engine()
    cache, runner, built = engine.cache, engine._runner, build(pipeline, engine.shape)
    seq = cache.open(1000)
    cache.reserve(seq, tokens)
    runner.prefill(seq, TEXT[:tokens], tokens, all_queries=False)
    full = runner.score(cache.context(seq), tokens, TEXT[tokens : tokens + 150])
    cache.apply(seq, built, Occasion.PROMPT)
    horizon = TEXT[tokens : tokens + 150]
    for start in (0, 3):  # once behind the prompt, once behind some steps
        for token in horizon[:start]:
            cache.reserve(seq, 1)
            runner.decode([seq], [token])
        scored = runner.score(cache.context(seq), seq.seen, horizon[start:])
        again = runner.score(cache.context(seq), seq.seen, horizon[start:])
        assert torch.equal(scored, again)  # nothing is kept of it
    decoded = []
    for token in horizon[3:]:
        cache.reserve(seq, 1)
        decoded.append(runner.decode([seq], [token])[0])
    torch.testing.assert_close(scored, torch.cat(decoded), rtol=0, atol=2e-4)
    assert float((scored - full[3:]).abs().max()) > 0.1


@pytest.mark.parametrize("pipeline", SELECTING[:1])
def test_a_replay_measures_what_is_lost_by_not_reading(pipeline: str) -> None:
    drive = Drive(tiny_engine())
    asked = {"at_tokens": [301, 500], "pipelines": ["full", pipeline, "quest(share=1)"], "horizon_tokens": 32}
    request = generation_pb2.GenerateRequest(
        token_ids=generation_pb2.TokenIds(ids=TEXT), replay=generation_pb2.Replay(**asked)
    )
    drive.engine.submit(job_pb2.Job(job_id="job", request=request))
    places = [event.replayed for event in drive.finish()["job"].events if event.HasField("replayed")]
    assert len(places) == 2
    for place in places:
        full, some, everything = place.pipelines
        assert full.divergence == 0
        assert everything.divergence == pytest.approx(0, abs=1e-6)
        assert some.divergence > 1e-3
        assert some.cache.shadow_bytes == some.cache.host_bytes == 0
        assert some.cache.device_bytes > full.cache.device_bytes  # its digests
    assert drive.engine.cache.device.used_bytes == drive.engine.cache.prefixes.unused_bytes()


# -- living with others ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", SELECTING[:2])
def test_neighbours_and_batches_do_not_matter(pipeline: str) -> None:
    alone = run(tiny_engine(), {"job": TEXT[:301]}, 48, pipeline=pipeline)["job"].token_ids
    full = run(tiny_engine(), {"job": TEXT[:301]}, 48)["job"].token_ids
    drive = Drive(tiny_engine())
    drive.submit("other", TEXT[100:500], 60)
    drive.submit("job", TEXT[:301], 48, pipeline=pipeline)
    drive.submit("third", TEXT[200:500], 60, pipeline="quest(share=0.3)")
    assert drive.finish()["job"].token_ids == alone != full


def test_what_is_computed_after_selective_reads_is_not_offered_as_exact() -> None:
    engine = tiny_engine()
    first = run(engine, {"job": TEXT[:301]}, 100, pipeline="quest(share=0.2, dense=0)")["job"]
    again = run(engine, {"next": [*TEXT[:301], *first.token_ids, 1, 2]}, 2)["next"]
    assert again.finished.usage.reused_prompt_tokens == 288  # whole rows of the prompt, none of the answer
