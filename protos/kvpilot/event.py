"""One event of a job, as the Python clients give it."""

from __future__ import annotations

from dataclasses import dataclass

from kvpilot.v1 import generation_pb2


@dataclass(frozen=True)
class Event:
    """What happened to a job.

    Attributes:
        message: the event as it came, with everything in it.
    """

    message: generation_pb2.GenerationEvent

    @property
    def offset(self) -> int:
        """Place in the job's stream, from 0; resume from ``offset + 1`` to see what comes next."""
        return self.message.offset

    @property
    def kind(self) -> str:
        """``accepted``, ``started``, ``tokens``, ``switch``, ``replayed`` or ``finished``."""
        return self.message.WhichOneof("event") or ""

    @property
    def text(self) -> str:
        """Text to append to what came before; empty for events other than tokens."""
        return self.message.tokens.text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """New tokens; none for events other than tokens."""
        return tuple(token.id for token in self.message.tokens.tokens)
