"""Recall from the host: what comes, what stays in the pool, what it costs, and that it changes no result."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kernels.layout import BLOCK_TOKENS, Format, Tier
from tests.tiny import Drive, prompt, tiny_engine, tiny_loaded
from tests.workers.test_selecting import SHAPE, Steps, numbers, step_numbers
from workers.cache.recalls import Asked
from workers.cache.sequence_cache import Occasion
from workers.engine.guessing import QueryGuesser
from workers.stages.registry import build

pytestmark = pytest.mark.usefixtures("one_torch_thread")

ARKVALE = "arkvale(recent=64, share=0.3)"
RECALLING = (
    ARKVALE,
    'arkvale(recent=32, share=0.5, volume="ball")',
    "kivi(bits=4) | arkvale(recent=64, share=0.3)",
    "clo(recent=64, share=0.3, alike=0.2)",
    "conversation(recent=64, share=0.4)",
)
TEXT = prompt(700, 5)


def slowly(steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Steps whose queries turn a little each time."""
    q = step_numbers(0)[0]
    for step in range(steps):
        turn, k, v = step_numbers(step)
        q = q + turn / 4
        yield q, k, v


@pytest.mark.parametrize("text", RECALLING)
def test_recalled_blocks_are_the_originals_and_change_no_result(text: str) -> None:
    """Copies are compared bit for bit as they come; without any room for them everything is read in place."""
    pooled, in_place = Steps(*numbers(500), text), Steps(*numbers(500), text)
    assert in_place.cache.give_up_pools(1) > 0
    for numbers_ in slowly(40):
        out, read = pooled.step(*numbers_)
        if in_place.seq.selective.pool.places:  # it takes room again as the request grows
            in_place.cache.give_up_pools(1)
        assert torch.equal(out, in_place.step(*numbers_)[0])
        if "kivi" not in text:
            for layer in range(SHAPE.layers):
                expected = pooled.attend(layer, numbers_[0], read[layer])
                torch.testing.assert_close(out[layer], expected, rtol=0, atol=1e-5)
    assert pooled.copies > 500
    assert in_place.copies == 0
    assert in_place.asked == Asked(in_place=pooled.asked.blocks)
    assert in_place.fetched_bytes == 0
    for steps in (pooled, in_place):
        steps.cache.close(steps.seq)
        assert steps.cache.device.used_bytes == steps.cache.host.used_bytes == 0


def test_the_pool_is_of_the_least_recently_read_and_counts_what_happens() -> None:
    steps = Steps(*numbers(700), ARKVALE)
    pool = steps.seq.selective.pool
    older = (700 - 64) // BLOCK_TOKENS
    assert pool.places == -(-older * 3 // 10)
    held: dict[tuple[int, int], OrderedDict[int, None]] = {}
    hits = misses = 0
    for numbers_ in slowly(20):  # 720 tokens: no upkeep yet, which is at 704
        if steps.seq.seen == 703:
            break
        _, read = steps.step(*numbers_)
        for layer in range(SHAPE.layers):
            for head in range(SHAPE.kv_heads):
                mine = held.setdefault((layer, head), OrderedDict())
                wanted = set(np.flatnonzero(read[layer][head, :older]).tolist())
                hits += len(wanted & set(mine))
                misses += len(wanted - set(mine))
                for block in wanted:
                    mine[block] = None
                    mine.move_to_end(block)
                while len(mine) > pool.places:
                    mine.popitem(last=False)
    assert steps.asked == Asked(there=hits, waited=misses)
    assert steps.asked.hit_rate == hits / (hits + misses)
    assert steps.fetched_bytes == misses * SHAPE.block_bytes(Format.RAW)
    assert hits > 0 < misses


def test_the_same_query_again_fetches_nothing() -> None:
    steps = Steps(*numbers(500), ARKVALE)
    q, k, v = step_numbers(0)
    steps.step(q, k, v)
    fetched, read = steps.fetched_bytes, steps.asked.waited
    steps.step(q, k, v)
    assert steps.fetched_bytes == fetched > 0
    assert steps.asked == Asked(there=read, waited=read)


def test_a_pool_keeps_to_half_of_what_the_device_has_free() -> None:
    """Where that is less than what is read, the rest is read in place."""
    row = SHAPE.layers * SHAPE.kv_heads * SHAPE.block_bytes(Format.RAW)
    steps = Steps(*numbers(640), "arkvale(recent=64, share=1)", device_bytes=22 * row)
    cache, pool = steps.cache, steps.seq.selective.pool
    for numbers_ in slowly(40):
        steps.step(*numbers_)
        assert cache.device.used_bytes <= cache.device.budget_bytes
    assert 0 < pool.places < 18
    assert steps.asked.in_place > 0 < steps.asked.there
    used = cache.device.used_bytes
    freed = cache.give_up_pools(1)
    assert freed == used - cache.device.used_bytes >= pool.places * row
    steps.step(*step_numbers(99))


def test_a_pool_goes_before_anything_else_does() -> None:
    """A second request fits only where the first one's pool was: nobody is switched or preempted for it."""
    engine = tiny_engine(device_budget_bytes=64 * 4 * 4096, max_context_tokens=2048)
    drive = Drive(engine)
    drive.submit("first", prompt(1200, 1), 200, pipeline="arkvale(recent=64, share=1)")
    drive.until(lambda: drive.generated("first") >= 2)
    reader = engine._live["first"].cache.selective
    assert reader.pool.places > 0
    drive.submit("second", prompt(1300, 2), 8, pipeline="full")
    drive.until(lambda: drive.generated("second") >= 1)
    assert reader.pool.places == 0
    found = drive.finish()
    assert all(not outcome.switches and not outcome.finished.usage.preemptions for outcome in found.values())


# -- what stages choose ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("volume", ["box", "ball"])
def test_arkvale_reads_what_a_plain_loop_says(volume: str) -> None:
    steps = Steps(*numbers(500), f'arkvale(recent=64, share=0.3, volume="{volume}")')
    q, k, v = step_numbers(0)
    _, read = steps.step(q, k, v)
    older, group = (501 - 64) // BLOCK_TOKENS, SHAPE.queries_per_kv_head
    for layer in range(SHAPE.layers):
        for head in range(SHAPE.kv_heads):
            score = []
            for block in range(older):
                keys = steps.k[layer, head, block * BLOCK_TOKENS : (block + 1) * BLOCK_TOKENS].double()
                most = []
                for query in q[layer, head * group : (head + 1) * group].double():
                    if volume == "box":
                        most.append(float(torch.maximum(query * keys.amin(0), query * keys.amax(0)).sum()))
                    else:
                        centre = keys.mean(0)
                        radius = max(float((key - centre).norm()) for key in keys)
                        most.append(float(query @ centre + query.norm() * radius))
                assert max(most) >= float((keys @ q[layer, head * group].double()).max()) - 1e-6
                score.append(max(most))
            best = np.argsort(-np.array(score))[: -(-older * 3 // 10)]
            assert sorted(best) == np.flatnonzero(read[layer][head, :older]).tolist()


def test_clo_chooses_anew_in_heads_whose_query_has_turned() -> None:
    steps, plain = (Steps(*numbers(500), text) for text in ("clo(recent=64, share=0.3, alike=0.97)", ARKVALE))
    asked, kept = None, np.zeros(0)
    reused = chosen = 0
    for q, k, v in slowly(30):
        read, fresh = (np.array(found.step(q, k, v)[1]) for found in (steps, plain))
        if asked is not None:
            cosine = F.cosine_similarity(q, asked, dim=-1).view(SHAPE.layers, SHAPE.kv_heads, -1).amin(-1)
            for layer, head in np.ndindex(*cosine.shape):
                if cosine[layer, head] >= 0.97:
                    older = (steps.seq.seen - 64) // BLOCK_TOKENS
                    before = np.zeros(older, bool)
                    before[: len(kept[layer, head])] = kept[layer, head][:older]
                    assert np.array_equal(read[layer, head, :older], before)
                    reused += 1
                else:
                    assert np.array_equal(read[layer, head], fresh[layer, head])
                    chosen += 1
        asked, kept = q, read[:, :, : (steps.seq.seen - 64) // BLOCK_TOKENS]
    assert reused > 20 < chosen


def test_a_conversation_reads_what_the_prompts_end_voted_for_and_all_that_came_since() -> None:
    steps = Steps(*numbers(500), "full")
    votes = np.random.default_rng(0).random((SHAPE.layers, SHAPE.kv_heads, 500), np.float32).astype(np.float16)
    steps.cache.tables.votes[steps.seq.slot, :, :, :500] = votes
    steps.pipeline = build("conversation(recent=64, share=0.3)", SHAPE)
    steps.cache.apply(steps.seq, steps.pipeline, Occasion.PROMPT)
    older = (501 - 64) // BLOCK_TOKENS
    by_block = votes[:, :, : older * BLOCK_TOKENS].astype(np.float64).reshape(SHAPE.layers, SHAPE.kv_heads, older, -1)
    expected = np.sort(np.argsort(-by_block.sum(-1), axis=2)[:, :, : -(-older * 3 // 10)], axis=2)
    for numbers_ in slowly(100):
        _, read = steps.step(*numbers_)
        for layer, head in np.ndindex(SHAPE.layers, SHAPE.kv_heads):
            assert np.array_equal(np.flatnonzero(read[layer][head, :older]), expected[layer, head])
            assert read[layer][head, older:].all()
    masses = np.random.default_rng(1).random(votes.shape, np.float32)
    steps.cache.tables.votes[steps.seq.slot, :, :, :500] = masses
    steps.cache.apply(steps.seq, steps.pipeline, Occasion.PROMPT)  # another turn
    _, read = steps.step(*step_numbers(0))
    assert any(not np.array_equal(np.flatnonzero(read[0][head, :older]), expected[0, head]) for head in range(2))


# -- guesses ---------------------------------------------------------------------------------------------------------


def test_a_guess_is_the_next_layers_query_where_nothing_comes_between() -> None:
    """Layers that add nothing to the hidden states, and norms alike: the guess is the query itself."""
    loaded = tiny_loaded()
    with torch.no_grad():
        for part in (loaded.model.model.layers[0].self_attn.o_proj, loaded.model.model.layers[0].mlp.down_proj):
            part.weight.zero_()
    engine = tiny_engine(loaded)
    cache = engine.cache
    seq = cache.open(400)
    cache.reserve(seq, 301)
    engine._runner.prefill(seq, TEXT[:300], 300, all_queries=False)
    cache.apply(seq, build("infinigen(recent=64, share=0.3)", engine.shape), Occasion.PROMPT)
    found = []
    foresee = seq.selective.foresee
    seq.selective.foresee = lambda layer, q, scaling: (found.append((layer, q)), foresee(layer, q, scaling))
    engine._runner.decode([seq], [TEXT[300]])
    ((layer, guess),) = found
    assert layer == 1
    asked, positions = cache.recent.read(seq.slot, 1, 1)
    assert positions.tolist() == [300]
    torch.testing.assert_close(guess[0], asked[:, 0], rtol=0, atol=1e-5)
    assert not any(module._forward_pre_hooks for module in loaded.model.modules())


def test_what_is_guessed_is_there_when_it_is_asked_for() -> None:
    engine = tiny_engine()
    cache = engine.cache
    seq = cache.open(800)
    cache.reserve(seq, 600)
    engine._runner.prefill(seq, TEXT[:600], 600, all_queries=False)
    cache.apply(seq, build("infinigen(recent=64, share=0.3, alpha=100)", engine.shape), Occasion.PROMPT)
    asked = seq.recalls.asked[Tier.HOST]
    for token in TEXT[600:630]:
        cache.reserve(seq, 1)
        engine._runner.decode([seq], [token])
    older = (630 - 64) // BLOCK_TOKENS
    assert seq.selective.pool.places == 5  # 0.3 of 16
    assert asked.ahead > 0
    assert asked.waited == 2 * seq.selective.pool.places  # the first layer's, which reads everything, in its first step
    assert seq.recalls.skipped_blocks > 30 * 2 * older * 0.5


def test_a_model_whose_next_layer_does_not_attend_is_told_of() -> None:
    guesser = QueryGuesser(torch.nn.Linear(2, 2))
    assert guesser.next_queries(0) is None
