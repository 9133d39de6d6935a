"""From settings to the settings of each process: budgets and threads shared out, everything checked before a start."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cli.settings import CliSettings
from controller.settings import ControllerSettings
from kvpilot.configuration import FileSettings
from models import store
from workers.settings import WorkerSettings

DEVICE_BUDGET_BYTES = 512 << 20
HOST_BUDGET_BYTES = 1024 << 20
DISK_BUDGET_BYTES = 2048 << 20
METRICS_LISTEN = "127.0.0.1:0"
"""A free port for each process: a second stack on the machine is not in the way."""
CONTROLLER_PREFIX = str(ControllerSettings.model_config["env_prefix"])
WORKER_PREFIX = str(WorkerSettings.model_config["env_prefix"])


@dataclass(frozen=True)
class StackPlan:
    """The processes of one stack; the environments are complete but for addresses learnt at the start."""

    controller: dict[str, str]
    workers: tuple[dict[str, str], ...]


def plan_stack(settings: CliSettings) -> StackPlan:
    """Shares budgets and threads out and checks every process's settings.

    A value in ``[worker]`` or ``[controller]`` replaces the share computed here, the process's own environment
    variable replaces both, and a flag of the command replaces all.

    Raises:
        ModelNotFoundError: the model is not there.
        pydantic.ValidationError: a key is unknown or a value not accepted.
    """
    model = store.resolve(settings.model)
    count = settings.workers
    device, host = settings.device_budget, settings.host_budget
    memory = memory_bytes()
    share: dict[str, object] = {
        "device_budget_bytes": (device or min(DEVICE_BUDGET_BYTES, memory // 8)) // count,
        "host_budget_bytes": (min(HOST_BUDGET_BYTES, memory // 4) if host is None else host) // count,
        "disk_budget_bytes": DISK_BUDGET_BYTES // count,
        "threads": max(1, (settings.threads or os.cpu_count() or 1) // count),
        "log_format": "console",
        "metrics_listen": METRICS_LISTEN,
    }
    asked = {"device_budget_bytes": device, "host_budget_bytes": host, "threads": settings.threads or None}
    fixed = {name: share[name] for name, value in asked.items() if value is not None}
    workers = tuple(
        _environment(
            WorkerSettings,
            defaults=share | {"drain_timeout_s": 0},  # all workers stop together: nobody would take over
            table=settings.worker,
            fixed=fixed | {"name": f"worker-{number}", "model": model, "model_name": store.model_name(model)},
        )
        for number in range(count)
    )
    own = {"listen": settings.endpoint} | ({"mode": settings.mode.value} if settings.mode else {})
    own |= {"planner": settings.planner.value} if settings.planner else {}
    controller = _environment(
        ControllerSettings,
        defaults={"log_format": "console", "metrics_listen": METRICS_LISTEN},
        table=settings.controller,
        fixed=own | {"name": "controller"},
    )
    return StackPlan(controller, workers)


def _environment(
    kind: type[FileSettings], defaults: Mapping[str, object], table: Mapping[str, object], fixed: Mapping[str, object]
) -> dict[str, str]:
    prefix = str(kind.model_config["env_prefix"])
    values = {**defaults, **table}
    for name in kind.model_fields:
        if (given := os.environ.get(f"{prefix}{name.upper()}")) is not None:
            values[name] = given
    values.update(fixed)
    kind.model_validate(values)
    return {f"{prefix}{name.upper()}": _spell(value) for name, value in values.items()}


def _spell(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Path | str):
        return str(value)
    if isinstance(value, Sequence):
        return ",".join(str(part) for part in value)
    return str(value)


def memory_bytes() -> int:
    """Physical memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
