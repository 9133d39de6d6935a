"""The chart keeps to the policy, and the policy's check finds who does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.deploy.policy import violations
from tests.deploy.rendering import VALUE_SETS, Object, find, of_kind, rendered


@pytest.mark.parametrize("values", VALUE_SETS)
def test_every_object_keeps_to_it(values: str) -> None:
    assert [problem for each in rendered(values) for problem in violations(each)] == []


Spoil = Callable[[Object, Object], object]
BROKEN: dict[str, Spoil] = {
    "may run as root": lambda pod, _: pod["securityContext"].update(runAsUser=0),
    "no seccomp profile": lambda pod, _: pod["securityContext"].pop("seccompProfile"),
    "mounts a token": lambda pod, _: pod.update(automountServiceAccountToken=True),
    "variables of other Services": lambda pod, _: pod.pop("enableServiceLinks"),
    "shares a namespace": lambda pod, _: pod.update(hostNetwork=True),
    "mounts a folder of its host": lambda pod, _: pod["volumes"].append({"name": "x", "hostPath": {"path": "/"}}),
    "no time to end in": lambda pod, _: pod.pop("terminationGracePeriodSeconds"),
    "can be written": lambda _, main: main["securityContext"].pop("readOnlyRootFilesystem"),
    "may gain privileges": lambda _, main: main["securityContext"].update(privileged=True),
    "has capabilities": lambda _, main: main["securityContext"]["capabilities"].update(add=["NET_ADMIN"]),
    "no limits of memory": lambda _, main: main["resources"]["limits"].pop("memory"),
    "no requests of cpu": lambda _, main: main["resources"].pop("requests"),
    "image registry/kvpilot:latest": lambda _, main: main.update(image="registry/kvpilot:latest"),
    "image registry:5000/kvpilot": lambda _, main: main.update(image="registry:5000/kvpilot"),
    "a secret in plain text": lambda _, main: main["env"].append({"name": "API_TOKEN", "value": "x"}),
    "no /tmp to write to": lambda _, main: main["volumeMounts"].pop(1),
    "no startupProbe": lambda _, main: main.pop("startupProbe"),
    "no readinessProbe": lambda _, main: main.pop("readinessProbe"),
    "no livenessProbe": lambda _, main: main.pop("livenessProbe"),
}


@pytest.mark.parametrize("problem", BROKEN)
def test_a_pod_that_breaks_it_is_found(problem: str) -> None:
    deployment = find(rendered("full"), "Deployment", "kvpilot-steering")
    pod = deployment["spec"]["template"]["spec"]
    BROKEN[problem](pod, pod["containers"][0])
    (found,) = {each for each in violations(deployment) if problem in each}
    assert found.startswith("Deployment kvpilot-steering: ")


def test_containers_that_run_first_are_held_to_it_too() -> None:
    worker = find(rendered("cpu"), "Deployment", "kvpilot-worker-small")
    del worker["spec"]["template"]["spec"]["initContainers"][0]["securityContext"]
    assert any("container model: has capabilities" in each for each in violations(worker))


def test_a_token_for_everyone_a_secret_and_a_lost_namespace_are_found() -> None:
    (account, *_) = of_kind(rendered("full"), "ServiceAccount")
    account["automountServiceAccountToken"] = True
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "x", "namespace": "y"}}
    service = find(rendered("full"), "Service", "kvpilot-redis")
    del service["metadata"]["namespace"]
    assert ["its token is mounted" in each for each in violations(account)] == [True]
    assert any("a Secret in the chart" in each for each in violations(secret))
    assert violations(service) == ["Service kvpilot-redis: no namespace"]
