"""Evictors that go by the model's profile, worked out a second time: in float64, by loops and explicit matrices."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from tests.tiny import prompt
from tests.workers.test_evictors import GROUP, HEADS, LAYERS, LOADED, PROMPT, Reference, reference_of, serve, view
from tests.workers.test_evictors import asked as asked  # a fixture
from workers.cache.accounting import CacheUse
from workers.cache.kvcache import KVCache
from workers.cache.sequence_cache import Occasion, SequenceCache
from workers.engine.attention import cache_shape
from workers.engine.runner import ModelRunner
from workers.expected import expected_use
from workers.profile.measure import measure
from workers.stages.base import Pipeline
from workers.stages.registry import build

DIM = 16
PROFILE = measure(LOADED, [prompt(400, seed=seed) for seed in range(2)], "0" * 64)


def make_cache() -> KVCache:
    shape = cache_shape(LOADED.model.config, torch.float32)
    return KVCache(shape, 8 << 20, 8 << 20, 3, 512, "m", torch.device("cpu"), "cpu", PROFILE)


def turn(position: int) -> np.ndarray:
    """The rotation of a position as a matrix [D, D]."""
    found = np.zeros((DIM, DIM))
    for channel in range(DIM // 2):
        angle = position / 10000 ** (2 * channel / DIM)
        pair = channel, channel + DIM // 2
        found[np.ix_(pair, pair)] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    return found


def expected_attention(of: Reference, layer: int, head: int, values: np.ndarray, epsilon: float) -> list[float]:
    """Of kept tokens, given their values [kept, D]."""
    mean_turn = sum(turn(of.seen + step) for step in range(512)) / 512
    weights = np.zeros(len(of.kept[head]))
    for query in range(GROUP):
        asking = head * GROUP + query
        mu = mean_turn @ PROFILE.tensor("query_mean")[layer, asking].double().numpy()
        sigma = mean_turn @ PROFILE.tensor("query_cov")[layer, asking].double().numpy() @ mean_turn.T
        expected = []
        for token in of.kept[head]:
            key = of.keys[head, token]
            expected.append(mu @ key / math.sqrt(DIM) + key @ sigma @ key / (2 * DIM))
        shares = [math.exp(value) if token >= 4 else 0.0 for token, value in zip(of.kept[head], expected, strict=True)]
        weights += np.array(shares) / sum(shares) / GROUP
    return [(weight + epsilon) * np.linalg.norm(v) for weight, v in zip(weights, values, strict=True)]


@pytest.mark.parametrize("epsilon", [0.0, 0.02])
@pytest.mark.parametrize("before", ["full", "knorm(keep=0.75, budgets=ada, shadow=false)"])
def test_expected_attention_is_the_definition(asked, before: str, epsilon: float) -> None:
    """Over all tokens, and over heads that kept different ones."""
    cache = make_cache()
    seq = serve(cache, before, steps=0 if before != "full" else 21)
    pipeline = build(f"expected_attention(keep=0.4, epsilon={epsilon})", cache.shape, PROFILE.names)
    wanted_kept = {}
    for layer in range(LAYERS):
        of, seen = reference_of(asked, cache, seq, layer), view(cache, seq, layer)
        got, values = pipeline.evictor.score(seen).double().numpy(), seen.read()[1].double().numpy()
        for head in range(HEADS):
            kept = of.kept[head]
            wanted = expected_attention(of, layer, head, values[head, : len(kept)], epsilon)
            np.testing.assert_allclose(got[head, : len(kept)], wanted, atol=1e-4, rtol=1e-4)
            safe = [token for token in kept if token < 4 or token >= seq.seen - 32]
            others = sorted(set(kept) - set(safe), key=lambda t: (got[head, kept.index(t)], t), reverse=True)
            wanted_kept[layer, head] = sorted(safe + others[: math.ceil(0.4 * seq.seen) - len(safe)])
    cache.apply(seq, pipeline, Occasion.SWITCH)
    for (layer, head), tokens in wanted_kept.items():
        assert reference_of(asked, cache, seq, layer).kept[head] == tokens


def test_expected_attention_follows_the_model_where_queries_agree() -> None:
    """With one certain query and none of the future beyond it, expected attention is that query's attention."""
    cache = make_cache()
    seq = serve(cache, steps=0)
    seen = view(cache, seq, 0)
    tensors = dict(PROFILE.tensors) | {"query_cov": torch.zeros_like(PROFILE.tensor("query_cov"))}
    certain = dataclasses.replace(PROFILE, tensors=tensors).layer(0)
    got = build("expected_attention", cache.shape, PROFILE.names).evictor.score(
        dataclasses.replace(seen, profile=certain)
    )
    asks = sum(turn(PROMPT + step) for step in range(512)) / 512
    keys, values = (part.double().numpy() for part in seen.read())
    for head in range(HEADS):
        shares = np.zeros(PROMPT)
        for query in range(head * GROUP, (head + 1) * GROUP):
            scores = keys[head] @ (asks @ certain.tensor("query_mean")[query].double().numpy()) / math.sqrt(DIM)
            weight = np.exp(scores - scores.max()) * (np.arange(PROMPT) >= 4)
            shares += weight / weight.sum() / GROUP
        np.testing.assert_allclose(got[head].numpy(), shares * np.linalg.norm(values[head], axis=1), atol=1e-4)


# -- heads of their own ----------------------------------------------------------------------------------------------


def ranked(name: str) -> list[tuple[int, int]]:
    """(layer, head) of a tensor [L, heads], the greatest first, the earlier ones among equals."""
    tensor = PROFILE.tensor(name)
    places = [(layer, head) for layer in range(tensor.shape[0]) for head in range(tensor.shape[1])]
    return sorted(places, key=lambda place: (-float(tensor[place]), place))


def near(seen: int, sinks: int, recent: int) -> list[int]:
    return [token for token in range(seen) if token < sinks or token >= seen - recent]


@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_duo_keeps_everything_of_the_heads_that_retrieve_most(asked, count: int) -> None:
    cache = make_cache()
    seq = serve(cache)
    text = f"duo(share={count / (LAYERS * HEADS)}, sinks=8, recent=40)"
    check_heads(asked, cache, seq, text, set(ranked("retrieval")[:count]), 8, 40)


@pytest.mark.parametrize(("echo", "induction"), [(1, 0), (0, 2), (1, 1), (0, 0), (3, 4)])
def test_razor_keeps_everything_of_echo_and_induction_heads(asked, echo: int, induction: int) -> None:
    cache = make_cache()
    seq = serve(cache)
    asking = LAYERS * HEADS * GROUP
    text = f"razor(echo={echo / asking}, induction={induction / asking}, recent=32)"
    best = ranked("echo")[:echo] + ranked("induction")[:induction]
    full = {(layer, query // GROUP) for layer, query in best}
    check_heads(asked, cache, seq, text, full, 4, math.ceil(seq.seen / 5))


def check_heads(
    asked, cache: KVCache, seq: SequenceCache, text: str, full: set[tuple[int, int]], sinks: int, recent: int
) -> None:
    """Right after a switch, foretold to the byte, and when 32 more tokens have come."""
    pipeline = build(text, cache.shape, PROFILE.names)
    cache.apply(seq, pipeline, Occasion.SWITCH)
    for layer in range(LAYERS):
        for head in range(HEADS):
            kept = reference_of(asked, cache, seq, layer).kept[head]
            wanted = list(range(seq.seen)) if (layer, head) in full else near(seq.seen, sinks, recent)
            assert kept == wanted
    told, found = expected_use(pipeline, cache.shape, seq.seen, PROFILE), cache.use(seq)
    assert dataclasses.replace(found, **peaks(told)) == told
    before = seq.seen
    for token in prompt(32, seed=9):
        cache.reserve(seq, 1)
        ModelRunner(LOADED, cache).decode([seq], [token])
    cache.apply(seq, pipeline, Occasion.SETTLE)
    window = max(recent, math.ceil(seq.seen / 5)) if text.startswith("razor") else recent
    for layer in range(LAYERS):
        for head in range(HEADS):
            length = cache.tables.length[seq.slot, layer, head]
            kept = cache.tables.position[seq.slot, layer, head, :length].tolist()
            still = near(seq.seen, sinks, window)
            gone = set(range(before)) - set(near(before, sinks, recent))
            wanted = list(range(seq.seen)) if (layer, head) in full else still
            assert kept == [token for token in wanted if (layer, head) in full or token not in gone]


def peaks(use: CacheUse) -> dict[str, int]:
    return {field.name: getattr(use, field.name) for field in dataclasses.fields(use) if field.name.startswith("peak")}


def fastgen(
    kept: list[int], seen: int, paid: np.ndarray, recovered: float, mass: dict[int, float]
) -> tuple[int, set[int]]:
    """Which of the rules, and what it keeps; ``paid`` [G, 32, kept] is what the last queries pay."""
    special = {token for token in kept if token < 4 or token >= seen - 32}
    local = {token for token in kept if token >= seen - math.ceil(0.3 * seen)}
    most = set(sorted(kept, key=lambda token: (-mass[token], token))[: math.ceil(0.3 * seen)])
    for number, rule in enumerate((special, special | local, special | most, special | local | most)):
        there = [place for place, token in enumerate(kept) if token in rule]
        if min(sum(sum(row[place] for place in there) for row in query) / len(query) for query in paid) >= recovered:
            return number, rule
    return 4, set(kept)


@pytest.mark.parametrize("before", ["full", "knorm(keep=0.75, budgets=ada, shadow=false)"])
def test_fastgen_takes_the_cheapest_rule_that_recovers_enough(asked, before: str) -> None:
    used, paid = set(), {}
    for recovered in (0.05, 0.3, 0.37, 0.42, 0.55, 0.65, 0.75, 0.85, 0.95):
        cache = make_cache()
        seq = serve(cache, before, steps=0)
        pipeline, wanted = build(f"fastgen(recovered={recovered})", cache.shape), {}
        for layer in range(LAYERS):
            of, seen = reference_of(asked, cache, seq, layer), view(cache, seq, layer)
            for head, kept in enumerate(of.kept):
                if (layer, head) not in paid:
                    paid[layer, head] = of.received(head, of.last(32))
                mass = dict(zip(kept, seen.mass[head].tolist(), strict=False))
                rule, wanted[layer, head] = fastgen(kept, seq.seen, paid[layer, head], recovered, mass)
                used.add(rule)
        cache.apply(seq, pipeline, Occasion.SWITCH)
        for (layer, head), tokens in wanted.items():
            assert reference_of(asked, cache, seq, layer).kept[head] == sorted(tokens)
        most = expected_use(pipeline, cache.shape, seq.seen)
        assert cache.use(seq).device_bytes <= most.device_bytes == most.full_bytes
    assert used == set(range(5))


def test_a_stage_that_says_no_number_for_its_heads_is_told(asked) -> None:
    class Silent(type(build("knorm", make_cache().shape).evictor)):  # type: ignore[misc]
        rule = "per-head"

    cache = make_cache()
    seq = serve(cache, steps=0)
    with pytest.raises(NotImplementedError, match="stage 'knorm' does not say how many tokens each head keeps"):
        cache.apply(seq, Pipeline((Silent(),)), Occasion.SWITCH)


def test_bytes_are_not_foretold_without_the_profile() -> None:
    shape = make_cache().shape
    with pytest.raises(ValueError, match="stage 'duo': it needs the model's retrieval heads"):
        expected_use(build("duo", shape, PROFILE.names), shape, 100)


def test_a_cache_without_the_profile_refuses_the_stage(asked) -> None:
    cache = make_cache()
    seq = serve(cache)
    before = cache.tables.position[seq.slot].copy()
    cache.profile = None
    with pytest.raises(ValueError, match="stage 'expected_attention': it needs the model's query statistics"):
        cache.apply(seq, build("expected_attention", cache.shape, PROFILE.names), Occasion.SWITCH)
    assert (cache.tables.position[seq.slot] == before).all()
