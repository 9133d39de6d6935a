"""What expressions say of metrics: which they read, and which labels their results have."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import promql_parser as promql

from kvpilot.metrics import METRICS, Kind

TARGET_LABELS = frozenset({"namespace", "job", "instance"})
"""What Prometheus adds to each series of a scrape."""
FOREIGN = dict.fromkeys(
    (
        "up",
        "process_start_time_seconds",
        "process_cpu_seconds_total",
        "process_resident_memory_bytes",
        "process_open_fds",
    ),
    frozenset[str](),
)
"""Series that are not of the metrics module and may be used: Prometheus' own and its client's."""
SETS = ("and", "or", "unless")
Labels = frozenset[str]


class ExpressionError(Exception):
    """An expression reads what there is not; ``str(error)`` says which."""


def known_series() -> dict[str, Labels]:
    """Every series that kvpilot's processes have, and its labels."""
    known = dict(FOREIGN)
    for metric in METRICS:
        labels = frozenset(metric.labels)
        if metric.kind is Kind.HISTOGRAM:
            known |= {f"{metric.name}_bucket": labels | {"le"}}
            known |= {f"{metric.name}_sum": labels, f"{metric.name}_count": labels}
        else:
            known[metric.name] = labels
    return {name: labels | TARGET_LABELS for name, labels in known.items()}


def metric_of(series: str) -> str:
    """The metric that a series belongs to."""
    names = {metric.name for metric in METRICS}
    return series if series in names else re.sub("_(bucket|sum|count)$", "", series)


def selectors(expression: str) -> Iterator[promql.VectorSelector]:
    """All series selectors of an expression."""
    found: list[promql.VectorSelector] = []

    def visit(node: promql.Expr) -> None:
        if isinstance(node, promql.VectorSelector):
            found.append(node)

    promql.walk(promql.parse(expression), visit)
    yield from found


def metrics_in(expression: str) -> set[str]:
    """Names of the metrics that an expression reads."""
    return {metric_of(selector.name) for selector in selectors(expression)}


def labels_of(expression: str, recorded: Mapping[str, Labels] | None = None) -> Labels:
    """Labels that an expression's results have.

    Args:
        recorded: what recording rules make, beside what processes expose.

    Raises:
        ExpressionError: it names a series or label that does not exist.
        ValueError: it is no PromQL.
    """
    return _labels(promql.parse(expression), known_series() | dict(recorded or {})) or frozenset()


def _labels(node: promql.Expr, known: Mapping[str, Labels]) -> Labels | None:
    """None: a scalar."""
    match node:
        case promql.VectorSelector():
            if node.name not in known:
                raise ExpressionError(f"no series {node.name}")
            has = known[node.name]
            _check(f"matcher of {node.name}", [matcher.name for matcher in node.matchers.matchers], has)
            return has
        case promql.MatrixSelector():
            return _labels(node.vector_selector, known)
        case promql.AggregateExpr():
            inside = _labels(node.expr, known) or frozenset()
            if node.modifier is None:
                return frozenset()
            assert node.modifier.type is promql.AggModifierType.By, "only `by` is understood here"
            _check("by", node.modifier.labels, inside)
            return frozenset(node.modifier.labels)
        case promql.Call():
            inner = [labels for argument in node.args if (labels := _labels(argument, known)) is not None]
            if node.func.name in ("absent", "vector") or not inner:
                return frozenset()
            return inner[-1] - {"le"} if node.func.name == "histogram_quantile" else inner[-1]
        case promql.BinaryExpr():
            return _of_binary(node, known)
        case promql.ParenExpr() | promql.UnaryExpr() | promql.SubqueryExpr():
            return _labels(node.expr, known)
        case _:
            return None


def _of_binary(node: promql.BinaryExpr, known: Mapping[str, Labels]) -> Labels | None:
    left, right = _labels(node.lhs, known), _labels(node.rhs, known)
    if left is None or right is None:
        return left if right is None else right
    modifier = node.modifier
    matching = modifier.matching if modifier else None
    if matching is None:
        if str(node.op) not in SETS and left != right:
            raise ExpressionError(f"{sorted(left)} and {sorted(right)} never match")
        return left
    _check("on", matching.labels, left)
    _check("on", matching.labels, right)
    if str(node.op) in SETS:
        return left
    _check("group_left", modifier.group_labels or [], right)
    many = modifier.card == promql.VectorMatchCardinality.ManyToOne
    return left | frozenset(modifier.group_labels or []) if many else frozenset(matching.labels)


def _check(where: str, labels: list[str], known: Labels) -> None:
    if unknown := set(labels) - known:
        raise ExpressionError(f"{where}: no label {', '.join(sorted(unknown))} among {', '.join(sorted(known))}")
