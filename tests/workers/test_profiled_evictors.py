"""Evictors that go by the model's profile, worked out a second time: in float64, by loops and explicit matrices."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from tests.tiny import prompt
from tests.workers.test_evictors import (
    GROUP,
    HEADS,
    LAYERS,
    LOADED,
    PROMPT,
    Reference,
    decode,
    reference_of,
    serve,
    view,
)
from tests.workers.test_evictors import asked as asked  # a fixture
from workers.cache.kvcache import KVCache, Occasion
from workers.engine.attention import cache_shape
from workers.profile.measure import measure
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


def test_a_cache_without_the_profile_refuses_the_stage(asked) -> None:
    cache = make_cache()
    seq = serve(cache)
    before = cache.tables.position[seq.slot].copy()
    cache.profile = None
    with pytest.raises(ValueError, match="stage 'expected_attention': it needs the model's query statistics"):
        cache.apply(seq, build("expected_attention", cache.shape, PROFILE.names), Occasion.SWITCH)
    assert (cache.tables.position[seq.slot] == before).all()
    decode(cache, seq, 0)
