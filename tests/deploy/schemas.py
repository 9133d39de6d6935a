"""Schemas of Kubernetes' objects and of the common custom ones, all closed: a key that is not known is an error."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any

import jsonschema
import kubernetes_validate
import kubernetes_validate.utils
import yaml

from tests.deploy.rendering import Object, name_of

VERSIONS = ("1.35.0", "1.36.0", "1.37.0")
"""Minor versions of Kubernetes that the chart is held to."""

MODELS = {
    ("keda.sh/v1alpha1", "ScaledObject"): "cloudcoil.models.keda.v1alpha1",
    ("keda.sh/v1alpha1", "TriggerAuthentication"): "cloudcoil.models.keda.v1alpha1",
    ("monitoring.coreos.com/v1", "PodMonitor"): "cloudcoil.models.prometheus_operator.v1",
    ("monitoring.coreos.com/v1", "ServiceMonitor"): "cloudcoil.models.prometheus_operator.v1",
    ("monitoring.coreos.com/v1", "PrometheusRule"): "cloudcoil.models.prometheus_operator.v1",
    ("cert-manager.io/v1", "Certificate"): "cloudcoil.models.cert_manager.v1",
}
"""Modules with pydantic models made of the custom resources' definitions."""

# No package of Python's index has Gateway API's definitions. What we use of them, as the specification (v1) says:
# https://gateway-api.sigs.k8s.io/reference/spec/
_GATEWAY_API = """
GRPCRoute:
  type: object
  required: [parentRefs, rules]
  additionalProperties: false
  properties:
    hostnames: {type: array, maxItems: 16, items: {type: string, minLength: 1}}
    parentRefs:
      type: array
      minItems: 1
      maxItems: 32
      items:
        type: object
        required: [name]
        additionalProperties: false
        properties:
          group: {type: string}
          kind: {type: string}
          namespace: {type: string, minLength: 1}
          name: {type: string, minLength: 1}
          sectionName: {type: string, minLength: 1}
          port: {type: integer, minimum: 1, maximum: 65535}
    rules:
      type: array
      minItems: 1
      maxItems: 16
      items:
        type: object
        additionalProperties: false
        properties:
          matches:
            type: array
            items:
              type: object
              additionalProperties: false
              properties:
                method:
                  type: object
                  additionalProperties: false
                  anyOf: [{required: [service]}, {required: [method]}]
                  properties:
                    type: {enum: [Exact, RegularExpression]}
                    service: {type: string, pattern: '^[A-Za-z_][A-Za-z0-9_]*([.][A-Za-z_][A-Za-z0-9_]*)*$'}
                    method: {type: string}
          backendRefs:
            type: array
            items:
              type: object
              required: [name, port]
              additionalProperties: false
              properties:
                name: {type: string, minLength: 1}
                port: {type: integer, minimum: 1, maximum: 65535}
                weight: {type: integer, minimum: 0}
Gateway:
  type: object
  required: [gatewayClassName, listeners]
  additionalProperties: false
  properties:
    gatewayClassName: {type: string, minLength: 1}
    listeners:
      type: array
      minItems: 1
      items:
        type: object
        required: [name, port, protocol]
        additionalProperties: false
        properties:
          name: {type: string, minLength: 1}
          hostname: {type: string, minLength: 1}
          port: {type: integer, minimum: 1, maximum: 65535}
          protocol: {enum: [HTTP, HTTPS, TLS, TCP, UDP]}
          tls:
            type: object
            additionalProperties: false
            properties:
              mode: {enum: [Terminate, Passthrough]}
              certificateRefs:
                type: array
                items:
                  type: object
                  required: [name]
                  additionalProperties: false
                  properties: {name: {type: string, minLength: 1}, namespace: {type: string}}
          allowedRoutes:
            type: object
            additionalProperties: false
            properties:
              namespaces:
                type: object
                additionalProperties: false
                properties: {from: {enum: [All, Selector, Same]}, selector: {type: object}}
"""


def problems(each: Object, version: str) -> list[str]:
    """What is wrong with an object, in the words of its schema."""
    return [f"{name_of(each)}: {problem}" for problem in _problems(each, version)]


def _problems(each: Object, version: str) -> Iterator[str]:
    group = each["apiVersion"].partition("/")[0]
    if group == "gateway.networking.k8s.io":
        schema = yaml.safe_load(_GATEWAY_API)[each["kind"]]
        yield from _against(schema, each["spec"])
    elif "." in group and not group.endswith(".k8s.io"):
        yield from _against(_custom(each["apiVersion"], each["kind"]), each)
    else:
        try:
            used = kubernetes_validate.validate(each, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{'.'.join(map(str, error.path))}: {error.message}"
        else:
            assert version.startswith(used), f"there are no schemas for {version}"


def _against(schema: dict[str, Any], instance: Any) -> Iterator[str]:
    for error in jsonschema.Draft202012Validator(schema).iter_errors(instance):
        yield f"{'.'.join(map(str, error.path))}: {error.message}"


@cache
def _custom(api_version: str, kind: str) -> dict[str, Any]:
    model = getattr(import_module(MODELS[api_version, kind]), kind)
    schema: dict[str, Any] = model.model_json_schema(by_alias=True)
    _close(schema)
    return schema


def _close(schema: Any) -> None:
    """Refuses what the definitions do not name: the models themselves would pass it over."""
    if isinstance(schema, dict):
        if "properties" in schema and schema.get("type") == "object":
            schema.setdefault("additionalProperties", False)
        for part in schema.values():
            _close(part)
    elif isinstance(schema, list):
        for part in schema:
            _close(part)


# Each call of the library reads definitions of several megabytes anew.
kubernetes_validate.utils.schema_contents = cache(kubernetes_validate.utils.schema_contents)
