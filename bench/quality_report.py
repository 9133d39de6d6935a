"""The quality report for people and programs: a document, and tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.table import Table as Grid
from rich.text import Text

from bench.machine import Machine, busy_note
from bench.quality_rows import Row, Table

TITLES = {
    Table.TEXT: "Text: the tokens that follow a real text, which the pipeline did not know",
    Table.RETRIEVAL: "Retrieval: passwords in a text, asked for",
    Table.CONVERSATION: "Conversation: the last of three turns asks for what the first one said",
    Table.GENERATION: "Long generation: along the full cache's own answer, evicting while decoding",
}
CAPTIONS = {
    Table.TEXT: "Bytes: on the device, of the full cache's, raw ones as 16 bits. Query-agnostic. Divergence in nats a "
    "token from the full cache; perplexity of the same tokens.",
    Table.RETRIEVAL: "Share of questions answered to the letter. Query-agnostic: the pipeline takes effect behind the "
    "context, the question is read against what it kept; query-aware: the question is in the prompt by then.",
    Table.CONVERSATION: "The pipeline is in force from the first turn on. Query-agnostic. Bytes: the most at any time, "
    "of the full cache's at the end. Divergence: over the answers' tokens.",
    Table.GENERATION: "Query-aware: what is to be written about is in the prompt. Bytes: the most at any time, of the "
    "full cache's at the end. Agreement: share of tokens with the same most probable one.",
}


@dataclass
class Report:
    """What was measured, on what, and how long it took.

    Attributes:
        machine: see ``describe_machine``.
        model: its name.
        date: day, UTC.
        command: that makes it.
        settings: sizes, and the names of texts.
        seconds: in all.
        spent: seconds by what they were spent on.
        rows: all tables'.
    """

    machine: Machine
    model: str
    date: str
    command: str
    settings: dict[str, Any]
    seconds: float = 0.0
    spent: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def of(self, table: Table) -> list[Row]:
        """One table's rows."""
        return [row for row in self.rows if row.table == table.value]

    @property
    def failed(self) -> list[Row]:
        """Rows of pipelines that raised."""
        return [row for row in self.rows if row.error]

    def document(self) -> dict[str, Any]:
        """The report as JSON has it."""
        return {
            "machine": self.machine,
            "model": self.model,
            "date": self.date,
            "command": self.command,
            "settings": self.settings,
            "seconds": round(self.seconds, 1),
            "spent_s": {name: round(seconds, 1) for name, seconds in self.spent.items()},
            "rows": [row.document() for row in self.rows],
        }


@dataclass(frozen=True)
class Cells:
    """A table as text: a line for each subject, and remarks on those that were not measured."""

    title: str
    caption: str
    heads: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    remarks: tuple[str, ...]


def cells(report: Report, table: Table) -> Cells:
    """One table as text."""
    rows = report.of(table)
    heads, remarks = ["pipeline", "loss"], list[str]()
    lines: list[tuple[str, ...]] = []
    groups = list(dict.fromkeys((row.context, row.query_aware) for row in rows))
    shown = {group: _columns(table, group, several=len(groups) > 1) for group in groups}
    heads += [head for columns in shown.values() for head, _ in columns]
    by_label = {label: [row for row in rows if row.label == label] for label in dict.fromkeys(r.label for r in rows)}
    for label, mine in by_label.items():
        at = {(row.context, row.query_aware): row for row in mine}
        loss = next((row.loss_class for row in mine if row.loss_class), "-")
        line = [label, loss]
        for group, columns in shown.items():
            line += [show(at[group]) if group in at else "-" for _, show in columns]
        lines.append(tuple(line))
        remarks += _remarks(label, mine)
    return Cells(TITLES[table], CAPTIONS[table], tuple(heads), tuple(lines), tuple(remarks))


Column = tuple[str, Callable[[Row], str]]


def _columns(table: Table, group: tuple[int, bool], several: bool) -> list[Column]:
    """Heads of a group's columns, and what they show."""
    context, aware = group
    at = f"{context:,}: " if several else ""
    size: Column = (f"{at}bytes", lambda row: _share(row.bytes_fraction))
    divergence: Column = (f"{at}nats", lambda row: _number(row.divergence))
    if table is Table.RETRIEVAL:
        found: Column = (f"{context:,}: {'aware' if aware else 'agnostic'}", lambda row: _share(row.needle_accuracy))
        return [found] if aware else [size, found]
    if table is Table.CONVERSATION:
        return [size, (f"{at}recalled", lambda row: _share(row.needle_accuracy)), divergence]
    if table is Table.TEXT:
        return [size, divergence, (f"{at}perplexity", lambda row: _number(row.perplexity))]
    last: Column = (f"{at}last quarter", lambda row: _number(row.divergence_last_quarter))
    agreement: Column = (f"{at}agreement", lambda row: _share(row.agreement))
    return [size, divergence, last, agreement, (f"{at}perplexity", lambda row: _number(row.perplexity))]


def _remarks(label: str, rows: Sequence[Row]) -> Iterator[str]:
    for what in dict.fromkeys(f"ERROR {row.error}" if row.error else row.left_out for row in rows):
        if what:
            yield f"{label}: {what}"


def render(report: Report, table: Table) -> Iterator[Grid | Text]:
    """One table for the terminal."""
    shown = cells(report, table)
    grid = Grid(
        title=shown.title, caption=shown.caption, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left"
    )
    for place, head in enumerate(shown.heads):
        grid.add_column(head, justify="right" if place > 1 else "left", overflow="fold")
    for line in shown.lines:
        grid.add_row(*map(Text, line))
    yield grid
    for remark in shown.remarks:
        yield Text(f"  {remark}")


def summary(report: Report) -> str:
    """On what, how long, and what took longest."""
    machine = report.machine
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in report.spent.items())
    by_name: dict[str, float] = {}
    for row in report.rows:
        by_name[row.name] = by_name.get(row.name, 0.0) + row.seconds
    longest = sorted(by_name.items(), key=lambda one: -one[1])[:5]
    slowest = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in longest)
    return (
        f"{report.model}, {machine['cpu']}, {machine['threads_used']} threads, {report.date}: {len(report.rows)} rows "
        f"in {report.seconds:.0f} s\nspent on: {spent}\nslowest: {slowest}{busy_note(machine)}"
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
