"""Settings of the ``kvpilot`` command: defaults, ``kvpilot.toml``, ``KVPILOT_*`` environment, flags; later ones win."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import ByteSize, Field
from pydantic_settings import SettingsConfigDict

from controller.settings import PlannerKind, SteeringMode
from kvpilot.configuration import FileSettings
from models.store import DEFAULT_MODEL

FILE_NAME = "kvpilot.toml"


class CliSettings(FileSettings):
    """What ``kvpilot.toml`` may hold.

    ``[worker]`` and ``[controller]`` tables are handed to the processes that ``kvpilot up`` starts; their keys are
    those of ``python -m workers --help`` and ``python -m controller --help``.
    """

    model_config = SettingsConfigDict(env_prefix="KVPILOT_")

    endpoint: str = Field("127.0.0.1:7450", description="host:port of the API; `up` serves there, the rest calls there")
    model: str = Field(DEFAULT_MODEL, description="name in the model store, or a folder written with a slash")
    workers: int = Field(1, ge=1, le=64, description="worker processes that `up` starts")
    redis_url: str = Field("", description="job store; empty: `up` starts an embedded one")
    state: Path | None = Field(None, description="folder for the embedded job store and the logs")
    device_budget: ByteSize | None = Field(
        None, gt=0, description="cache bytes on the device tier, shared out to the workers"
    )
    host_budget: ByteSize | None = Field(
        None, ge=0, description="cache bytes on the host tier, shared out to the workers"
    )
    threads: int = Field(0, ge=0, description="CPU threads of all workers together; 0: one per core")
    mode: SteeringMode | None = Field(
        None, description="how much is steered until an operator sets it (kept in the job store): off, advisory, active"
    )
    planner: PlannerKind | None = Field(
        None, description="who decides: rule, learned (the active bundle), auto (that if there is one, else the rule)"
    )
    worker: dict[str, Any] = Field(default_factory=dict, description="further settings of each worker")
    controller: dict[str, Any] = Field(default_factory=dict, description="further settings of the controller")


def state_folder() -> Path:
    """``$XDG_STATE_HOME/kvpilot``, else ``~/.local/state/kvpilot``: what must outlive a restart, and the logs."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".local" / "state").absolute() / "kvpilot"


def settings_file(given: Path | None = None) -> Path | None:
    """The file to read: the one given, else ``$KVPILOT_CONFIG``, else the first that exists of ``./kvpilot.toml`` and
    ``~/.config/kvpilot/kvpilot.toml`` (``$XDG_CONFIG_HOME`` is heeded); None if there is none."""
    if given is not None:
        return given
    if named := os.environ.get("KVPILOT_CONFIG"):
        return Path(named)
    shared = os.environ.get("XDG_CONFIG_HOME")
    home = Path(shared).expanduser() if shared else Path.home() / ".config"
    places = (Path(FILE_NAME), home / "kvpilot" / FILE_NAME)
    return next((place for place in places if place.is_file()), None)


def load_settings(file: Path | None = None, **flags: Any) -> CliSettings:
    """Reads the settings; flags that are None count as not given.

    Raises:
        OSError, tomllib.TOMLDecodeError, pydantic.ValidationError: as ``FileSettings.load``.
    """
    return CliSettings.load(settings_file(file), **flags)
