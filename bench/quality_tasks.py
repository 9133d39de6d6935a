"""What pipelines are tried on: real texts, needles in them, conversations, and prompts for a long answer; as token ids.

The texts lie on every machine: documentation and code of Python's library, and the system's licences.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice

from models.collect.builtin import docstrings_of, find_builtin
from models.collect.corpus import Found, Skipped, interleave, read_files
from models.collect.document import CODE, PROSE, Document, Turn, rng_of
from models.collect.tasks import Value, haystack
from models.collect.words import NOUNS, compound
from workers.engine.runner import LoadedModel

SEED = 20261128
MOST_PROSE = 12
"""Documents to make tasks of."""
CHARACTERS_PER_TOKEN = 8
"""No text has more a token; as much of one is read."""


@dataclass(frozen=True)
class Text:
    """Token ids of a real text."""

    name: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """What is asked, up to the answer, and the answer."""

    ids: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Recall:
    """A context, tokens that come behind it whatever is asked, and questions whose answers are in the context.

    Each question is asked of the same cache: none of them is in what another one sees.
    """

    name: str
    ids: tuple[int, ...]
    questions: tuple[Question, ...]
    between: tuple[int, ...] = ()


class Words:
    """A model's tokenizer and way of writing conversations."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._tokenizer = loaded.tokenizer
        self._chat = loaded.chat

    def encode(self, text: str, first: bool = False) -> list[int]:
        """Token ids; ``first``: the text begins a sequence, with what the model puts before."""
        return list(self._tokenizer.encode(text, add_special_tokens=first))

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.encode(text))

    def render(self, turns: Sequence[Turn]) -> str:
        """A conversation up to where the assistant is to speak, by the model's template, or plainly if it has none."""
        if self._chat:
            messages = [{"role": role, "content": content} for role, content in turns]
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        return "".join(f"{role}: {content}\n\n" for role, content in turns) + "assistant:"


def texts(words: Words, number: int, tokens: int) -> list[Text]:
    """So many texts of so many tokens, prose and code in turn."""
    found: list[Text] = []
    for document in _alternate():
        assert isinstance(document.text, str)
        ids = words.encode(document.text[: CHARACTERS_PER_TOKEN * tokens], first=True)[:tokens]
        if len(ids) == tokens:
            found.append(Text(document.name, tuple(ids)))
        if len(found) == number:
            return found
    raise ValueError(f"{len(found)} of {number} texts of {tokens} tokens found on this machine")


def needles(words: Words, number: int, asked: int, tokens: int) -> list[Recall]:
    """Haystacks of exactly so many tokens, with ``asked`` needles each, one in every part of them.

    A needle says a password, and each is asked for in the same words. It is of two words: the first is foretold by
    the prompt's end, which is computed before any pipeline takes effect. Unlike RULER's (arXiv
    2404.06654) none is a long number: where a model has a token for each digit, such a needle asks how far beyond what
    a query attends to an evictor keeps, more than whether it finds it.
    """
    return [
        _needles(words, source, asked, tokens, rng_of(SEED, "needles", tokens, place))
        for place, source in enumerate(_prose(number))
    ]


def _needles(words: Words, source: Document, asked: int, tokens: int, rng: random.Random) -> Recall:
    keys = list(dict.fromkeys(compound(rng) for _ in range(8 * asked)))[:asked]
    values = [" ".join(rng.sample(NOUNS, 2)) for _ in keys]
    ids = words.encode(
        "Some facts are hidden within the following text. Memorize them. You will be asked for them afterwards.\n\n",
        first=True,
    )
    hidden = [words.encode(f" The password of {k} is {v}.") for k, v in zip(keys, values, strict=True)]
    room = tokens - len(ids) - sum(map(len, hidden))
    if room < 2 * asked:
        raise ValueError(f"{tokens} tokens are too few for {asked} needles")
    stack = haystack(source, room, words.count, rng, 0)
    pieces = cycle(words.encode(f" {sentence}") for sentence in stack.sentences)
    places = [len(ids) + room * (part + rng.random()) / asked for part in range(asked)]
    while room > 0 or hidden:
        while hidden and (len(ids) >= places[-len(hidden)] or room == 0):
            ids += hidden.pop(0)
        piece = next(pieces)[:room]
        ids += piece
        room -= len(piece)
    questions = tuple(
        Question(
            tuple(words.encode(f"\n\nThe password of {key} is")),
            tuple(words.encode(f" {value}")),
        )
        for key, value in zip(keys, values, strict=True)
    )
    return Recall(f"{stack.source}, {tokens} tokens", tuple(ids), questions)


def conversations(words: Words, number: int, tokens: int) -> list[Recall]:
    """Conversations of three turns. The first, of about so many tokens, begins with facts that the last asks for."""
    return [
        _conversation(words, source, tokens, rng_of(SEED, "conversation", tokens, place))
        for place, source in enumerate(_prose(number))
    ]


def _conversation(words: Words, source: Document, tokens: int, rng: random.Random) -> Recall:
    name, city = rng.choice(NOUNS).capitalize(), rng.choice(NOUNS).capitalize() + "ville"
    booking, locker = Value.NUMBER.draw(rng), str(rng.randrange(1000, 10_000))
    stack = haystack(source, max(16, tokens - 120), words.count, rng, 0)
    turns: list[Turn] = [
        (
            "user",
            f"Hi! My name is {name}, I live in {city}, and my locker code is {locker}. My booking number is {booking}; "
            "please keep it in mind, I will need it at the end. Now read this and tell me what you make of it:\n\n"
            + " ".join(stack.sentences),
        )
    ]
    first = words.render(turns)
    turns += [
        ("assistant", "I have read it. It goes into detail."),
        ("user", f"Does this fit with it? {stack.tail[:60]}"),
        ("assistant", "Yes, it says more about the same subject."),
    ]
    facts = (
        ("What is my booking number?", "Your booking number is", f" {booking}"),
        ("What is my locker code?", "Your locker code is", f" {locker}"),
        ("Where do I live?", "You live in", f" {city}"),
    )
    asked = [words.render([*turns, ("user", f"Thank you. {question}")]) + begun for question, begun, _ in facts]
    shared = _common_beginning(words.render([*turns, ("user", "Thank you.")]), *asked)
    if not shared.startswith(first):
        raise ValueError("the model's chat template does not put later turns behind the earlier ones")
    questions = tuple(
        Question(tuple(words.encode(text[len(shared) :])), tuple(words.encode(answer)))
        for text, (_, _, answer) in zip(asked, facts, strict=True)
    )
    between = tuple(words.encode(shared[len(first) :]))
    return Recall(stack.source, tuple(words.encode(first)), questions, between)


def _common_beginning(*of: str) -> str:
    least, most = min(of), max(of)
    return least[: next((at for at, letter in enumerate(least) if letter != most[at]), len(least))]


def long_answers(words: Words, number: int, tokens: int) -> list[Text]:
    """Prompts, of at most so many tokens, that ask for a long answer about a text."""
    found = []
    for place, source in enumerate(_prose(number)):
        stack = haystack(source, max(16, tokens - 80), words.count, rng_of(SEED, "long", tokens, place), 0)
        asked = "Explain in your own words, at length and point by point, what the following text says.\n\n"
        found.append(
            Text(stack.source, tuple(words.encode(words.render([("user", asked + " ".join(stack.sentences))]))))
        )
    return found


# -- sources -----------------------------------------------------------------------------------------------------------


def _alternate() -> Iterator[Document]:
    """Prose and code in turn, as long as both last."""
    for prose, code in zip(_all_prose(), _of_library(CODE), strict=False):
        yield from (prose, code)


def _prose(number: int) -> list[Document]:
    """So many documents; the same ones again where there are fewer."""
    return list(islice(cycle(_first_prose()), number))


@cache
def _first_prose() -> tuple[Document, ...]:
    return tuple(islice(_all_prose(), MOST_PROSE))


def _all_prose() -> Iterator[Document]:
    """Documentation of Python's library; every third text is a licence, where there are some."""
    licences = read_files(interleave([one for one in _builtin() if one.group == "licences"], SEED), Skipped())
    for place, document in enumerate(_of_library(PROSE)):
        yield document
        if place % 2 and (licence := next(licences, None)):
            yield licence


@cache
def _builtin() -> tuple[Found, ...]:
    return tuple(find_builtin())


def _of_library(kind: str) -> Iterator[Document]:
    """Modules of Python's library as they are, or what they say of themselves: never one as both."""
    files = interleave([one for one in _builtin() if one.kind == CODE], SEED)
    for place, document in enumerate(read_files(files, Skipped())):
        if place % 2 and kind == CODE:
            yield document
        elif not place % 2 and kind == PROSE and (said := docstrings_of(document)):
            yield said
