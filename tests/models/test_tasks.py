"""Generated tasks: their answers are in their haystacks as often as stated, and nothing but the seed decides."""

from __future__ import annotations

import ast
import random
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.collect.code import far_use
from models.collect.document import CODE, PROSE, Document, rng_of
from models.collect.tasks import TaskKind, haystack, hide, make_task, make_tasks
from models.collect.words import essay
from models.dataset import source_of, split_of


def count(text: str) -> int:
    """Tokens of a text, as the tests count them."""
    return len(re.findall(r"\w+|[^\w\s]", text))


BOOK = Document("folder/book.txt", PROSE, essay(random.Random(1), 30_000))
MODULE = Document(
    "folder/module.py",
    CODE,
    "import json\n\n\ndef far_away(x):\n    return x + 1\n\n\n"
    + "\n\n".join(f"def step_{n}(value):\n    total = value * {n}\n    return total - {n}" for n in range(60))
    + "\n\n\ndef last(y):\n    z = [1]\n    return far_away(y)\n\n\nprint(json.dumps(last(3)))\n",
)
HAY = [kind for kind in TaskKind if kind is not TaskKind.CODE_COMPLETION]
SEEDS = st.integers(0, 10_000)


def task(kind: TaskKind, seed: int, source: Document | None = BOOK, tokens: int = 700) -> Document:
    made = make_task(kind, source, tokens, count, seed, 3)
    assert made is not None
    return made


@pytest.mark.parametrize("kind", HAY)
@given(seed=SEEDS, real=st.booleans(), tokens=st.integers(400, 1500))
def test_a_task_is_determined_and_about_as_long_as_asked(kind: TaskKind, seed: int, real: bool, tokens: int) -> None:
    source = BOOK if real else None
    made = task(kind, seed, source, tokens)
    assert made == task(kind, seed, source, tokens)
    assert made.kind == kind.value
    text = made.text or " ".join(content for _, content in made.turns)
    assert isinstance(text, str)
    assert 0.5 * tokens <= count(text) <= 1.35 * tokens
    assert isinstance(made.continuation, str)
    assert made.answer
    assert made.continuation.lstrip().startswith(made.answer)


@given(seed=SEEDS)
def test_single_and_multi_key_needles_are_there_once(seed: int) -> None:
    for kind, needles in ((TaskKind.NEEDLE_SINGLE, 1), (TaskKind.NEEDLE_MULTIKEY, 4)):
        made = task(kind, seed)
        found = re.findall(r"One of the special magic \w+ for ([\w-]+) is: ([\w-]+)\.", str(made.text))
        assert len(found) == len(set(dict(found))) == needles
        assert str(made.text).count(made.answer) == 1
        assert str(made.text).endswith(f"for {dict(map(reversed, found))[made.answer]} mentioned in the text above is")


@given(seed=SEEDS)
def test_all_values_of_a_key_are_asked_for_in_their_order(seed: int) -> None:
    made = task(TaskKind.NEEDLE_MULTIVALUE, seed)
    found = re.findall(r"One of the special magic \w+ for ([\w-]+) is: ([\w-]+)\.", str(made.text))
    assert len({key for key, _ in found}) == 1
    assert made.answer == ", ".join(value for _, value in found)
    assert len(found) == 4


@given(seed=SEEDS)
def test_variable_chains_lead_to_the_value(seed: int) -> None:
    made = task(TaskKind.VARIABLES, seed)
    asked = re.search(r"assigned the value (\d+) in the text", str(made.text))
    assert asked is not None
    values: dict[str, str] = {}
    for name, given_value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", str(made.text)):
        assert name not in values
        values[name] = values.get(given_value, given_value)  # defined before it is used
    assert len(values) == 10
    assert set(values.values()) <= {value for value in values.values() if value.isdigit()}
    assert made.answer.split() == [name for name, value in values.items() if value == asked.group(1)]


@given(seed=SEEDS, tokens=st.integers(300, 2000))
def test_the_words_asked_for_are_the_most_frequent(seed: int, tokens: int) -> None:
    common = task(TaskKind.COMMON_WORDS, seed, None, tokens)
    times = Counter(re.findall(r"\d+\. ([a-z]+)", str(common.text)))
    assert {word for word, _ in times.most_common(10)} == set(common.answer.split())
    assert times.most_common(10)[-1][1] > times.most_common(11)[-1][1]
    frequent = task(TaskKind.FREQUENT_WORDS, seed, None, tokens)
    coded = str(frequent.text).split("coded words.\n")[1].split("\nQuestion")[0]
    ranked = Counter(re.findall(r"[a-z]+", coded)).most_common(4)
    assert [word for word, _ in ranked[:3]] == frequent.answer.split()
    assert ranked[2][1] > ranked[3][1]


@given(seed=SEEDS)
def test_a_chat_asks_for_what_the_first_turn_said(seed: int) -> None:
    made = task(TaskKind.CHAT_RECALL, seed)
    roles = [role for role, _ in made.turns]
    assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
    assert len(roles) >= 5
    (number,) = re.findall(r"booking number is (\d+)", made.turns[0][1])
    assert number in made.answer
    assert not any(number in content for _, content in made.turns[1:])


@given(seed=SEEDS, tokens=st.integers(500, 1200))
def test_code_is_cut_where_something_far_is_used(seed: int, tokens: int) -> None:
    found = far_use(str(MODULE.text), tokens, count, rng_of(seed))
    if found is None:
        return
    assert found.rest.lstrip(" ").startswith(found.name)
    assert str(MODULE.text).count(found.prompt + found.rest[:40]) == 1
    assert re.match(rf"(def|class|import|from)\b.*\b{found.name}\b", found.prompt)
    assert tokens // 2 <= count(found.prompt) <= tokens


def test_a_far_use_is_found_and_bad_code_is_none() -> None:
    total = count(str(MODULE.text))
    found = far_use(str(MODULE.text), total, count, rng_of(0))
    assert found is not None
    assert found.name in ("json", "far_away")
    assert far_use("def broken(:\n", 100, count, rng_of(0)) is None
    umlauts = 's = "äöü"; import os\ndef f():\n    return "äöü", os\n' + "# filler filler filler\n" * 10
    assert far_use(umlauts, 20, count, rng_of(0)) is not None
    ast.parse(umlauts)


@given(seed=SEEDS, number=st.integers(1, 30))
def test_tasks_are_in_their_sources_split_and_have_names_of_their_own(seed: int, number: int) -> None:
    made = list(make_tasks(number, [BOOK, MODULE], lambda rng: rng.randint(300, 900), count, seed))
    assert len(made) == number
    assert len({document.name for document in made}) == number
    for document in made:
        if document.kind in (TaskKind.COMMON_WORDS.value, TaskKind.FREQUENT_WORDS.value):
            assert source_of(document.name).startswith("generated/")
            continue
        source = MODULE if document.kind == TaskKind.CODE_COMPLETION.value else BOOK
        assert source_of(document.name) == source.name
        assert split_of(document.name) is split_of(source.name)


def test_kinds_take_turns_and_code_that_lends_itself_to_nothing_is_left_out() -> None:
    made = list(make_tasks(14, [BOOK], lambda rng: 500, count, 0))
    assert Counter(document.kind for document in made) == {kind.value: 2 for kind in HAY}
    short = Document("short.py", CODE, "x = 1\n")
    assert len(list(make_tasks(16, [BOOK, short], lambda rng: 500, count, 0))) == 16


@given(seed=SEEDS, needles=st.lists(st.text("ab", min_size=1), max_size=6), hay=st.lists(st.just("x"), max_size=9))
def test_hiding_keeps_everything_in_order(seed: int, needles: list[str], hay: list[str]) -> None:
    mixed = hide(hay, needles, random.Random(seed)).split()
    assert [word for word in mixed if word != "x"] == needles
    assert mixed.count("x") == len(hay)


@given(seed=SEEDS, tokens=st.integers(50, 4000))
def test_a_haystack_has_the_length_asked_for(seed: int, tokens: int) -> None:
    stack = haystack(BOOK, tokens, count, random.Random(seed), 1)
    assert tokens <= count(" ".join(stack.sentences)) <= tokens + 60
    assert stack.tail
