"""The controller's settings: defaults, TOML file, ``KVPILOT_CONTROLLER_*`` environment, flags."""

from __future__ import annotations

import os
import socket
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from kvpilot.configuration import FileSettings
from kvpilot.log import LogFormat, LogLevel
from kvpilot.process import check_listen, split_address


class Role(StrEnum):
    """A service of the controller program."""

    GENERATION = "generation"
    STEERING = "steering"
    OPERATOR = "operator"


class SteeringMode(StrEnum):
    """How much is steered; see ``operator.proto``'s Mode."""

    OFF = "off"
    ADVISORY = "advisory"
    ACTIVE = "active"


class PlannerKind(StrEnum):
    """Who decides."""

    RULE = "rule"
    LEARNED = "learned"
    AUTO = "auto"


def _process_name() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


class ControllerSettings(FileSettings):
    """Settings of one controller process."""

    model_config = SettingsConfigDict(env_prefix="KVPILOT_CONTROLLER_")

    config: Path | None = Field(None, description="TOML file with these settings")
    name: str = Field(default_factory=_process_name, description="unique name of this process")
    listen: str = Field("127.0.0.1:7450", description="host:port to serve gRPC on; port 0 takes a free one")
    advertise: str = Field(
        "",
        description="host:port at which the other controllers of the job store reach this one; empty: that of listen, "
        "or this machine's name where it listens everywhere",
    )
    roles: Annotated[frozenset[Role], NoDecode] = Field(
        frozenset(Role), description="services to run, comma-separated: generation, steering, operator"
    )
    redis_url: str = Field(
        "redis://127.0.0.1:6379/0",
        description="job store; it also keeps overrides and the mode. Empty: none, for roles without generation; what "
        "operators set is then forgotten when the process ends",
    )
    mode: SteeringMode = Field(
        SteeringMode.ACTIVE,
        description="how much is steered until an operator sets it; a mode set by SetMode is kept in the job store and "
        "wins over this one at every later start",
    )
    tick_ms: float = Field(
        100.0,
        gt=0,
        description="time between two looks for what waits; without news a plan is made at every tenth, milliseconds",
    )
    coalesce_ms: float = Field(5.0, ge=0, description="wait for more reports before a plan, milliseconds")
    report_interval_tokens: int = Field(16, ge=1, description="generated tokens between two reports of a request")
    planner: PlannerKind = Field(
        PlannerKind.AUTO,
        description="who decides: rule; learned, the active bundle, and while there is none the rule, saying so; auto, "
        "the active bundle if there is one, else the rule",
    )
    bundle_store: str = Field(
        "",
        description="where bundles are, beside those that come with kvpilot: a folder or an fsspec URL such as "
        "s3://bucket/prefix; empty: `bundles` in the cache folder",
    )
    dwell_tokens: int = Field(32, ge=0, description="generated tokens between two switches of a request")
    switch_margin: float = Field(
        0.05,
        ge=0,
        description="cost that a learned switch must gain; a full cache costs the sum of a request's two weights",
    )
    bundle_poll_s: float = Field(
        5.0, gt=0, description="longest time until a new active bundle is noticed if its notice was lost, seconds"
    )
    guard_error: float = Field(
        1e-3,
        gt=0,
        lt=1,
        description="probability that a bundle which keeps its bounds is taken for one that breaks them, over its "
        "whole time in force",
    )
    guard_least_audits: int = Field(50, ge=1, description="audits of a bundle before it can be taken for one")
    guard_rollback: bool = Field(
        True,
        description="whether a bundle that breaks its bounds is rolled back; false: that is logged and counted alone",
    )
    default_pipeline: str = Field("", description="pipeline of new requests that name none; empty: the worker's own")
    nack_backoff_ms: float = Field(
        1000.0, gt=0, description="wait before a refused pipeline is tried again, doubling each time, milliseconds"
    )
    nack_backoff_max_ms: float = Field(30_000.0, gt=0, description="longest such wait, milliseconds")
    override_timeout_ms: float = Field(
        10_000.0, gt=0, description="longest wait for a worker's answer to an operator's override, milliseconds"
    )
    metrics_listen: str = Field(
        "",
        description="host:port to serve Prometheus' metrics on, over HTTP; port 0 takes a free one, which the ready"
        " file tells; empty: not served",
    )
    max_queued: int = Field(1024, ge=1, description="waiting jobs of a model beyond which new ones are refused")
    grace_s: float = Field(5.0, ge=0, description="time that calls get to end by themselves on shutdown, seconds")
    max_concurrent_calls: int = Field(10_000, ge=1, description="calls beyond this are refused, RESOURCE_EXHAUSTED")
    ready_file: Path | None = Field(
        None,
        description="file to write host:port to once calls are served; below it `metrics=` and theirs, if they are"
        " served",
    )
    log_level: LogLevel = Field(LogLevel.INFO, description="least severe events that are logged")
    log_format: LogFormat = Field(LogFormat.AUTO, description="console, json, or auto by terminal")

    @field_validator("listen")
    @classmethod
    def _is_address(cls, value: str) -> str:
        split_address(value)
        return value

    @field_validator("advertise", "metrics_listen")
    @classmethod
    def _is_address_or_empty(cls, value: str) -> str:
        return check_listen(value)

    @field_validator("roles", mode="before")
    @classmethod
    def _split_roles(cls, value: object) -> object:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    @field_validator("roles")
    @classmethod
    def _some_role(cls, value: frozenset[Role]) -> frozenset[Role]:
        if not value:
            raise ValueError("at least one of generation, steering, operator is needed")
        if Role.OPERATOR in value and Role.STEERING not in value:
            raise ValueError("role operator needs role steering in the same process: it acts on its streams")
        return value

    @model_validator(mode="after")
    def _store_for_generation(self) -> Self:
        if Role.GENERATION in self.roles and not self.redis_url:
            raise ValueError("role generation needs a redis_url: jobs live in the job store")
        return self
