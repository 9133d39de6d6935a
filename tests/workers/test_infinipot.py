"""InfiniPot: a pot of fixed size, from the prompt's first token on. Held to the model run once over all tokens, with a
mask for what each query finds in the pot, and to its definition by loops."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from transformers import AttentionInterface

from tests.tiny import Drive, prompt, run, tiny_engine, tiny_loaded, tiny_model
from workers.engine.catalyst import TEXT
from workers.engine.repeating import turn
from workers.errors import RESOURCE_EXHAUSTED, ProblemError
from workers.stages.base import LossClass
from workers.stages.registry import build

LAYERS, HEADS, GROUP, DIM = 2, 2, 2, 16
SIZE, STAY, INTERVAL = 96, 32, 64  # half of three blocks, in whole ones
PROMPT = prompt(230, seed=3)  # the pot is full after 96, 160 and 224 tokens


@dataclass
class Pot:
    """The definition: what is in each head's pot from which token on."""

    catalyst: list[int]
    weight: float = 0.5
    kept: list[tuple[int, dict[tuple[int, int], list[int]]]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def sees(self, layer: int, head: int, query: int) -> list[int]:
        """The tokens that are there for the query of a position."""
        for at, kept in reversed(self.kept):
            if query >= at:
                return [*kept[layer, head], *range(at, query + 1)]
        return list(range(query + 1))

    def forward(self, token_ids: list[int]) -> tuple[torch.Tensor, list[tuple[np.ndarray, np.ndarray]]]:
        """Logits [T, V], and each layer's queries [H, G, T, D] and keys [H, T, D]."""
        count, heard = len(token_ids), []

        def attend(module, query, key, value, mask, scaling, **kwargs):
            grouped = query[0].view(HEADS, GROUP, count, DIM)
            allowed = torch.zeros(HEADS, count, count, dtype=torch.bool)
            for head, asker in np.ndindex(HEADS, count):
                allowed[head, asker, self.sees(module.layer_idx, head, asker)] = True
            scores = (grouped @ key[0][:, None].mT * scaling).masked_fill(~allowed[:, None], -torch.inf)
            heard.append((grouped.double().numpy(), key[0].double().numpy()))
            return (scores.softmax(-1) @ value[0][:, None]).flatten(0, 1).transpose(0, 1)[None], None

        AttentionInterface.register("pot", attend)
        with torch.inference_mode():
            logits = tiny_model(attention="pot")(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
        return logits.float(), heard

    def boil_down(self, at: int, known_from: int = 1) -> None:
        """Chooses what stays of the first ``at`` tokens."""
        asked = self.catalyst or self.tokens[at - 32 : at]
        extended = [*self.tokens[:at], *self.catalyst]
        logits, heard = self.forward(extended)
        surprise = -torch.log_softmax(logits.double(), -1)
        novelty = [math.nan] * known_from + [float(surprise[t - 1, extended[t]]) for t in range(known_from, at)]
        old = {place: self.sees(*place, at - 1) for place in np.ndindex(LAYERS, HEADS)}
        kept = {}
        for layer in range(LAYERS):
            known = [novelty[t] for head in range(HEADS) for t in old[layer, head] if not math.isnan(novelty[t])]
            mean = sum(known) / len(known) if known else 0.0
            for head in range(HEADS):
                there = old[layer, head]
                paid = np.zeros(len(there))
                for asker in range(len(extended) - len(asked), len(extended)):
                    for group in range(GROUP):
                        row = heard[layer][0][head, group, asker] @ heard[layer][1][head][there].T / math.sqrt(DIM)
                        row[np.array(there) > asker] = -np.inf
                        shares = np.exp(row - row.max())
                        paid += shares / shares.sum() / len(asked)
                new = np.array([mean if math.isnan(novelty[t]) else novelty[t] for t in there])
                score = (1 - self.weight) * paid / paid.max() + self.weight * new / max(new.max(), 1e-12)
                ranked = sorted(range(len(there) - 32), key=lambda i: (-score[i], -there[i]))
                kept[layer, head] = sorted([there[i] for i in ranked[: STAY - 32]] + there[-32:])
        self.kept.append((at, kept))


CASES = {"keep=0.5": (32, 64), "keep=0.7": (64, 32), "keep=0.7, novelty=0.9": (64, 32)}


@pytest.fixture(params=CASES.items(), ids=CASES, scope="module")
def case(request) -> tuple[str, Pot]:
    """A pipeline's text, and its pot after the prompt and 60 greedy tokens behind it."""
    global STAY, INTERVAL
    text, (STAY, INTERVAL) = request.param
    loaded = tiny_loaded()
    pot = Pot(loaded.tokenizer(turn(loaded, TEXT))["input_ids"], 0.9 if "0.9" in text else 0.5, tokens=list(PROMPT))
    full_at = SIZE
    while len(pot.tokens) < len(PROMPT) + 60:
        while full_at <= len(pot.tokens):
            pot.boil_down(full_at)
            full_at += INTERVAL
        logits, _ = pot.forward(pot.tokens)
        pot.tokens.append(int(logits[-1].argmax()))
    return f"infinipot(size={SIZE}, {text})", pot


@pytest.mark.parametrize("step_tokens", [512, 23])
@pytest.mark.parametrize("more", ["", " | kivi(bits=8)"])
def test_it_keeps_and_answers_what_the_definition_does(case, step_tokens: int, more: str) -> None:
    text, pot = case
    drive = Drive(tiny_engine(step_tokens=step_tokens, max_running=4))
    drive.submit("a", PROMPT, 60, pipeline=text + more)
    seen: dict[int, dict] = {}
    while not drive.generated("a") or drive.generated("a") < 60:
        assert drive.engine.step()
        seq = drive.engine._live.get("a")
        if seq is None or seq.cache is None or seq.computed == 0:
            continue
        tables, slot = drive.engine.cache.tables, seq.cache.slot
        assert tables.length[slot].max() <= SIZE
        kept = {
            place: tables.position[(slot, *place)][: tables.length[(slot, *place)]].tolist()
            for place in np.ndindex(LAYERS, HEADS)
        }
        if seq.cache.seen >= SIZE:
            seen[seq.cache.seen] = kept
    found = drive.outcomes["a"]
    if not more:
        assert found.token_ids == pot.tokens[len(PROMPT) :]
    checked = [at for at, _ in pot.kept if at in seen and (not more or at <= len(PROMPT))]
    assert len(checked) >= (1 if more else 3)
    for at, wanted in pot.kept:
        assert at not in checked or seen[at] == wanted
    assert (
        found.finished.cache.peak_device_bytes <= SIZE / len(pot.tokens) * 1.1 * found.finished.cache.full_cache_bytes
    )


def test_a_switch_there_and_back_while_tokens_are_generated() -> None:
    drive = Drive(tiny_engine(step_tokens=64))
    drive.submit("a", PROMPT, 200)
    drive.until(lambda: drive.generated("a") == 20)
    cache, seq = drive.engine.cache, drive.engine._live["a"].cache
    exact = [part.clone() for part in cache.context(seq).read(1)]
    drive.direct("a", "infinipot(size=128)")
    assert (cache.tables.length[seq.slot] == 64 + (seq.seen - 128) % 64).all()
    drive.until(lambda: drive.generated("a") == 60)
    assert cache.tables.length[seq.slot].max() <= 128
    drive.direct("a", "full", epoch=2)
    assert (cache.tables.length[seq.slot] == seq.seen).all()
    assert cache.loss_class(seq, build("full", cache.shape)) is LossClass.EXACT
    for old, new in zip(exact, cache.context(seq).read(1), strict=True):
        assert torch.equal(old, new[:, : old.shape[1]])
    drive.finish()
    cache.prefixes.drop(1 << 40)
    assert (cache.device.used_bytes, cache.host.used_bytes) == (0, 0)


def test_ordered_away_while_the_prompt_is_computed_all_tokens_come_back() -> None:
    drive = Drive(tiny_engine(step_tokens=32))
    drive.engine._intake.default_pipeline = build("infinipot(size=64)", drive.engine.shape)
    drive.submit("a", PROMPT, 10)
    seq = None
    while seq is None or seq.computed < 160:
        drive.engine.step()
        seq = drive.engine._live["a"]
    assert seq.cache.evicted
    drive.direct("a", "full")
    drive.until(lambda: drive.generated("a") >= 1)
    assert (drive.engine.cache.tables.length[seq.cache.slot] >= len(PROMPT)).all()
    assert not seq.cache.evicted
    assert len(drive.finish()["a"].token_ids) == 10


def test_without_a_tokenizer_the_last_queries_stand_in() -> None:
    loaded = tiny_loaded()
    silent = type(loaded)(**{**loaded.__dict__, "tokenizer": None})
    found = [
        run(tiny_engine(silent, step_tokens=step), {"a": PROMPT}, 40, pipeline="infinipot(size=96)")["a"].token_ids
        for step in (512, 30)
    ]
    assert len(found[0]) == 40
    assert found[0] == found[1]


def test_a_preempted_request_or_one_taken_over_ends_alike() -> None:
    pipeline = "infinipot(size=96)"
    whole = run(tiny_engine(), {"a": PROMPT}, 60, pipeline=pipeline)["a"].token_ids
    drive = Drive(tiny_engine())
    drive.submit("a", PROMPT, 60, emitted=whole[:33], pipeline=pipeline)
    assert drive.finish()["a"].token_ids == whole[33:]


def test_a_prompt_longer_than_both_tiers_is_served_where_nothing_is_to_be_brought_back() -> None:
    tight = {"device_budget_bytes": 160 << 10, "host_budget_bytes": 64 << 10, "max_context_tokens": 2048}
    engine = tiny_engine(**tight)
    found = run(engine, {"a": prompt(1500)}, 50, pipeline="infinipot(size=96, shadow=false)")["a"]
    assert len(found.token_ids) == 50
    assert found.finished.cache.shadow_bytes == 0
    with pytest.raises(ProblemError) as refused:
        run(tiny_engine(**tight), {"a": prompt(1500)}, 50, pipeline="infinipot(size=96)")
    assert refused.value.problem.code == RESOURCE_EXHAUSTED


def test_no_prefix_is_taken_and_none_is_left_of_what_was_evicted() -> None:
    engine = tiny_engine()
    run(engine, {"a": PROMPT}, 4)
    rows = len(engine.cache.prefixes)
    drive = Drive(engine)
    drive.submit("b", PROMPT, 4, pipeline="infinipot(size=96)")
    drive.until(lambda: drive.generated("b") == 1)
    assert drive.engine._live["b"].reused_prompt_tokens == 0
    drive.finish()
    assert len(engine.cache.prefixes) == rows


def test_when_the_pot_is_full() -> None:
    evictor = build("infinipot(size=96, keep=0.5)", tiny_engine().shape).evictor
    assert [evictor.next_eviction(seen) for seen in (0, 95, 96, 159, 160, 300)] == [96, 96, 160, 160, 224, 352]
    assert [evictor.budget(seen) for seen in (5, 95, 96, 97, 159, 160, 161)] == [5, 95, 32, 33, 95, 32, 33]
