"""What is to be tried: the dashboards' queries and the rules' expressions, as the files have them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.promql import Labels, labels_of

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
DASHBOARDS = sorted((DEPLOY / "grafana").glob("*.json"))
RULES = DEPLOY / "prometheus" / "rules.yaml"

VARIABLES = {"$__rate_interval": "10s", "$namespace": ".*", "$model": ".*", "$worker": ".*"}
"""What Grafana would put in: all of each, and a window of ten scrapes."""


@dataclass(frozen=True)
class Query:
    """A query of a panel or an annotation, with variables filled in."""

    where: str
    expression: str
    legend: str
    instant: bool = False
    is_annotation: bool = False


def filled(text: str) -> str:
    """Text with its variables' values; one that is not known stays, and is no PromQL."""
    for name, value in VARIABLES.items():
        text = text.replace(name, value)
    return text


def load(file: Path) -> dict[str, Any]:
    """A dashboard."""
    return json.loads(file.read_text(encoding="utf-8"))


def queries(file: Path) -> Iterator[Query]:
    """All queries of a dashboard: of panels and annotations."""
    dashboard = load(file)
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            where = f"{file.stem}, {panel['title']}, {target['refId']}"
            yield Query(where, filled(target["expr"]), target.get("legendFormat", ""), target["instant"])
    for annotation in dashboard["annotations"]["list"]:
        yield Query(f"{file.stem}, {annotation['name']}", filled(annotation["expr"]), "", is_annotation=True)


def all_queries() -> list[Query]:
    """Those of all dashboards."""
    return [query for file in DASHBOARDS for query in queries(file)]


def rules() -> list[dict[str, Any]]:
    """All rules, in their order."""
    return [rule for group in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"] for rule in group["rules"]]


def alerts() -> dict[str, dict[str, Any]]:
    """Alert rules by name."""
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def recorded() -> dict[str, Labels]:
    """What recording rules make, and its labels."""
    return {rule["record"]: labels_of(rule["expr"]) for rule in rules() if "record" in rule}


def labels_named(template: str) -> set[str]:
    """Labels that an annotation's template or a panel's legend speaks of."""
    return set(re.findall(r"\$labels\.(\w+)", template)) | set(re.findall(r"\{\{\s*(\w+)\s*\}\}", template))
