"""A text to be measured, whatever it came from."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

Turn: TypeAlias = tuple[str, str]
"""``(role, content)``."""
Piece: TypeAlias = str | tuple[int, ...]
"""Text, or token ids used as they are."""

PROSE, CODE, CHAT = "prose", "code", "chat"
_NAME_CHARACTERS = 1000
"""Texts that begin with as many equal characters count as one source."""


@dataclass(frozen=True)
class Document:
    """A text, and what is known of it.

    Attributes:
        name: stable. ``<source>#<what>`` is made of the text of ``<source>``; all that has one source is in one split.
        kind: ``prose``, ``code``, ``chat``, or a task's name.
        text: the text, or the prompt where a continuation is known.
        continuation: what follows the prompt: measured from its first token on. Empty: ``text`` is measured anywhere.
        turns: a conversation; used instead of ``text`` where given. The assistant's turn is opened behind it if there
            is a continuation.
        answer: of a task, what the continuation begins with.
    """

    name: str
    kind: str
    text: Piece = ""
    continuation: Piece = ""
    turns: tuple[Turn, ...] = ()
    answer: str = ""


def rng_of(*of: object) -> random.Random:
    """Random numbers that depend on nothing but these values."""
    digest = hashlib.sha256("\0".join(str(value) for value in of).encode()).digest()
    return random.Random(int.from_bytes(digest, "big"))


def safe_name(name: str) -> str:
    """A name without ``#``, which would set it apart from its source."""
    return name.replace("#", "%23")


def fingerprint(text: str) -> str:
    """Names a text by its words: spacing, case and punctuation do not matter."""
    words = re.findall(r"\w+", text.casefold())
    return hashlib.sha256(" ".join(words).encode()).hexdigest()


def name_by_beginning(text: str) -> str:
    """A name shared by all texts that begin alike, as prompts about one document and the turns of one chat do."""
    return fingerprint(text[:_NAME_CHARACTERS])[:16]


def name_of_chat(turns: Sequence[Turn]) -> str:
    """A name shared by all states of a conversation: up to and with the first user's turn nothing changes."""
    until = next((place for place, (role, _) in enumerate(turns) if role == "user"), 0)
    return name_by_beginning("\n".join(content for role, content in turns[: until + 1] if role != "system"))
