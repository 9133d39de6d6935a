"""Generated tasks whose answer needs what was said far back.

The retrieval, tracing and aggregation tasks follow the definitions of RULER (Hsieh et al., "RULER: What's the Real
Context Size of Your Long-Context Language Models?", 2024, arXiv:2404.06654): needles in a haystack (single, multi-key,
multi-value), variable tracking, common words and frequent words. Beside them: chats whose last turn asks for the first,
and completions of real code at the first use of something defined far back.

Each task is a :class:`~models.collect.document.Document`: prompt, and the gold answer as the continuation, followed by
more text where the answer is shorter than a horizon. It is determined by its seed, its haystack and its length.
"""

from __future__ import annotations

import random
import re
import string
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import TypeAlias

from models.collect import code
from models.collect.document import CODE, PROSE, Document, Turn, rng_of
from models.collect.words import ADJECTIVES, NOUNS, compound, essay, sentence

Count: TypeAlias = Callable[[str], int]
"""Tokens of a text."""


class TaskKind(Enum):
    """Tasks; the values are the documents' kinds."""

    NEEDLE_SINGLE = "needle-single"
    NEEDLE_MULTIKEY = "needle-multikey"
    NEEDLE_MULTIVALUE = "needle-multivalue"
    VARIABLES = "variable-tracking"
    COMMON_WORDS = "common-words"
    FREQUENT_WORDS = "frequent-words"
    CHAT_RECALL = "chat-recall"
    CODE_COMPLETION = "code-completion"


@dataclass(frozen=True)
class Haystack:
    """Text to hide something in, and what comes after the answer."""

    source: str
    """Name of the document it comes from."""
    sentences: tuple[str, ...]
    tail: str


def haystack(source: Document | None, tokens: int, count: Count, rng: random.Random, number: int) -> Haystack:
    """About ``tokens`` tokens of a document from a random place on, repeated if it is shorter; made up if None."""
    if source is None:
        name, text = f"generated/{number}", essay(rng, tokens * 6)
    else:
        assert isinstance(source.text, str)
        name, text = source.name, source.text
    pieces = [piece for piece in re.split(r"(?<=[.!?:])\s+|\n\s*\n", text) if piece.strip()]
    start = rng.randrange(len(pieces))
    turned = pieces[start:] + pieces[:start]
    taken: list[str] = []
    size = place = 0
    while size < tokens:
        piece = turned[place % len(turned)]
        place += 1
        cost = count(piece + " ")
        if cost > tokens - size and cost > 40:  # a piece without stops, cut to fit
            piece = piece[: max(1, len(piece) * (tokens - size) // cost)]
            cost = tokens - size
        taken.append(piece)
        size += max(1, cost)
    tail = " ".join(turned[(place + ahead) % len(turned)] for ahead in range(8))
    return Haystack(name, tuple(taken), tail)


def hide(sentences: Sequence[str], needles: Sequence[str], rng: random.Random) -> str:
    """The sentences with the needles, in their order, at random places among them."""
    places = sorted(rng.randint(0, len(sentences)) for _ in needles)
    mixed: list[str] = []
    before = 0
    for place, needle in zip(places, needles, strict=True):
        mixed += [*sentences[before:place], needle]
        before = place
    mixed += sentences[before:]
    return " ".join(mixed)


class Value(Enum):
    """What a needle's value is, as in RULER."""

    NUMBER = "number"
    WORD = "word"
    UUID = "uuid"

    def draw(self, rng: random.Random) -> str:
        """A random one."""
        if self is Value.NUMBER:
            return str(rng.randrange(1_000_000, 10_000_000))
        if self is Value.WORD:
            return compound(rng)
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _distinct(draw: Callable[[], str], number: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < number:
        found[draw()] = None
    return list(found)


def needle(kind: TaskKind, stack: Haystack, rng: random.Random) -> Document:
    """Needles "one of the special magic numbers for KEY is: VALUE." and the question for one key.

    Single: one needle. Multi-key: four needles of different keys, one is asked for. Multi-value: four values of one
    key, all are asked for.
    """
    value = rng.choice(tuple(Value))
    keys = _distinct(lambda: compound(rng), 4 if kind is TaskKind.NEEDLE_MULTIKEY else 1)
    per_key = 4 if kind is TaskKind.NEEDLE_MULTIVALUE else 1
    values = _distinct(lambda: value.draw(rng), len(keys) * per_key)
    pairs = [(key, values[place * per_key + at]) for place, key in enumerate(keys) for at in range(per_key)]
    order = rng.sample(pairs, len(pairs))
    text = hide(stack.sentences, [f"One of the special magic {value.value}s for {k} is: {v}." for k, v in order], rng)
    asked = rng.choice(keys)
    gold = [v for k, v in order if k == asked]
    what = f"all the special magic {value.value}s" if per_key > 1 else f"the special magic {value.value}"
    be = "are" if per_key > 1 else "is"
    return _task(
        stack,
        kind,
        f"Some special magic {value.value}s are hidden within the following text. Memorize them. You will be asked for "
        f"them afterwards.\n\n{text}\n\nQuestion: what {be} {what} for {asked} mentioned in the text above?\n"
        f"Answer: {what} for {asked} mentioned in the text above {be}",
        ", ".join(gold),
    )


def variables(stack: Haystack, rng: random.Random, hops: int = 4, chains: int = 2) -> Document:
    """Chains of assignments, ``VAR A = 12345`` and then ``VAR B = VAR A``; all variables of one value are asked for."""
    names = _distinct(lambda: "".join(rng.choices(string.ascii_uppercase, k=5)), chains * (hops + 1))
    roots = _distinct(lambda: str(rng.randrange(10_000, 100_000)), chains)
    own = [names[chain * (hops + 1) : (chain + 1) * (hops + 1)] for chain in range(chains)]
    steps = [
        [f"VAR {chain[0]} = {root}.", *(f"VAR {to} = VAR {of}." for of, to in pairwise(chain))]
        for chain, root in zip(own, roots, strict=True)
    ]
    order = [chain for chain in range(chains) for _ in steps[chain]]
    rng.shuffle(order)  # the chains run through each other, each in its own order
    following = [iter(step) for step in steps]
    text = hide(stack.sentences, [next(following[chain]) for chain in order], rng)
    asked = rng.randrange(chains)
    return _task(
        stack,
        TaskKind.VARIABLES,
        "Memorize and track the chains of variable assignments hidden in the following text.\n\n"
        f"{text}\n\nQuestion: find all variables that are assigned the value {roots[asked]} in the text above, "
        f"directly or through another variable.\nAnswer: the variables that are assigned the value {roots[asked]} are",
        " ".join(own[asked]),
    )


def common_words(tokens: int, count: Count, rng: random.Random, number: int) -> Document:
    """A numbered list of words where ten occur many times each and all others seldom; the ten are asked for."""
    words = _distinct(lambda: f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}".replace(" ", ""), 600)
    common, rare = words[:10], words[10:]
    often, seldom = 20, 2
    per_word = max(1, count("\n".join(f"{place + 1}. {word}" for place, word in enumerate(words[:100])))) / 100
    entries = int(tokens / per_word)
    while often > 6 and len(common) * often > 0.7 * entries:
        often -= 1
    listed = common * often
    others = max(1, min(len(rare), (entries - len(listed)) // seldom))
    listed += rare[:others] * seldom
    rng.shuffle(listed)
    text = " ".join(f"{place + 1}. {word}" for place, word in enumerate(listed))
    return _task(
        Haystack(f"generated/common-words-{number}", (), "Each of the other words appears less often. " * 4),
        TaskKind.COMMON_WORDS,
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        f"appear most often.\n{text}\nQuestion: what are the 10 most common words in the above list?\n"
        "Answer: the 10 words that appear most often in the list are:",
        " ".join(common),
    )


def frequent_words(tokens: int, count: Count, rng: random.Random, number: int, exponent: float = 2.0) -> Document:
    """Coded words whose frequencies fall by Zipf's law, with dots as noise; the top three are asked for."""
    words = _distinct(lambda: "".join(rng.choices(string.ascii_lowercase, k=rng.randint(4, 7))), 40)
    shares = [1 / (place + 1) ** exponent for place in range(len(words))]
    total = int(tokens / max(1.0, count(" ".join(words)) / len(words) + 0.5))
    times = [max(1, round(total * share / sum(shares))) for share in shares]
    times[1] = min(times[1], times[0] - 1) if times[0] > 1 else times[1]
    listed = [word for word, often in zip(words, times, strict=True) for _ in range(often)]
    rng.shuffle(listed)
    text = " ".join(f"{word} ..." if rng.random() < 0.2 else word for word in listed)
    return _task(
        Haystack(f"generated/frequent-words-{number}", (), "All other words of the coded text appear less often. " * 4),
        TaskKind.FREQUENT_WORDS,
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        f"appearing coded words.\n{text}\nQuestion: what are the three most frequently appearing words in the above "
        "coded text? Ignore the dots.\nAnswer: the three most frequently appearing words are:",
        " ".join(words[:3]),
    )


def chat_recall(stack: Haystack, rng: random.Random) -> Document:
    """A conversation about pieces of text; its last turn asks for what the first one said."""
    name, city, pet = rng.choice(NOUNS).capitalize(), rng.choice(NOUNS).capitalize() + "ville", compound(rng)
    code_word = Value.NUMBER.draw(rng)
    turns: list[Turn] = [
        (
            "user",
            f"Hi! My name is {name}, I live in {city}, and my boat is called {pet}. My booking number is {code_word}; "
            "please keep it in mind, I will need it at the end.",
        ),
        ("assistant", f"Nice to meet you, {name}. I have noted your booking number and will have it ready."),
    ]
    parts = max(1, min(6, len(stack.sentences) // 6))
    size = -(-len(stack.sentences) // parts)
    for part in range(parts):
        piece = " ".join(stack.sentences[part * size : (part + 1) * size])
        if not piece:
            break
        turns.append(("user", f"{rng.choice(_REQUESTS)}\n\n{piece}"))
        turns.append(("assistant", f"{rng.choice(_REPLIES)} {sentence(rng)}"))
    turns.append(("user", "Thank you. Now please repeat my booking number, my name, my city and my boat's name."))
    answer = (
        f"Your booking number is {code_word}, your name is {name}, you live in {city}, and your boat is called {pet}."
    )
    return Document(
        name=f"{stack.source}#{TaskKind.CHAT_RECALL.value}",
        kind=TaskKind.CHAT_RECALL.value,
        turns=tuple(turns),
        continuation=f"{answer} Is there anything else that I can do for you today?",
        answer=answer,
    )


_REQUESTS = (
    "Please read this and tell me in one sentence what you make of it:",
    "Here is the next part. What do you think?",
    "And what about this passage?",
    "I also found the following. Does it fit with the rest?",
)
_REPLIES = (
    "I have read it.",
    "That follows from what came before.",
    "This passage goes into more detail.",
    "It is worth a second look.",
)


def completion(source: Document | None, tokens: int, count: Count, rng: random.Random) -> Document | None:
    """Python code up to the first use of something defined far back; None where the source has none."""
    found = code.far_use(source.text, tokens, count, rng) if source and isinstance(source.text, str) else None
    if source is None or found is None:
        return None
    kind = TaskKind.CODE_COMPLETION.value
    return Document(f"{source.name}#{kind}", kind, found.prompt, found.rest, answer=found.name)


def _task(stack: Haystack, kind: TaskKind, prompt: str, answer: str) -> Document:
    return Document(
        name=f"{stack.source}#{kind.value}",
        kind=kind.value,
        text=prompt,
        continuation=f" {answer}.\n\n{stack.tail}",
        answer=answer,
    )


def make_task(
    kind: TaskKind, source: Document | None, tokens: int, count: Count, seed: int, number: int
) -> Document | None:
    """One task of about ``tokens`` tokens; None where the source does not lend itself to it.

    Args:
        kind: which.
        source: prose for a haystack, or None to make one up; for a code completion Python code.
        tokens: of the prompt, about.
        count: tokens of a text.
        seed: everything random depends on it and on the number.
        number: ends up in the name.
    """
    rng = rng_of(seed, kind.value, number)
    about = max(64, tokens - 96)  # what stands around a haystack
    made: Document | None
    match kind:
        case TaskKind.NEEDLE_SINGLE | TaskKind.NEEDLE_MULTIKEY | TaskKind.NEEDLE_MULTIVALUE:
            made = needle(kind, haystack(source, max(64, about - 80), count, rng, number), rng)
        case TaskKind.VARIABLES:
            made = variables(haystack(source, max(64, about - 120), count, rng, number), rng)
        case TaskKind.COMMON_WORDS:
            made = common_words(about, count, rng, number)
        case TaskKind.FREQUENT_WORDS:
            made = frequent_words(about, count, rng, number)
        case TaskKind.CHAT_RECALL:
            made = chat_recall(haystack(source, max(64, about - 120), count, rng, number), rng)
        case TaskKind.CODE_COMPLETION:
            made = completion(source, tokens, count, rng)
    if made is None:
        return None
    return Document(f"{made.name}-{number}", made.kind, made.text, made.continuation, made.turns, made.answer)


def make_tasks(
    number: int, sources: Iterable[Document], tokens: Callable[[random.Random], int], count: Count, seed: int
) -> Iterator[Document]:
    """So many tasks, each kind in turn, over the sources in turn.

    Args:
        number: how many.
        sources: documents to make them of; without prose haystacks are made up, without Python code there are no
            code completions.
        tokens: draws a length.
        count: tokens of a text.
        seed: everything depends on it.
    """
    documents = list(sources)
    prose = [document for document in documents if document.kind == PROSE and isinstance(document.text, str)]
    python = [document for document in documents if document.kind == CODE and document.name.endswith(".py")]
    kinds = [kind for kind in TaskKind if python or kind is not TaskKind.CODE_COMPLETION]
    made = turn = misses = 0
    next_prose = next_python = 0
    while made < number:
        kind = kinds[turn % len(kinds)]
        turn += 1
        source: Document | None = None
        if kind is TaskKind.CODE_COMPLETION:
            if misses >= len(python):  # none of them lends itself
                kinds.remove(kind)
                continue
            source = python[next_python % len(python)]
            next_python += 1
        elif prose and kind not in (TaskKind.COMMON_WORDS, TaskKind.FREQUENT_WORDS):
            source = prose[next_prose % len(prose)]
            next_prose += 1
        task = make_task(kind, source, tokens(rng_of(seed, "length", turn)), count, seed, turn)
        if task is None:
            misses += 1
            turn -= 1  # the next source, the same kind
            continue
        if kind is TaskKind.CODE_COMPLETION:
            misses = 0
        made += 1
        yield task
