"""PromQL of the dashboards, made from metrics, so that names and labels are theirs and all queries filter alike.

>>> from kvpilot import metrics
>>> rate(metrics.GENERATED_TOKENS, by=("model",))
'sum by (model) (rate(kvpilot_generated_tokens_total{namespace=~"$namespace", model=~"$model", instance=~"$worker"}\
[$__rate_interval]))'
"""

from __future__ import annotations

from collections.abc import Sequence

from kvpilot import metrics
from kvpilot.metrics import Metric, Part

WINDOW = "$__rate_interval"
"""What Grafana takes for it reaches over at least four scrapes."""


def select(metric: Metric, suffix: str = "", **labels: str) -> str:
    """Series of a metric that the dashboard's variables let through.

    Args:
        suffix: of a histogram's series: ``_bucket``, ``_count`` or ``_sum``.
        labels: further ones to match; a value with ``|``, or one that a variable gives, is an expression.
    """
    if unknown := labels.keys() - {*metric.labels, "le"}:
        raise ValueError(f"metric {metric.name}: no label {', '.join(sorted(unknown))}; it has {metric.labels}")
    matchers = ['namespace=~"$namespace"']
    if "model" in metric.labels:
        matchers.append('model=~"$model"')
    if metric.part is Part.WORKER:
        matchers.append('instance=~"$worker"')
    for name, value in labels.items():
        matchers.append(f'{name}{"=~" if "|" in value or "$" in value else "="}"{value}"')
    return f"{metric.name}{suffix}{{{', '.join(matchers)}}}"


def total(metric: Metric, by: Sequence[str] = (), **labels: str) -> str:
    """Sum of a gauge."""
    return f"sum{_by(by)}({select(metric, **labels)})"


def shared(metric: Metric, by: Sequence[str] = (), **labels: str) -> str:
    """A gauge of which every process says the same, each for its namespace."""
    inner = ("namespace", *metric.labels)
    return f"sum{_by(by)}(max{_by(inner)}({select(metric, **labels)}))"


def rate(metric: Metric, by: Sequence[str] = (), suffix: str = "", **labels: str) -> str:
    """Rise of a counter per second."""
    return f"sum{_by(by)}(rate({select(metric, suffix, **labels)}[{WINDOW}]))"


def increase(metric: Metric, by: Sequence[str] = (), window: str = WINDOW, **labels: str) -> str:
    """Rise of a counter over a time."""
    return f"sum{_by(by)}(increase({select(metric, **labels)}[{window}]))"


def quantile(share: float, metric: Metric, by: Sequence[str] = (), **labels: str) -> str:
    """Quantile of what a histogram observed lately."""
    return f"histogram_quantile({share:g}, {buckets(metric, by, **labels)})"


def mean(metric: Metric, by: Sequence[str] = (), **labels: str) -> str:
    """Mean of what a histogram observed lately."""
    return ratio(rate(metric, by, "_sum", **labels), rate(metric, by, "_count", **labels))


def buckets(metric: Metric, by: Sequence[str] = (), **labels: str) -> str:
    """A histogram's buckets, observations per second."""
    return rate(metric, (*by, "le"), "_bucket", **labels)


def ratio(part: str, whole: str) -> str:
    """One over the other."""
    return f"{part} / {whole}"


def named(per_instance: str) -> str:
    """An expression whose series are one per ``namespace, instance`` of workers, with the workers' names."""
    return f"{per_instance} * on (namespace, instance) group_left (worker) {select(metrics.WORKER_INFO)}"


def of_processes(name: str, window: str = "") -> str:
    """A ``process_*`` metric of kvpilot's processes, with their kinds and names."""
    series = f'{name}{{namespace=~"$namespace"}}'
    value = f"rate({series}[{window}])" if window else series
    return f"{value} * on (job, instance) group_left (kind, process) {select(metrics.BUILD_INFO)}"


def _by(labels: Sequence[str]) -> str:
    return f" by ({', '.join(labels)}) " if labels else " "
