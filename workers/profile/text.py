"""Real text for a profile: what lies on this machine, cut into pieces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from models.collect.builtin import docstrings_of, find_builtin
from models.collect.corpus import Skipped, interleave, read_files
from models.collect.document import PROSE, Document
from models.profiles import ProfileError

TEXT_TOKENS = 1024
"""Tokens of a piece, each of another document."""
_CHARACTERS_PER_TOKEN = 12
"""No tokenizer makes as few tokens of text: as much of a document is read."""


def pieces(tokenizer: Any, tokens: int, context: int, seed: int = 0) -> list[list[int]]:
    """So many tokens of prose and code, a piece of each document, from its beginning.

    Licences, manuals, documentation and Python's library alternate, and of every second module its documentation is
    taken; which ones depends on the machine and the seed.

    Raises:
        ProfileError: there is too little text here.
    """
    length = min(TEXT_TOKENS, context)
    found: list[list[int]] = []
    left = tokens
    for document in _documents(seed):
        ids = list(tokenizer(str(document.text)[: length * _CHARACTERS_PER_TOKEN])["input_ids"])[: min(length, left)]
        if len(ids) < min(length, left):
            continue
        found.append(ids)
        left -= len(ids)
        if not left:
            return found
    raise ProfileError(f"{tokens} tokens of text wanted; the documents on this machine have {tokens - left}")


def _documents(seed: int) -> Iterator[Document]:
    modules = 0
    for document in read_files(interleave(find_builtin(), seed), Skipped()):
        said = docstrings_of(document) if document.kind != PROSE else None
        modules += said is not None
        yield said if said is not None and modules % 2 else document
