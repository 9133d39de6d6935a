"""The chart as helm renders it, once a set of values and process."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent.parent
CHART = ROOT / "deploy" / "helm" / "kvpilot"
VALUE_SETS = sorted(path.stem.removesuffix("-values") for path in (CHART / "ci").glob("*-values.yaml"))
WORKLOADS = ("Deployment", "StatefulSet", "DaemonSet", "Job")

Object = dict[str, Any]


class StrictLoader(yaml.CSafeLoader):
    """Refuses a key that stands twice in a mapping: Kubernetes would silently take one of the two."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        assert not twice, f"{node.start_mark}: twice in a mapping: {sorted(twice)}"
        return super().construct_mapping(node, deep)


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A script of the deploy folder."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "protos")))}
    command = [sys.executable, "-P", str(ROOT / "deploy" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@cache
def binary(name: str) -> str:
    """Path of helm or kubectl."""
    done = run("tools/binaries.py", name)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Helm, which knows nothing of this machine's settings."""
    homes = {f"HELM_{kind}_HOME": "/nonexistent" for kind in ("CACHE", "CONFIG", "DATA")}
    command = [binary("helm"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | homes)


def template(*arguments: str) -> subprocess.CompletedProcess[str]:
    """``helm template`` of the chart."""
    return helm("template", "kvpilot", str(CHART), "--namespace", "serving", *arguments)


@cache
def _rendered(values: str) -> tuple[Object, ...]:
    done = template("--values", str(CHART / "ci" / f"{values}-values.yaml"))
    assert done.returncode == 0, done.stderr
    return tuple(read(done.stdout))


def read(text: str) -> list[Object]:
    """The objects in a YAML text."""
    return [each for each in yaml.load_all(text, Loader=StrictLoader) if each]


def rendered(values: str) -> list[Object]:
    """Objects of a value set of the chart's ci folder; the caller's own."""
    return copy.deepcopy(list(_rendered(values)))


def name_of(each: Object) -> str:
    """Kind and name, to be read in messages."""
    return f"{each['kind']} {each['metadata']['name']}"


def find(objects: Iterable[Object], kind: str, name: str) -> Object:
    """The object of this kind and name."""
    return next(each for each in objects if each["kind"] == kind and each["metadata"]["name"] == name)


def of_kind(objects: Iterable[Object], *kinds: str) -> list[Object]:
    """All objects of these kinds."""
    return [each for each in objects if each["kind"] in kinds]


def pod_of(workload: Object) -> Object:
    """A workload's pod."""
    template: Object = workload["spec"]["template"]
    return template


def containers(workload: Object) -> Iterator[Object]:
    """A workload's containers, those that run before it included."""
    spec = pod_of(workload)["spec"]
    yield from spec.get("initContainers", ())
    yield from spec["containers"]


def environment(container: Object) -> dict[str, Any]:
    """A container's variables: value, or where it comes from."""
    return {each["name"]: each.get("value", each.get("valueFrom")) for each in container.get("env", ())}
