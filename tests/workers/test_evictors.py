"""What evictors go by, worked out a second time: from the model's own queries and keys, in float64, by loops.

The model runs under kvpilot, and once more over all tokens at once with transformers' own attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kernels.layout import BLOCK_TOKENS
from tests.tiny import prompt, tiny_loaded, tiny_model
from workers.cache.arrangement import tokens_of
from workers.cache.kvcache import KVCache
from workers.cache.sequence_cache import Occasion, SequenceCache
from workers.engine.attention import cache_shape
from workers.engine.runner import ModelRunner
from workers.stages.base import LayerView
from workers.stages.registry import build

WIDE = {"num_attention_heads": 6, "hidden_size": 96}  # 2 layers, 3 query heads to each of 2 KV heads, 16 channels
PROMPT, STEPS = 200, 21
TOKENS = prompt(PROMPT + STEPS, seed=5)
SEEN = len(TOKENS)
LAYERS, HEADS, GROUP = 2, 2, 3
LOADED = tiny_loaded(**WIDE)


@pytest.fixture(scope="module")
def asked() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The model's queries [L, H, G, T, D], keys and values [L, H, T, D] of all tokens, in float64."""
    heard: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def listen(module, query, key, value, mask, **kwargs):
        heard.append((query[0].double(), key[0].double(), value[0].double()))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("listening", listen)
    with torch.inference_mode():
        tiny_model(attention="listening", **WIDE)(input_ids=torch.tensor([TOKENS]), use_cache=False)
    queries, keys, values = (torch.stack(part) for part in zip(*heard, strict=True))
    return queries.unflatten(1, (HEADS, GROUP)), keys, values


def make_cache() -> KVCache:
    shape = cache_shape(LOADED.model.config, torch.float32)
    return KVCache(shape, 8 << 20, 8 << 20, 3, 512, "m", torch.device("cpu"), "cpu")


def serve(cache: KVCache, pipeline: str = "full", chunk: int = PROMPT, steps: int = STEPS) -> SequenceCache:
    """Computes the prompt in chunks, applies a pipeline, and decodes."""
    runner, seq = ModelRunner(LOADED, cache), cache.open(512)
    cache.reuse_prefix(seq, TOKENS[:PROMPT])
    while seq.seen < PROMPT:
        count = min(chunk, PROMPT - seq.seen)
        cache.reserve(seq, count)
        runner.prefill(seq, TOKENS[seq.seen : seq.seen + count], PROMPT, all_queries=True)
    cache.apply(seq, build(pipeline, cache.shape), Occasion.PROMPT)
    decode(cache, seq, steps)
    return seq


def decode(cache: KVCache, seq: SequenceCache, steps: int) -> None:
    for _ in range(steps):
        cache.reserve(seq, 1)
        ModelRunner(LOADED, cache).decode([seq], [TOKENS[seq.seen]])


def view(cache: KVCache, seq: SequenceCache, layer: int) -> LayerView:
    cache.settle(seq)
    return cache.views(seq, tokens_of(cache.tables, seq.slot)).layer(layer)


# -- the queries ------------------------------------------------------------------------------------------------------


def check_queries(cache: KVCache, seq: SequenceCache, queries: torch.Tensor, positions: range) -> None:
    for layer in range(LAYERS):
        noted, at = cache.recent.read(seq.slot, layer, BLOCK_TOKENS)
        assert at.tolist() == list(positions)
        wanted = queries[layer, :, :, positions.start : positions.stop].flatten(0, 1).float()
        torch.testing.assert_close(noted, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk", [PROMPT, 27])
@pytest.mark.parametrize("steps", [0, 1, STEPS])
def test_noted_queries_are_the_models_own(asked, chunk: int, steps: int) -> None:
    cache = make_cache()
    seq = serve(cache, chunk=chunk, steps=steps)
    check_queries(cache, seq, asked[0], range(seq.seen - BLOCK_TOKENS, seq.seen))
    last, at = cache.recent.read(seq.slot, 1, 5)
    assert at.tolist() == list(range(seq.seen - 5, seq.seen))
    assert torch.equal(last, cache.recent.read(seq.slot, 1, BLOCK_TOKENS)[0][:, -5:])


def test_of_a_prompt_that_came_from_a_prefix_only_what_was_computed_is_noted(asked) -> None:
    cache = make_cache()
    cache.publish(serve(cache, steps=0), TOKENS[:PROMPT])
    seq = serve(cache, steps=3)
    assert seq.prefix
    check_queries(cache, seq, asked[0], range(192, PROMPT + 3))  # 6 blocks were there


def test_a_fork_begins_with_its_originals_queries_and_goes_its_own_way(asked) -> None:
    cache = make_cache()
    seq = serve(cache, steps=4)
    fork = cache.fork(seq)
    decode(cache, fork, 5)
    check_queries(cache, seq, asked[0], range(seq.seen - BLOCK_TOKENS, seq.seen))
    check_queries(cache, fork, asked[0], range(fork.seen - BLOCK_TOKENS, fork.seen))


def test_a_slot_that_is_used_again_knows_nothing_of_the_request_before(asked) -> None:
    cache = make_cache()
    seq = serve(cache)
    cache.close(seq)
    again = cache.open(512)
    assert again.slot == seq.slot
    with pytest.raises(KeyError):
        cache.recent.read(again.slot, 0, 1)
    cache.reserve(again, 7)
    ModelRunner(LOADED, cache).prefill(again, TOKENS[:7], 7, all_queries=False)
    check_queries(cache, again, asked[0], range(7))


# -- the scores -------------------------------------------------------------------------------------------------------


class Reference:
    """One layer's tokens, head by head, and what queries pay them; positions name tokens."""

    def __init__(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, kept: list[list[int]], seen: int
    ) -> None:
        self.queries = queries.numpy()  # [H, G, T, D]
        self.keys = keys.numpy()  # [H, T, D]
        self.values = values.numpy()  # [H, T, D]
        self.kept = kept
        self.seen = seen

    def pays(self, head: int, query: int, asker: int) -> dict[int, float]:
        """The shares of one query's attention, over the kept tokens that it sees."""
        seen = [token for token in self.kept[head] if token <= asker]
        scores = [float(self.queries[head, query, asker] @ self.keys[head, t]) / math.sqrt(16) for t in seen]
        weights = [math.exp(score - max(scores)) for score in scores]
        return {token: weight / sum(weights) for token, weight in zip(seen, weights, strict=True)}

    def received(self, head: int, askers: range) -> np.ndarray:
        """[G, askers, tokens]"""
        table = np.zeros((GROUP, len(askers), len(self.kept[head])))
        for query in range(GROUP):
            for row, asker in enumerate(askers):
                shares = self.pays(head, query, asker)
                table[query, row] = [shares.get(token, 0.0) for token in self.kept[head]]
        return table

    def last(self, count: int) -> range:
        return range(self.seen - count, self.seen)


def knorm(of: Reference, head: int) -> list[float]:
    return [-math.sqrt(sum(x * x for x in of.keys[head, token])) for token in of.kept[head]]


def qhitter(of: Reference, head: int) -> list[float]:
    mass = of.received(head, range(of.seen)).sum(axis=(0, 1))
    found = []
    for place, token in enumerate(of.kept[head]):
        lost = length = 0.0
        for x in (of.keys[head, token], of.values[head, token]):
            steps = [(min(x[at : at + 32]), max(x[at : at + 32])) for at in range(0, len(x), 32)]
            for channel, number in enumerate(x):
                low, high = steps[channel // 32]
                near = low + round((number - low) / (high - low) * 15) * (high - low) / 15
                lost, length = lost + (number - near) ** 2, length + number**2
        found.append(mass[place] / max(mass) / (1 + 100 * math.sqrt(lost / length)))
    return found


def keydiff(of: Reference, head: int) -> list[float]:
    units = [of.keys[head, token] / math.sqrt(of.keys[head, token] @ of.keys[head, token]) for token in of.kept[head]]
    anchor = sum(units) / len(units)
    return [-float(unit @ anchor) / math.sqrt(anchor @ anchor) for unit in units]


def dilated(of: Reference, head: int) -> list[float]:
    def stays(token: int) -> bool:
        age, distance, interval = of.seen - 1 - token, 64, 1
        while age >= distance:
            distance, interval = 2 * distance, 2 * interval
        return token % interval == 0

    return [float(stays(token)) for token in of.kept[head]]


def tova(of: Reference, head: int) -> list[float]:
    paid = [of.pays(each, query, of.seen - 1) for each in range(HEADS) for query in range(GROUP)]
    return [sum(shares.get(token, 0.0) for shares in paid) / len(paid) for token in of.kept[head]]


def morphkv(of: Reference, head: int) -> list[float]:
    return of.received(head, of.last(32)).sum(axis=(0, 1)).tolist()


def morphkv_max(of: Reference, head: int) -> list[float]:
    return of.received(head, of.last(32)).sum(axis=0).max(axis=0).tolist()


def scissorhands(of: Reference, head: int) -> list[float]:
    low = dict.fromkeys(of.kept[head], 0)
    for query in range(GROUP):
        for asker in of.last(32):
            shares = of.pays(head, query, asker)
            for token in low:
                low[token] += shares.get(token, 0.0) < 1 / len(shares)
    return [-float(count) for count in low.values()]


def hashevict(of: Reference, head: int, layer: int) -> list[float]:
    planes = torch.randn(16, 16, generator=torch.Generator().manual_seed(layer)).double().numpy()
    asked = [of.queries[head, query, of.seen - 1] @ planes > 0 for query in range(GROUP)]
    stored = [of.keys[head, token] @ planes > 0 for token in of.kept[head]]
    return [-sum(int((key != query).sum()) for query in asked) / GROUP for key in stored]


def rkv(of: Reference, head: int) -> list[float]:
    kept = of.kept[head]
    units = [of.keys[head, token] / np.linalg.norm(of.keys[head, token]) for token in kept]
    cosine = np.array([[0.0 if i == j else float(a @ b) for j, b in enumerate(units)] for i, a in enumerate(units)])
    for row in cosine:
        alike = [j for j, value in enumerate(row) if value > 0.5]
        if alike:
            row[alike[-1]] = 0.0
    likeness = np.exp(cosine.sum(axis=0) / len(kept))
    importance = of.received(head, of.last(8)).max(axis=0).mean(axis=0)
    return (0.1 * importance - 0.9 * likeness / likeness.sum()).tolist()


def nacl(of: Reference, head: int, layer: int) -> list[float]:
    scores = of.received(head, of.last(32)).mean(axis=0).sum(axis=0)
    certain = round(0.7 * (math.ceil(of.seen / 2) - 32))
    old = [place for place, token in enumerate(of.kept[head]) if token < of.seen - 32]
    best = sorted(old, key=lambda place: -scores[place])[:certain]
    uniform = torch.rand(of.seen, HEADS, generator=torch.Generator().manual_seed(layer)).double().numpy()
    gumbel = -np.log(-np.log(uniform[:, head]))
    return [
        score + (1000 if place in best else gumbel[token])
        for place, (token, score) in enumerate(zip(of.kept[head], scores, strict=True))
    ]


BY_LAYER = {"hashevict", "nacl"}
"""Those whose random numbers depend on the layer."""
SCORES: dict[str, Callable[..., list[float]]] = {
    "knorm": knorm,
    "keydiff": keydiff,
    "qhitter": qhitter,
    "dilated(recent=64)": dilated,
    "tova(size=64)": tova,
    "morphkv(size=64)": morphkv,
    "morphkv(size=64, fuse=max)": morphkv_max,
    "scissorhands": scissorhands,
    "hashevict": hashevict,
    "nacl": nacl,
    "rkv(size=64)": rkv,
    "h2o": lambda of, head: of.received(head, range(of.seen)).sum(axis=(0, 1)).tolist(),
    "window(recent=64)": lambda of, head: [float(token) for token in of.kept[head]],
}


def reference_of(asked, cache: KVCache, seq: SequenceCache, layer: int) -> Reference:
    tables = cache.tables
    lengths = tables.length[seq.slot, layer]
    kept = [tables.position[seq.slot, layer, head, : lengths[head]].tolist() for head in range(HEADS)]
    return Reference(*(part[layer] for part in asked), kept, seq.seen)


@pytest.mark.parametrize("chunk", [PROMPT, 27])
@pytest.mark.parametrize("text", SCORES)
def test_scores_and_what_is_kept_are_those_of_the_definition(asked, text: str, chunk: int) -> None:
    cache = make_cache()
    seq = serve(cache, chunk=chunk)
    check_scores(asked, cache, seq, text)


@pytest.mark.parametrize("text", [text for text in SCORES if text not in ("h2o", "qhitter")])
def test_so_are_those_over_heads_that_kept_different_tokens(asked, text: str) -> None:
    """Later queries come from what was kept, so the last ones are taken as they were noted."""
    cache = make_cache()
    seq = serve(cache, "knorm(keep=0.75, budgets=ada, shadow=false)", steps=0)
    assert len(np.unique(cache.tables.length[seq.slot])) > 1
    check_scores(asked, cache, seq, text)


def test_snapkv_pools_what_the_last_64_queries_of_the_prompt_pay(asked) -> None:
    cache = make_cache()
    seq = serve(cache, chunk=27, steps=0)
    for layer in range(LAYERS):
        got = build("snapkv", cache.shape).evictor.score(view(cache, seq, layer))
        of = reference_of(asked, cache, seq, layer)
        for head in range(HEADS):
            votes = of.received(head, of.last(64)).sum(axis=(0, 1))
            wanted = [votes[max(0, token - 2) : token + 3].mean() for token in range(PROMPT)]
            np.testing.assert_allclose(got[head].numpy(), wanted, atol=1e-4, rtol=2**-10)  # votes are float16


def test_nacl_draws_by_the_softmax_of_the_scores(asked) -> None:
    """Over many seeds, one draw falls on each token as often as its odds say."""
    cache = make_cache()
    seq = serve(cache, steps=0)
    of, seen = reference_of(asked, cache, seq, 0), view(cache, seq, 0)
    odds = np.exp(of.received(0, of.last(32)).mean(axis=0).sum(axis=0)[: PROMPT - 32])
    odds /= odds.sum()
    found, draws = np.zeros(PROMPT - 32), 4000
    for seed in range(draws):
        score = build(f"nacl(drawn=1, seed={seed})", cache.shape).evictor.score(seen)
        found[int(score[0, : PROMPT - 32].argmax())] += 1
    assert (np.abs(found - draws * odds) <= 4.5 * np.sqrt(draws * odds * (1 - odds)) + 1).all()


def check_scores(asked, cache: KVCache, seq: SequenceCache, text: str) -> None:
    evictor = build(text, cache.shape).evictor
    sinks, recent = evictor.protected(seq.seen)
    wanted_kept = {}
    for layer in range(LAYERS):
        of = reference_of(asked, cache, seq, layer)
        got = evictor.score(view(cache, seq, layer)).double()
        for head in range(HEADS):
            kept = of.kept[head]
            wanted = SCORES[text](of, head, layer) if text in BY_LAYER else SCORES[text](of, head)
            torch.testing.assert_close(
                got[head, : len(kept)], torch.tensor(wanted, dtype=torch.float64), atol=1e-4, rtol=1e-4
            )
            safe = [token for token in kept if token < sinks or token >= seq.seen - recent]
            others = sorted(set(kept) - set(safe), key=lambda t: (wanted[kept.index(t)], t), reverse=True)
            room = max(evictor.budget(seq.seen), sinks + recent) - len(safe)
            wanted_kept[layer, head] = sorted(safe + others[:room])
    cache.apply(seq, build(text, cache.shape), Occasion.SWITCH)
    for (layer, head), tokens in wanted_kept.items():
        assert reference_of(asked, cache, seq, layer).kept[head] == tokens
