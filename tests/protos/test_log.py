"""The logging setup: one line an event, JSON for machines, ids bound once on all of them."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from kvpilot.log import LogFormat, LogLevel, configure_logging


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    level = root.level
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    root.setLevel(level)
    for handler in [one for one in root.handlers if getattr(one, "kvpilot", False)]:
        root.removeHandler(handler)


def test_events_of_both_kinds_of_loggers_are_json_lines_with_bound_ids() -> None:
    out = io.StringIO()
    configure_logging(LogLevel.INFO, LogFormat.JSON, out)
    structlog.contextvars.bind_contextvars(process="c0")
    structlog.get_logger().info("decision", request="job-1")
    logging.getLogger("grpc").warning("transport %s", "closed")
    structlog.get_logger().debug("too fine")
    ours, foreign = (json.loads(line) for line in out.getvalue().splitlines())
    assert (ours["event"], ours["request"], ours["process"], ours["level"]) == ("decision", "job-1", "c0", "info")
    assert (foreign["event"], foreign["logger"], foreign["process"]) == ("transport closed", "grpc", "c0")


def test_exceptions_stay_on_one_line() -> None:
    out = io.StringIO()
    configure_logging(LogLevel.INFO, LogFormat.AUTO, out)  # no terminal: JSON
    try:
        raise ValueError("bad")
    except ValueError:
        structlog.get_logger().exception("failed")
        logging.getLogger("foreign").exception("failed too")
    for line in out.getvalue().splitlines():
        assert json.loads(line)["exception"][0]["exc_value"] == "bad"


def test_a_second_call_replaces_the_first() -> None:
    first, second = io.StringIO(), io.StringIO()
    configure_logging(LogLevel.INFO, LogFormat.CONSOLE, first)
    configure_logging(LogLevel.INFO, LogFormat.CONSOLE, second)
    structlog.get_logger().info("hello", answer=42)
    assert first.getvalue() == ""
    assert "answer=42" in second.getvalue()
