"""The worker's settings: defaults, TOML file, ``KVPILOT_WORKER_*`` environment, flags."""

from __future__ import annotations

import os
import socket
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from pydantic import ByteSize, Field, field_validator, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from kvpilot.bus.keys import Priority
from kvpilot.configuration import FileSettings
from kvpilot.log import LogFormat, LogLevel
from kvpilot.pipeline import parse_pipeline
from kvpilot.process import check_listen, split_address
from models import store


class KernelBackend(StrEnum):
    """Implementation of decode attention and block conversion. ``auto``: the fastest one for the device."""

    AUTO = "auto"
    CPU = "cpu"
    REFERENCE = "reference"
    TRITON = "triton"


class ModelDtype(StrEnum):
    """Dtype of weights and raw blocks. ``auto``: float32 on a CPU, bfloat16 elsewhere."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


MIB = 1 << 20


def _process_name() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


class WorkerSettings(FileSettings):
    """Settings of one worker process. Sizes are bytes; text such as ``512MiB`` is accepted."""

    model_config = SettingsConfigDict(env_prefix="KVPILOT_WORKER_")

    config: Path | None = Field(None, description="TOML file with these settings")
    name: str = Field(default_factory=_process_name, description="unique name of this process")
    model: Path = Field(..., description="directory with the model's config, tokenizer and safetensors")
    model_name: str = Field("", description="name clients ask for; empty: the directory's name")
    redis_url: str = Field("redis://127.0.0.1:6379/0", description="job store")
    controllers: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="host:port of controllers, comma-separated; every address of a name counts as one, and one of them "
        "has this worker at a time; none: the static rule steers",
    )
    device: str = Field("cpu", description="torch device")
    dtype: ModelDtype = Field(ModelDtype.AUTO, description="dtype of weights and raw blocks")
    device_budget_bytes: ByteSize = Field(ByteSize(512 * MIB), gt=0, description="cache bytes on the device tier")
    lendable_layers: int = Field(
        0,
        ge=0,
        description="most layers of the model that lend the device memory of their weights to the cache under pressure,"
        " two fewer than it has or less; a copy of these weights, and of two more layers', is kept on the host beside"
        " its budget",
    )
    host_budget_bytes: ByteSize = Field(ByteSize(1024 * MIB), ge=0, description="cache bytes on the host tier")
    disk_folder: Path = Field(
        default_factory=lambda: store.cache_folder() / "blocks",
        description="where the disk tier keeps its files; each process has a sub-folder, removed when it ends",
    )
    disk_budget_bytes: ByteSize = Field(
        ByteSize(2048 * MIB), ge=0, description="most bytes of files on the disk tier; 0: no disk tier"
    )
    session_host_s: float = Field(
        60.0,
        ge=0,
        description="how long a session's cache stays on the host tier after a turn, then it goes to disk",
    )
    session_keep_s: float = Field(
        3600.0, ge=0, description="how long a session's cache is kept at all between turns; 0: not kept"
    )
    max_running: int = Field(8, ge=1, description="most requests decoded at once")
    max_context_tokens: int = Field(0, ge=0, description="longest prompt plus answer; 0: the model's own limit")
    step_tokens: int = Field(256, ge=1, description="most tokens computed in one step, decodes first")
    kernel_backend: KernelBackend = Field(KernelBackend.AUTO, description="kernels to run")
    default_pipeline: str = Field("full", description="pipeline of requests that name none")
    report_interval_tokens: int = Field(
        16, ge=1, description="generated tokens between two reports, until a controller says otherwise"
    )
    audit_every_tokens: int = Field(
        256, ge=0, description="generated tokens between two audits of a request with a recoverable pipeline; 0: none"
    )
    audit_tokens: int = Field(
        32, ge=1, description="steps of an audit; as many as a bound is for, or measured and promised do not compare"
    )
    audit_budget: float = Field(
        0.01, ge=0, description="most time that audits may take, as a share of decoding; beyond it they are skipped"
    )
    switch_step_share: float = Field(
        0.25, ge=0, description="longest slice of a switch between two decode steps, as a share of a step's time"
    )
    switch_least_blocks: int = Field(
        256, ge=1, description="blocks that a slice of a switch may build however long they take"
    )
    threads: int = Field(0, ge=0, description="CPU threads of torch and the kernels; 0: one per core")
    lease_s: float = Field(
        10.0, ge=1, description="a worker that is silent for this long loses its jobs to another; the same everywhere"
    )
    health_listen: str = Field("127.0.0.1:0", description="host:port of the health service; port 0 takes a free one")
    metrics_listen: str = Field(
        "",
        description="host:port to serve Prometheus' metrics on, over HTTP; port 0 takes a free one, which the ready"
        " file tells; empty: not served",
    )
    reconnect_min_ms: float = Field(
        100.0, gt=0, description="first wait before controllers are tried again where none took the worker on"
    )
    reconnect_max_ms: float = Field(2000.0, gt=0, description="longest such wait, milliseconds")
    connect_timeout_ms: float = Field(
        1000.0, gt=0, description="longest wait for a connection to a controller, milliseconds"
    )
    balance_s: float = Field(
        5.0,
        ge=0,
        description="time between two looks for a controller that has fewer workers, to move there; 0: never, seconds",
    )
    welcome_timeout_ms: float = Field(5000.0, gt=0, description="longest wait for a controller's Welcome")
    drain_timeout_s: float = Field(
        20.0,
        ge=0,
        description="time that running jobs get to finish after SIGTERM; the rest is handed over to other workers, and "
        "all at once by a second SIGTERM, seconds. With stop_timeout_s it must fit an orchestrator's grace period",
    )
    stop_timeout_s: float = Field(5.0, ge=0, description="time the step at work gets to end on shutdown, seconds")
    ready_file: Path | None = Field(
        None,
        description="file to write the health service's host:port to once serving; below it `metrics=` and theirs, if"
        " they are served",
    )
    log_level: LogLevel = Field(LogLevel.INFO, description="least severe events that are logged")
    log_format: LogFormat = Field(LogFormat.AUTO, description="console, json, or auto by terminal")

    @field_validator("controllers", mode="before")
    @classmethod
    def _split_controllers(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("controllers")
    @classmethod
    def _are_addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for address in value:
            split_address(address)
        return value

    @field_validator("health_listen")
    @classmethod
    def _is_address(cls, value: str) -> str:
        split_address(value)
        return value

    @field_validator("metrics_listen")
    @classmethod
    def _is_address_or_empty(cls, value: str) -> str:
        return check_listen(value)

    @field_validator("default_pipeline")
    @classmethod
    def _pipeline_parses(cls, value: str) -> str:
        parse_pipeline(value)
        return value

    @model_validator(mode="after")
    def _name_is_no_queue_of_another(self) -> WorkerSettings:
        for priority in Priority:
            if priority.suffix and self.served_name.endswith(priority.suffix):
                raise ValueError(
                    f"model_name {self.served_name!r}: a name that does not end in {priority.suffix!r} is needed, or"
                    " its jobs would share a queue with another model's"
                )
        return self

    @model_validator(mode="after")
    def _a_step_holds_every_decode(self) -> WorkerSettings:
        if self.step_tokens <= self.max_running:
            raise ValueError(
                f"step_tokens {self.step_tokens}: more than max_running {self.max_running} is needed, or full batches"
                " would leave no token for prompts"
            )
        return self

    @model_validator(mode="after")
    def _audits_do_not_overlap(self) -> WorkerSettings:
        if 0 < self.audit_every_tokens < self.audit_tokens:
            raise ValueError(
                f"audit_every_tokens {self.audit_every_tokens}: 0, or audit_tokens ({self.audit_tokens}) or more"
            )
        return self

    @property
    def served_name(self) -> str:
        """Name of the model for clients."""
        return self.model_name or self.model.name
