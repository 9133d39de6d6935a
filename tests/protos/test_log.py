"""The logging setup: one line an event, JSON for machines, ids bound once on all of them."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Iterator

import pytest
import structlog
from opentelemetry import context as contexts

from kvpilot.log import LogFormat, LogLevel, configure_logging, set_level
from kvpilot.tracing import context_of, trace_id_of


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


@pytest.mark.parametrize("log_format", [LogFormat.JSON, LogFormat.CONSOLE])
def test_tracebacks_show_no_variables(log_format: LogFormat) -> None:
    """There are passwords in them, in URLs of the job store, and prompts."""

    def connect(url: str) -> None:
        raise ConnectionError("refused")

    out = io.StringIO()
    configure_logging(LogLevel.INFO, log_format, out)
    try:
        connect("redis://user:" + "hush".upper() + "@store")
    except ConnectionError:
        structlog.get_logger().exception("failed")
        logging.getLogger("foreign").exception("failed too")
    assert out.getvalue().count("in connect") == 2 or out.getvalue().count('"name": "connect"') == 2
    assert "HUSH" not in out.getvalue()


def test_a_second_call_replaces_the_first() -> None:
    first, second = io.StringIO(), io.StringIO()
    configure_logging(LogLevel.INFO, LogFormat.CONSOLE, first)
    configure_logging(LogLevel.INFO, LogFormat.CONSOLE, second)
    structlog.get_logger().info("hello", answer=42)
    assert first.getvalue() == ""
    assert "answer=42" in second.getvalue()


def test_names_of_the_process_are_on_every_line_of_every_thread() -> None:
    out = io.StringIO()
    configure_logging(LogLevel.INFO, LogFormat.JSON, out, process="worker-0", worker="worker-0")
    threads = [
        threading.Thread(target=lambda: structlog.get_logger().info("ours", request="job-1")),
        threading.Thread(target=lambda: logging.getLogger("grpc").warning("foreign")),
    ]
    for thread in threads:  # a thread does not inherit what is bound in its starter's context
        thread.start()
        thread.join()
    structlog.get_logger().info("said of another", worker="worker-1")
    ours, foreign, other = (json.loads(line) for line in out.getvalue().splitlines())
    assert (ours["process"], ours["worker"], ours["request"]) == ("worker-0", "worker-0", "job-1")
    assert (foreign["process"], foreign["worker"]) == ("worker-0", "worker-0")
    assert (other["process"], other["worker"]) == ("worker-0", "worker-1")


def test_lines_within_a_span_name_its_trace() -> None:
    out = io.StringIO()
    configure_logging(LogLevel.INFO, LogFormat.JSON, out)
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    token = contexts.attach(context_of(traceparent))
    try:
        structlog.get_logger().info("within")
        structlog.get_logger().info("of another", trace_id="1" * 32)
    finally:
        contexts.detach(token)
    structlog.get_logger().info("outside")
    within, other, outside = (json.loads(line) for line in out.getvalue().splitlines())
    assert within["trace_id"] == trace_id_of(traceparent) == "0af7651916cd43dd8448eb211c80319c"
    assert within["span_id"] == "b7ad6b7169203331"
    assert other["trace_id"] == "1" * 32
    assert "trace_id" not in outside


def test_the_level_changes_while_loggers_are_in_use() -> None:
    out = io.StringIO()
    configure_logging(LogLevel.WARNING, LogFormat.JSON, out)
    log = structlog.get_logger("kvpilot").bind(request="job-1")
    for level in (LogLevel.WARNING, LogLevel.DEBUG, LogLevel.ERROR):
        set_level(level)
        log.debug(f"debug at {level}")
        logging.getLogger("grpc").warning(f"warning at {level}")
    assert [json.loads(line)["event"] for line in out.getvalue().splitlines()] == [
        "warning at warning",
        "debug at debug",
        "warning at debug",
    ]
