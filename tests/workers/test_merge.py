"""Merging: what evicted tokens become part of, worked out a second time by loops in float64; what may not change."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from kernels.layout import Format
from tests.tiny import Drive, prompt, tiny_engine, tiny_loaded
from workers.cache.arena import TierFullError
from workers.cache.kvcache import KVCache
from workers.cache.sequence_cache import Occasion, SequenceCache
from workers.engine.attention import cache_shape
from workers.engine.runner import ModelRunner
from workers.stages.base import LossClass
from workers.stages.registry import build

LAYERS, HEADS, DIM = 2, 2, 16
LOADED = tiny_loaded()
TEXT = prompt(200, seed=5)
METHODS = {
    "cam": "merge(keep=0.4, method=cam)",
    "d2o": "merge(keep=0.4, method=d2o)",
    "ada": "merge(keep=0.4, method=cam, budgets=ada)",
}
every_method = pytest.mark.parametrize("text", METHODS.values(), ids=METHODS)


def make_cache(device_bytes: int = 8 << 20, host_bytes: int = 8 << 20) -> KVCache:
    shape = cache_shape(LOADED.model.config, torch.float32)
    return KVCache(shape, device_bytes, host_bytes, 3, 512, "m", torch.device("cpu"), "cpu")


def serve(cache: KVCache) -> SequenceCache:
    seq = cache.open(512)
    cache.reserve(seq, len(TEXT))
    ModelRunner(LOADED, cache).prefill(seq, TEXT, len(TEXT), all_queries=True)
    return seq


def decode(cache: KVCache, seq: SequenceCache, steps: int) -> None:
    for token_id in prompt(steps, seed=seq.seen):
        cache.reserve(seq, 1)
        ModelRunner(LOADED, cache).decode([seq], [token_id])


@dataclass
class Head:
    """One table: its tokens by position."""

    position: list[int]
    k: dict[int, np.ndarray]
    v: dict[int, np.ndarray]
    mass: dict[int, float]


def look(cache: KVCache, seq: SequenceCache) -> dict[tuple[int, int], Head]:
    """Every table of a request, dequantised where need be."""
    cache.settle(seq)
    found = {}
    for layer in range(LAYERS):
        k, v = (part.double().numpy() for part in cache.context(seq).read(layer))
        for head in range(HEADS):
            where = (seq.slot, layer, head)
            position = cache.tables.position[where][: cache.tables.length[where]].tolist()
            found[layer, head] = Head(
                position,
                {t: k[head, i] for i, t in enumerate(position)},
                {t: v[head, i] for i, t in enumerate(position)},
                {t: float(cache.tables.mass[where][i]) for i, t in enumerate(position)},
            )
    return found


def cam(old: Head, gone: list[int], into: list[int], layer: int, head: int, seen: int) -> Head:
    lots = torch.rand(seen, HEADS, generator=torch.Generator().manual_seed(layer))
    v = dict(old.v)
    for token in gone:
        following = [t for t in into if t > token][:32]
        mean = sum(old.mass[t] for t in following) / len(following) if following else 0
        if following and mean and float(lots[token, head]) < min(1.0, old.mass[token] / mean):
            for t in following:
                v[t] = v[t] + old.v[token] / len(following)
    return Head(old.position, old.k, v, old.mass)


def d2o(old: Head, gone: list[int], into: list[int], threshold: list[float]) -> Head:
    def cosine(a: int, b: int) -> float:
        return float(old.k[a] @ old.k[b] / np.linalg.norm(old.k[a]) / np.linalg.norm(old.k[b]))

    nearest = {token: max(into, key=lambda t: cosine(token, t)) for token in gone}
    likeness = {token: cosine(token, nearest[token]) for token in gone}
    joined: dict[int, list[int]] = {t: [] for t in into}
    if not threshold:
        threshold.append(sum(likeness.values()) / len(likeness))
        for token in gone:
            if likeness[token] >= threshold[0]:
                joined[nearest[token]].append(token)
    else:
        for token in gone:
            threshold[0] = 0.7 * likeness[token] + 0.3 * threshold[0]
            if likeness[token] >= threshold[0]:
                joined[nearest[token]].append(token)
    k, v = dict(old.k), dict(old.v)
    for t, others in joined.items():
        total = math.e + sum(math.exp(likeness[o]) for o in others)
        k[t] = (math.e * old.k[t] + sum(math.exp(likeness[o]) * old.k[o] for o in others)) / total
        v[t] = (math.e * old.v[t] + sum(math.exp(likeness[o]) * old.v[o] for o in others)) / total
    return Head(old.position, k, v, old.mass)


def check(old: dict, new: dict, text: str, seen: int, thresholds: dict, tolerance: float = 1e-4) -> int:
    """The tables after an eviction, against their definition from those before. Returns how many tokens changed."""
    changed = 0
    evictor = build(text.split(" | ")[0], cache_shape(LOADED.model.config, torch.float32)).evictor
    _, recent = evictor.protected(seen)
    for (layer, head), was in old.items():
        now = new[layer, head]
        if "ada" not in text:
            older = sorted((t for t in was.position if t < seen - recent), key=lambda t: (-was.mass[t], -t))
            free = evictor.budget(seen) - recent
            assert now.position == sorted(older[:free] + [t for t in was.position if t >= seen - recent])
        gone = [t for t in was.position if t not in set(now.position)]
        into = [t for t in now.position if t < seen - 32]
        if "d2o" in text:
            wanted = d2o(was, gone, into, thresholds.setdefault((layer, head), []))
        else:
            wanted = cam(was, gone, into, layer, head, seen)
        for t in now.position:
            np.testing.assert_allclose(now.k[t], wanted.k[t], atol=tolerance, rtol=1e-4)
            np.testing.assert_allclose(now.v[t], wanted.v[t], atol=tolerance, rtol=1e-4)
            changed += bool((wanted.v[t] != was.v[t]).any())
        for t in [t for t in now.position if t >= seen - 32]:
            assert (now.v[t] == was.v[t]).all()
    return changed


@every_method
def test_what_stays_holds_what_the_definition_says(text: str) -> None:
    cache, thresholds = make_cache(), {}
    seq = serve(cache)
    old = look(cache, seq)
    cache.apply(seq, build(text, cache.shape), Occasion.PROMPT)
    assert check(old, look(cache, seq), text, seq.seen, thresholds) > 40
    for _ in range(3):
        decode(cache, seq, 32 - seq.seen % 32)
        old = look(cache, seq)
        cache.apply(seq, build(text, cache.shape), Occasion.SETTLE)
        assert check(old, look(cache, seq), text, seq.seen, thresholds)


@every_method
def test_so_it_does_in_compressed_blocks_which_the_exact_copy_does_not_undo(text: str) -> None:
    """Dequantised, merged and rounded anew: int8's steps here are below 0.1."""
    text += " | int8"
    cache, thresholds = make_cache(), {}
    seq = serve(cache)
    old = look(cache, seq)
    cache.apply(seq, build(text, cache.shape), Occasion.PROMPT)
    assert (cache.tables.format[seq.slot, :, :, 0] == Format.INT8).all()
    check(old, look(cache, seq), text, seq.seen, thresholds, tolerance=0.1)
    originals = old
    for _ in range(3):
        decode(cache, seq, 32 - seq.seen % 32)
        old = look(cache, seq)
        cache.apply(seq, build(text, cache.shape), Occasion.SETTLE)
        new = look(cache, seq)
        check(old, new, text, seq.seen, thresholds, tolerance=0.1)
    merged, far = seq.merging.merged, 0
    for (layer, head), was in originals.items():
        for t in new[layer, head].position:
            if t < len(TEXT) and merged[layer, head, t]:
                far += bool(np.abs(new[layer, head].v[t] - was.v[t]).max() > 0.2)
    assert far > 10


@every_method
@pytest.mark.parametrize("more", ["", " | kivi(bits=4)", " | host(recent=32)"])
def test_a_switch_back_brings_the_exact_values_and_a_second_one_the_same_merged_ones(text: str, more: str) -> None:
    cache = make_cache()
    seq = serve(cache)
    before = look(cache, seq)
    cache.apply(seq, build(text + more, cache.shape), Occasion.SWITCH)
    once = look(cache, seq)
    assert seq.merging is not None
    for _ in range(2):
        cache.apply(seq, build("full", cache.shape), Occasion.SWITCH)
        back = look(cache, seq)
        for place, was in before.items():
            assert back[place].position == was.position
            for t in was.position:
                assert (back[place].k[t] == was.k[t]).all()
                assert (back[place].v[t] == was.v[t]).all()
        assert seq.merging is None
        assert seq.shadow is None
        cache.apply(seq, build(text + more, cache.shape), Occasion.SWITCH)
        again = look(cache, seq)
        assert all((again[p].v[t] == once[p].v[t]).all() for p in once for t in once[p].position)
    cache.close(seq)
    assert (cache.device.used_bytes, cache.host.used_bytes) == (0, 0)


@every_method
def test_rows_that_others_share_are_never_written(text: str) -> None:
    cache = make_cache()
    mine = serve(cache)
    cache.publish(mine, TEXT)
    other = cache.open(512)
    assert cache.reuse_prefix(other, TEXT) == 192
    before = look(cache, other)
    cache.apply(mine, build(text.replace("keep=0.4", "keep=0.9"), cache.shape), Occasion.SWITCH)
    fork = cache.fork(other)
    cache.apply(fork, build(text, cache.shape), Occasion.SWITCH)
    after = look(cache, other)
    for place, was in before.items():
        assert all((after[place].k[t] == was.k[t]).all() for t in was.position)
        assert all((after[place].v[t] == was.v[t]).all() for t in was.position)


@every_method
def test_without_a_shadow_the_merged_values_are_all_there_is(text: str) -> None:
    cache = make_cache()
    seq = serve(cache)
    cache.apply(seq, build(text[:-1] + ", shadow=false)", cache.shape), Occasion.PROMPT)
    kept = look(cache, seq)
    cache.apply(seq, build("full", cache.shape), Occasion.SWITCH)
    assert cache.loss_class(seq, build("full", cache.shape)) is LossClass.PERMANENT
    after = look(cache, seq)
    assert all((after[p].v[t] == kept[p].v[t]).all() for p in kept for t in kept[p].position)
    assert cache.host.used_bytes == 0


def test_without_room_on_any_tier_nothing_changes() -> None:
    row = 4 * make_cache().shape.block_bytes(Format.RAW)
    cache = make_cache(device_bytes=7 * row, host_bytes=6 * row)  # the copy fits, what is merged does not
    seq = serve(cache)
    before, used = look(cache, seq), cache.device.used_bytes
    with pytest.raises(TierFullError):
        cache.apply(seq, build(METHODS["cam"], cache.shape), Occasion.PROMPT)
    after = look(cache, seq)
    assert all((after[p].v[t] == before[p].v[t]).all() for p in before for t in before[p].position)
    assert (cache.device.used_bytes, cache.host.used_bytes) == (used, 0)
    assert seq.merging is None


def test_where_only_the_host_has_room_it_lends_it() -> None:
    roomy, tight = make_cache(), make_cache(device_bytes=7 * 4 * make_cache().shape.block_bytes(Format.RAW))
    found = []
    for cache in (roomy, tight):
        seq = serve(cache)
        cache.apply(seq, build(METHODS["cam"], cache.shape), Occasion.PROMPT)
        found.append(look(cache, seq))
        shadow = seq.shadow.nbytes
        assert cache.host.used_bytes <= shadow + cache.host.page_bytes
    assert all((found[0][p].v[t] == found[1][p].v[t]).all() for p in found[0] for t in found[0][p].position)


def test_requests_with_it_do_not_depend_on_the_chunks_and_leave_nothing() -> None:
    found = []
    for step_tokens in (512, 40):
        engine = tiny_engine(step_tokens=step_tokens)
        drive = Drive(engine)
        drive.submit("a", TEXT, 80, pipeline="merge(keep=0.4) | kivi(bits=4)")
        drive.submit("b", TEXT, 80, pipeline="merge(keep=0.4, method=d2o)")
        found.append({name: outcome.token_ids for name, outcome in drive.finish().items()})
        engine.cache.prefixes.drop(1 << 40)
        assert (engine.cache.device.used_bytes, engine.cache.host.used_bytes) == (0, 0)
    assert found[0] == found[1]
