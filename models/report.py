"""An evaluation for people and programs: ``report.json``, PNG files, and one HTML page that holds them all."""

from __future__ import annotations

import base64
import html
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.evaluation import Evaluation, known
from models.metrics import Coverage
from models.policies import LEARNED, ORACLE, STATIC


@dataclass(frozen=True)
class Target:
    """A promise, what was found, and whether it was kept; None: not measured."""

    name: str
    wanted: str
    value: str
    passed: bool | None


def targets(found: Evaluation) -> list[Target]:
    """All promises."""
    ranks, covered = found.ranking, found.coverage
    exceeded = 1 - covered.overall
    worst_family, worst_kind = _worst(covered.by_family), _worst(covered.by_kind)
    regret, ratio = found.oracle_regret, found.bytes_ratio_best_static
    beaten = [name for name, won in found.beats.items() if not won]
    return [
        _least("spearman_pooled", ranks.spearman_pooled, 0.90),
        _least("spearman_within", ranks.spearman_within, 0.70),
        _least("auc_within", ranks.auc_within, 0.85),
        Target(
            "bound exceeded",
            "8 % to 12 %",
            f"{exceeded:.1%} (95 % interval {1 - covered.high:.1%} to {1 - covered.low:.1%})",
            None if known(exceeded) is None else 0.08 <= exceeded <= 0.12,
        ),
        Target("bound exceeded, worst family", "under 15 %", *worst_family),
        Target("bound exceeded, worst text kind", "under 15 %", *worst_kind),
        Target(
            "bytes_ratio_best_static",
            "at most 0.75",
            _number(ratio) if found.headline is None else f"{_number(ratio)} against {found.headline.pipeline}",
            None if ratio is None else ratio <= 0.75,
        ),
        Target(
            "beats the baselines",
            "all of them",
            found.no_comparison or ("all" if not beaten else f"not {', '.join(beaten)}"),
            None if not found.beats else not beaten,
        ),
        *_elsewhere(found),
        Target("oracle_regret", "reported", "-" if regret is None else f"{regret:.1%} more bytes", None),
        _most("tick_ms_256", found.tick_ms, 20.0, " ms"),
        _most("steering_overhead", found.steering_overhead, 0.02, ""),
    ]


def _elsewhere(found: Evaluation) -> list[Target]:
    """The bytes against other static pipelines, which are the best where more may be lost."""
    others = {one.pipeline: one for one in reversed(found.comparisons)}  # the least level of each
    return [
        Target(
            f"the same at {one.divergence:.2g} nats",
            "reported",
            f"{_number(known(one.ratio(LEARNED, STATIC)))} against {one.pipeline}, the oracle "
            f"{_number(known(one.ratio(ORACLE, STATIC)))}",
            None,
        )
        for one in reversed(others.values())
        if found.headline is not None and one.pipeline != found.headline.pipeline
    ]


def as_json(found: Evaluation) -> dict[str, Any]:
    """The figures; None for what was not measured. Shares are of 1, times in milliseconds, divergences in nats."""
    ranks, covered = found.ranking, found.coverage
    return {
        "bundle": found.bundle,
        "documents": found.documents,
        "windows": found.windows,
        "rows": found.rows,
        "spearman_pooled": known(ranks.spearman_pooled),
        "spearman_within": known(ranks.spearman_within),
        "spearman_by_pipeline": _all_known(ranks.spearman_by_pipeline),
        "auc_within": known(ranks.auc_within),
        "auc_by_pipeline": _all_known(ranks.auc_by_pipeline),
        "coverage": known(covered.overall),
        "coverage_interval": [known(covered.low), known(covered.high)],
        "coverage_by_family": _all_known(covered.by_family),
        "coverage_by_kind": _all_known(covered.by_kind),
        "coverage_by_pipeline": _all_known(covered.by_pipeline),
        "bytes_ratio_best_static": found.bytes_ratio_best_static,
        "beats": found.beats,
        "oracle_regret": found.oracle_regret,
        "comparisons": [
            {
                "level": one.level,
                "divergence": one.divergence,
                "best_static": one.pipeline,
                "bytes_share": _all_known(one.bytes_share),
            }
            for one in found.comparisons
        ],
        "no_comparison": found.no_comparison,
        "fronts": {
            name: {"divergence": front.divergence.tolist(), "bytes_share": front.bytes_share.tolist()}
            for name, front in found.fronts.items()
        },
        "tick_ms_256": found.tick_ms,
        "steering_overhead": found.steering_overhead,
        "libraries": found.versions,
        "passed": {target.name: target.passed for target in targets(found)},
    }


def write(found: Evaluation, folder: Path) -> list[Path]:
    """Writes everything into a folder, which is made if need be; returns the files."""
    from models.plots import all_plots

    folder.mkdir(parents=True, exist_ok=True)
    plots = all_plots(found)
    contents = {
        **plots,
        "report.html": page(found, plots).encode(),
        "report.json": (json.dumps(as_json(found), indent=2, allow_nan=False) + "\n").encode(),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


def page(found: Evaluation, plots: dict[str, bytes]) -> str:
    """One HTML page with the pictures in it."""
    rows = "".join(
        f"<tr><td>{html.escape(one.name)}</td><td>{html.escape(one.wanted)}</td><td>{html.escape(one.value)}</td>"
        f"<td class={_WORDS[one.passed][1]}>{_WORDS[one.passed][0]}</td></tr>"
        for one in targets(found)
    )
    pictures = "".join(
        f"<h2>{html.escape(_CAPTIONS[name][0])}</h2><p>{html.escape(_CAPTIONS[name][1])}</p>"
        f'<img alt="{html.escape(_CAPTIONS[name][0])}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for name, png in plots.items()
    )
    shares = "".join(
        f"<tr><td>{one.level:g}</td><td>{html.escape(one.pipeline)}, {one.divergence:.4g}</td>"
        + "".join(f"<td>{_number(known(share))}</td>" for share in one.bytes_share.values())
        + "</tr>"
        for one in found.comparisons
    )
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in found.fronts)
    policies = (
        f"<h2>Mean device bytes at equal mean divergence</h2><p>As a share of a full cache's. Static pipelines, the "
        f"rule and random have their best knob in hindsight.</p><table><tr><th>allowed, nats</th><th>best static "
        f"pipeline, its nats</th>{heads}</tr>{shares}</table>"
        if found.comparisons
        else f"<p>{html.escape(found.no_comparison or 'No static pipeline is within any level.')}</p>"
    )
    covered = "".join(_coverage_rows(found.coverage))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>kvpilot bundle {html.escape(found.bundle)}</title>"
        f"<style>{_STYLE}</style><h1>Bundle {html.escape(found.bundle)}</h1>"
        f"<p>{found.documents:,} documents, {found.windows:,} windows, {found.rows:,} rows that it has not seen.</p>"
        f"<table><tr><th>figure</th><th>wanted</th><th>found</th><th></th></tr>{rows}</table>{policies}{pictures}"
        f"<h2>Coverage</h2><table><tr><th>of</th><th></th><th>within the bound</th></tr>{covered}</table></html>\n"
    )


_WORDS = {True: ("kept", "yes"), False: ("missed", "no"), None: ("-", "none")}
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}"
    "td,th{border-bottom:1px solid #ccc;padding:.25rem .75rem;text-align:left}"
    "img{max-width:100%;height:auto}.yes{color:#0072B2;font-weight:600}.no{color:#D55E00;font-weight:600}"
)
_CAPTIONS = {
    "predicted_measured.png": ("Predicted against measured", "On the line, the prediction was right."),
    "calibration.png": (
        "Calibration",
        "Share of windows within the bound if it were larger or smaller; at 1 it should meet the dashed line.",
    ),
    "pareto.png": ("Bytes against divergence", "Lower and further left is better; crosses are single pipelines."),
    "regret.png": ("Regret", "Bytes above those of the oracle, which knows what will be lost."),
}


def _coverage_rows(covered: Coverage) -> list[str]:
    groups = {"family": covered.by_family, "text kind": covered.by_kind, "pipeline": covered.by_pipeline}
    return [
        f"<tr><td>{what}</td><td>{html.escape(name)}</td><td>{share:.1%}</td></tr>"
        for what, shares in groups.items()
        for name, share in shares.items()
    ]


def _worst(covered: dict[str, float]) -> tuple[str, bool | None]:
    if not covered:
        return "-", None
    name = min(covered, key=lambda one: covered[one])
    return f"{1 - covered[name]:.1%} ({name})", 1 - covered[name] < 0.15


def _least(name: str, value: float, least: float) -> Target:
    return Target(name, f"at least {least:g}", _number(known(value)), None if known(value) is None else value >= least)


def _most(name: str, value: float | None, most: float, unit: str) -> Target:
    shown = "-" if value is None else f"{value:.3g}{unit}"
    return Target(name, f"under {most:g}{unit}", shown, None if value is None else value < most)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _all_known(values: dict[str, float]) -> dict[str, float | None]:
    return {name: known(value) for name, value in values.items()}
