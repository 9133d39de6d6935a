"""What the checks of queries and rules are made of: labels of expressions' results."""

from __future__ import annotations

import pytest

from tests.deploy.promql import ExpressionError, labels_of, metrics_in

TARGET = {"namespace", "job", "instance"}
TIERS = "kvpilot_tier_used_bytes", "kvpilot_tier_budget_bytes"


@pytest.mark.parametrize(
    ("expression", "labels"),
    [
        (TIERS[0], TARGET | {"model", "tier"}),
        (f'sum by (tier) (rate({TIERS[0]}{{tier="host"}}[5m]))', {"tier"}),
        (f"{TIERS[0]} / ({TIERS[1]} > 0)", TARGET | {"model", "tier"}),
        ("sum(kvpilot_queue_jobs) or vector(0)", set()),
        ("histogram_quantile(0.9, sum by (model, le) (rate(kvpilot_inter_token_seconds_bucket[5m])))", {"model"}),
        ("up * on (job, instance) group_left (kind) kvpilot_build_info", TARGET | {"kind"}),
        ("up == 0 and on (job) kvpilot_build_info", TARGET),
        ("1 - max by (namespace) (kvpilot_bundle_alpha)", {"namespace"}),
        ("absent(kvpilot_build_info)", set()),
    ],
)
def test_labels_of_results(expression: str, labels: set[str]) -> None:
    assert labels_of(expression) == labels


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("kvpilot_tokens_total", "no series kvpilot_tokens_total"),
        ("rate(kvpilot_inter_token_seconds[5m])", "no series"),
        ('kvpilot_queue_jobs{modell="tiny"}', "no label modell"),
        ("sum by (tier) (kvpilot_queue_jobs)", "no label tier"),
        ("kvpilot_queue_jobs / kvpilot_workers_live", "never match"),
        ("up * on (job) group_left (worker) kvpilot_build_info", "no label worker"),
        ("sum by (model) (sum by (namespace) (kvpilot_queue_jobs))", "no label model"),
    ],
)
def test_what_cannot_be_is_named(expression: str, why: str) -> None:
    with pytest.raises(ExpressionError, match=why):
        labels_of(expression)


def test_recording_rules_are_series_too() -> None:
    assert labels_of("job:up:sum", {"job:up:sum": frozenset({"job"})}) == {"job"}


def test_metrics_of_an_expression() -> None:
    assert metrics_in("sum(rate(kvpilot_inter_token_seconds_bucket[1m])) / kvpilot_lent_layers") == {
        "kvpilot_inter_token_seconds",
        "kvpilot_lent_layers",
    }
