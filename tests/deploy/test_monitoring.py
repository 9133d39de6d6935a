"""Alert rules and dashboards reach the cluster as they are in their files."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from tests.deploy.policy import violations
from tests.deploy.rendering import CHART, ROOT, Object, find, helm, of_kind, read, rendered, template
from tests.deploy.schemas import VERSIONS, problems

RULES = {
    "groups": [
        {
            "name": "kvpilot",
            "rules": [
                {
                    "alert": "Example",
                    "expr": 'sum by (pool) (rate(kvpilot_x_total{state=~"a|b"}[5m])) > 1',
                    "for": "5m",
                    "labels": {"severity": "page"},
                    "annotations": {"summary": "{{ $labels.pool }} has {{ $value | humanize }}"},
                }
            ],
        }
    ]
}
DASHBOARD = {"title": "Fleet", "panels": [{"title": "{{pool}}", "targets": [{"expr": "up", "legendFormat": "{{a}}"}]}]}


@pytest.fixture(scope="module")
def with_files(tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    """The chart's objects where there is a file of rules, one of their tests, and a dashboard."""
    chart = tmp_path_factory.mktemp("charts") / "kvpilot"
    shutil.copytree(CHART, chart, ignore=shutil.ignore_patterns("files"))
    for name, text in {
        "prometheus/alerts.rules.yml": yaml.safe_dump(RULES),
        "prometheus/tests.yml": "rule_files: [alerts.rules.yml]\ntests: []\n",
        "grafana/fleet_view.json": json.dumps(DASHBOARD),
    }.items():
        path = chart / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    values = ["--values", str(CHART / "ci" / "full-values.yaml")]
    done = helm("template", "kvpilot", str(chart), "--namespace", "serving", *values)
    assert done.returncode == 0, done.stderr
    return read(done.stdout)


def test_rules_are_taken_as_they_are(with_files: list[Object]) -> None:
    (rule,) = of_kind(with_files, "PrometheusRule")
    assert rule["spec"] == RULES
    assert rule["metadata"]["name"] == "kvpilot-alerts-rules"
    assert rule["metadata"]["labels"]["release"] == "prometheus"


def test_dashboards_are_taken_as_they_are(with_files: list[Object]) -> None:
    dashboard = find(with_files, "ConfigMap", "kvpilot-dashboard-fleet-view")
    assert json.loads(dashboard["data"]["fleet_view.json"]) == DASHBOARD
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_both_are_valid(with_files: list[Object]) -> None:
    ours = of_kind(with_files, "PrometheusRule", "ConfigMap")
    assert len(ours) == 2
    assert [problem for each in ours for problem in (*problems(each, VERSIONS[-1]), *violations(each))] == []


def test_a_rule_with_a_misspelt_key_is_found(with_files: list[Object]) -> None:
    (rule,) = of_kind(with_files, "PrometheusRule")
    rule = json.loads(json.dumps(rule))
    rule["spec"]["groups"][0]["rules"][0]["annotation"] = {}
    assert problems(rule, VERSIONS[-1]) != []


def test_the_projects_own_files_are_in_the_chart() -> None:
    dashboards = {path.name for path in (ROOT / "deploy" / "grafana").glob("*.json")}
    given = {name for each in of_kind(rendered("full"), "ConfigMap") for name in each["data"]}
    assert dashboards == given
    files = [yaml.safe_load(path.read_text()) for path in (ROOT / "deploy" / "prometheus").glob("*.y*ml")]
    assert len(of_kind(rendered("full"), "PrometheusRule")) == sum("groups" in file for file in files)


def served(objects: list[Object]) -> list[tuple[dict[str, str], int]]:
    """Labels of each Deployment's pods, and the port at which they serve metrics."""
    found = []
    for each in of_kind(objects, "Deployment"):
        template = each["spec"]["template"]
        container = template["spec"]["containers"][0]
        (port,) = (port["containerPort"] for port in container["ports"] if port["name"] == "metrics")
        listens = [each["value"] for each in container["env"] if each["name"].endswith("_METRICS_LISTEN")]
        assert listens == [f"0.0.0.0:{port}"]
        found.append((template["metadata"]["labels"], port))
    return found


def test_every_pod_with_metrics_is_scraped_at_the_port_that_it_serves() -> None:
    (monitor,) = of_kind(rendered("full"), "PodMonitor")
    wanted = monitor["spec"]["selector"]["matchLabels"]
    (among,) = monitor["spec"]["selector"]["matchExpressions"]
    for labels, _ in served(rendered("full")):
        assert wanted.items() <= labels.items()
        assert labels[among["key"]] in among["values"]


def test_through_a_service_too() -> None:
    objects = rendered("service-monitor")
    (monitor,) = of_kind(objects, "ServiceMonitor")
    (endpoint,) = monitor["spec"]["endpoints"]
    wanted = monitor["spec"]["selector"]["matchLabels"]
    (service,) = (each for each in of_kind(objects, "Service") if wanted.items() <= each["metadata"]["labels"].items())
    (port,) = service["spec"]["ports"]
    assert port["name"] == port["targetPort"] == endpoint["port"] == "metrics"
    for labels, serves in served(objects):
        assert service["spec"]["selector"].items() <= labels.items()
        assert port["port"] == serves


def test_runbooks_are_linked_to_where_the_repository_is() -> None:
    given = "metrics.rules.enabled=true,metrics.rules.repository=https://git.example.com/kvpilot/blob/main/"
    done = template("--set", given)
    assert done.returncode == 0, done.stderr
    (made,) = of_kind(read(done.stdout), "PrometheusRule")
    rules = [rule for group in made["spec"]["groups"] for rule in group["rules"] if "alert" in rule]
    assert len(rules) > 20
    for rule in rules:
        anchor = rule["alert"].lower()
        link = f"https://git.example.com/kvpilot/blob/main/deploy/runbooks.md#{anchor}"
        assert rule["annotations"]["runbook_url"] == link


def test_not_twice() -> None:
    both = ("--set", "metrics.podMonitor.enabled=true,metrics.serviceMonitor.enabled=true")
    done = template(*both)
    assert done.returncode != 0
    assert "metrics.serviceMonitor: with metrics.podMonitor each pod would be scraped twice" in done.stderr
