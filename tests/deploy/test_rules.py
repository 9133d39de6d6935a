"""The rules as files: each alert fires and stays silent where it should, and tells whoever is woken what to do."""

from __future__ import annotations

import functools
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis
import typer
import yaml

from cli.main import app
from kvpilot.bus import BusError
from kvpilot.bus.connection import STORE_COUNTS
from tests.conftest import RedisProcess
from tests.deploy.prometheus import needs_prometheus
from tests.deploy.promql import TARGET_LABELS, known_series, labels_of
from tests.deploy.sources import DEPLOY, RULES, alerts, labels_named, recorded, rules
from tests.jobs_help import connected, make_job

CASES = DEPLOY.parent / "tests" / "deploy" / "rules_test.yaml"
RUNBOOKS = DEPLOY / "runbooks.md"
SEVERITIES = {"critical", "warning", "info"}


def cases() -> list[dict[str, Any]]:
    return yaml.safe_load(CASES.read_text(encoding="utf-8"))["tests"]


def promtool(*arguments: str) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
def test_prometheus_accepts_the_rules() -> None:
    promtool("check", "rules", "--lint-fatal", str(RULES))


@needs_prometheus
def test_prometheus_accepts_the_example_of_its_configuration() -> None:
    promtool("check", "config", str(DEPLOY / "prometheus" / "prometheus.yaml"))


@needs_prometheus
@pytest.mark.slow
def test_alerts_fire_and_stay_silent() -> None:
    promtool("test", "rules", str(CASES))


def test_each_alert_is_tried_both_ways() -> None:
    assert [case["name"] for case in cases()] == list(alerts()), "in the rules' order"
    for case in cases():
        quiet, fires = case["promql_expr_test"]
        assert quiet["expr"] == fires["expr"] == f'ALERTS{{alertname="{case["name"]}", alertstate="firing"}}'
        assert not quiet["exp_samples"]
        assert fires["exp_samples"]


def test_alerts_are_tried_on_series_as_they_are() -> None:
    """Made-up labels would prove an alert that never fires on real ones."""
    known = known_series() | {"up": TARGET_LABELS}
    for case in cases():
        for series in case["input_series"]:
            name, labels = re.fullmatch(r"(\w+)\{(.*)\}", series["series"]).groups()
            assert set(re.findall(r'(\w+)="', labels)) == known[name], series["series"]


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.get("alert") or rule["record"])
def test_expression_reads_what_exists(rule: dict[str, Any]) -> None:
    labels = labels_of(rule["expr"], recorded())
    assert labels_named(str(rule.get("annotations", ""))) <= labels, "an annotation names a label that no result has"


@pytest.mark.parametrize("alert", alerts())
def test_alert_says_how_bad_it_is_and_what_to_do(alert: str) -> None:
    rule = alerts()[alert]
    assert rule["labels"]["severity"] in SEVERITIES
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["runbook_url"] == f"deploy/runbooks.md#{alert.lower()}"
    section = runbook(alert)
    for part in ("**Means.**", "**Look.**", "**Do.**"):
        assert part in section, f"{alert} has no {part}"


def test_runbooks_have_no_section_of_an_alert_that_is_gone() -> None:
    assert re.findall(r"^## (Kvpilot\w+)$", RUNBOOKS.read_text(encoding="utf-8"), re.M) == list(alerts())


def runbook(alert: str) -> str:
    """An alert's section."""
    _, _, rest = RUNBOOKS.read_text(encoding="utf-8").partition(f"\n## {alert}\n")
    assert rest, f"{RUNBOOKS.name} has no section {alert}"
    return rest.partition("\n## ")[0]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("command", "code", "alert"),
    [
        ("CONFIG SET maxmemory 1", "OOM", "KvpilotJobStoreUnavailable"),
        ("REPLICAOF 127.0.0.1 1", "READONLY", "KvpilotJobStoreUnavailable"),
        ("SET kvpilot:jobs: text", "WRONGTYPE", "KvpilotJobStoreRefuses"),
        ("ACL SETUSER default -evalsha", "NOPERM", "KvpilotJobStoreRefuses"),
    ],
)
async def test_what_the_job_store_says_is_in_the_runbook_of_the_alert_that_comes_of_it(
    forgetful_redis: RedisProcess, command: str, code: str, alert: str
) -> None:
    async with connected(forgetful_redis.url) as bus:
        with redis.Redis.from_url(forgetful_redis.url) as client:
            client.execute_command(*command.split())
        before = replace(STORE_COUNTS)
        with pytest.raises(BusError):
            await bus.submit(make_job(model_name=""))
    counted = {
        "KvpilotJobStoreUnavailable": STORE_COUNTS.unavailable - before.unavailable,
        "KvpilotJobStoreRefuses": STORE_COUNTS.refused - before.refused,
    }
    assert [name for name, rise in counted.items() if rise] == [alert]
    assert f"`{code}`" in runbook(alert)


@pytest.mark.parametrize("program", ["workers", "controller"])
def test_runbook_says_how_a_process_logs_that_the_job_store_refuses(
    forgetful_redis: RedisProcess, tmp_path: Path, program: str
) -> None:
    with redis.Redis.from_url(forgetful_redis.url) as client:
        client.execute_command("ACL", "SETUSER", "default", "-ping")
    arguments = {"workers": ["--model", str(tmp_path)], "controller": ["--roles", "generation"]}[program]
    command = [sys.executable, "-m", program, *arguments, "--redis-url", forgetful_redis.url, "--log-format", "json"]
    done = subprocess.run(command, cwd=DEPLOY.parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    last = json.loads((done.stdout + done.stderr).splitlines()[-1])
    assert "has no permissions" in json.dumps(last), "Redis' words"
    assert f"`{last['event']}`" in runbook("KvpilotJobStoreRefuses")


def test_runbooks_name_commands_that_exist() -> None:
    """Every ``kvpilot ...`` in a runbook is a command of the tool, with options that it has."""
    text = RUNBOOKS.read_text(encoding="utf-8")
    lines = re.findall(r"^kvpilot (.+?)(?:\s+#.*)?$", text, re.M) + re.findall(r"`kvpilot ([^`]+)`", text)
    assert len(lines) > 30
    for line in lines:
        assert not (wrong := what_is_wrong(shlex.split(line))), f"kvpilot {line}: {wrong}"
    assert what_is_wrong(["models", "demote"]) == "no command demote"
    assert what_is_wrong(["top", "--twice"]) == "no option --twice"


@functools.cache
def tool() -> Any:
    """The ``kvpilot`` command."""
    return typer.main.get_command(app)


def what_is_wrong(words: list[str]) -> str:
    """Why the tool would not understand these arguments; empty if it would."""
    command = tool()
    while words and hasattr(command, "commands"):
        name, *words = words
        if name not in command.commands:
            return f"no command {name}"
        command = command.commands[name]
    options = {option for parameter in command.params for option in parameter.opts}
    unknown = [word for word in words if word.startswith("-") and word not in options]
    return f"no option {unknown[0]}" if unknown else ""
