"""``kvpilot log-level``: from which level on processes log, while they run."""

from __future__ import annotations

import re
from datetime import UTC

from cli.connection import operator_stub
from cli.errors import BadInputError
from cli.operate import CALL_TIMEOUT_S
from kvpilot.v1 import operator_pb2

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def show_levels(endpoint: str) -> str:
    """The orders that hold, a line each."""
    with operator_stub(endpoint) as stub:
        orders = stub.ListLogLevels(operator_pb2.ListLogLevelsRequest(), timeout=CALL_TIMEOUT_S).orders
    return "\n".join(map(_line, orders)) or "every process logs as it was configured"


def _line(order: operator_pb2.LogLevelOrder) -> str:
    until = ""
    if order.HasField("until"):
        until = f" until {order.until.ToDatetime(UTC).astimezone():%Y-%m-%d %H:%M:%S}"
    return f"{order.process or 'all'}: {_word(order.level)}{until}"


def set_level(endpoint: str, word: str, process: str, duration: str) -> str:
    """Orders a level; says what was ordered.

    Raises:
        BadInputError: a duration that is none.
    """
    level = operator_pb2.LogLevel.Value(f"LOG_LEVEL_{word.upper()}")
    request = operator_pb2.SetLogLevelRequest(level=level, process=process, duration_ms=_milliseconds(duration))
    with operator_stub(endpoint) as stub:
        stub.SetLogLevel(request, timeout=CALL_TIMEOUT_S)
    return f"{process or 'all'}: {word}{f' for {duration}' if duration else ''}"


def _milliseconds(duration: str) -> int:
    if not duration:
        return 0
    found = re.fullmatch(r"(\d+)([smhd])", duration)
    if found is None or not int(found[1]):
        raise BadInputError(f"--for {duration!r}: expected a number and s, m, h or d, e.g. 10m")
    return int(found[1]) * _UNITS_S[found[2]] * 1000


def _word(level: operator_pb2.LogLevel) -> str:
    return str(operator_pb2.LogLevel.Name(level)).removeprefix("LOG_LEVEL_").lower()
