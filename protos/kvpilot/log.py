"""Logging of every kvpilot process: structlog events, also for the standard loggers of grpc and asyncio.

Events are one line each: coloured columns on a terminal, JSON otherwise. What the whole process is called is on every
line of it, and so is the trace of the span under way. Bind other ids once and they are on every line::

    log = structlog.get_logger().bind(worker="w0")
    log.info("directive", request="job-1", to_pipeline="kivi(bits=4)")
"""

from __future__ import annotations

import logging
import sys
from enum import StrEnum
from typing import TextIO

import structlog
from opentelemetry import trace
from structlog.types import EventDict, Processor


class LogLevel(StrEnum):
    """Least severe events that are written."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(StrEnum):
    """How an event is spelled. ``auto``: ``console`` on a terminal, ``json`` otherwise."""

    AUTO = "auto"
    CONSOLE = "console"
    JSON = "json"


def configure_logging(
    level: LogLevel = LogLevel.INFO,
    log_format: LogFormat = LogFormat.AUTO,
    stream: TextIO | None = None,
    **names: str,
) -> None:
    """Sets up structlog and the standard library's root logger to write to ``stream`` (default: stderr).

    May be called again; the last call holds. ``names``, and context bound with ``structlog.contextvars``, are on every
    event, also on those of foreign loggers; ``names`` whichever thread it comes from.
    """
    out = sys.stderr if stream is None else stream

    def add_names(logger: object, method: str, event: EventDict) -> EventDict:
        return {**event, **{name: value for name, value in names.items() if name not in event}}

    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        add_names,
        _add_trace,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    console = log_format is LogFormat.CONSOLE or (log_format is LogFormat.AUTO and out.isatty())
    final: list[Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if console:
        final.append(
            structlog.dev.ConsoleRenderer(colors=out.isatty(), exception_formatter=structlog.dev.plain_traceback)
        )
    else:
        final += [_dict_tracebacks, structlog.processors.JSONRenderer()]

    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name], processors=final
        )
    )
    root = logging.getLogger()
    for old in list(root.handlers):
        if getattr(old, "kvpilot", False):
            root.removeHandler(old)
    handler.kvpilot = True  # type: ignore[attr-defined]  # marks ours, so that a second call replaces only it
    root.addHandler(handler)
    set_level(level)

    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.processors.StackInfoRenderer(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


def set_level(level: LogLevel) -> None:
    """From now on events less severe than this are not written."""
    logging.getLogger().setLevel(level.value.upper())


# Tracebacks in neither format show local variables: they hold URLs with passwords, and what clients wrote.
_dict_tracebacks = structlog.processors.ExceptionRenderer(
    structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
)


def _add_trace(logger: object, method: str, event: EventDict) -> EventDict:
    """Names the trace of the span under way, unless the event names one."""
    under_way = trace.get_current_span().get_span_context()
    if under_way.is_valid and "trace_id" not in event:
        event["trace_id"] = trace.format_trace_id(under_way.trace_id)
        event["span_id"] = trace.format_span_id(under_way.span_id)
    return event
