"""From a document to the replays that measure it."""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from kvpilot.request import make_replay_request
from models.collect.corpus import Skipped
from models.collect.document import Document, Piece, rng_of
from models.collect.places import anywhere, around, in_force, places_of
from models.collect.vocabulary import Vocabulary, VocabularyError
from models.features import SCHEMA_HASH

_LONGEST_CONTINUATION_TOKENS = 512
_MOST_PLACES_BY_DEFAULT = 3


@dataclass(frozen=True)
class Options:
    """What decides about windows and places.

    Attributes:
        seed: everything random depends on it and on the documents' names.
        least_tokens: shortest window of a longer text.
        most_tokens: longest window of a text; prompts that have a continuation are not cut.
        windows: most windows of a text; they do not overlap.
        places: places of each; 0: 2 to 4, by its length.
        horizon_tokens: tokens compared at each place.
        context_tokens: longest sequence that the model takes.
    """

    seed: int = 0
    least_tokens: int = 512
    most_tokens: int = 2500
    windows: int = 1
    places: int = 0
    horizon_tokens: int = 32
    context_tokens: int = 8192

    def length(self, rng: random.Random) -> int:
        """Draws a window's length; short and long ones alike, on a logarithmic scale."""
        most = min(self.most_tokens, self.context_tokens)
        least = min(self.least_tokens, most)
        return round(math.exp(rng.uniform(math.log(least), math.log(most))))


@dataclass(frozen=True)
class Asked:
    """What is the same for all replays of a run."""

    model: str
    pipelines: tuple[str, ...]
    horizon_tokens: int


@dataclass(frozen=True)
class Replay:
    """One text to be measured.

    Attributes:
        token_ids: the text.
        at_tokens: places.
        measured_under: a pipeline per place.
        turns: user turns, if it is a conversation of more than one.
        prompt_tokens: where its prompt ends, if an answer follows.
    """

    token_ids: tuple[int, ...]
    at_tokens: tuple[int, ...]
    measured_under: tuple[str, ...]
    turns: int = 0
    prompt_tokens: int = 0


@dataclass(frozen=True)
class Plan:
    """All that is measured of one document: a replay per window. No two places of a document are the same."""

    document: str
    kind: str
    replays: tuple[Replay, ...]

    @property
    def places(self) -> int:
        """Places of all its windows."""
        return sum(len(replay.at_tokens) for replay in self.replays)

    def digest(self, asked: Asked) -> str:
        """Names everything that the result depends on."""
        digest = hashlib.sha256(f"{SCHEMA_HASH}\0{self.document}\0{self.kind}".encode())
        for replay in self.replays:
            request = make_replay_request(
                token_ids=replay.token_ids,
                at_tokens=replay.at_tokens,
                measured_under=replay.measured_under,
                pipelines=asked.pipelines,
                horizon_tokens=asked.horizon_tokens,
                turns=replay.turns,
                prompt_tokens=replay.prompt_tokens,
                model=asked.model,
            )
            digest.update(request.SerializeToString(deterministic=True))
        return digest.hexdigest()


def file_stem(document: str) -> str:
    """Begins the name of a document's file."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", document)[-80:].strip("._")
    return f"{readable}-{hashlib.sha256(document.encode()).hexdigest()[:10]}"


def make_plans(
    documents: Iterable[Document],
    vocabulary: Vocabulary,
    others: Sequence[str],
    options: Options,
    skipped: Skipped,
) -> Iterator[Plan]:
    """Plans of the documents that can be measured; the others are counted with the reason.

    Args:
        documents: read as plans are asked for.
        vocabulary: of the model that measures.
        others: pipelines in force at the places where ``full`` is not.
        options: about windows and places.
        skipped: takes the counts.
    """
    for document in documents:
        try:
            replays = _known(document, vocabulary, others, options)
        except VocabularyError as error:
            skipped.add(str(error))
            continue
        except _LeftOutError as error:
            skipped.add(str(error))
            continue
        yield Plan(document.name, document.kind, tuple(replays))


class _LeftOutError(Exception):
    """A document cannot be measured; says why."""


def _known(document: Document, vocabulary: Vocabulary, others: Sequence[str], options: Options) -> Iterable[Replay]:
    rng = rng_of(options.seed, "places", document.name)
    if document.continuation:
        return [_continued(document, vocabulary, others, options, rng)]
    text: Piece = vocabulary.render(document.turns, answer=False) if document.turns else document.text
    replays: list[Replay] = []
    taken: set[int] = set()
    for window in _windows(text, vocabulary, options, rng):
        places = anywhere(len(window), options.places or places_of(len(window)), options.horizon_tokens, rng, taken)
        taken.update(places)
        if places:
            measured_under = tuple(in_force(places, others, rng))
            replays.append(Replay(tuple(window), tuple(places), measured_under, _user_turns(document)))
    if not replays:
        raise _LeftOutError("too short")
    return replays


def _continued(
    document: Document, vocabulary: Vocabulary, others: Sequence[str], options: Options, rng: random.Random
) -> Replay:
    if document.turns:
        prompt = vocabulary.encode(vocabulary.render(document.turns, answer=True))
    else:
        prompt = _ids(document.text, vocabulary, first=True)
    horizon = options.horizon_tokens
    task = bool(document.answer)
    most = horizon if task else max(horizon, _LONGEST_CONTINUATION_TOKENS)
    after = _ids(document.continuation, vocabulary, first=False)[:most]
    if len(prompt) + len(after) > options.context_tokens:
        raise _LeftOutError(f"longer than the model's context of {options.context_tokens} tokens")
    count = options.places or min(_MOST_PLACES_BY_DEFAULT, places_of(len(prompt)))
    places = around(len(prompt), len(after), count, horizon, rng, task)
    if not places:
        raise _LeftOutError("too short")
    measured_under = tuple(in_force(places, others, rng))
    return Replay((*prompt, *after), tuple(places), measured_under, _user_turns(document), len(prompt))


def _user_turns(document: Document) -> int:
    """0 for what is no conversation of several turns."""
    turns = sum(role == "user" for role, _ in document.turns)
    return turns if turns > 1 else 0


def _ids(piece: Piece, vocabulary: Vocabulary, first: bool) -> list[int]:
    return vocabulary.encode(piece, first) if isinstance(piece, str) else list(piece)


def _windows(piece: Piece, vocabulary: Vocabulary, options: Options, rng: random.Random) -> Iterator[Sequence[int]]:
    """Windows of drawn lengths, one in each of as many equal parts of the text; they begin at a line's beginning."""
    if not isinstance(piece, str):
        length = options.length(rng)
        yield piece[:length]
        return
    whole = vocabulary.encode(piece, first=True)
    number = max(1, min(options.windows, len(whole) // (options.most_tokens + 1)))
    for part in range(number):
        length = options.length(rng)
        if number == 1 and len(whole) <= length:
            yield whole
            return
        begin, end = (len(piece) * edge // number for edge in (part, part + 1))
        characters = (end - begin) * length * number // len(whole)  # about those of the window
        start = rng.randint(begin, max(begin, end - characters))
        line = piece.find("\n", start, end) + 1
        if line and end - line >= characters // 2:
            start = line
        yield vocabulary.encode(piece[start:end], first=True)[:length]
