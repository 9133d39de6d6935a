"""The picture of ``kvpilot bench kernels``, as PNG. Colours are Okabe and Ito's, as in :mod:`models.plots`."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.kernel_report import Report, Row

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442", "#D55E00")
GREY, RED = "#666666", "#D55E00"


def plot(report: Report) -> bytes:
    """GB/s of every kernel beside the memory's, and speed against torch's attention, by context length."""
    figure = Figure(figsize=(11, 4.5), dpi=120, layout="constrained")  # no pyplot: no window, no global state
    speed, ratio = figure.subplots(1, 2)
    groups = list(dict.fromkeys((row.context, row.backend) for row in report.rows))
    _bars(speed, report, groups, "gb_per_s")
    for number, group in enumerate(groups):
        row = next(row for row in report.rows if (row.context, row.backend) == group)
        for name, height, line in (("read", row.read_gb_per_s, "-"), ("copy", row.copy_gb_per_s, "--")):
            label = f"memory: {name}" if number == 0 else None
            speed.hlines(height, number - 0.45, number + 0.45, color=GREY, linestyle=line, label=label)
    speed.set_ylabel("GB/s of blocks read")
    speed.set_title("Decode attention beside the memory")
    _bars(ratio, report, groups, "speedup_vs_sdpa")
    ratio.axhline(1, color=RED, linewidth=1, label="torch's scaled_dot_product_attention")
    ratio.set_ylabel("times as fast as torch")
    ratio.set_title("Decode attention beside torch's")
    for axes in (speed, ratio):
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", alpha=0.25)
    named = {
        label: mark for axes in (speed, ratio) for mark, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=len(named), fontsize="small")
    chosen, machine = report.settings, report.machine
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads_used']} threads"
    figure.suptitle(f"{where}, batch {chosen['batch']}, {chosen['dtype']}", fontsize="medium")
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": "kvpilot"})
    return out.getvalue()


def _bars(axes: Any, report: Report, groups: list[tuple[int, str]], name: str) -> None:
    """A bar for each row: formats beside each other, in groups of context and backend."""
    formats = list(dict.fromkeys(row.format for row in report.rows))
    width = 0.8 / max(1, len(formats))
    for number, fmt in enumerate(formats):
        rows: list[Row] = [row for row in report.rows if row.format == fmt]
        places = np.array([groups.index((row.context, row.backend)) for row in rows])
        shift = (number - (len(formats) - 1) / 2) * width
        colour = COLOURS[number % len(COLOURS)]
        axes.bar(places + shift, [getattr(row, name) for row in rows], width, color=colour, label=fmt)
    axes.set_xticks(range(len(groups)), [f"{context:,} tokens\n{backend}" for context, backend in groups])
