"""The pictures of an evaluation, as PNG. Colours are Okabe and Ito's, which colour-blind people can tell apart."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from models.evaluation import Evaluation
from models.policies import HEADLINE_NATS, LEARNED, MASS_RULE, ORACLE, PRICED, RANDOM, STATIC, STATIC_BY_KIND
from models.scale import log_divergence

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#666666",
)
STYLES = {
    LEARNED: (BLUE, "-", "learned (bound)"),
    PRICED: (SKY, "-", "learned (price)"),
    STATIC: (ORANGE, "o--", "static pipelines"),
    STATIC_BY_KIND: (GREEN, "-", "best static per kind"),
    MASS_RULE: (RED, "-", "attention-mass rule"),
    RANDOM: (PURPLE, ":", "random"),
    ORACLE: (GREY, "--", "oracle"),
}


def all_plots(found: Evaluation) -> dict[str, bytes]:
    """PNG files by name, in the order in which a report shows them."""
    plots = {
        "predicted_measured.png": predicted_measured(found),
        "calibration.png": calibration(found),
    }
    if found.comparisons:
        plots["pareto.png"] = pareto(found)
        plots["regret.png"] = regret(found)
    return plots


def predicted_measured(found: Evaluation) -> bytes:
    """Predicted against measured divergence of all rows that lose something."""
    rows = found.examples.lossy
    measured = log_divergence(found.examples.divergence[rows]) / np.log(10)
    predicted = log_divergence(found.prediction.divergence[rows]) / np.log(10)
    figure, axes = _axes()
    cells = axes.hexbin(predicted, measured, gridsize=50, mincnt=1, bins="log", cmap="cividis")
    low, high = float(min(predicted.min(), measured.min())), float(max(predicted.max(), measured.max()))
    axes.plot([low, high], [low, high], color=RED, linewidth=1, label="predicted = measured")
    axes.set_xlabel("predicted divergence, log10 nats per token")
    axes.set_ylabel("measured divergence, log10 nats per token")
    axes.set_title(f"Predicted against measured, {int(rows.sum()):,} rows")
    axes.legend(loc="upper left")
    figure.colorbar(cells, ax=axes, label="rows")
    return _png(figure)


def calibration(found: Evaluation) -> bytes:
    """Share of rows within their bound where bounds are scaled: a calibrated one passes through its mark."""
    examples, bound = found.examples, found.prediction.bound
    factors = np.geomspace(0.1, 10, 81)
    figure, axes = _axes()
    for colour, family in zip((BLUE, ORANGE, GREEN, RED, PURPLE, SKY), found.coverage.by_family, strict=False):
        rows = examples.lossy & (examples.family == family)
        share = [float((examples.divergence[rows] <= factor * bound[rows]).mean()) for factor in factors]
        axes.plot(factors, share, color=colour, label=f"{family} ({found.coverage.by_family[family]:.1%} at 1)")
    target = 1 - found.alpha
    axes.axhline(target, color=GREY, linestyle="--", linewidth=1, label=f"promised: {target:.0%}")
    axes.axvline(1, color=GREY, linestyle=":", linewidth=1)
    axes.set_xscale("log")
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("bound multiplied by")
    axes.set_ylabel("share of windows within it")
    axes.set_title("Calibration of the upper bound, by family")
    axes.legend(loc="lower right", fontsize="small")
    return _png(figure)


def pareto(found: Evaluation) -> bytes:
    """Mean device bytes against mean divergence of every policy and every static pipeline."""
    figure, axes = _axes()
    for name, front in found.fronts.items():
        colour, line, label = STYLES[name]
        axes.plot(front.divergence + 1e-5, front.bytes_share, line, color=colour, label=label, markersize=4)
    for name, (divergence, share) in found.statics.items():
        axes.plot(divergence + 1e-5, share, "x", color=ORANGE, markersize=5)
        axes.annotate(name, (divergence + 1e-5, share), fontsize=6, xytext=(3, 3), textcoords="offset points")
    axes.axvline(HEADLINE_NATS, color=GREY, linestyle=":", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("mean divergence + 0.00001, nats per token")
    axes.set_ylabel("mean device bytes, share of a full cache's")
    axes.set_title("Bytes against divergence, unseen documents")
    axes.legend(loc="upper right", fontsize="small")
    return _png(figure)


def regret(found: Evaluation) -> bytes:
    """Bytes of each policy above the oracle's, at equal mean divergence, per level."""
    policies = [name for name in found.fronts if name != ORACLE]
    figure, axes = _axes()
    width = 0.8 / len(policies)
    places = np.arange(len(found.comparisons))
    for number, name in enumerate(policies):
        heights = [100 * (one.ratio(name, ORACLE) - 1) for one in found.comparisons]
        colour, _, label = STYLES[name]
        axes.bar(places + (number - (len(policies) - 1) / 2) * width, heights, width, color=colour, label=label)
    axes.set_xticks(places, [f"{one.level:g}\n({one.divergence:.3g})" for one in found.comparisons])
    axes.set_xlabel("divergence allowed (that of the best static pipeline, where all are compared), nats per token")
    axes.set_ylabel("device bytes above the oracle's, %")
    axes.set_title("Regret at equal mean divergence")
    axes.legend(fontsize="small")
    return _png(figure)


def _axes() -> tuple[Figure, Any]:
    figure = Figure(figsize=(7.5, 5.0), dpi=120, layout="constrained")  # no pyplot: no window, no global state
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    return figure, axes


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": "kvpilot"})
    return out.getvalue()
