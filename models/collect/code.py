"""Places in real Python code where something is used for the first time, far behind its definition."""

from __future__ import annotations

import ast
import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class FarUse:
    """A piece of code cut at the use."""

    name: str
    """What is used there."""
    prompt: str
    """From the definition to just before the use."""
    rest: str
    """The code from the use on; begins with the name, maybe behind spaces."""


def far_use(text: str, tokens: int, count: Callable[[str], int], rng: random.Random) -> FarUse | None:
    """A first use whose definition lies at least half of ``tokens`` back; None where there is none.

    Args:
        text: Python source.
        tokens: most tokens between definition and use.
        count: tokens of a text.
        rng: chooses among several.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return None
    starts = _line_starts(text)
    defined = _definitions(tree)
    first: dict[str, int] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in defined:
            line = text[starts[node.lineno - 1] : starts[node.lineno]].encode()
            at = starts[node.lineno - 1] + len(line[: node.col_offset].decode(errors="ignore"))
            if at > starts[defined[node.id] - 1] and at < first.get(node.id, len(text)):
                first[node.id] = at
    choices = sorted((name, starts[defined[name] - 1], use) for name, use in first.items())
    rng.shuffle(choices)
    for name, start, use in choices:
        prompt = text[start:use]
        if not tokens // 2 <= len(prompt) <= 12 * tokens:  # cheaper than counting
            continue
        if not tokens // 2 <= count(prompt) <= tokens:
            continue
        kept = prompt.rstrip(" ")
        if kept.endswith("\n") or not kept:
            kept = prompt  # indentation is part of the prompt
        return FarUse(name, kept, text[start + len(kept) : use + 2_000])
    return None


def _line_starts(text: str) -> list[int]:
    starts = [0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    return starts


def _definitions(tree: ast.Module) -> dict[str, int]:
    """Names defined or imported at the top of the module, each with the number of its line."""
    defined: dict[str, int] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.setdefault(node.name, node.lineno)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                defined.setdefault((alias.asname or alias.name).partition(".")[0], node.lineno)
    return defined
