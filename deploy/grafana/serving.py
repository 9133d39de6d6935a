"""Requests: what clients wait for, how requests end, which pipelines they have, and what the cache does for them."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from deploy.grafana.panels import (
    BYTES,
    BYTES_PER_SECOND,
    COUNT,
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
    rows,
)
from deploy.grafana.queries import mean, quantile, rate, ratio, total
from kvpilot import metrics

LATENCIES = ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"))


def dashboard() -> Dashboard:
    """The dashboard."""
    return board(
        "kvpilot-serving",
        "kvpilot / Requests",
        "Latencies and outcomes of requests, switches of their pipelines, what the cache keeps and recalls for them.",
        rows(
            ("Now", _now()),
            ("Latency", _latency()),
            ("Where the time goes", _phases()),
            ("Outcomes", _outcomes()),
            ("Switches", _switches()),
            ("Cache", _cache()),
            ("Recall", _recall()),
        ),
    )


def _now() -> tuple[Panel, ...]:
    ended = rate(metrics.REQUESTS)
    recalled = rate(metrics.RECALL_BLOCKS)
    return (
        figure("Requests", "Requests that ended, per second.", Query(ended), PER_SECOND),
        figure(
            "Failed",
            "Share of requests that ended as failed.",
            Query(f"({rate(metrics.REQUESTS, outcome='failed')} or vector(0)) / {ended}"),
            SHARE,
            ((0.01, YELLOW), (0.02, RED)),
        ),
        figure(
            "First token, p95",
            "As workers see it: from a front door's taking the request.",
            Query(quantile(0.95, metrics.TIME_TO_FIRST_TOKEN)),
            SECONDS,
            ((2.5, YELLOW), (5, RED)),
        ),
        figure("Between tokens, p95", "As workers see it.", Query(quantile(0.95, metrics.INTER_TOKEN)), SECONDS),
        figure(
            "Prompt reuse",
            "Share of prompt tokens that were not computed.",
            Query(ratio(rate(metrics.REUSED_PROMPT_TOKENS), rate(metrics.PROMPT_TOKENS))),
            SHARE,
        ),
        figure(
            "Switch stall, p95",
            "How long a switch keeps its request waiting.",
            Query(quantile(0.95, metrics.SWITCH_STALL)),
            SECONDS,
            ((0.25, YELLOW), (1, RED)),
        ),
        figure(
            "Recalled in time",
            "Share of blocks asked of lower tiers that steps did not wait for.",
            Query(ratio(rate(metrics.RECALL_BLOCKS, found="there|ahead|in_place"), recalled)),
            SHARE,
        ),
        figure(
            "Of full cache",
            "Device bytes of live requests over what the same tokens would take with `full`.",
            Query(ratio(total(metrics.REQUEST_BYTES, tier="device"), total(metrics.FULL_BYTES))),
            SHARE,
        ),
    )


def _latency() -> tuple[Panel, ...]:
    return (
        heat(
            "First token",
            "From a front door's taking a request to its first token, as workers see it: requests per second.",
            metrics.TIME_TO_FIRST_TOKEN,
            SECONDS,
        ),
        heat(
            "Between tokens",
            "From one token of a request to its next: tokens per second and bucket.",
            metrics.INTER_TOKEN,
            SECONDS,
        ),
        heat(
            "Whole requests",
            "From a front door's taking a request to its end.",
            metrics.REQUEST_DURATION,
            SECONDS,
        ),
        lines(
            "First token by model",
            "p95. The front door's own clock, delivery included, beside the worker's.",
            Query(quantile(0.95, metrics.FIRST_TOKEN_DELIVERY, ("model",)), "{{model}} delivered"),
            Query(quantile(0.95, metrics.TIME_TO_FIRST_TOKEN, ("model",)), "{{model}} made"),
            unit=SECONDS,
            limits=((5, RED),),
        ),
        lines(
            "Between tokens",
            "Quantiles over all models.",
            *(Query(quantile(share, metrics.INTER_TOKEN), name) for share, name in LATENCIES),
            unit=SECONDS,
        ),
        lines(
            "Whole requests",
            "Quantiles over all models.",
            *(Query(quantile(share, metrics.REQUEST_DURATION), name) for share, name in LATENCIES),
            unit=SECONDS,
        ),
    )


def _phases() -> tuple[Panel, ...]:
    phases = (
        (metrics.REQUEST_QUEUE, "queue"),
        (metrics.REQUEST_PREFILL, "prefill"),
        (metrics.REQUEST_DECODE, "decode"),
    )
    return (
        lines(
            "Mean time of a request",
            "In the queue; from a worker's beginning to the first token, waiting for memory included; from the first"
            " token to the last.",
            *(Query(mean(metric), name) for metric, name in phases),
            unit=SECONDS,
            stacked=True,
        ),
        lines(
            "The same, p95",
            "Quantiles do not add up.",
            *(Query(quantile(0.95, metric), name) for metric, name in phases),
            unit=SECONDS,
        ),
        lines(
            "A decode step",
            "Mean time of one pass over all decoding requests, and of the signals measured for each.",
            Query(ratio(rate(metrics.DECODE_TIME), rate(metrics.DECODE_STEPS)), "step"),
            Query(ratio(rate(metrics.SIGNAL_TIME), rate(metrics.DECODE_STEPS)), "signals"),
            unit=SECONDS,
        ),
    )


def _outcomes() -> tuple[Panel, ...]:
    return (
        lines(
            "Requests by outcome",
            "Per second. `measured`: replays that collect training data.",
            Query(rate(metrics.REQUESTS, ("outcome",)), "{{outcome}}"),
            unit=PER_SECOND,
            stacked=True,
        ),
        lines(
            "Tokens made and handed over",
            "Per second. Clients that resume are handed some again; what they leave unread is not handed over.",
            Query(rate(metrics.GENERATED_TOKENS), "made"),
            Query(rate(metrics.DELIVERED_TOKENS), "handed over"),
            unit=PER_SECOND,
        ),
        lines(
            "On the way to clients",
            "Event streams under way, and events that the job store does not have yet.",
            Query(total(metrics.STREAMS_OPEN), "streams"),
            Query(total(metrics.UNDELIVERED_EVENTS), "events not stored"),
            unit=COUNT,
        ),
    )


def _switches() -> tuple[Panel, ...]:
    return (
        lines(
            "By reason and outcome",
            "Changes of a request's pipeline, per second.",
            Query(rate(metrics.SWITCHES, ("reason", "outcome")), "{{reason}}, {{outcome}}"),
            unit=PER_SECOND,
            stacked=True,
        ),
        lines(
            "By who ordered them",
            "`worker`: under memory pressure, or for want of a controller.",
            Query(rate(metrics.SWITCHES, ("ordered_by",), outcome="applied"), "{{ordered_by}}"),
            unit=PER_SECOND,
            stacked=True,
        ),
        lines(
            "Device bytes of switches",
            "Bytes per second that they freed and took.",
            Query(rate(metrics.SWITCH_BYTES, ("direction",)), "{{direction}}"),
            unit=BYTES_PER_SECOND,
        ),
        heat(
            "Stall",
            "How long a switch kept its request's decoding waiting: switches per second and bucket.",
            metrics.SWITCH_STALL,
            SECONDS,
            width=12,
        ),
        lines(
            "Live requests by pipeline",
            "By family and loss class of the pipeline in force.",
            Query(total(metrics.REQUESTS_BY_FAMILY, ("family", "loss_class")), "{{family}}, {{loss_class}}"),
            unit=COUNT,
            width=12,
            stacked=True,
        ),
    )


def _cache() -> tuple[Panel, ...]:
    return (
        *(
            lines(
                f"{tier.capitalize()} bytes by format",
                "Pages that hold blocks of requests, exact copies, prefixes, sessions." if tier != "disk" else "Files.",
                Query(total(metrics.CACHE_BYTES, ("format",), tier=tier), "{{format}}"),
                unit=BYTES,
                stacked=True,
            )
            for tier in ("device", "host", "disk")
        ),
        lines(
            "Live requests' bytes",
            "By tier, exact copies beside them, and what pipeline `full` would take.",
            Query(total(metrics.REQUEST_BYTES, ("tier",)), "{{tier}}"),
            Query(total(metrics.SHADOW_BYTES), "exact copies"),
            Query(total(metrics.FULL_BYTES), "full"),
            unit=BYTES,
            width=12,
        ),
        lines(
            "Preemptions",
            "Requests that lost their memory to others, or to damage on disk, and were computed again, per second.",
            Query(rate(metrics.PREEMPTIONS, ("model",)), "{{model}}"),
            unit=PER_SECOND,
            width=12,
        ),
    )


def _recall() -> tuple[Panel, ...]:
    found = rate(metrics.RECALL_BLOCKS, ("tier", "found"))
    return (
        lines(
            "Blocks asked of lower tiers",
            "Per second, by whether they were there, had been brought ahead, were waited for, or were read in place.",
            Query(found, "{{tier}}, {{found}}"),
            unit=PER_SECOND,
            stacked=True,
        ),
        lines(
            "Hits",
            "Share of these that steps did not wait for, by tier.",
            Query(
                ratio(
                    rate(metrics.RECALL_BLOCKS, ("tier",), found="there|ahead|in_place"),
                    rate(metrics.RECALL_BLOCKS, ("tier",)),
                ),
                "{{tier}}",
            ),
            unit=SHARE,
            most=1,
        ),
        lines(
            "Blocks that queries choose",
            "Blocks that queries were free to skip, per second.",
            Query(rate(metrics.SELECTED_BLOCKS, ("choice",)), "{{choice}}"),
            unit=PER_SECOND,
            stacked=True,
        ),
        lines(
            "Blocks on the move",
            "Bytes per second of blocks copied or built, as stored where they went.",
            Query(rate(metrics.MOVED_BYTES, ("from_tier", "to_tier")), "{{from_tier}} to {{to_tier}}"),
            unit=BYTES_PER_SECOND,
            width=24,
        ),
    )
