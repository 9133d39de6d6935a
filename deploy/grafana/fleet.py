"""The fleet: what there is of workers and memory, how much it does, who waits, and how the processes fare."""

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
    lines,
    listing,
    rows,
)
from deploy.grafana.queries import (
    increase,
    named,
    of_processes,
    quantile,
    rate,
    ratio,
    select,
    shared,
    total,
)
from kvpilot import metrics

FULL = ((0.85, YELLOW), (0.95, RED))
BY_WORKER = ("namespace", "instance")


def dashboard() -> Dashboard:
    """The dashboard."""
    return board(
        "kvpilot-fleet",
        "kvpilot / Fleet",
        "Capacity, throughput, queues, memory against its budgets, and the processes of a kvpilot installation.",
        rows(
            ("Now", _now()),
            ("Throughput and queues", _work()),
            ("Latency", _latency()),
            ("Memory", _memory()),
            ("Sessions and disk", _disk()),
            ("Processes", _processes()),
        ),
    )


def _now() -> tuple[Panel, ...]:
    used, budget = total(metrics.TIER_USED, tier="device"), total(metrics.TIER_BUDGET, tier="device")
    return (
        figure(
            "Workers",
            "Workers whose heartbeat the job store has.",
            Query(shared(metrics.WORKERS_LIVE)),
            COUNT,
        ),
        figure(
            "Steered",
            "Share of workers with a controller attached; the others hold their requests' last pipelines.",
            Query(f"avg({select(metrics.STEERED)})"),
            SHARE,
        ),
        figure(
            "Waiting",
            "Jobs that no live worker has.",
            Query(shared(metrics.QUEUE_JOBS)),
            COUNT,
            ((1, YELLOW), (100, RED)),
        ),
        figure(
            "Longest wait",
            "How long the oldest of them has waited.",
            Query(f"max({select(metrics.QUEUE_AGE)})"),
            SECONDS,
            ((10, YELLOW), (60, RED)),
        ),
        figure("Running", "Requests being prefilled or decoded.", Query(total(metrics.REQUESTS_RUNNING)), COUNT),
        figure("Tokens", "Tokens generated per second.", Query(rate(metrics.GENERATED_TOKENS)), PER_SECOND),
        figure(
            "First token, p95",
            "95 % of requests have their first token handed over within this time.",
            Query(quantile(0.95, metrics.FIRST_TOKEN_DELIVERY)),
            SECONDS,
            ((2.5, YELLOW), (5, RED)),
        ),
        figure("Device memory", "Share of the device tiers' budgets in use.", Query(ratio(used, budget)), SHARE, FULL),
    )


def _work() -> tuple[Panel, ...]:
    return (
        lines(
            "Tokens",
            "Tokens per second: generated; of prompts that workers began; of these, not computed, since a prefix or a"
            " session had them.",
            Query(rate(metrics.GENERATED_TOKENS, ("model",)), "{{model}} generated"),
            Query(rate(metrics.PROMPT_TOKENS, ("model",)), "{{model}} prompts"),
            Query(rate(metrics.REUSED_PROMPT_TOKENS, ("model",)), "{{model}} reused"),
            unit=PER_SECOND,
        ),
        lines(
            "Requests in and out",
            "Requests that became jobs and requests that ended, per second. Lines that stay apart: a growing queue.",
            Query(rate(metrics.JOBS_ACCEPTED, ("model", "kind")), "{{model}} in, {{kind}}"),
            Query(rate(metrics.REQUESTS, ("model",)), "{{model}} out"),
            unit=PER_SECOND,
        ),
        lines(
            "Requests in workers",
            "Running ones, and those that a worker took and that wait for its memory.",
            Query(total(metrics.REQUESTS_RUNNING, ("model",)), "{{model}} running"),
            Query(total(metrics.REQUESTS_WAITING, ("model",)), "{{model}} waiting for memory"),
            unit=COUNT,
            stacked=True,
        ),
        lines(
            "Queued jobs",
            "Jobs that no live worker has.",
            Query(shared(metrics.QUEUE_JOBS, ("model", "priority")), "{{model}} {{priority}}"),
            unit=COUNT,
            stacked=True,
        ),
        lines(
            "Age of the oldest queued job",
            "0 where none waits.",
            Query(f"max by (model, priority) ({select(metrics.QUEUE_AGE)})", "{{model}} {{priority}}"),
            unit=SECONDS,
            limits=((60, RED),),
        ),
        lines(
            "Jobs taken",
            "Per second; `again`: a worker had begun before and was lost or handed them back. And how many are held.",
            Query(rate(metrics.JOBS_CLAIMED, ("model", "kind")), "{{model}} taken, {{kind}}"),
            Query(total(metrics.JOBS_HELD, ("model",)), "{{model}} held"),
            unit=COUNT,
        ),
    )


def _latency() -> tuple[Panel, ...]:
    shares = ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"))
    return (
        lines(
            "First token at the front door",
            "From a Generate call's arrival to the handing over of its first token. The alerts' objective is drawn.",
            *(Query(quantile(share, metrics.FIRST_TOKEN_DELIVERY), name) for share, name in shares),
            unit=SECONDS,
            limits=((5, RED),),
        ),
        lines(
            "Between tokens",
            "From one token of a request to its next: switches, preemptions and others' prompts included.",
            *(Query(quantile(share, metrics.INTER_TOKEN), name) for share, name in shares),
            unit=SECONDS,
        ),
        lines(
            "Whole requests",
            "From a front door's taking a request to its end.",
            *(Query(quantile(share, metrics.REQUEST_DURATION), name) for share, name in shares),
            unit=SECONDS,
        ),
    )


def _memory() -> tuple[Panel, ...]:
    return (
        *(_tier(tier, said) for tier, said in TIERS.items()),
        lines(
            "Bytes by tier and format",
            "Pages and files that hold blocks: of requests, exact copies, prefixes, sessions.",
            Query(total(metrics.CACHE_BYTES, ("tier", "format")), "{{tier}} {{format}}"),
            unit=BYTES,
            stacked=True,
        ),
        lines(
            "What steering saves",
            "Device bytes of live requests beside what the same tokens would take with `full`, and the exact copies on"
            " lower tiers that let switches be undone.",
            Query(total(metrics.REQUEST_BYTES, tier="device"), "device"),
            Query(total(metrics.REQUEST_BYTES, ("tier",), tier="host|disk"), "{{tier}}"),
            Query(total(metrics.FULL_BYTES), "full, all on the device"),
            Query(total(metrics.SHADOW_BYTES), "exact copies"),
            unit=BYTES,
        ),
        lines(
            "Pressure",
            "Per second: requests that lost their memory and were computed again; times that rows of a prompt left the"
            " device early. And layers of models that lend their memory.",
            Query(rate(metrics.PREEMPTIONS, ("model",)), "{{model}} preemptions"),
            Query(rate(metrics.EVACUATIONS, ("model",)), "{{model}} evacuations"),
            Query(total(metrics.LENT_LAYERS, ("model",)), "{{model}} lent layers"),
            unit=COUNT,
        ),
    )


TIERS = {
    "device": "Share of each worker's device budget in use; unused prefixes are left out, since they give way at once.",
    "host": "Share of each worker's host budget in use; parked sessions are left out, since they give way at once.",
    "disk": "Share of each worker's disk budget in use. Where disk is full, placers to disk are refused.",
}


def _tier(tier: str, said: str) -> Panel:
    share = ratio(
        total(metrics.TIER_USED, BY_WORKER, tier=tier), f"({total(metrics.TIER_BUDGET, BY_WORKER, tier=tier)} > 0)"
    )
    return lines(f"{tier.capitalize()} tier", said, Query(named(share), "{{worker}}"), unit=SHARE, most=1, limits=FULL)


def _disk() -> tuple[Panel, ...]:
    busy = ((metrics.DISK_WRITE_TIME, "writing"), (metrics.DISK_READ_TIME, "reading"))
    return (
        lines(
            "Sessions",
            "Sessions kept between two turns; per second, turns that began with what the one before had left, pieces"
            " given up for want of room, and sessions whose time was over.",
            Query(total(metrics.SESSIONS_PARKED), "parked"),
            Query(rate(metrics.SESSION_TURNS), "turns restored"),
            Query(rate(metrics.SESSION_DROPPED), "pieces dropped"),
            Query(rate(metrics.SESSIONS_EXPIRED), "expired"),
            unit=COUNT,
        ),
        lines(
            "Sessions' bytes",
            "What is kept of parked sessions.",
            Query(total(metrics.SESSION_BYTES, ("tier",)), "{{tier}}"),
            unit=BYTES,
            stacked=True,
        ),
        lines(
            "Tokens that sessions saved",
            "Prompt tokens per second that turns did not compute.",
            Query(rate(metrics.SESSION_TOKENS, ("model",)), "{{model}}"),
            unit=PER_SECOND,
        ),
        lines(
            "Disk traffic",
            "Bytes per second to and from the disk tier's files.",
            Query(rate(metrics.DISK_WRITTEN), "written"),
            Query(rate(metrics.DISK_READ), "read"),
            unit=BYTES_PER_SECOND,
        ),
        lines(
            "Disk threads",
            "Threads' worth of time that the stores spend.",
            *(Query(rate(metric), name) for metric, name in busy),
            unit=COUNT,
        ),
        lines(
            "Damaged blocks",
            "Blocks that disk did not give back as they were written, in the last hour; they are made anew.",
            Query(named(increase(metrics.DISK_DAMAGED, BY_WORKER, "1h")), "{{worker}}"),
            unit=COUNT,
            limits=((1, RED),),
        ),
    )


def _processes() -> tuple[Panel, ...]:
    return (
        listing(
            "Processes",
            "What runs, and in which version.",
            Query(select(metrics.BUILD_INFO)),
            ("kind", "process", "version", "instance"),
        ),
        lines(
            "Streams",
            "Workers attached to controllers, and event streams of clients.",
            Query(total(metrics.STEERING_STREAMS, ("instance",)), "steering, {{instance}}"),
            Query(total(metrics.STREAMS_OPEN, ("instance",)), "clients, {{instance}}"),
            unit=COUNT,
        ),
        lines(
            "Job store",
            "Failed calls per second: `unavailable` is waited out, `refused` is not. And connections opened.",
            Query(rate(metrics.STORE_ERRORS, ("kind",)), "{{kind}}"),
            Query(rate(metrics.STORE_CONNECTS), "connects"),
            unit=PER_SECOND,
        ),
        lines(
            "gRPC calls",
            "Calls that ended, per second, by status.",
            Query(rate(metrics.CALLS, ("code",)), "{{code}}"),
            unit=PER_SECOND,
        ),
        lines(
            "gRPC calls under way",
            "Streams count for as long as they last.",
            Query(total(metrics.CALLS_OPEN, ("service", "method")), "{{service}}/{{method}}"),
            unit=COUNT,
        ),
        lines(
            "gRPC time, p95",
            "Of streams, their whole life.",
            Query(quantile(0.95, metrics.CALL_TIME, ("method",)), "{{method}}"),
            unit=SECONDS,
            logarithmic=True,
        ),
        lines(
            "Processor time",
            "Cores in use, by process.",
            Query(of_processes("process_cpu_seconds_total", "$__rate_interval"), "{{kind}} {{process}}"),
            unit=COUNT,
        ),
        lines(
            "Resident memory",
            "By process. A CPU worker's device and host tiers are in it.",
            Query(of_processes("process_resident_memory_bytes"), "{{kind}} {{process}}"),
            unit=BYTES,
        ),
        lines(
            "Open files",
            "By process: connections, the disk tier's files.",
            Query(of_processes("process_open_fds"), "{{kind}} {{process}}"),
            unit=COUNT,
        ),
    )
