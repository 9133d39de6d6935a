"""Every object that the chart makes is one that Kubernetes knows, to the last key."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.deploy.rendering import VALUE_SETS, Object, find, of_kind, rendered
from tests.deploy.schemas import MODELS, VERSIONS, problems


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("values", VALUE_SETS)
def test_every_object_is_valid(values: str, version: str) -> None:
    assert [problem for each in rendered(values) for problem in problems(each, version)] == []


def test_all_that_can_be_switched_on_is_validated() -> None:
    kinds = {(each["apiVersion"], each["kind"]) for values in VALUE_SETS for each in rendered(values)}
    assert set(MODELS) <= kinds
    assert {("gateway.networking.k8s.io/v1", kind) for kind in ("Gateway", "GRPCRoute")} <= kinds


def _misspell_replicas(objects: list[Object]) -> Object:
    deployment = find(objects, "Deployment", "kvpilot-steering")
    deployment["spec"]["replcas"] = deployment["spec"].pop("replicas")
    return deployment


def _misspell_trigger(objects: list[Object]) -> Object:
    (scaled, *_) = of_kind(objects, "ScaledObject")
    scaled["spec"]["triggers"][0]["metdata"] = {}
    return scaled


def _wrong_type(objects: list[Object]) -> Object:
    (monitor,) = of_kind(objects, "PodMonitor")
    monitor["spec"]["podMetricsEndpoints"][0]["interval"] = 15
    return monitor


def _misspell_certificate(objects: list[Object]) -> Object:
    (certificate,) = of_kind(objects, "Certificate")
    certificate["spec"]["issuerRef"]["nam"] = "x"
    return certificate


def _misspell_match(objects: list[Object]) -> Object:
    (route, *_) = of_kind(objects, "GRPCRoute")
    route["spec"]["rules"][0]["matches"][0]["methods"] = {}
    return route


def _misspell_probe(objects: list[Object]) -> Object:
    deployment = find(objects, "Deployment", "kvpilot-generation")
    deployment["spec"]["template"]["spec"]["containers"][0]["livenessProbe"]["grpc"]["servce"] = ""
    return deployment


@pytest.mark.parametrize(
    "spoil",
    [_misspell_replicas, _misspell_trigger, _wrong_type, _misspell_certificate, _misspell_match, _misspell_probe],
)
def test_a_mistake_is_found(spoil: Callable[[list[Object]], Object]) -> None:
    assert problems(spoil(rendered("full")), VERSIONS[-1]) != []
