"""``kvpilot chat``: a conversation in one session."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import uuid
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cli.errors import BadInputError, describe_call_error
from cli.generate import stream, summary, write
from cli.order import Order, Turn
from kvpilot.errors import KvpilotError
from kvpilot.pipeline import PipelineError, parse_pipeline
from kvpilot.result import Result

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Order", "chat"]

HELP = "/pipeline STAGES  keep to this pipeline; without STAGES the planner decides\n/reset  forget the talk\n/quit"


@dataclass
class Conversation:
    """The talk so far and how to go on with it."""

    endpoint: str
    system: str | None
    order: Order
    turns: tuple[Turn, ...] = ()

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Starts over, in a session of its own."""
        self.turns = (("system", self.system),) if self.system is not None else ()
        self.order = replace(self.order, session_id=f"chat-{uuid.uuid4().hex}")

    def ask(self, user: str, show: Callable[[str], None]) -> Result:
        """The model's answer. A turn that is refused or interrupted is not kept.

        Raises:
            KvpilotError: it was refused or failed.
            KeyboardInterrupt: the user interrupted it; the job is cancelled.
        """
        result = Result()
        turns = (*self.turns, ("user", user))
        asyncio.run(stream(self.endpoint, replace(self.order, turns=turns), result, show))
        self.turns = (*turns, ("assistant", result.text))
        return result

    def command(self, line: str) -> str:
        """Carries out a ``/command``; what to tell the user.

        Raises:
            EOFError: it was ``/quit``.
        """
        name, _, argument = line.partition(" ")
        if name in ("/quit", "/exit"):
            raise EOFError
        if name == "/reset":
            self.reset()
            return "forgotten"
        if name == "/pipeline":
            argument = argument.strip()
            try:
                if argument:
                    parse_pipeline(argument)
            except PipelineError as error:
                return str(error)
            self.order = replace(self.order, pipeline=argument or None)
            return f"from the next turn on: {argument or 'what the planner decides'}"
        return HELP if name == "/help" else f"unknown command {name}\n{HELP}"


def chat(endpoint: str, system: str | None, order: Order) -> None:
    """Reads turns from stdin until ``/quit`` or its end."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives input() a history
    conversation = Conversation(endpoint, system, order)
    terminal = sys.stdin.isatty()
    if terminal:
        print("/help lists the commands, /quit leaves", file=sys.stderr)
    while True:
        try:
            line = input("> " if terminal else "").strip()
            if line.startswith("/"):
                print(conversation.command(line), file=sys.stderr)
            elif line:
                _turn(conversation, line)
        except EOFError:
            return


def _turn(conversation: Conversation, line: str) -> None:
    try:
        result = conversation.ask(line, write)
    except KeyboardInterrupt:
        write("\n")
        print("cancelled; this turn is forgotten", file=sys.stderr)
    except BadInputError as error:
        print(error, file=sys.stderr)
    except KvpilotError as error:
        write("\n")
        print(describe_call_error(error, conversation.endpoint), file=sys.stderr)
    else:
        write("\n")
        print(summary(result), file=sys.stderr)
