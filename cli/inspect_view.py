"""How ``kvpilot inspect`` looks on a terminal: a map of what each layer keeps, totals, pieces of the text."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli import text
from cli.inspect_run import Inspection

SHADES = " ░▒▓█"
"""From no token of a cell to all of them; the first and the last mean exactly that."""
PIECE_TOKENS = 8
PIECES = 5
"""Pieces of the text that are shown of the best and of the worst."""
_MARGIN = 14
"""Columns beside the map: a layer's name before it, its share behind it."""


@dataclass(frozen=True)
class Piece:
    """Tokens ``start`` .. ``end`` - 1 and which share of the heads keeps them, in the mean."""

    start: int
    end: int
    share: float


def show(found: Inspection, console: Console) -> None:
    """Prints everything."""
    generated = found.seen - found.prompt_tokens
    console.print(
        f"{found.pipeline} ({found.loss_class.name.lower()}), {found.model},"
        f" {found.prompt_tokens} + {generated} tokens",
        soft_wrap=True,
        markup=False,
    )
    console.print()
    for line in layer_map(found, console.width):
        console.print(line, soft_wrap=True, markup=False)
    console.print(totals(found))
    console.print(kinds(found))
    if moves := text.recalls(found.recalls.to_proto()):
        console.print(moves, soft_wrap=True, markup=False)
    for line in piece_lines(found, console.width):
        console.print(line, soft_wrap=True, markup=False)


def layer_map(found: Inspection, width: int) -> list[str]:
    """A row for each layer: along the text, the share of tokens that its heads keep, in the mean."""
    columns = max(1, min(found.seen, width - _MARGIN))
    edges = np.arange(columns + 1) * found.seen // columns
    kept = found.kept.reshape(found.shape.layers, found.shape.kv_heads, found.seen).mean(axis=1)  # [L, T]
    cells = np.add.reduceat(kept, edges[:-1], axis=1) / np.diff(edges)  # [L, columns]
    rows = [
        f"layer {layer:>2} {''.join(shade(share) for share in row)} {float(kept[layer].mean()):>4.0%}"
        for layer, row in enumerate(cells)
    ]
    per_cell = f"{found.seen / columns:.3g} tokens" if columns < found.seen else "a token"
    key = f"kept along the text, {per_cell} a column: ' ' none, ░ ▒ ▓ some, █ all; behind it the layer's share"
    return [*rows, key]


def shade(share: float) -> str:
    """The character for a share from 0 to 1."""
    if share <= 0:
        return SHADES[0]
    if share >= 1 - 1e-9:
        return SHADES[-1]
    return SHADES[1 + min(int(share * (len(SHADES) - 2)), len(SHADES) - 3)]


def totals(found: Inspection) -> Table:
    """Tokens and bytes against the full cache."""
    kept = np.array([len(head.kept) for head in found.heads])
    use, heads = found.use, text.count(len(found.heads), "head")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "now", "of the full cache"):
        table.add_column(column, justify="right" if column else "left")
    spread = f"from {kept.min()} to {kept.max()}"
    table.add_row(f"tokens a head ({heads})", f"{kept.mean():.1f}", text.share(float(kept.mean()), found.seen))
    table.add_row("  fewest and most", spread, "")
    for name, size in (
        ("device", use.device_bytes),
        ("host", use.host_bytes),
        ("disk", use.disk_bytes),
        ("shadow", use.shadow_bytes),
        ("peak on the device", use.peak_device_bytes),
        ("full cache", use.full_bytes),
    ):
        table.add_row(name, text.size(size), text.share(size, use.full_bytes))
    return table


def kinds(found: Inspection) -> Table:
    """Blocks and tokens by format and tier."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("format", "tier", "blocks", "tokens", "of the kept"):
        table.add_column(column, justify="left" if column in ("format", "tier") else "right")
    kept = sum(len(head.kept) for head in found.heads)
    for kind in found.kinds:
        words = (kind.format.name.lower(), kind.tier.name.lower(), f"{kind.blocks}", f"{kind.tokens}")
        table.add_row(*words, text.share(kind.tokens, kept))
    return table


# -- pieces of the text ------------------------------------------------------------------------------------------------


def piece_lines(found: Inspection, width: int) -> list[str]:
    """The pieces that most and fewest heads keep, of those the evictor was free to drop."""
    if found.choice is None:
        return ["no stage evicts: every head keeps every token"]
    first, end = found.choice.first, found.choice.seen - found.choice.recent
    where = f"between the first {first} and the last {found.choice.recent} of {found.choice.seen} tokens"
    if end <= first:
        return [f"nothing to choose from {where}: all of these are protected"]
    count = found.kept.sum(axis=0)  # [T] heads that keep each token
    pieces = cut(count[first:end] / len(found.heads), first)
    if pieces[0].share == pieces[-1].share:
        return [
            f"{where}, every piece is kept by the same share of the {len(found.heads)} heads: {pieces[0].share:.0%}"
        ]
    shown = min(PIECES, len(pieces) // 2)
    lines = [f"pieces of {PIECE_TOKENS} tokens, {where}: share of heads that keep them, positions, text"]
    for title, some in (("most kept", pieces[:shown]), ("least kept", pieces[: -shown - 1 : -1])):
        lines += [f"{title}:", *(piece_line(found, piece, width) for piece in some)]
    return lines


def cut(share: npt.NDArray[np.float64], first: int) -> list[Piece]:
    """The pieces of a stretch of tokens, best first, equal ones in the text's order; the last one takes the rest in.

    Args:
        share: [n] share of heads that keep each token.
        first: position of the first of them.
    """
    starts = [piece * PIECE_TOKENS for piece in range(max(1, len(share) // PIECE_TOKENS))]
    ends = [*starts[1:], len(share)]
    pieces = [
        Piece(first + start, first + end, float(share[start:end].mean()))
        for start, end in zip(starts, ends, strict=True)
    ]
    return sorted(pieces, key=lambda piece: -piece.share)


def piece_line(found: Inspection, piece: Piece, width: int) -> str:
    """One piece in a line, its text cut where the line ends."""
    written = "".join(islice(found.tokens, piece.start, piece.end))
    head = f"  {piece.share:>4.0%}  {f'{piece.start}-{piece.end - 1}':<11} "
    line = Text(head + "".join(mark if mark.isprintable() else repr(mark)[1:-1] for mark in written))
    line.truncate(width, overflow="ellipsis")
    return line.plain
