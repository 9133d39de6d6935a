"""Token ids to text, as a stream: whole characters only, and nothing that might be part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Detokenizer(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of these tokens."""
        ...


class TextStream:
    """The text of one request's generated tokens.

    What :meth:`add` releases depends on the ids added so far alone, so a worker that takes a request over reaches the
    same state by adding the tokens already delivered.
    """

    def __init__(self, tokenizer: Detokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._context = 0  # first token of the window that is decoded
        self._settled = 0  # first token whose text is not yet complete
        self._held = ""
        self.stopped = False
        """Whether a stop string was met; the text ends before it."""

    def add(self, token_id: int) -> str:
        """Takes the next token in and returns the text that is now certain."""
        self._ids.append(token_id)
        # Decoded with some tokens before it, since a token's text may depend on its neighbours (leading spaces).
        before = self._decode(self._ids[self._context : self._settled])
        after = self._decode(self._ids[self._context :])
        if not after.endswith("\ufffd"):  # else: in the middle of a character
            self._held += after[len(before) :]
            self._context, self._settled = self._settled, len(self._ids)
        return self._release()

    def finish(self) -> str:
        """Returns what was still held back, at the end of generation; it too ends before a stop string."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._context : self._settled])
        self._held += self._decode(self._ids[self._context :])[len(before) :]
        self._settled = self._context = len(self._ids)
        text = self._release()
        rest, self._held = self._held, ""
        return text if self.stopped else text + rest

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _release(self) -> str:
        places = [place for place in (self._held.find(stop) for stop in self._stop) if place >= 0]
        if places:
            self.stopped = True
            text, self._held = self._held[: min(places)], ""
            return text
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
