"""What every object of the chart must keep to, beyond its schema."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.deploy.rendering import WORKLOADS, Object, containers, name_of, pod_of

SECRET = re.compile(r"(^|_)(PASSWORD|TOKEN|SECRET|CREDENTIALS?|API_KEY|AUTH)$")


def violations(each: Object) -> list[str]:
    """The rules that an object breaks, in words."""
    found = [*_everything(each)]
    if each["kind"] in WORKLOADS:
        found += _pod(each)
        for container in containers(each):
            found += [f"container {container['name']}: {problem}" for problem in _container(container)]
        for container in pod_of(each)["spec"]["containers"]:
            found += [f"container {container['name']}: {problem}" for problem in _served(container)]
    return [f"{name_of(each)}: {problem}" for problem in found]


def _everything(each: Object) -> Iterator[str]:
    if not each["metadata"].get("namespace"):
        yield "no namespace"
    if "app.kubernetes.io/component" not in each["metadata"].get("labels", {}):
        yield "no label app.kubernetes.io/component"
    if each["kind"] == "Secret":
        yield "a Secret in the chart: secrets are given by reference"
    if each["kind"] == "ServiceAccount" and each.get("automountServiceAccountToken") is not False:
        yield "its token is mounted into pods"


def _pod(each: Object) -> Iterator[str]:
    spec = pod_of(each)["spec"]
    security = spec.get("securityContext", {})
    if security.get("runAsNonRoot") is not True or not security.get("runAsUser"):
        yield "may run as root"
    if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "no seccomp profile"
    if spec.get("automountServiceAccountToken") is not False:
        yield "mounts a token of its service account"
    if spec.get("enableServiceLinks") is not False:
        yield "has variables of other Services, which are taken for settings"
    if any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
        yield "shares a namespace of its host"
    if any("hostPath" in volume for volume in spec.get("volumes", ())):
        yield "mounts a folder of its host"
    if not spec.get("terminationGracePeriodSeconds"):
        yield "no time to end in"


def _container(container: Object) -> Iterator[str]:
    security = container.get("securityContext", {})
    if security.get("readOnlyRootFilesystem") is not True:
        yield "its root file system can be written"
    if security.get("allowPrivilegeEscalation") is not False or security.get("privileged"):
        yield "may gain privileges"
    capabilities = security.get("capabilities", {})
    if capabilities.get("drop") != ["ALL"] or capabilities.get("add"):
        yield "has capabilities"
    for kind in ("requests", "limits"):
        for resource in ("cpu", "memory"):
            if not container.get("resources", {}).get(kind, {}).get(resource):
                yield f"no {kind} of {resource}"
    name, _, digest = container["image"].partition("@")
    _, _, tag = name.rpartition("/")[2].partition(":")
    if not digest and tag in ("", "latest"):
        yield f"image {container['image']}: no version"
    for variable in container.get("env", ()):
        if SECRET.search(variable["name"]) and "value" in variable:
            yield f"variable {variable['name']}: a secret in plain text"
    if not any(mount["mountPath"] == "/tmp" for mount in container.get("volumeMounts", ())):
        yield "no /tmp to write to"


def _served(container: Object) -> Iterator[str]:
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        if not container.get(probe):
            yield f"no {probe}"
