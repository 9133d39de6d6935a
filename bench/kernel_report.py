"""What ``kvpilot bench kernels`` found: the arithmetic from times to figures, and tables for people."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

from rich import box
from rich.table import Table

from bench.kernel_cache import Case
from bench.kernel_timing import Times
from bench.machine import Machine, busy_note
from kernels.layout import Format

PEERS = {
    "packed": "scaled_dot_product_attention, queries of a group packed as rows of their KV head",
    "gqa": "scaled_dot_product_attention with enable_gqa=True",
}
COPY, READ = "copy", "read"


@dataclass(frozen=True)
class Row:
    """One kernel's decode attention. Times are of one layer; GB are 10^9 bytes; figures are medians over the rounds."""

    backend: str
    format: str
    context: int
    batch: int
    layers: int
    """Walked over in a pass."""
    bytes_read: int
    """Of blocks, in one layer."""
    ms: float
    plan_ms: float
    """Of planning the whole step, which is not in ``ms``."""
    gb_per_s: float
    copy_gb_per_s: float
    """torch's copy, bytes read and written."""
    read_gb_per_s: float
    """torch's sum, bytes read."""
    share_of_read: float
    sdpa_form: str
    """The faster of PEERS."""
    sdpa_ms: float
    sdpa_packed_ms: float
    sdpa_gqa_ms: float
    sdpa_gb_per_s: float
    speedup_vs_sdpa: float
    """Median over the rounds of the faster form's time over the kernel's in the same round."""
    speedup_low: float
    speedup_high: float
    """Lowest and highest round."""
    difference_vs_sdpa: float
    """|ours - torch's| / |torch's| over the first layer's output: what the format rounds."""


@dataclass(frozen=True)
class Switch:
    """One request's full blocks built anew in another format, all layers: the stall of a format switch."""

    backend: str
    from_: str
    to: str
    tokens: int
    ms: float
    gb_per_s: float
    """Bytes of blocks read and built."""
    decode_step_ms: float
    """Attention of one decode step of this request, all layers, before the switch."""
    decode_steps: float
    """The stall in such steps."""


@dataclass(frozen=True)
class Skipped:
    """A format that a backend does not do."""

    backend: str
    format: str
    why: str


@dataclass
class Report:
    """All of one run."""

    machine: Machine
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    switches: list[Switch] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """The report as JSON has it."""
        return {
            "machine": self.machine,
            "settings": self.settings,
            "rows": [asdict(row) for row in self.rows],
            "switches": [{key.rstrip("_"): value for key, value in asdict(switch).items()} for switch in self.switches],
            "skipped": [asdict(one) for one in self.skipped],
        }


def make_row(
    case: Case,
    backend: str,
    fmt: Format,
    runs: Times,
    plans: Times,
    bandwidth_bytes: dict[str, int],
    difference: float,
) -> Row:
    """Figures of one format from the passes of a group of contestants.

    Args:
        case: what all of them went over.
        backend: who did it.
        fmt: also the kernel's name in ``runs``, as ``fmt.name``.
        runs: seconds a pass, of the kernel, both PEERS, COPY and READ.
        plans: seconds a plan, of the kernel.
        bandwidth_bytes: bytes of COPY and READ.
        difference: see Row.
    """
    layers = case.shape.layers
    layer_s = {name: statistics.median(times) / layers for name, times in runs.items()}
    form = min(PEERS, key=layer_s.__getitem__)
    ratios = [peer / ours for peer, ours in zip(runs[form], runs[fmt.name], strict=True)]
    copy, read = (bandwidth_bytes[name] / statistics.median(runs[name]) / 1e9 for name in (COPY, READ))
    speed = case.block_bytes(fmt) / layer_s[fmt.name] / 1e9
    return Row(
        backend=backend,
        format=fmt.name.lower(),
        context=case.context_tokens,
        batch=case.rows,
        layers=layers,
        bytes_read=case.block_bytes(fmt),
        ms=_short(layer_s[fmt.name] * 1000),
        plan_ms=_short(statistics.median(plans[fmt.name]) * 1000),
        gb_per_s=_short(speed),
        copy_gb_per_s=_short(copy),
        read_gb_per_s=_short(read),
        share_of_read=_short(speed / read),
        sdpa_form=form,
        sdpa_ms=_short(layer_s[form] * 1000),
        sdpa_packed_ms=_short(layer_s["packed"] * 1000),
        sdpa_gqa_ms=_short(layer_s["gqa"] * 1000),
        sdpa_gb_per_s=_short(case.raw_bytes / layer_s[form] / 1e9),
        speedup_vs_sdpa=_short(statistics.median(ratios)),
        speedup_low=_short(min(ratios)),
        speedup_high=_short(max(ratios)),
        difference_vs_sdpa=_short(difference),
    )


def make_switch(
    case: Case, backend: str, from_: Format, to: Format, switch_s: list[float], step_s: list[float]
) -> Switch:
    """Figures of one switch from the seconds of each round: of the switch, and of a decode step before it."""
    shape = case.shape
    blocks = shape.layers * case.tables_per_layer * case.full_blocks
    took, step = statistics.median(switch_s), statistics.median(step_s)
    return Switch(
        backend=backend,
        from_=from_.name.lower(),
        to=to.name.lower(),
        tokens=case.context_tokens,
        ms=_short(took * 1000),
        gb_per_s=_short(blocks * (shape.block_bytes(from_) + shape.block_bytes(to)) / took / 1e9),
        decode_step_ms=_short(step * 1000),
        decode_steps=_short(took / step),
    )


def _short(number: float) -> float:
    """Four digits, however small."""
    return float(f"{number:.4g}")


ROW_COLUMNS = ("backend", "format", "context", "ms", "GB/s", "copy", "read", "share", "SDPA ms", "vs SDPA")
SWITCH_COLUMNS = ("backend", "from", "to", "tokens", "ms", "GB/s", "step ms", "in steps")


def _row_cells(row: Row) -> tuple[str, ...]:
    return (
        row.backend,
        row.format,
        f"{row.context:,}",
        f"{row.ms:.3g}",
        f"{row.gb_per_s:.1f}",
        f"{row.copy_gb_per_s:.1f}",
        f"{row.read_gb_per_s:.1f}",
        f"{row.share_of_read:.0%}",
        f"{row.sdpa_ms:.3g}",
        f"{row.speedup_vs_sdpa:.2f}x",
    )


def _switch_cells(one: Switch) -> tuple[str, ...]:
    figures = (f"{one.ms:.3g}", f"{one.gb_per_s:.1f}", f"{one.decode_step_ms:.3g}", f"{one.decode_steps:.1f}")
    return (one.backend, one.from_, one.to, f"{one.tokens:,}", *figures)


def _sizes(report: Report) -> str:
    chosen = report.settings
    return (
        f"batch {chosen['batch']}, {chosen['kv_heads']} KV heads of {chosen['queries_per_kv_head']} query heads, "
        f"head_dim {chosen['head_dim']}, {chosen['dtype']}"
    )


def _machine_line(report: Report) -> str:
    machine = report.machine
    line = (
        f"{machine['cpu']}, {machine['threads_used']} of {machine['cores']} cores, "
        f"{int(machine['memory_bytes']) / 2**30:.0f} GiB; torch {machine['torch']}"
    )
    return f"{machine['gpu']}; {line}" if "gpu" in machine else line


def _notes(report: Report) -> list[str]:
    """What the columns mean, a line each."""
    chosen = report.settings
    notes = [
        f"medians of {chosen['repeats']} rounds of all contestants in turn; each pass walks at least "
        f"{chosen['walk_bytes'] / 2**20:.0f} MiB of blocks; ms: one layer",
        "GB/s: blocks read; copy, read: torch's copy (read + written) and sum in the same rounds; share: of read",
        "SDPA: torch's scaled_dot_product_attention on the same numbers, the faster of packed queries and enable_gqa",
    ]
    notes += [f"{one.backend} does not do {one.format}: {one.why}" for one in report.skipped]
    return notes


STEP_NOTE = "step: the attention of one decode step of the same request before the switch, all layers"


def render(report: Report) -> list[Table]:
    """The report for people: decode attention, and format switches."""
    layout: dict[str, Any] = {
        "box": box.SIMPLE_HEAD,
        "title_justify": "left",
        "caption_justify": "left",
        "collapse_padding": True,  # ten columns on a terminal of 80
    }
    table = Table(
        title=f"decode attention, {_sizes(report)}\n{_machine_line(report)}",
        caption="\n".join(_notes(report)) + busy_note(report.machine),
        **layout,
    )
    for number, column in enumerate(ROW_COLUMNS):
        table.add_column(column, justify="left" if number < 2 else "right", no_wrap=True)
    for row, following in zip(report.rows, [*report.rows[1:], None], strict=True):
        last = following is None or following.context != row.context
        table.add_row(*_row_cells(row), end_section=last)
    if not report.switches:
        return [table]
    switches = Table(
        title=f"format switches of one request, {report.settings['switch_layers']} layers", caption=STEP_NOTE, **layout
    )
    for number, column in enumerate(SWITCH_COLUMNS):
        switches.add_column(column, justify="left" if number < 3 else "right")
    for one in report.switches:
        switches.add_row(*_switch_cells(one))
    return [table, switches]


def markdown(report: Report) -> str:
    """The report as Markdown: the machine, both tables, and what the columns mean."""
    lines = [f"**Decode attention**, {_sizes(report)}. {_machine_line(report)}.", ""]
    lines += _markdown_table(ROW_COLUMNS, 2, [_row_cells(row) for row in report.rows])
    if report.switches:
        lines += ["", f"**Format switches** of one request, {report.settings['switch_layers']} layers.", ""]
        lines += _markdown_table(SWITCH_COLUMNS, 3, [_switch_cells(one) for one in report.switches])
    notes = [*_notes(report), *([STEP_NOTE] if report.switches else []), *busy_note(report.machine).split("\n")]
    lines += ["", *(f"- {note}" for note in notes if note)]
    return "\n".join(lines) + "\n"


def _markdown_table(columns: tuple[str, ...], words: int, rows: list[tuple[str, ...]]) -> list[str]:
    """A table whose first ``words`` columns are text and whose others are numbers, padded to be read as it is."""
    widths = [max(len(column), *(len(row[i]) for row in rows), 3) for i, column in enumerate(columns)]

    def line(cells: tuple[str, ...]) -> str:
        padded = (
            cell.ljust(width) if i < words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(padded)} |"

    rule = tuple("-" * width if i < words else "-" * (width - 1) + ":" for i, width in enumerate(widths))
    return [line(columns), line(rule), *(line(row) for row in rows)]
