"""The pipelines that are measured and planned with.

What is not here is neither replayed by ``kvpilot models collect`` nor chosen by the learned planner, so the list
covers each family at a few strengths, and little more: every entry costs a decode of the whole horizon at every
replayed place, and a row of every live request at every planning tick. All lossy entries keep shadows (the stages'
default), so that a planner may try them and come back; without shadows they differ in their bytes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvpilot.catalog import StageCatalog
from kvpilot.pipeline import PipelineError

FULL = "full"

CANDIDATES: tuple[str, ...] = (
    FULL,
    "int8",
    "kivi(bits=4)",
    "turboquant(bits=4)",
    "turboquant(bits=3)",
    "window(sinks=4, recent=512)",
    "window(sinks=4, recent=1024) | kivi(bits=4)",
    "window(sinks=4, recent=512) | kivi(bits=4)",
    "snapkv(keep=0.5)",
    "snapkv(keep=0.75) | kivi(bits=4)",
    "snapkv(keep=0.5) | kivi(bits=4)",
    "snapkv(keep=0.25) | kivi(bits=4)",
    "snapkv(keep=0.75) | turboquant(bits=4)",
    "snapkv(keep=0.5) | turboquant(bits=3)",
    "h2o(keep=0.75) | kivi(bits=4)",
    "h2o(keep=0.5) | kivi(bits=4)",
    "h2o(keep=0.25) | kivi(bits=4)",
    "scissorhands(keep=0.5) | kivi(bits=4)",
    "keydiff(keep=0.5) | kivi(bits=4)",
    "expected_attention(keep=0.5) | kivi(bits=4)",
    "tova(size=512) | kivi(bits=4)",
    "morphkv(size=512) | kivi(bits=4)",
    "host",
    "kivi(bits=4) | host",
)
MOST = 64
"""Pipelines that one replay may measure."""


class CandidatesError(ValueError):
    """A list of candidates that cannot be used; says which entry, and why."""


def read_candidates(path: Path) -> tuple[str, ...]:
    """Reads one pipeline a line; empty lines and those that begin with ``#`` are comments.

    Raises:
        CandidatesError: no pipeline in it.
        OSError, UnicodeDecodeError: it cannot be read.
    """
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    found = tuple(line for line in lines if line and not line.startswith("#"))
    if not found:
        raise CandidatesError(f"{path}: no pipeline in it; expected one a line, e.g. kivi(bits=4)")
    return found


def check_candidates(candidates: Sequence[str], catalog: StageCatalog) -> tuple[str, ...]:
    """The candidates, ``full`` first and present: everything is compared with it; recipes as the pipelines they are.

    Raises:
        CandidatesError: with all that the served model's stages refuse, or entries that mean the same; or too many.
    """
    wrong: list[str] = []
    known: dict[object, str] = {}
    for text in map(catalog.expand, (FULL, *candidates)):
        try:
            key = catalog.key(text)
        except PipelineError as error:
            wrong.append(f"{text!r}: {error}")
            continue
        if known.setdefault(key, text) != text:
            wrong.append(f"{text!r} means the same as {known[key]!r}")
    if wrong:
        raise CandidatesError("candidates not accepted:\n" + "\n".join(f"  {line}" for line in wrong))
    if len(known) > MOST:
        raise CandidatesError(f"{len(known)} candidates; at most {MOST} are accepted")
    return tuple(known.values())


def recoverable(candidates: Sequence[str], catalog: StageCatalog) -> tuple[str, ...]:
    """Those that lose something and keep the shadows to undo it.

    Raises:
        PipelineError: a pipeline that is not known.
    """
    found = []
    for text in candidates:
        shadows = [dict(values)["shadow"] is True for _, values in catalog.key(text) if "shadow" in dict(values)]
        if shadows and all(shadows):
            found.append(text)
    return tuple(found)
