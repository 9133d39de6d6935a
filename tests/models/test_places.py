"""Where texts are measured: valid, spread, the same at every run; and splits that do not leak."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.candidates import CANDIDATES, FULL
from models.collect.corpus import Skipped
from models.collect.document import Document, Turn
from models.collect.places import LEAST_TOKENS, anywhere, around, in_force, places_of
from models.collect.plan import Asked, Options, Plan, make_plans
from models.collect.vocabulary import VocabularyError
from models.dataset import Split, source_of, split_of

RNG = st.integers(0, 10_000).map(random.Random)
HORIZONS = st.integers(1, 256)


class Letters:
    """A token per character."""

    def encode(self, text: str, first: bool = False) -> list[int]:
        return [ord(letter) % 1000 for letter in text]

    def render(self, turns: Sequence[Turn], answer: bool) -> str:
        if len(turns) > 3:
            raise VocabularyError("no chat template")
        return "".join(f"[{role}]{content}" for role, content in turns) + ("[assistant]" if answer else "")


@given(tokens=st.integers(1, 6000), count=st.integers(1, 40), horizon=HORIZONS, rng=RNG)
def test_places_anywhere_are_valid(tokens: int, count: int, horizon: int, rng: random.Random) -> None:
    places = anywhere(tokens, count, horizon, rng)
    assert len(places) <= count
    assert bool(places) == (tokens >= LEAST_TOKENS + horizon)
    assert all(LEAST_TOKENS <= place <= tokens - horizon for place in places)
    assert all(later - earlier >= horizon for earlier, later in pairwise(places))


@given(tokens=st.integers(2000, 6000), count=st.integers(1, 8), rng=RNG)
def test_places_are_spread_over_the_text(tokens: int, count: int, rng: random.Random) -> None:
    places = anywhere(tokens, count, 32, rng)
    assert len(places) == count
    parts = [(place - LEAST_TOKENS) * count // (tokens - 32 - LEAST_TOKENS + 1) for place in places]
    assert parts == list(range(count))


@given(
    prompt=st.integers(1, 5000),
    continuation=st.integers(1, 600),
    count=st.integers(1, 8),
    horizon=HORIZONS,
    rng=RNG,
    task=st.booleans(),
)
def test_places_around_a_boundary_are_valid_and_have_it(
    prompt: int, continuation: int, count: int, horizon: int, rng: random.Random, task: bool
) -> None:
    places = around(prompt, continuation, count, horizon, rng, task)
    assert places == sorted(set(places))
    assert all(LEAST_TOKENS <= place <= prompt + continuation - horizon for place in places)
    if places:
        assert len(places) <= count
        assert min(prompt, prompt + continuation - horizon) in places
    if places and task:
        assert max(places) <= prompt


@given(places=st.lists(st.integers(64, 5000), max_size=9), rng=RNG)
def test_half_of_the_places_are_measured_under_the_full_cache(places: list[int], rng: random.Random) -> None:
    chosen = in_force(places, CANDIDATES[1:], rng)
    assert len(chosen) == len(places)
    assert abs(2 * chosen.count(FULL) - len(places)) <= 1
    assert set(in_force(places, (), rng)) <= {FULL}


def test_longer_texts_have_more_places() -> None:
    assert [places_of(tokens) for tokens in (200, 512, 1100, 2000, 9000)] == [2, 2, 3, 4, 4]


def plans_of(documents: Sequence[Document], **options: int) -> tuple[list[Plan], Skipped]:
    skipped = Skipped()
    return list(make_plans(documents, Letters(), CANDIDATES[1:], Options(**options), skipped)), skipped


TEXTS = st.integers(0, 9000).map(lambda size: "".join(f"line {n}\n" for n in range(size))[:size])


@given(text=TEXTS, windows=st.integers(1, 4), seed=st.integers(0, 99), most=st.integers(600, 3000))
def test_plans_of_texts_are_valid_and_determined(text: str, windows: int, seed: int, most: int) -> None:
    options = {"windows": windows, "seed": seed, "most_tokens": most}
    document = Document("a/b.txt", "prose", text)
    plans, skipped = plans_of([document], **options)
    assert plans == plans_of([document], **options)[0]
    assert len(plans) == (len(text) >= 96)
    assert skipped.reasons == ({} if plans else {"too short": 1})
    for plan in plans:
        assert len(plan.replays) <= windows
        every = [place for replay in plan.replays for place in replay.at_tokens]
        assert len(set(every)) == len(every)
        for replay in plan.replays:
            assert len(replay.token_ids) <= most
            assert all(64 <= place <= len(replay.token_ids) - 32 for place in replay.at_tokens)
            assert len(replay.measured_under) == len(replay.at_tokens)


def test_a_known_continuation_is_measured_from_its_first_token() -> None:
    task = Document("a#needle-1", "needle-single", "x" * 300, "y" * 200, answer="y")
    talk = Document("chat", "chat", turns=(("user", "u" * 200),), continuation="z" * 200)
    (of_task, of_talk), _ = plans_of([task, talk])
    assert len(of_task.replays[0].token_ids) == 332  # a horizon of the answer
    assert 300 in of_task.replays[0].at_tokens
    prompt = len("[user]" + "u" * 200 + "[assistant]")
    assert prompt in of_talk.replays[0].at_tokens
    assert max(of_talk.replays[0].at_tokens) == prompt or max(of_talk.replays[0].at_tokens) >= prompt + 32


def test_a_conversation_says_how_many_turns_it_has() -> None:
    said = (("user", "u" * 200), ("assistant", "a" * 200), ("user", "v" * 200))
    documents = [Document("one", "chat", turns=said[:1], continuation="z"), Document("two", "chat", turns=said)]
    plans, _ = plans_of([*documents, Document("text", "prose", "x" * 500)])
    replays = [replay for plan in plans for replay in plan.replays]
    assert [replay.turns for replay in replays] == [0, 2, 0]
    prompt = len("[user]" + "u" * 200 + "[assistant]")
    assert [replay.prompt_tokens for replay in replays] == [prompt, 0, 0]


def test_token_ids_are_used_as_they_are() -> None:
    (plan,), _ = plans_of([Document("job/1#x", "prose", tuple(range(100)), tuple(range(500, 600)))])
    assert plan.replays[0].token_ids == (*range(100), *range(500, 600))


def test_what_cannot_be_measured_is_counted() -> None:
    documents = [
        Document("a", "prose", "short"),
        Document("b", "chat", turns=(("user", "x"),) * 4, continuation="y"),
        Document("c", "prose", "x" * 900, "y" * 200),
    ]
    plans, skipped = plans_of(documents, context_tokens=1000)
    assert plans == []
    assert skipped.reasons == {
        "too short": 1,
        "no chat template": 1,
        "longer than the model's context of 1000 tokens": 1,
    }


def test_a_digest_names_everything_asked_for() -> None:
    text = Document("a", "prose", "line\n" * 200)
    (plan,), _ = plans_of([text])
    (other_seed,), _ = plans_of([text], seed=1)
    asked = Asked("m", ("full", "int8"), 32)
    digests = {
        plan.digest(asked),
        other_seed.digest(asked),
        plan.digest(Asked("n", ("full", "int8"), 32)),
        plan.digest(Asked("m", ("full",), 32)),
        plan.digest(Asked("m", ("full", "int8"), 16)),
    }
    assert len(digests) == 5
    assert plan.digest(asked) == plan.digest(asked)


@given(source=st.text(st.characters(exclude_characters="#"), min_size=1), parts=st.lists(st.text(), max_size=3))
def test_what_is_made_of_a_document_is_in_its_split(source: str, parts: list[str]) -> None:
    name = "#".join([source, *parts])
    assert source_of(name) == source
    assert split_of(name) is split_of(source)


def test_splits_have_their_shares() -> None:
    counts = Counter(split_of(f"document {number}") for number in range(5000))
    assert counts[Split.TRAIN] == pytest.approx(3000, abs=150)
    assert counts[Split.CALIBRATE] == pytest.approx(1000, abs=100)
