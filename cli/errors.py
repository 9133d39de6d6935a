"""Errors as the user sees them: one message, every bad field named, exit code 2 for bad input and 1 for the rest."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from kvpilot.errors import KvpilotError

BAD_INPUT = 2
FAILED = 1
INTERRUPTED = 130


class BadInputError(Exception):
    """The command line or what it names is wrong; ``str(error)`` says how."""


class FailedError(Exception):
    """The command could not do its work; ``str(error)`` says why."""


@contextmanager
def reported(endpoint: str = "") -> Iterator[None]:
    """Turns the errors a command expects into a message on stderr and an exit code.

    Args:
        endpoint: where the command calls, for "nothing answers there".
    """
    try:
        yield
    except BadInputError as error:
        _leave(str(error), BAD_INPUT)
    except FailedError as error:
        _leave(str(error), FAILED)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        message, code = describe(error, endpoint)
        if not message:
            raise
        _leave(message, code)


def _leave(message: str, code: int) -> None:
    print(f"kvpilot: {message}", file=sys.stderr)
    raise typer.Exit(code) from None


def describe(error: Exception, endpoint: str = "") -> tuple[str, int]:
    """Message and exit code of an error that a command may expect; an empty message for any other."""
    from pydantic import ValidationError

    from cli.redis_server import StateInUseError
    from cli.stack import StackError
    from kvpilot.recipes import RecipesError
    from models.store import ModelNotFoundError

    if isinstance(error, ValidationError):
        return describe_validation(error), BAD_INPUT
    if isinstance(error, ModelNotFoundError | tomllib.TOMLDecodeError):
        return str(error.args[0] if error.args else error), BAD_INPUT
    if isinstance(error, StateInUseError | StackError | RecipesError):
        return str(error), FAILED
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}", BAD_INPUT
    if "grpc" in sys.modules:
        from kvpilot.errors import InvalidArgument, OutOfRange

        called = as_kvpilot_error(error)
        if called is not None:
            bad = isinstance(called, InvalidArgument | OutOfRange)
            return describe_call_error(called, endpoint), BAD_INPUT if bad else FAILED
    return "", FAILED


def as_kvpilot_error(error: Exception) -> KvpilotError | None:
    """The error of a call, whichever client made it; None for any other."""
    import grpc

    from kvpilot.errors import KvpilotError, error_of_rpc

    if isinstance(error, KvpilotError):
        return error
    return error_of_rpc(error) if isinstance(error, grpc.RpcError) else None


def describe_validation(error: Any) -> str:
    """A pydantic ValidationError, one line per bad setting."""
    lines = []
    for problem in error.errors(include_url=False):
        place = ".".join(str(part) for part in problem["loc"]) or error.title
        given = "" if problem["type"] in ("missing", "extra_forbidden") else f", not {problem['input']!r}"
        lines.append(f"  {place}: {problem['msg']}{given}")
    return "\n".join([f"settings not accepted ({error.title}):", *lines])


def describe_call_error(error: KvpilotError, endpoint: str) -> str:
    """A refused or failed call: the server's words, one line per bad field, and how long to wait where that helps."""
    from kvpilot.errors import Unavailable

    if isinstance(error, Unavailable) and "connect" in str(error).lower():
        return f"nothing answers at {endpoint}; start it with `kvpilot up`, or name another one with --endpoint"
    lines = ["the request was refused:" if error.violations else str(error)]  # the message only lists them again
    lines += [f"  {field}: {description}" for field, description in error.violations.items()]
    if error.retry_after_ms:
        lines.append(f"  try again in {error.retry_after_ms / 1000:.1f} s")
    return "\n".join(lines)
