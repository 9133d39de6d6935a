"""The picture of ``kvpilot bench quality``, as PNG: what is lost over what is kept. Colours are Okabe and Ito's."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from bench.quality_report import Report
from bench.quality_rows import Row, Table

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
GREY = "#666666"
LEAST_NATS = 1e-6
"""Drawn for less, on a logarithmic scale."""


def plot(report: Report) -> bytes:
    """Divergence, and needles found, over the share of device bytes, at the longest length; the best are named."""
    figure = Figure(figsize=(12, 10), dpi=110, layout="constrained")  # no pyplot: no window, no global state
    (text, long), (agnostic, aware) = figure.subplots(2, 2)
    kinds = list(dict.fromkeys(row.kind for row in report.rows))
    colours = {kind: COLOURS[number % len(COLOURS)] for number, kind in enumerate(kinds)}
    _points(text, _longest(report, Table.TEXT), "divergence", colours)
    text.set_title("Behind a text")
    _points(long, _longest(report, Table.GENERATION), "divergence", colours)
    long.set_title("Along a long generation")
    for axes, known in ((agnostic, False), (aware, True)):
        rows = [row for row in report.of(Table.RETRIEVAL) if row.query_aware is known]
        _points(axes, rows, "needle_accuracy", colours, mean=True)
        axes.set_title(f"Needles, {'query-aware' if known else 'query-agnostic'}, all lengths")
        axes.set_ylim(-0.05, 1.1)
    for axes in (text, long):
        axes.set_yscale("log")
    marks = [text.scatter([], [], color=colour) for colour in colours.values()]
    figure.legend(marks, list(colours), loc="outside lower center", ncols=max(1, len(kinds)), fontsize="small")
    figure.suptitle(f"{report.model}, {report.date}: {report.command}", fontsize="medium")
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": "kvpilot"})
    return out.getvalue()


def _longest(report: Report, table: Table) -> list[Row]:
    rows = report.of(table)
    return [row for row in rows if row.context == max(other.context for other in rows)]


def _points(axes: Any, rows: Sequence[Row], name: str, colours: dict[str, str], mean: bool = False) -> None:
    """A point for each pipeline that was measured, a line through those that nothing beats, and their names."""
    by_label: dict[str, list[Row]] = {}
    for row in rows:
        if row.bytes_fraction is not None and getattr(row, name) is not None:
            by_label.setdefault(row.label, []).append(row)
    points = []
    for label, mine in by_label.items():
        share = sum(row.bytes_fraction or 0.0 for row in mine) / len(mine)
        value = sum(getattr(row, name) for row in mine) / len(mine)
        points.append((share, value if mean else max(value, LEAST_NATS), mine[0].kind, label))
    for kind, colour in colours.items():
        mine_ = [point for point in points if point[2] == kind]
        axes.scatter([point[0] for point in mine_], [point[1] for point in mine_], color=colour, s=22, alpha=0.8)
    best = front([(share, -value if mean else value) for share, value, _, _ in points])
    axes.plot([points[at][0] for at in best], [points[at][1] for at in best], color=GREY, linewidth=0.8, zorder=0)
    for at in best:
        share, value, _, label = points[at]
        axes.annotate(label, (share, value), xytext=(3, 3), textcoords="offset points", fontsize=6)
    axes.set_xlabel("device bytes, of the full cache's")
    axes.set_ylabel("share of needles found" if mean else "divergence, nats a token")
    axes.grid(alpha=0.25)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, loss) that no other one beats in both, by rising cost."""
    best: list[int] = []
    for at in sorted(range(len(points)), key=lambda at: points[at]):
        if not best or points[at][1] < points[best[-1]][1]:
            best.append(at)
    return best
