"""Policy and models: who decides, what was promised and what was lost, what it costs, and whether workers comply."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from deploy.grafana.panels import (
    COUNT,
    NATS,
    PER_SECOND,
    RED,
    SECONDS,
    SHARE,
    YELLOW,
    Panel,
    Query,
    board,
    figure,
    heat,
    lines,
    listing,
    rows,
)
from deploy.grafana.queries import increase, mean, quantile, rate, ratio, select, total
from kvpilot import metrics

ALARM = ((1, RED),)


def dashboard() -> Dashboard:
    """The dashboard."""
    return board(
        "kvpilot-policy",
        "kvpilot / Policy and models",
        "Decisions and directives, predicted beside measured divergence, bounds and their violations, audits, bundles.",
        rows(
            ("Now", _now()),
            ("Promised and lost", _quality()),
            ("Decisions", _decisions()),
            ("Directives", _directives()),
            ("Cost", _cost()),
            ("Bundles", _bundles()),
        ),
    )


def _now() -> tuple[Panel, ...]:
    return (
        figure(
            "Mode",
            "How much is steered; kept in the job store until an operator sets another.",
            Query(f"max by (mode) ({select(metrics.STEERING_MODE)}) == 1", "{{mode}}"),
            COUNT,
            words=True,
        ),
        figure(
            "Bundle in force",
            "None: the rule decides.",
            Query(f"max by (bundle) ({select(metrics.BUNDLE_INFO, place='active')})", "{{bundle}}"),
            COUNT,
            words=True,
            width=6,
        ),
        figure(
            "Bounds exceeded, 1 h",
            "Share of audits that measured more than was promised; alpha is admitted.",
            Query(_violations("1h")),
            SHARE,
            ((0.1, YELLOW), (0.15, RED)),
        ),
        figure(
            "Alpha",
            "Share that the bundle in force admits.",
            Query(f"max({select(metrics.BUNDLE_ALPHA)})"),
            SHARE,
        ),
        figure(
            "Audits, share of decoding",
            "What audits cost. Workers skip those beyond `audit_budget`.",
            Query(_audit_share()),
            SHARE,
            ((0.02, YELLOW), (0.05, RED)),
        ),
        figure("Held by operators", "Requests with an override.", Query(total(metrics.OVERRIDES)), COUNT),
        figure(
            "Bundles refused",
            "Bundles that a pointer shows and a controller cannot use.",
            Query(total(metrics.BUNDLES_REFUSED)),
            COUNT,
            ALARM,
        ),
    )


def _violations(window: str) -> str:
    return ratio(
        increase(metrics.BOUND_VIOLATIONS, window=window), f"({increase(metrics.BOUNDED_AUDITS, window=window)} > 0)"
    )


def _audit_share() -> str:
    return ratio(rate(metrics.AUDIT_TIME), f"({rate(metrics.DECODE_TIME)} > 0)")


def _quality() -> tuple[Panel, ...]:
    family = ("family",)
    exceeded = ratio(
        increase(metrics.BOUND_VIOLATIONS, family, "1h"), f"({increase(metrics.BOUNDED_AUDITS, family, '1h')} > 0)"
    )
    return (
        lines(
            "Predicted and measured, mean",
            "Divergence from the full cache, nats per token. Predicted: of every pipeline chosen, at each report."
            " Measured: by audits, so of recoverable pipelines alone.",
            Query(mean(metrics.PREDICTED_DIVERGENCE, family), "{{family}} predicted"),
            Query(mean(metrics.MEASURED_DIVERGENCE, family), "{{family}} measured"),
            unit=NATS,
            logarithmic=True,
            width=12,
        ),
        lines(
            "Bounds exceeded, by family",
            "Share of the last hour's audits that measured more than was promised, beside alpha.",
            Query(exceeded, "{{family}}"),
            Query(f"max({select(metrics.BUNDLE_ALPHA)})", "alpha"),
            unit=SHARE,
            width=12,
        ),
        heat(
            "Predicted divergence",
            "Of pipelines that a bundle chose, to move to or to stay with: reports per second and bucket.",
            metrics.PREDICTED_DIVERGENCE,
            NATS,
        ),
        heat("Measured divergence", "Of audits: per second and bucket.", metrics.MEASURED_DIVERGENCE, NATS),
        lines(
            "Measured, p90",
            "90 % of audits measured less.",
            Query(quantile(0.9, metrics.MEASURED_DIVERGENCE, family), "{{family}}"),
            unit=NATS,
            logarithmic=True,
        ),
    )


def _decisions() -> tuple[Panel, ...]:
    return (
        lines(
            "Who decides",
            "Decisions per second: by the bundle in force, or by the rule.",
            Query(rate(metrics.DECISIONS, ("decided_by",)), "{{decided_by}}"),
            unit=PER_SECOND,
            stacked=True,
        ),
        lines(
            "What comes of it",
            "Per second: nothing is to change, only advised, sent, or held back, since the worker lately refused it.",
            Query(rate(metrics.DECISIONS, ("outcome",)), "{{outcome}}"),
            unit=PER_SECOND,
            stacked=True,
        ),
        lines(
            "Mode",
            "1 for the mode in force; controllers read it when they start.",
            Query(f"max by (mode, instance) ({select(metrics.STEERING_MODE)})", "{{mode}}, {{instance}}"),
            unit=COUNT,
            most=1,
        ),
    )


def _directives() -> tuple[Panel, ...]:
    return (
        lines(
            "Directives by reason",
            "Sent per second.",
            Query(rate(metrics.DIRECTIVES, ("ordered_by", "reason")), "{{ordered_by}}: {{reason}}"),
            unit=PER_SECOND,
            stacked=True,
        ),
        lines(
            "Answers",
            "Acks, Nacks by their code, and directives without an answer in time; per second.",
            Query(rate(metrics.ANSWERS, ("answer", "code")), "{{answer}} {{code}}"),
            unit=PER_SECOND,
            stacked=True,
        ),
        lines(
            "Time to the answer",
            "A switch that is spread over steps is answered at its end.",
            Query(quantile(0.5, metrics.ANSWER_TIME), "p50"),
            Query(quantile(0.95, metrics.ANSWER_TIME), "p95"),
            unit=SECONDS,
        ),
    )


def _cost() -> tuple[Panel, ...]:
    return (
        lines(
            "Planning tick",
            "Duration of a plan for one worker.",
            Query(quantile(0.5, metrics.PLAN_TIME), "p50"),
            Query(quantile(0.99, metrics.PLAN_TIME), "p99"),
            unit=SECONDS,
            limits=((0.1, RED),),
            width=6,
        ),
        lines(
            "Requests in a tick",
            "Mean number of live requests that a plan looks at.",
            Query(ratio(rate(metrics.PLANNED_REQUESTS), rate(metrics.PLAN_TIME, suffix="_count")), "requests"),
            unit=COUNT,
            width=6,
        ),
        lines(
            "Share of decoding",
            "Time of audits and of signals over that of decode steps.",
            Query(_audit_share(), "audits"),
            Query(f"max({select(metrics.AUDIT_BUDGET)})", "audit_budget"),
            Query(ratio(rate(metrics.SIGNAL_TIME), f"({rate(metrics.DECODE_TIME)} > 0)"), "signals"),
            unit=SHARE,
            width=6,
        ),
        lines(
            "Audits",
            "Per second: made; due and not made, for want of budget or of an exact copy; made of decisions that had a"
            " bound.",
            Query(rate(metrics.AUDITS), "made"),
            Query(rate(metrics.AUDITS_SKIPPED), "skipped"),
            Query(rate(metrics.BOUNDED_AUDITS), "with a bound"),
            unit=PER_SECOND,
            width=6,
        ),
    )


def _bundles() -> tuple[Panel, ...]:
    return (
        listing(
            "Bundles",
            "In force (`active`) and scored beside it (`shadow`), by controller.",
            Query(select(metrics.BUNDLE_INFO)),
            ("place", "bundle", "instance"),
            width=6,
        ),
        lines(
            "Changes",
            "In the last hour: bundles that came in force, and those that were taken out for broken bounds.",
            Query(increase(metrics.BUNDLE_SWAPS, window="1h"), "came in force"),
            Query(increase(metrics.GUARD_ROLLBACKS, window="1h"), "rolled back"),
            unit=COUNT,
            width=6,
        ),
        lines(
            "Guard",
            "In the last hour: bounds found broken, and drifts of what is measured from what is predicted.",
            Query(increase(metrics.GUARD_ALARMS, window="1h"), "alarms"),
            Query(increase(metrics.GUARD_DRIFTS, window="1h"), "drifts"),
            unit=COUNT,
            width=6,
            limits=ALARM,
        ),
        lines(
            "Log of decisions",
            "Entries that wait for the job store, and entries per second lost because it was away for too long.",
            Query(total(metrics.JOURNAL_PENDING), "waiting"),
            Query(rate(metrics.JOURNAL_DROPPED), "lost"),
            unit=COUNT,
            width=6,
        ),
    )
