"""The dashboards as files: fresh, importable without plug-ins, and about metrics that exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from grafana_foundation_sdk.models import dashboard as model

from kvpilot.metrics import METRICS
from tests.deploy.promql import labels_of, metrics_in
from tests.deploy.sources import DASHBOARDS, DEPLOY, Query, all_queries, filled, labels_named, load, queries, rules

UNUSED: dict[str, str] = {}
"""Metrics that neither a panel nor a rule shows, and why."""
CORE_PANELS = {"row", "timeseries", "stat", "heatmap", "table"}
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def panels(file: Path) -> list[dict[str, Any]]:
    return [panel for panel in load(file)["panels"] if panel["type"] != "row"]


def test_there_are_three() -> None:
    assert [file.name for file in DASHBOARDS] == ["kvpilot-fleet.json", "kvpilot-policy.json", "kvpilot-serving.json"]


def test_files_are_what_their_source_makes() -> None:
    root = DEPLOY.parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(root), str(root / "protos")))}
    command = [sys.executable, "-P", "-m", "deploy.grafana.generate", "--check"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
class TestEach:
    def test_is_of_grafanas_schema(self, file: Path) -> None:
        dashboard = load(file)
        read = model.Dashboard.from_json(dashboard)
        assert read.uid == file.stem, "the identity by which an import replaces an older version"
        assert read.id_val is None, "the identity in one Grafana's database; an import with one fails elsewhere"
        assert len(read.panels) == len(dashboard["panels"])

    def test_needs_no_plugin_and_no_certain_datasource(self, file: Path) -> None:
        dashboard = load(file)
        assert {panel["type"] for panel in dashboard["panels"]} <= CORE_PANELS
        variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
        assert list(variables) == ["datasource", "namespace", "model", "worker"]
        assert variables["datasource"]["type"] == "datasource"
        for panel in panels(file):
            assert panel["datasource"] == SOURCE
            assert all(target["datasource"] == SOURCE for target in panel["targets"])

    def test_panels_say_what_they_show(self, file: Path) -> None:
        for panel in panels(file):
            assert panel["description"].endswith("."), panel["title"]
            assert panel["type"] == "table" or panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        ids = [panel["id"] for panel in load(file)["panels"]]
        assert len(set(ids)) == len(ids)

    def test_panels_fill_the_grid_without_overlap(self, file: Path) -> None:
        taken: set[tuple[int, int]] = set()
        for panel in load(file)["panels"]:
            place = panel["gridPos"]
            cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in _rows(place)}
            assert not cells & taken, panel["title"]
            assert max(x for x, _ in cells) < 24, panel["title"]
            taken |= cells

    def test_variables_ask_for_labels_that_exist(self, file: Path) -> None:
        for variable in load(file)["templating"]["list"][1:]:
            asked = re.fullmatch(r"label_values\((.+), (\w+)\)|query_result\((.+)\)", filled(variable["query"]))
            assert asked, variable["query"]
            series, label, instances = asked.groups()
            assert {label} <= labels_of(series) if series else {"instance", "worker"} <= labels_of(instances)


def _rows(place: dict[str, int]) -> range:
    return range(place["y"], place["y"] + place["h"])


@pytest.mark.parametrize("query", all_queries(), ids=lambda query: query.where)
def test_query_reads_what_exists_and_names_labels_that_it_has(query: Query) -> None:
    assert labels_named(query.legend) <= labels_of(query.expression)


def test_every_metric_is_shown_or_left_out_on_purpose() -> None:
    shown = {name for query in all_queries() for name in metrics_in(query.expression)}
    used = shown | {name for rule in rules() for name in metrics_in(rule["expr"])}
    unused = {metric.name for metric in METRICS} - used
    assert unused == UNUSED.keys()


def test_dashboards_do_not_need_the_rules() -> None:
    for file in DASHBOARDS:
        assert not [query for query in queries(file) if ":" in query.expression]
