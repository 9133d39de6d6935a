"""A real Prometheus scrapes a real stack, and is asked all that the dashboards and the rules ask."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import re
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from cli import tether
from kvpilot import AsyncClient
from kvpilot.metrics import METRICS
from tests.deploy.prometheus import Prometheus, needs_prometheus, prometheus
from tests.deploy.promql import metric_of
from tests.deploy.sources import DASHBOARDS, DEPLOY, Query, all_queries, filled, load, recorded, rules
from tests.e2e.serving import ENDLESS, TIMEOUT_S, Following, Running, operator_of, serving
from tests.tiny import prompt

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    pytest.mark.skipif(not tether.SUPPORTED, reason="needs Linux"),
    needs_prometheus,
]
ADMITTED = 1000.0
"""Nats per token that the steered request admits: the random model loses much."""
SEEN_S = 60
"""How far back queries look: to before the first request."""
LIVE = ("", "arkvale(recent=64, share=0.5)", "disk(recent=64)")
"""Pipelines of the requests that run side by side; of the first one the planner's and an operator's."""


@dataclass(frozen=True)
class Observed:
    """A stack that serves requests, and who watches it."""

    stack: Running
    watcher: Prometheus
    work: asyncio.Task[None]
    """Has it serve them, round after round; ends only if something is wrong."""


@pytest.fixture(scope="module")
async def observed(
    anyio_backend: str, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Observed]:
    folder = tmp_path_factory.mktemp("observed")
    worker = {
        "audit_every_tokens": 32,
        "audit_tokens": 8,
        "audit_budget": 100.0,
        "disk_folder": folder / "blocks",
        "disk_budget_bytes": 16 << 20,
    }
    # Of a random model the shipped bundle says anything: it is not to be rolled back while it is looked at.
    controller = {"dwell_tokens": 32, "guard_least_audits": 1_000_000}
    settings = {"planner": "auto", "host_budget": 16 << 20, "worker": worker, "controller": controller}
    async with AsyncExitStack() as stack:
        running = await stack.enter_async_context(serving(tiny_folder, folder, **settings))
        watcher = stack.enter_context(prometheus(folder, configuration(running, folder)))
        client = await stack.enter_async_context(AsyncClient(running.endpoint))
        work = asyncio.create_task(run_requests(client, running))
        while len(watcher.now("up == 1")) < 2:
            await asyncio.sleep(0.2)
        yield Observed(running, watcher, work)
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work


def configuration(running: Running, folder: Path) -> dict[str, Any]:
    """The example's, with this stack's targets, more often; beside the rules a copy of the alerts that all fire."""
    example = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text(encoding="utf-8"))
    example["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    example["scrape_configs"][0]["file_sd_configs"] = [{"files": [str(running.stack.targets_file)]}]
    firing = folder / "firing.yaml"
    firing.write_text(yaml.safe_dump({"groups": [{"name": "firing", "rules": firing_alerts()}]}), encoding="utf-8")
    example["rule_files"] = [str(DEPLOY / "prometheus" / file) for file in example["rule_files"]] + [str(firing)]
    return example


def firing_alerts() -> list[dict[str, Any]]:
    """The alerts with an expression that is always so and has the labels that their annotations speak of."""
    made = []
    for rule in rules():
        if "alert" not in rule:
            continue
        expression = "vector(0.25)"
        for label in sorted(set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"])))):
            expression = f'label_replace({expression}, "{label}", "the-{label}", "", "")'
        labels = rule["labels"] | {"made": "firing"}
        made.append({"alert": rule["alert"], "expr": expression, "labels": labels, "annotations": rule["annotations"]})
    return made


async def run_requests(client: AsyncClient, running: Running) -> None:
    """Has the stack do what dashboards show: turns of a session, all tiers, switches, Nacks, audits, cancelled jobs.

    Again and again: rates need a rise between two scrapes, and what only live requests have must be there at one.
    """
    async with operator_of(running) as operator:
        for number in itertools.count():
            text = prompt(400, number)
            for turn in (text, text + prompt(40, 1)):
                await client.complete(token_ids=turn, max_tokens=16, ignore_eos=True, session_id=f"talk-{number}")
            await client.complete(token_ids=text, max_tokens=48, ignore_eos=True, pipeline="host(recent=64)")
            steered = Following(
                client.generate(token_ids=text, max_tokens=400, ignore_eos=True, max_divergence=ADMITTED)
            )
            await steered.until(lambda job=steered: job.tokens >= 200)
            await steered.cancel(client)
            live = [
                Following(client.generate(token_ids=text, max_tokens=ENDLESS, ignore_eos=True, pipeline=pipeline))
                for pipeline in LIVE
            ]
            for job in live:
                await job.more(64)
            await operator.override(live[0].job_id, "kivi(bits=4)", "to be seen")
            with pytest.raises(grpc.aio.AioRpcError):  # there is no profile of this model
                await operator.override(live[0].job_id, "shadowkv(recent=64, share=0.5, rank=0.5)")
            await live[0].more(64)
            for job in live:
                await job.cancel(client)


async def test_every_query_finds_what_it_is_for(observed: Observed) -> None:
    """Numbers, that is; a query that is refused fails at once."""
    waiting = all_queries()
    end = time.monotonic() + 2 * TIMEOUT_S
    while waiting := [query for query in waiting if not found(observed.watcher, query)]:
        if observed.work.done():
            observed.work.result()
        assert time.monotonic() < end, "\n".join(f"{query.where}: {query.expression}" for query in waiting)
        await asyncio.sleep(0.5)


def found(watcher: Prometheus, query: Query) -> bool:
    """Whether it gives a number; any error fails.

    Annotations mark events, of which there may be none: what they look at is asked for, once their query was accepted.
    """
    if query.is_annotation:
        watcher.lately(query.expression, SEEN_S)
        query = replace(query, expression=query.expression.removesuffix(" > 0"), is_annotation=False)
    if query.instant:
        values = [series["value"] for series in watcher.now(query.expression)]
    else:
        values = [pair for series in watcher.lately(query.expression, SEEN_S) for pair in series["values"]]
    return any(math.isfinite(float(value)) for _, value in values)


async def test_variables_offer_what_there_is(observed: Observed) -> None:
    worker = observed.stack.child("worker-0").metrics
    for file in DASHBOARDS:
        variables = {variable["name"]: variable for variable in load(file)["templating"]["list"]}
        assert await offered(observed.watcher, variables["namespace"]) == [], "there is none without Kubernetes"
        assert await offered(observed.watcher, variables["model"]) == ["tiny"]
        [shown] = await offered(observed.watcher, variables["worker"])
        matched = re.search(variables["worker"]["regex"].strip("/").replace("(?<", "(?P<"), shown)
        assert matched, shown
        assert matched.groupdict() == {"text": "worker-0", "value": worker}


async def offered(watcher: Prometheus, variable: dict[str, Any]) -> list[str]:
    """What Grafana finds for a variable: values of a label, or series with value and time behind them."""
    query = filled(variable["query"])
    if of_label := re.fullmatch(r"label_values\((.+), (\w+)\)", query):
        series, label = of_label.groups()
        return watcher.get(f"label/{label}/values", **{"match[]": series})
    inside = query.removeprefix("query_result(").removesuffix(")")
    return [written(series) for series in watcher.now(inside)]


def written(series: dict[str, Any]) -> str:
    """A series as Grafana writes it before a variable's regular expression is applied."""
    name = series["metric"].pop("__name__")
    labels = ",".join(f'{label}="{value}"' for label, value in series["metric"].items())
    at, value = series["value"]
    return f"{name}{{{labels}}} {value} {int(at * 1000)}"


async def test_rules_are_evaluated_and_nothing_is_wrong_with_a_healthy_stack(observed: Observed) -> None:
    end = time.monotonic() + TIMEOUT_S
    groups = await evaluated(observed.watcher)
    made = [rule for group in groups if group["name"] != "firing" for rule in group["rules"]]
    assert {rule["name"] for rule in made} == {rule.get("alert") or rule["record"] for rule in rules()}
    assert {rule["name"]: rule["lastError"] for rule in made if rule["health"] != "ok"} == {}
    assert [rule["name"] for rule in made if rule.get("state") == "firing"] == []
    while unrecorded := [name for name in recorded() if not observed.watcher.lately(name, SEEN_S)]:
        assert time.monotonic() < end, f"{unrecorded} record nothing"
        await asyncio.sleep(0.5)


async def evaluated(watcher: Prometheus) -> list[dict[str, Any]]:
    """Groups of rules, once each has been evaluated."""
    end = time.monotonic() + TIMEOUT_S / 2
    while True:
        groups = watcher.get("rules")["groups"]
        if all(rule["health"] != "unknown" for group in groups for rule in group["rules"]):
            return groups
        assert time.monotonic() < end, "rules are not evaluated"
        await asyncio.sleep(0.2)


async def test_every_alert_can_be_told(observed: Observed) -> None:
    """Annotations of alerts that fire, as Prometheus fills them in."""
    await evaluated(observed.watcher)
    told = [alert for alert in observed.watcher.get("alerts")["alerts"] if alert["labels"].get("made") == "firing"]
    assert len(told) == len(firing_alerts())
    for alert in told:
        for text in (alert["annotations"]["summary"], alert["annotations"]["description"]):
            assert "<error" not in text, text
            assert "<no value>" not in text, text
            assert "  " not in text.strip(), text


async def test_processes_expose_what_the_module_names(observed: Observed) -> None:
    named = {metric.name for metric in METRICS}
    end = time.monotonic() + 2 * TIMEOUT_S
    while missing := named - (seen := metrics_seen(observed.watcher)):
        assert time.monotonic() < end, f"no process shows {sorted(missing)}"
        await asyncio.sleep(0.5)
    assert seen == named


def metrics_seen(watcher: Prometheus) -> set[str]:
    """Metrics of kvpilot's that were scraped."""
    names = watcher.get("label/__name__/values")
    return {metric_of(name) for name in names if name.startswith("kvpilot_")}
