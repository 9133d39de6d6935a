"""The chart as a whole, and what is made of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.deploy.policy import violations
from tests.deploy.rendering import CHART, ROOT, VALUE_SETS, binary, find, helm, name_of, read, rendered, run, template
from tests.deploy.schemas import VERSIONS, problems

MANIFESTS = ROOT / "deploy" / "manifests"


@pytest.mark.parametrize("values", VALUE_SETS)
def test_helm_has_nothing_to_complain_of(values: str) -> None:
    done = helm("lint", "--strict", str(CHART), "--values", str(CHART / "ci" / f"{values}-values.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_chart_can_be_packed_with_its_files(tmp_path: Path) -> None:
    done = helm("package", str(CHART), "--destination", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (packed,) = tmp_path.glob("kvpilot-*.tgz")
    shown = helm("show", "values", str(packed))
    assert shown.stdout.strip() == (CHART / "values.yaml").read_text().strip()


def test_the_plain_manifests_are_fresh() -> None:
    done = run("tools/render.py", "--check")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", sorted(MANIFESTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_plain_manifests_are_valid_and_whole(path: Path) -> None:
    namespace, *objects = read(path.read_text())
    assert namespace["kind"] == "Namespace"
    assert problems(namespace, VERSIONS[0]) == []
    for each in objects:
        assert each["metadata"]["namespace"] == namespace["metadata"]["name"]
        assert [*problems(each, VERSIONS[0]), *violations(each)] == []
    names = [name_of(each) for each in objects]
    assert len(names) == len(set(names))


def test_kubectl_and_kustomize_take_them(tmp_path: Path) -> None:
    """As a team without Helm would: a kustomization of its own on top, built by kubectl."""
    (tmp_path / "base.yaml").write_text((MANIFESTS / "cpu.yaml").read_text())
    (tmp_path / "kustomization.yaml").write_text(
        "resources: [base.yaml]\n"
        "images: [{name: registry.example.com/kvpilot/kvpilot-controller, newName: example.org/controller}]\n"
    )
    done = subprocess.run([binary("kubectl"), "kustomize", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    deployment = find(read(done.stdout), "Deployment", "kvpilot-steering")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "example.org/controller:0.1.0"


def test_an_upgrade_of_the_chart_alone_restarts_no_pod() -> None:
    """Pods carry no label of the chart's version, and selectors, which cannot change, neither."""
    for each in rendered("full"):
        if each["kind"] in ("Deployment", "StatefulSet"):
            labels = each["spec"]["template"]["metadata"]["labels"] | each["spec"]["selector"]["matchLabels"]
            assert not {"helm.sh/chart", "app.kubernetes.io/version"} & set(labels)


def test_long_names_stay_within_what_kubernetes_takes() -> None:
    done = template(
        "--set",
        f"fullnameOverride={'n' * 60}",
        "--set",
        f"workers.{'p' * 22}.model.name=x",
        "--set",
        f"workers.{'p' * 22}.model.fetch=smollm2",
    )
    assert done.returncode == 0, done.stderr
    for each in read(done.stdout):
        assert len(each["metadata"]["name"]) <= 63, name_of(each)
