"""kvpilot's public Python face.

>>> import kvpilot
>>> with kvpilot.Client("localhost:7450") as client:  # doctest: +SKIP
...     for event in client.generate("Hello", max_tokens=32, pipeline="snapkv(keep=0.5)"):
...         print(event.text, end="")

Names are brought in when first used: importing the package alone loads neither gRPC nor anything of the workers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvpilot.client import AsyncClient, Client, JobView, Settings
    from kvpilot.errors import (
        AlreadyExists,
        Cancelled,
        DeadlineExceeded,
        FailedPrecondition,
        Internal,
        InvalidArgument,
        KvpilotError,
        NotFound,
        OutOfRange,
        PermissionDenied,
        ResourceExhausted,
        Unauthenticated,
        Unavailable,
    )
    from kvpilot.event import Event
    from kvpilot.pipeline import PipelineError, StageSpec, format_pipeline, parse_pipeline
    from kvpilot.result import FinishReason, JobState, Result, TokenLogprob

__all__ = [
    "AlreadyExists",
    "AsyncClient",
    "Cancelled",
    "Client",
    "DeadlineExceeded",
    "Event",
    "FailedPrecondition",
    "FinishReason",
    "Internal",
    "InvalidArgument",
    "JobState",
    "JobView",
    "KvpilotError",
    "NotFound",
    "OutOfRange",
    "PermissionDenied",
    "PipelineError",
    "ResourceExhausted",
    "Result",
    "Settings",
    "StageSpec",
    "TokenLogprob",
    "Unauthenticated",
    "Unavailable",
    "format_pipeline",
    "parse_pipeline",
]

_HOMES = {
    "kvpilot.client": ("AsyncClient", "Client", "JobView", "Settings"),
    "kvpilot.event": ("Event",),
    "kvpilot.pipeline": ("PipelineError", "StageSpec", "format_pipeline", "parse_pipeline"),
    "kvpilot.result": ("FinishReason", "JobState", "Result", "TokenLogprob"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'kvpilot' has no attribute {name!r}")
    value = getattr(import_module(_HOME.get(name, "kvpilot.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
