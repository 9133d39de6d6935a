"""Makes ``docs/metrics.md`` of ``kvpilot.metrics``: ``python docs/generate_metrics.py``; ``--check`` only compares."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from kvpilot.metrics import Kind, Metric, Part, metrics_of

PAGE = Path(__file__).resolve().parent / "metrics.md"
HEAD = """# Metrics

Made from `protos/kvpilot/metrics.py` by `python docs/generate_metrics.py`; change it there.

Each process serves its own at `http://<metrics_listen>/metrics`, where that setting names an address; `kvpilot up` has
all its processes do so and says where. Beside these come `process_*` (processor time, memory, open files) and
`python_*`, by the Prometheus client. *Elsewhere* is what the same figure is called in OpenTelemetry's conventions for
generative AI and in vLLM; why it is not exposed under those names too, the module says.
"""


def page() -> str:
    """The whole text."""
    return "\n".join([HEAD, *(line for part in Part for line in _section(part))])


def _section(part: Part) -> Iterator[str]:
    yield f"## {part.value[0].upper()}{part.value[1:]}\n"
    yield "| metric | type | labels | unit | what it says | elsewhere |"
    yield "|---|---|---|---|---|---|"
    buckets: dict[tuple[float, ...], list[str]] = {}
    for metric in metrics_of(part):
        yield _row(metric)
        if metric.kind is Kind.HISTOGRAM:
            buckets.setdefault(metric.buckets, []).append(f"`{metric.name}`")
    yield ""
    for ends, names in buckets.items():
        yield f"Buckets of {', '.join(names)}: {', '.join(f'{end:g}' for end in ends)}.\n"


def _row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    elsewhere = ", ".join(f"`{name.partition(' ')[0]}`{_rest(name)}" for name in metric.elsewhere)
    cells = (f"`{metric.name}`", metric.kind.value, labels, metric.unit, metric.help, elsewhere)
    return f"| {' | '.join(cell for cell in cells)} |"


def _rest(name: str) -> str:
    _, space, rest = name.partition(" ")
    return space + rest


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is stale")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page():
        return 0
    print("docs/metrics.md is stale; run `python docs/generate_metrics.py`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
