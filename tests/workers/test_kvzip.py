"""KVzip: the model repeats a text, and what it looks at meanwhile stays. Held to a second run of the model, over text
and repetition at once, and to its definition by loops in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import AttentionInterface

from kvpilot.v1 import generation_pb2, job_pb2
from tests.tiny import Drive, prompt, run, tiny_engine, tiny_loaded, tiny_model
from workers.cache.arena import TierFullError
from workers.cache.kvcache import KVCache
from workers.cache.sequence_cache import Occasion, SequenceCache
from workers.engine import repeating
from workers.engine.attention import cache_shape
from workers.engine.repeating import Repetition, Words
from workers.engine.runner import ModelRunner
from workers.engine.sequence import Phase
from workers.errors import FAILED_PRECONDITION, INVALID_ARGUMENT, RESOURCE_EXHAUSTED, ProblemError
from workers.stages.base import LossClass
from workers.stages.registry import build

WIDE = {"num_attention_heads": 6, "hidden_size": 96}  # 2 layers, 3 query heads to each of 2 KV heads, 16 channels
LAYERS, HEADS, GROUP, DIM = 2, 2, 3, 16
TEXT = prompt(150, seed=5)
LOADED = tiny_loaded(**WIDE)
WORDS = Words.of(LOADED)


def make_cache(device_bytes: int = 8 << 20) -> KVCache:
    shape = cache_shape(LOADED.model.config, torch.float32)
    return KVCache(shape, device_bytes, 8 << 20, 3, 1024, "m", torch.device("cpu"), "cpu")


def serve(cache: KVCache, pipeline: str = "full") -> SequenceCache:
    seq = cache.open(1024)
    cache.reserve(seq, len(TEXT))
    ModelRunner(LOADED, cache).prefill(seq, TEXT, len(TEXT), all_queries=True)
    cache.apply(seq, build(pipeline, cache.shape), Occasion.PROMPT)
    return seq


def decode(cache: KVCache, seq: SequenceCache, steps: int) -> None:
    for token_id in prompt(steps, seed=9):
        cache.reserve(seq, 1)
        ModelRunner(LOADED, cache).decode([seq], [token_id])


def repetition(cache: KVCache, seq: SequenceCache) -> Repetition:
    return Repetition(cache, ModelRunner(LOADED, cache), seq, TEXT, WORDS, 1024)


# -- the scores -------------------------------------------------------------------------------------------------------


def kept_of(cache: KVCache, seq: SequenceCache) -> np.ndarray:
    """bool [L, H, text] which tokens are there."""
    kept = np.zeros((LAYERS, HEADS, len(TEXT)), bool)
    for layer, head in np.ndindex(LAYERS, HEADS):
        length = cache.tables.length[seq.slot, layer, head]
        kept[layer, head, cache.tables.position[seq.slot, layer, head, :length]] = True
    return kept


def heard(token_ids: list[int], kept: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each layer's queries [H, G, T, D] and keys [H, T, D] where the tokens behind the text see only what is kept."""
    found: list[tuple[np.ndarray, np.ndarray]] = []
    tokens, text = len(token_ids), len(TEXT)

    def attend(module, query, key, value, mask, scaling, **kwargs):
        sees = torch.ones(tokens, tokens, dtype=torch.bool).tril().repeat(HEADS, 1, 1)
        sees[:, text:, :text] = torch.from_numpy(kept[module.layer_idx])[:, None]
        scores = query[0].unflatten(0, (HEADS, GROUP)) @ key[0][:, None].mT * scaling  # [H, G, T, T]
        shares = scores.masked_fill(~sees[:, None], -torch.inf).softmax(-1)
        found.append((query[0].unflatten(0, (HEADS, GROUP)).double().numpy(), key[0].double().numpy()))
        return (shares @ value[0][:, None]).flatten(0, 1).transpose(0, 1)[None], None

    AttentionInterface.register("seeing", attend)
    with torch.inference_mode():
        tiny_model(attention="seeing", **WIDE)(input_ids=torch.tensor([token_ids]), use_cache=False)
    return found


def definition(kept: np.ndarray, chunk_tokens: int) -> np.ndarray:
    """[L, H, text] for each token the largest share that a query of its chunk's repetition pays it."""
    scores = np.zeros((LAYERS, HEADS, len(TEXT)))
    for first in range(0, len(TEXT), chunk_tokens):
        chunk = range(first, min(first + chunk_tokens, len(TEXT)))
        if first:
            fed = [*WORDS.before, *TEXT[first - 8 : first], *WORDS.after, *TEXT[first : chunk.stop]]
        else:
            fed = [*WORDS.whole, *TEXT[first : chunk.stop]]
        for layer, (queries, keys) in enumerate(heard([*TEXT, *fed], kept)):
            for head in range(HEADS):
                candidates = [t for t in [*range(min(4, first)), *chunk] if kept[layer, head, t]]
                for asker in range(len(TEXT), len(TEXT) + len(fed)):
                    columns = [*candidates, *range(len(TEXT), asker + 1)]
                    raw = queries[head][:, asker] @ keys[head][columns].T / math.sqrt(DIM)  # [G, columns]
                    shares = np.exp(raw - raw.max(axis=1, keepdims=True))
                    shares /= shares.sum(axis=1, keepdims=True)
                    for place, token in enumerate(candidates):
                        if token in chunk:
                            scores[layer, head, token] = max(scores[layer, head, token], shares[:, place].max())
    return scores


@pytest.mark.parametrize("chunk_tokens", [2048, 61])
@pytest.mark.parametrize("piece", [10_000, 37])
def test_scores_and_what_is_kept_are_those_of_the_definition(monkeypatch, chunk_tokens: int, piece: int) -> None:
    monkeypatch.setattr(repeating, "CHUNK_TOKENS", chunk_tokens)
    monkeypatch.setattr(repeating, "QUERIES_AT_ONCE", 50)
    cache = make_cache()
    seq = serve(cache)
    wanted = definition(kept_of(cache, seq), chunk_tokens)
    before, work = cache.device.used_bytes, repetition(cache, seq)
    fed = 0
    while work.left:
        left = work.left
        work.step(piece)
        fed += left - work.left
        assert left - work.left <= piece
    assert fed >= len(TEXT) + len(WORDS.whole)
    assert cache.device.used_bytes == before
    np.testing.assert_allclose(seq.reconstruction, wanted, atol=1e-4)
    for text in ("kvzip(keep=0.5)", "kvzip(keep=0.4, budgets=ada)"):
        cache.apply(seq, build(text, cache.shape), Occasion.SWITCH)
        kept, old = kept_of(cache, seq), len(TEXT) - 32
        assert kept[:, :, old:].all()
        free = max(64, math.ceil((0.5 if "0.5" in text else 0.4) * len(TEXT))) - 32
        for layer in range(LAYERS):
            if "ada" in text:
                chosen = by_ada(wanted[layer, :, :old], free)
            else:
                chosen = {(head, t) for head in range(HEADS) for t in np.argsort(-wanted[layer, head, :old])[:free]}
            assert {(head, t) for head, t in np.argwhere(kept[layer, :, :old])} == chosen


def by_ada(scores: np.ndarray, free: int) -> set[tuple[int, int]]:
    """The best fifth of each head's share, then the best of all heads."""
    floor = int(0.2 * free)
    chosen = {(head, t) for head in range(HEADS) for t in np.argsort(-scores[head])[:floor]}
    rest = sorted(np.ndindex(scores.shape), key=lambda place: -scores[place])
    rest = [place for place in rest if place not in chosen]
    return chosen | set(rest[: HEADS * (free - floor)])


def test_so_they_are_of_what_heads_have_kept_of_a_text(monkeypatch) -> None:
    monkeypatch.setattr(repeating, "CHUNK_TOKENS", 61)
    cache = make_cache()
    seq = serve(cache, "knorm(keep=0.7, budgets=ada, shadow=false)")
    kept = kept_of(cache, seq)
    assert len(np.unique(kept.sum(axis=2))) > 1
    work = repetition(cache, seq)
    work.step(20)
    decode(cache, seq, 3)  # what comes meanwhile is not seen
    while work.left:
        work.step(50)
    wanted = definition(kept, 61)
    np.testing.assert_allclose(seq.reconstruction, wanted, atol=1e-4)
    assert (wanted[~kept] == 0).all()


def test_a_compressed_text_is_repeated_from_its_exact_copy() -> None:
    found = []
    for pipeline in ("full", "window(recent=64) | kivi(bits=2)"):
        cache = make_cache()
        seq = serve(cache, pipeline)
        work = repetition(cache, seq)
        while work.left:
            work.step(64)
        found.append(seq.reconstruction)
    np.testing.assert_array_equal(found[0], found[1])


def test_without_a_repetition_there_is_a_clear_error_and_nothing_changes() -> None:
    cache = make_cache()
    seq = serve(cache)
    with pytest.raises(ValueError, match="'kvzip': the model has not repeated this request's text yet"):
        cache.apply(seq, build("kvzip", cache.shape), Occasion.SWITCH)
    assert (cache.tables.length[seq.slot] == len(TEXT)).all()
    assert seq.shadow is None


def test_a_fork_shares_what_came_of_it_and_goes_its_own_way() -> None:
    cache = make_cache()
    seq = serve(cache)
    work = repetition(cache, seq)
    while work.left:
        work.step(500)
    fork = cache.fork(seq)
    cache.apply(fork, build("kvzip(keep=0.5)", cache.shape), Occasion.SWITCH)
    assert fork.reconstruction is seq.reconstruction
    assert (cache.tables.length[fork.slot] == 75).all()
    assert (cache.tables.length[seq.slot] == len(TEXT)).all()


# -- the words --------------------------------------------------------------------------------------------------------


def test_words_are_a_turn_of_the_chat_where_there_is_a_template_and_plain_text_elsewhere() -> None:
    loaded = tiny_loaded()
    read = loaded.tokenizer.decode
    words = Words.of(loaded)
    assert read(words.whole) == "\n[user]Repeat the previous context exactly.\n[assistant]"
    asked = words.ask(TEXT, 100)
    assert asked[: len(words.before)] == list(words.before)
    assert asked[len(words.before) :][:8] == TEXT[92:100]
    assert read(words.before).endswith("starting with ")
    assert read(words.after) == "\n[assistant]"
    loaded.tokenizer.chat_template = None
    assert read(Words.of(loaded).whole) == "\n\nRepeat the previous context exactly.\n\n"


def test_the_model_repeats_no_more_at_a_time_than_its_context_has_room_for() -> None:
    assert WORDS.chunk_tokens(100, 100_000) == 2048
    assert WORDS.chunk_tokens(100, 100 + WORDS.most + 70) == 70
    assert WORDS.chunk_tokens(100, 100 + WORDS.most + 63) == 0
    assert WORDS.chunk_tokens(10, 10 + WORDS.most + 10) == 10


# -- the engine -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step_tokens", [32, 400])
def test_output_does_not_depend_on_the_pieces_nor_on_neighbours(step_tokens: int) -> None:
    pipeline = "kvzip(keep=0.4) | kivi(bits=4)"
    alone = run(tiny_engine(), {"a": prompt(200)}, 40, pipeline=pipeline)["a"]
    drive = Drive(tiny_engine(step_tokens=step_tokens))
    drive.submit("other", prompt(30, 3), 200)
    drive.until(lambda: drive.generated("other") > 3)
    drive.submit("a", prompt(200), 40, pipeline=pipeline)
    drive.until(lambda: drive.generated("a") == 1)
    seq, told = drive.engine._live["a"], drive.generated("other")
    steps = 0
    while seq.phase is Phase.REPEAT:
        assert drive.generated("a") == 1  # the first token needs no pipeline, the second one does
        drive.engine.step()
        steps += 1
    assert drive.generated("other") - told == steps  # one a step, as ever
    assert steps >= 200 // step_tokens
    assert drive.finish()["a"].token_ids == alone.token_ids
    assert drive.engine.cache.host.used_bytes == 0


def test_a_switch_there_and_back_while_tokens_are_generated() -> None:
    drive = Drive(tiny_engine(step_tokens=48))
    drive.submit("a", prompt(200), 120)
    drive.until(lambda: drive.generated("a") == 20)
    answer = drive.order("a", "kvzip(keep=0.4)")
    generated = 20
    while not answer.done():
        drive.engine.step()
        generated += 1
        assert drive.generated("a") == generated  # it goes on meanwhile
    ack = answer.result(0).applied
    assert generated > 24
    assert ack.after.device_bytes < 0.6 * ack.before.device_bytes
    cache, seq = drive.engine.cache, drive.engine._live["a"].cache
    assert seq.evicted
    assert seq.reconstruction.shape[2] >= 219
    known = seq.reconstruction
    assert not drive.order("a", "full", epoch=2).exception(0)
    assert not seq.evicted
    assert cache.loss_class(seq, build("full", cache.shape)) is LossClass.EXACT
    assert drive.order("a", "kvzip(keep=0.3)", epoch=3).result(0).applied.to_pipeline == "kvzip(keep=0.3)"
    assert seq.reconstruction is known  # little has come since
    drive.order("a", "full", epoch=4).result(0)
    drive.until(lambda: seq.seen > 290)
    again = drive.order("a", "kvzip(keep=0.3)", epoch=5)
    drive.until(again.done)
    assert again.result(0).epoch == 5
    np.testing.assert_array_equal(seq.reconstruction[:, :, : known.shape[2]], known)  # only what is new was repeated
    assert seq.reconstruction.shape[2] > 285
    drive.finish()
    cache.prefixes.drop(1 << 40)
    assert (cache.device.used_bytes, cache.host.used_bytes) == (0, 0)


def test_tokens_generated_later_all_stay_and_are_not_repeated() -> None:
    drive = Drive(tiny_engine())
    drive.submit("a", prompt(200), 150, pipeline="kvzip(keep=0.4)")
    drive.until(lambda: drive.generated("a") == 140)
    seq = drive.engine._live["a"]
    assert seq.settled
    assert seq.cache.reconstruction.shape[2] == 200
    assert (drive.engine.cache.tables.length[seq.cache.slot] == 80 + seq.cache.seen - 200).all()
    assert drive.engine._switching.for_pressure(seq, build("kvzip(keep=0.4) | host(recent=32)", drive.engine.shape), "")
    assert (drive.engine.cache.tables.length[seq.cache.slot] == math.ceil(0.4 * seq.cache.seen)).all()
    drive.finish()


def test_a_newer_directive_a_deadline_and_the_end_put_an_end_to_it() -> None:
    drive = Drive(tiny_engine(step_tokens=16))
    drive.submit("a", prompt(200), 60)
    drive.until(lambda: drive.generated("a") == 2)
    first = drive.order("a", "kvzip")
    drive.engine.step()
    drive.engine.step()
    assert drive.engine._live["a"].to_repeat
    drive.order("a", "window(recent=64)", epoch=2).result(0)
    assert first.exception(0).problem.code == FAILED_PRECONDITION
    assert not drive.engine._live["a"].to_repeat
    late = drive.order("a", "kvzip", epoch=3, deadline_token=drive.generated("a") + 1)
    drive.until(late.done)
    assert "deadline" in str(late.exception(0))
    last = drive.order("a", "kvzip", epoch=4)
    drive.engine.step()
    drive.engine.step()
    drive.engine.cancel("a")
    drive.finish()
    assert "ended" in str(last.exception(0))
    drive.engine.cache.prefixes.drop(1 << 40)
    assert drive.engine.cache.device.used_bytes == 0


def test_another_pipeline_ordered_meanwhile_takes_effect_at_once() -> None:
    drive = Drive(tiny_engine(step_tokens=16))
    drive.submit("a", prompt(100), 20)
    drive.engine._intake.default_pipeline = build("kvzip", drive.engine.shape)
    drive.submit("b", prompt(100, 1), 20)
    drive.until(lambda: drive.generated("b") == 1)
    assert drive.engine._live["b"].phase is Phase.REPEAT
    drive.direct("b", "window(recent=32)")
    drive.engine.step()
    assert drive.engine._live["b"].phase is Phase.DECODE
    assert drive.engine._live["b"].cache.reconstruction is None
    assert (drive.engine.cache.tables.length[drive.engine._live["b"].cache.slot] == 36).all()
    drive.finish()


def test_models_without_words_or_room_refuse_by_name() -> None:
    loaded = tiny_loaded()
    engine = tiny_engine(type(loaded)(**{**loaded.__dict__, "tokenizer": None}))

    def submit(engine, tokens: int, **request) -> dict[str, str]:
        message = generation_pb2.GenerateRequest(token_ids=generation_pb2.TokenIds(ids=prompt(tokens)), **request)
        with pytest.raises(ProblemError) as refused:
            engine.submit(job_pb2.Job(job_id="j", request=message))
        assert refused.value.problem.code == INVALID_ARGUMENT
        return {violation.field: violation.description for violation in refused.value.problem.violations}

    assert "'kvzip'" in submit(engine, 100, pipeline="kvzip")["pipeline"]
    assert "no tokenizer" in submit(engine, 100, pipeline="kvzip | kivi")["pipeline"]
    tight = tiny_engine(max_context_tokens=300)
    assert "do not fit the context of 300" in submit(tight, 200, pipeline="kvzip")["pipeline"]
    replay = generation_pb2.Replay(at_tokens=[64], pipelines=["full", "kvzip"])
    assert "no tokenizer" in submit(engine, 200, replay=replay)["replay.pipelines[1]"]
    with pytest.raises(ValueError, match="default_pipeline 'kvzip'"):
        tiny_engine(type(loaded)(**{**loaded.__dict__, "tokenizer": None}), default_pipeline="kvzip")
    drive = Drive(tight)
    drive.submit("a", prompt(200), 10)
    drive.until(lambda: drive.generated("a") == 2)
    refused = drive.order("a", "kvzip").exception(0)
    assert refused.problem.code == FAILED_PRECONDITION
    assert "300" in str(refused)
    drive.finish()


def test_where_there_is_no_room_for_what_is_fed_again_the_request_goes_on_and_a_directive_is_refused(
    monkeypatch,
) -> None:
    def full(self: Repetition, most: int) -> None:
        raise TierFullError(self._cache.device.tier, 2, 1)

    plain = run(tiny_engine(), {"a": prompt(100)}, 40)["a"]
    monkeypatch.setattr(Repetition, "step", full)
    drive = Drive(tiny_engine())
    drive.submit("a", prompt(100), 40, pipeline="kvzip(keep=0.7)")
    drive.submit("b", prompt(100), 40)
    drive.until(lambda: drive.generated("b") == 3)
    assert not drive.engine._live["a"].settled
    refused = drive.order("b", "kvzip")
    drive.until(refused.done)
    assert refused.exception(0).problem.code == RESOURCE_EXHAUSTED
    assert drive.finish()["a"].token_ids == plain.token_ids
    monkeypatch.undo()
    drive.submit("c", prompt(100), 40, pipeline="kvzip(keep=0.7)")
    drive.finish()
    assert drive.outcomes["c"].finished.cache.shadow_bytes


def test_a_tight_device_serves_it_too_without_exceeding_its_budget() -> None:
    """Repetitions find no room now and then, or lose it to others; all requests finish, and nothing stays behind."""
    engine = tiny_engine(
        device_budget_bytes=400 << 10, host_budget_bytes=2 << 20, step_tokens=32, max_context_tokens=512
    )
    drive = Drive(engine)
    for index in range(5):
        drive.submit(f"r{index}", prompt(150, index), 40, pipeline="kvzip(keep=0.5)" if index % 2 else "")
    found = drive.finish()
    assert all(len(outcome.token_ids) == 40 for outcome in found.values())
    engine.cache.prefixes.drop(1 << 40)
    assert (engine.cache.device.used_bytes, engine.cache.host.used_bytes) == (0, 0)
    assert len(engine.cache._free_slots) == len(engine.cache.tables.length)


def test_a_replay_measures_it_as_a_request_that_is_switched_there_would_lose() -> None:
    engine = tiny_engine(step_tokens=64)
    drive = Drive(engine)
    drive.submit(
        "r",
        prompt(300),
        replay=generation_pb2.Replay(
            at_tokens=[128, 250],
            pipelines=["full", "kvzip(keep=0.5)", "kvzip(keep=1.0)"],
            measured_under=["full", "kvzip(keep=0.6)"],
        ),
    )
    events = [event.replayed for event in drive.finish()["r"].events if event.HasField("replayed")]
    assert [event.at_token for event in events] == [128, 250]
    for event in events:
        full, half, whole = event.pipelines
        assert full.divergence == whole.divergence == 0
        assert half.divergence > 0
        assert half.cache.device_bytes < 0.7 * full.cache.device_bytes
    assert engine.cache.device.used_bytes == 0
