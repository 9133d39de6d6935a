"""What the chart's objects say to each other, and to the processes in them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from controller.server import SERVICE_NAMES
from controller.settings import ControllerSettings, Role
from kvpilot.bus import keys
from tests.deploy.rendering import (
    VALUE_SETS,
    Object,
    containers,
    environment,
    find,
    of_kind,
    pod_of,
    read,
    rendered,
    template,
)
from workers.process import HEALTH_SERVICE
from workers.settings import WorkerSettings


def _main(workload: Object) -> Object:
    container: Object = pod_of(workload)["spec"]["containers"][0]
    return container


def _ours(values: str) -> list[Object]:
    return of_kind(rendered(values), "Deployment")


def _matches(labels: dict[str, str], selector: dict[str, str]) -> bool:
    return selector.items() <= labels.items()


@pytest.mark.parametrize("values", VALUE_SETS)
def test_processes_know_their_settings_and_take_their_values(values: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for workload in _ours(values):
        variables = environment(_main(workload))
        worker = _main(workload)["name"] == "worker"
        prefix = "KVPILOT_WORKER_" if worker else "KVPILOT_CONTROLLER_"
        settings = WorkerSettings if worker else ControllerSettings
        named = {name.removeprefix(prefix) for name in variables if name.startswith("KVPILOT_")}
        assert named <= {name.upper() for name in settings.model_fields}
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                by_kubernetes = {"THREADS": "4", "NAME": "pod-1", "REDIS_URL": "redis://somewhere:6379/0"}
                given = value if isinstance(value, str) else by_kubernetes.get(name.removeprefix(prefix), "x")
                patch.setenv(name, given)
            loaded = settings()
        assert loaded.listen == "0.0.0.0:7450" if isinstance(loaded, ControllerSettings) else loaded.threads == 4


def test_values_of_a_pool_become_its_workers_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = environment(_main(find(rendered("full"), "Deployment", "kvpilot-worker-long")))
    for name in ("KVPILOT_WORKER_NAME", "KVPILOT_WORKER_THREADS", "KVPILOT_WORKER_REDIS_URL"):
        variables.pop(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value if isinstance(value, str) else "x")
    settings = WorkerSettings()
    assert settings.served_name == "llama-8b"
    assert settings.model == Path("/models/llama-8b")
    assert settings.controllers == ("kvpilot-steering-pods:7450",)
    assert settings.device == "cuda"
    assert settings.host_budget_bytes == 16 << 30
    assert settings.disk_budget_bytes == 100 << 30
    assert settings.default_pipeline == "kivi(bits=4) | host(recent=2048)"
    assert settings.max_running == 4, "a pool's own settings win"


def test_replicas_of_steering_find_each_other_by_their_pods_addresses() -> None:
    container = _main(find(rendered("gpu"), "Deployment", "kvpilot-steering"))
    names = [each["name"] for each in container["env"]]
    variables = environment(container)
    assert variables["KVPILOT_CONTROLLER_ADVERTISE"] == "$(POD_IP):7450"
    assert variables["POD_IP"] == {"fieldRef": {"fieldPath": "status.podIP"}}
    assert names.index("POD_IP") < names.index("KVPILOT_CONTROLLER_ADVERTISE"), "or it is not put in"


def test_roles_are_split_so_that_planning_delays_no_token() -> None:
    objects = rendered("cpu")
    roles = {
        name: environment(_main(find(objects, "Deployment", f"kvpilot-{name}")))["KVPILOT_CONTROLLER_ROLES"]
        for name in ("generation", "steering")
    }
    assert roles == {"generation": "generation", "steering": "steering,operator"}


@pytest.mark.parametrize("values", VALUE_SETS)
def test_probes_ask_for_services_that_the_processes_have(values: str) -> None:
    of_controllers = {"generation": SERVICE_NAMES[Role.GENERATION], "steering": SERVICE_NAMES[Role.STEERING]}
    for workload in _ours(values):
        container = _main(workload)
        component = workload["metadata"]["labels"]["app.kubernetes.io/component"]
        ready = of_controllers.get(component, HEALTH_SERVICE)
        asked = {kind: container[f"{kind}Probe"]["grpc"]["service"] for kind in ("startup", "readiness", "liveness")}
        assert asked == {"startup": ready, "readiness": ready, "liveness": ""}
        served = {port["containerPort"] for port in container["ports"]}
        assert {container[f"{kind}Probe"]["grpc"]["port"] for kind in ("startup", "readiness", "liveness")} <= served


@pytest.mark.parametrize("values", VALUE_SETS)
def test_what_selects_pods_finds_pods(values: str) -> None:
    objects = rendered(values)
    pods = [pod_of(each)["metadata"]["labels"] for each in of_kind(objects, "Deployment", "StatefulSet")]
    for each in of_kind(objects, "Service"):
        assert any(_matches(labels, each["spec"]["selector"]) for labels in pods)
    for each in of_kind(objects, "PodDisruptionBudget"):
        assert any(_matches(labels, each["spec"]["selector"]["matchLabels"]) for labels in pods)
    for each in of_kind(objects, "NetworkPolicy"):
        assert any(_matches(labels, each["spec"]["podSelector"]["matchLabels"]) for labels in pods)
    for each in of_kind(objects, "Deployment", "StatefulSet"):
        own = pod_of(each)["metadata"]["labels"]
        selector = each["spec"]["selector"]["matchLabels"]
        assert [labels for labels in pods if _matches(labels, selector)] == [own], "selects its own pods alone"
        for constraint in pod_of(each)["spec"].get("topologySpreadConstraints", ()):
            assert _matches(own, constraint["labelSelector"]["matchLabels"])


@pytest.mark.parametrize("values", VALUE_SETS)
def test_names_that_objects_call_each_other_are_there(values: str) -> None:
    objects = rendered(values)
    services = {each["metadata"]["name"]: each["spec"]["ports"] for each in of_kind(objects, "Service")}
    accounts = {each["metadata"]["name"] for each in of_kind(objects, "ServiceAccount")} | {"default"}
    for workload in of_kind(objects, "Deployment", "StatefulSet"):
        assert pod_of(workload)["spec"]["serviceAccountName"] in accounts
        variables = environment(_main(workload))
        if "KVPILOT_WORKER_CONTROLLERS" in variables:
            host, port = variables["KVPILOT_WORKER_CONTROLLERS"].split(":")
            assert int(port) in [each["port"] for each in services[host]]
            assert find(objects, "Service", host)["spec"]["clusterIP"] == "None", "an address for each controller"
        for name, value in variables.items():
            if name.endswith("REDIS_URL") and isinstance(value, str):
                (host,) = re.findall(r"^redis://(?:.*@)?([^:/]+):6379/0$", value)
                assert host in services
        volumes = {volume["name"] for volume in pod_of(workload)["spec"].get("volumes", ())}
        volumes |= {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", ())}
        for container in containers(workload):
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    deployments = {each["metadata"]["name"] for each in of_kind(objects, "Deployment")}
    for each in of_kind(objects, "ScaledObject", "HorizontalPodAutoscaler"):
        target = each["spec"]["scaleTargetRef"]["name"]
        assert target in deployments
        assert "replicas" not in find(objects, "Deployment", target)["spec"], "an upgrade would undo the scaling"
    for each in of_kind(objects, "GRPCRoute"):
        for backend in (backend for rule in each["spec"]["rules"] for backend in rule["backendRefs"]):
            assert backend["port"] in [port["port"] for port in services[backend["name"]]]


def test_routes_lead_to_services_of_the_api() -> None:
    routes = of_kind(rendered("full"), "GRPCRoute")
    to = {
        match["method"]["service"]: rule["backendRefs"][0]["name"]
        for route in routes
        for rule in route["spec"]["rules"]
        for match in rule["matches"]
    }
    assert to == {
        SERVICE_NAMES[Role.GENERATION]: "kvpilot-generation",
        SERVICE_NAMES[Role.OPERATOR]: "kvpilot-steering",
    }


def test_the_certificate_lands_where_the_gateway_looks() -> None:
    objects = rendered("full")
    (certificate,) = of_kind(objects, "Certificate")
    (gateway,) = of_kind(objects, "Gateway")
    for listener in gateway["spec"]["listeners"]:
        certificates = [{"name": certificate["spec"]["secretName"]}]
        assert listener["tls"] == {"mode": "Terminate", "certificateRefs": certificates}
        assert listener["hostname"] in certificate["spec"]["dnsNames"]


def test_a_gateway_of_the_charts_own_serves_every_hostname_that_the_routes_have() -> None:
    objects = rendered("full")
    (gateway,) = of_kind(objects, "Gateway")
    listeners = {each["name"]: each["hostname"] for each in gateway["spec"]["listeners"]}
    assert listeners == {"https": "llm.example.com", "https-1": "llm.example.org"}
    for route in of_kind(objects, "GRPCRoute"):
        (parent,) = route["spec"]["parentRefs"]
        assert parent == {"name": gateway["metadata"]["name"]}, "a sectionName would be one listener"
        assert route["spec"]["hostnames"] == list(listeners.values())


@pytest.mark.parametrize(("hostnames", "listeners"), [([], [None]), (["a.example.com"], ["a.example.com"])])
def test_a_gateway_has_a_listener_with_one_hostname_or_none(hostnames: list[str], listeners: list[str | None]) -> None:
    given = json.dumps({"hostnames": hostnames, "enabled": True, "create": {"enabled": True, "className": "x"}})
    done = template("--set-json", f"gateway={given}", "--set", "networkPolicy.enabled=false")
    assert done.returncode == 0, done.stderr
    (gateway,) = of_kind(read(done.stdout), "Gateway")
    found = gateway["spec"]["listeners"]
    assert [each.get("hostname") for each in found] == listeners
    assert [each["name"] for each in found] == ["https"]


def test_the_gateways_pods_are_let_in_to_all_that_it_routes_to() -> None:
    objects = rendered("full")
    gateways = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "gateways"}}}
    for route in of_kind(objects, "GRPCRoute"):
        (rule,) = route["spec"]["rules"]
        policy = find(objects, "NetworkPolicy", rule["backendRefs"][0]["name"])["spec"]
        (grpc,) = (each for each in policy["ingress"] if {"port": "grpc", "protocol": "TCP"} in each["ports"])
        assert gateways in grpc["from"]


def test_a_pod_has_time_for_all_that_it_promises_to_finish() -> None:
    objects = rendered("full")
    worker = pod_of(find(objects, "Deployment", "kvpilot-worker-long"))["spec"]
    drain = int(environment(worker["containers"][0])["KVPILOT_WORKER_DRAIN_TIMEOUT_S"])
    stop = WorkerSettings.model_fields["stop_timeout_s"].default
    assert drain == 600
    assert worker["terminationGracePeriodSeconds"] >= drain + stop + 10
    front = pod_of(find(objects, "Deployment", "kvpilot-generation"))["spec"]
    asleep = front["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    grace = int(environment(front["containers"][0])["KVPILOT_CONTROLLER_GRACE_S"])
    assert front["terminationGracePeriodSeconds"] > asleep + grace


def test_loading_a_model_may_take_as_long_as_its_pool_says() -> None:
    probe = _main(find(rendered("gpu"), "Deployment", "kvpilot-worker-llama-8b"))["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 900


def test_gpus_are_asked_for_where_there_are_some() -> None:
    objects = rendered("full")
    cuda, cpu = (_main(find(objects, "Deployment", f"kvpilot-worker-{pool}")) for pool in ("long", "small"))
    assert cuda["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "nvidia.com/gpu" not in cpu["resources"]["limits"]
    spec = pod_of(find(objects, "Deployment", "kvpilot-worker-small"))["spec"]
    assert "runtimeClassName" not in spec, "a pool can take back what the defaults say"
    assert "tolerations" not in spec


def test_a_pool_that_is_off_is_not_there() -> None:
    assert [each for each in rendered("full") if "retired" in each["metadata"]["name"]] == []


def test_images_are_told_apart_by_variant_unless_a_digest_says_which() -> None:
    images = {
        values: _main(find(rendered(values), "Deployment", name))["image"]
        for values, name in (("cpu", "kvpilot-worker-small"), ("gpu", "kvpilot-worker-llama-8b"))
    }
    assert images["cpu"].endswith("/kvpilot-worker:0.1.0-cpu")
    assert images["gpu"].endswith("/kvpilot-worker:0.1.0-cuda")
    full = rendered("full")
    assert "/kvpilot-worker@sha256:" in _main(find(full, "Deployment", "kvpilot-worker-long"))["image"]
    assert _main(find(full, "Deployment", "kvpilot-worker-small"))["image"].endswith("/kvpilot-worker:0.1.0-cpu")
    assert _main(find(full, "Deployment", "kvpilot-steering"))["image"].endswith("/kvpilot-controller:0.1.0-rc.1")


def test_no_update_takes_a_replica_away_before_there_is_another_unless_gpus_are_scarce() -> None:
    for workload in (each for values in ("cpu", "full") for each in _ours(values)):
        update = workload["spec"]["strategy"]["rollingUpdate"]
        assert update == {"maxSurge": 1, "maxUnavailable": 0}
    scarce = find(rendered("gpu"), "Deployment", "kvpilot-worker-llama-8b")["spec"]["strategy"]["rollingUpdate"]
    assert scarce == {"maxSurge": 0, "maxUnavailable": 1}


def test_network_policies_open_the_ports_that_are_used_and_no_other() -> None:
    objects = rendered("full")
    policies = {each["metadata"]["name"]: each["spec"] for each in of_kind(objects, "NetworkPolicy")}
    ports = {
        name: {port["port"] for rule in spec["ingress"] for port in rule["ports"]} for name, spec in policies.items()
    }
    assert ports == {
        "kvpilot-generation": {"grpc", "metrics"},
        "kvpilot-steering": {"grpc", "metrics"},
        "kvpilot-worker": {"metrics"},
        "kvpilot-redis": {"redis"},
    }
    for spec in policies.values():
        assert spec["policyTypes"] == ["Ingress", "Egress"]
    to_steering = {
        name
        for name, spec in policies.items()
        if any(peer.get("podSelector") == policies["kvpilot-steering"]["podSelector"]
               for rule in spec["egress"] for peer in rule.get("to", ()))
    }  # fmt: skip
    assert to_steering == {"kvpilot-steering", "kvpilot-worker"}, "its replicas call each other"
    for workload in of_kind(objects, "Deployment", "StatefulSet"):
        labels = pod_of(workload)["metadata"]["labels"]
        assert [spec for spec in policies.values() if _matches(labels, spec["podSelector"]["matchLabels"])]


def test_scaling_looks_at_the_queues_that_workers_read() -> None:
    scaled = find(rendered("full"), "ScaledObject", "kvpilot-worker-chat")["spec"]
    looked_at = {trigger["metadata"]["stream"] for trigger in scaled["triggers"]}
    assert looked_at == {keys.queue("mine", priority) for priority in keys.Priority}
    for metadata in (trigger["metadata"] for trigger in scaled["triggers"]):
        # With a group KEDA reads lag or pending entries, and takes no notice of streamLength.
        assert metadata.get("consumerGroup") == (keys.GROUP if "lagCount" in metadata else None)
        assert ("lagCount" in metadata) != ("streamLength" in metadata)
        assert "pendingEntriesCount" not in metadata
    assert scaled["minReplicaCount"] == 0
    assert all(trigger["authenticationRef"]["name"] == "kvpilot-redis" for trigger in scaled["triggers"])
    authentication = find(rendered("full"), "TriggerAuthentication", "kvpilot-redis")["spec"]["secretTargetRef"]
    assert authentication == [{"parameter": "password", "name": "kvpilot-redis", "key": "password"}]
