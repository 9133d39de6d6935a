"""The quality report as one HTML page that holds its pictures."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

from bench.quality_report import Report, cells, summary
from bench.quality_rows import Table

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:80rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto;font-variant-numeric:tabular-nums}"
    "td,th{border-bottom:1px solid #ccc;padding:.15rem .75rem;text-align:right}"
    "td:nth-child(-n+2),th:nth-child(-n+2){text-align:left}img{max-width:100%;height:auto}"
)


def page(report: Report, picture: bytes) -> str:
    """The page.

    Args:
        report: what was measured.
        picture: PNG.
    """
    tables = "".join(_table(report, table) for table in Table if report.of(table))
    said = "".join(f"<p>{html.escape(line)}</p>" for line in summary(report).splitlines())
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>kvpilot: quality of {html.escape(report.model)}"
        f"</title><style>{_STYLE}</style><h1>Quality of every pipeline, {html.escape(report.model)}</h1>{said}"
        f"<p><code>{html.escape(report.command)}</code></p>"
        f'<img alt="Divergence and needles found over device bytes" '
        f'src="data:image/png;base64,{base64.b64encode(picture).decode()}">{tables}{_pipelines(report)}</html>\n'
    )


def _table(report: Report, table: Table) -> str:
    shown = cells(report, table)
    remarks = "".join(f"<li>{html.escape(remark)}</li>" for remark in shown.remarks)
    return (
        f"<h2>{html.escape(shown.title)}</h2><p>{html.escape(shown.caption)}</p>"
        f"{_grid(shown.heads, shown.lines)}{f'<ul>{remarks}</ul>' if remarks else ''}"
    )


def _pipelines(report: Report) -> str:
    """The text of every pipeline at every length."""
    lines = dict.fromkeys(
        (row.label, row.pipeline, f"{row.context:,}") for row in report.rows if row.pipeline is not None
    )
    return f"<h2>Pipelines as set</h2>{_grid(('name', 'pipeline', 'tokens'), list(lines))}"


def _grid(heads: Sequence[str], lines: Sequence[Sequence[str | None]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    body = ["".join(f"<td>{html.escape(cell or '-')}</td>" for cell in line) for line in lines]
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in body)}</table>"
