"""The chart's values: the schema says what there is, and refuses what there is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.rendering import CHART, template

VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA = json.loads((CHART / "values.schema.json").read_text())


def _refused(tmp_path: Path, values: dict[str, Any]) -> str:
    """What helm says of these values."""
    path = tmp_path / "values.yaml"
    path.write_text(json.dumps(values))
    done = template("--values", str(path))
    assert done.returncode != 0, "accepted"
    return done.stderr


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"replicas": 3}, "'replicas' not allowed"),
        ({"controller": {"generation": {"replcas": 3}}}, "'replcas' not allowed"),
        ({"controller": {"steering": {"mode": "on"}}}, "/controller/steering/mode"),
        ({"controller": {"steering": {"settings": {"dwell_tokens": 1}}}}, "invalid propertyName 'dwell_tokens'"),
        ({"image": {"controller": {"tag": "latest"}}}, "/image/controller/tag"),
        ({"image": {"controller": {"digest": "sha256:12"}}}, "/image/controller/digest"),
        ({"redis": {"internal": {"appendFsync": "no"}}}, "/redis/internal/appendFsync"),
        ({"redis": {"url": "redis://user:password@host"}}, "'url' not allowed"),
        ({"workers": {"Big": {}}}, "Big"),
        ({"workers": {"big": {"device": "tpu"}}}, "/workers/big/device"),
        ({"workers": {"big": {"deviceBudget": "much"}}}, "/workers/big/deviceBudget"),
        ({"workers": {"big": {"resources": {"limits": {"cpu": "many"}}}}}, "/workers/big/resources/limits/cpu"),
        ({"workers": {"big": {"model": {"weights": "x"}}}}, "'weights' not allowed"),
        ({"workers": {"big": {"model": {"name": "x"}}}}, "exactly one of existingClaim, fetch, init is needed, got 0"),
        (
            {"workers": {"big": {"model": {"name": "x", "fetch": "y", "existingClaim": "z"}}}},
            "exactly one of existingClaim, fetch, init is needed, got 2",
        ),
        ({"workers": {"big": {"model": {"fetch": "y"}}}}, "workers.big.model.name"),
        ({"workers": {"big": {"model": {"name": "x", "existingClaim": "z"}}}}, "workers.big.model.path"),
        (
            {"workers": {"a": {"model": {"init": {"image": "aws-cli", "command": ["x"]}}}}},
            "/workers/a/model/init/image",
        ),
        ({"podSecurityContext": {"runAsUser": 0}}, "/podSecurityContext/runAsUser"),
        ({"gateway": {"enabled": True}}, "gateway.parentRefs"),
        (
            {"gateway": {"enabled": True, "create": {"enabled": True}}, "networkPolicy": {"enabled": False}},
            "gateway.create.className",
        ),
        ({"gateway": {"enabled": True, "parentRefs": [{"name": "public"}]}}, "networkPolicy.clients"),
        (
            {
                "gateway": {"enabled": True, "parentRefs": [{"name": "public"}], "exposeOperator": True},
                "networkPolicy": {"clients": [{"podSelector": {}}]},
            },
            "networkPolicy.operators",
        ),
        ({"gateway": {"hostnames": ["a.example.com", "a.example.com"]}}, "/gateway/hostnames"),
        ({"certificate": {"enabled": True}}, "gateway.hostnames"),
        (
            {
                "redis": {"urlSecret": {"name": "redis"}},
                "workers": {"a": {"model": {"name": "x", "fetch": "y"}, "keda": {"enabled": True}}},
            },
            "keda.redisAddress",
        ),
    ],
)
def test_a_mistake_is_refused_by_its_name(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    assert said in _refused(tmp_path, values)


def _keys(values: Any, schema: dict[str, Any], path: str = "") -> list[str]:
    """Keys that the schema has and the values have not, or the other way round."""
    while "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]]
    if schema.get("additionalProperties") is not False or not isinstance(values, dict):
        return []
    properties = schema["properties"]
    found = [f"{path}/{key}" for key in set(values) ^ set(properties)]
    for key in set(values) & set(properties):
        found += _keys(values[key], properties[key], f"{path}/{key}")
    return found


def test_values_and_schema_name_the_same_keys() -> None:
    by_pool_alone = {f"/workerDefaults/model/{key}" for key in ("name", "path", "existingClaim", "fetch", "init")}
    assert set(_keys(VALUES, SCHEMA)) - by_pool_alone == {"/global"}  # helm adds `global` by itself
