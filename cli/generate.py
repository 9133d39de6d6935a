"""``kvpilot generate``: one job, streamed as text or given as one JSON document."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path

from cli import text
from cli.document import result_document
from cli.errors import BadInputError
from cli.jobs import follow
from cli.order import Order, Turn
from kvpilot.result import Result

__all__ = ["Order", "conversation", "generate", "read_prompt"]


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt: the argument, the file's text, or stdin's (also for ``-``).

    Raises:
        BadInputError: both are given, or the text is not UTF-8.
        OSError: the file cannot be read.
    """
    if file is not None:
        if prompt is not None:
            raise BadInputError("give the prompt as an argument or by --file, not both")
        return _decode(file.read_bytes(), str(file))
    if prompt is not None and prompt != "-":
        return prompt
    if sys.stdin.isatty():
        print("reading the prompt from the terminal; Ctrl-D ends it", file=sys.stderr)
    return _decode(sys.stdin.buffer.read(), "stdin")


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInputError(f"{source}: not UTF-8: byte {data[error.start]:#04x} at offset {error.start}") from None


def conversation(system: str | None, user: str) -> tuple[Turn, ...]:
    """The turns of a fresh conversation."""
    opening: tuple[Turn, ...] = (("system", system),) if system is not None else ()
    return (*opening, ("user", user))


def generate(endpoint: str, order: Order, as_json: bool, quiet: bool) -> None:
    """Runs one job and prints it.

    Raises:
        KvpilotError: it was refused, or failed; what was generated before is printed.
    """
    result = Result()
    try:
        asyncio.run(stream(endpoint, order, result, (lambda piece: None) if as_json else write))
    finally:
        if as_json and result.finished is not None:
            print(json.dumps(result_document(result), ensure_ascii=False))
        elif not as_json and result.token_ids:
            write("\n")
    if not quiet and not as_json:
        print(summary(result), file=sys.stderr)


async def stream(endpoint: str, order: Order, result: Result, show: Callable[[str], None]) -> None:
    """Runs one job, adding its events to ``result`` and showing its text; cancels it if it is itself cancelled."""
    async for event in follow(endpoint, order):
        result.add(event.message)
        if event.text:
            show(event.text)


def write(piece: str) -> None:
    """Text to stdout, at once."""
    sys.stdout.write(piece)
    sys.stdout.flush()


def summary(result: Result) -> str:
    """One paragraph on a finished job: speed, cache, switches."""
    cache, usage, timings = result.cache, result.usage, result.timings
    speed = f", {(usage.generated_tokens - 1) * 1000 / timings.decode_ms:.1f} tokens/s" if timings.decode_ms else ""
    reused = f" ({usage.reused_prompt_tokens} reused)" if usage.reused_prompt_tokens else ""
    lines = [
        f"[{result.finish_reason}] {usage.prompt_tokens}{reused} + {usage.generated_tokens} tokens{speed}, first after "
        f"{(timings.queued_ms + timings.prefill_ms) / 1000:.2f} s; peak cache {text.size(cache.peak_device_bytes)} on "
        f"the device, {text.share(cache.peak_device_bytes, cache.full_cache_bytes)} of full; {result.pipeline}"
    ]
    lines += [
        f"  switched at token {switch.at_token} by the {text.orderer(switch.ordered_by)}: {switch.from_pipeline} -> "
        f"{switch.to_pipeline} ({switch.reason})"
        for switch in result.switches
    ]
    return "\n".join(lines)
