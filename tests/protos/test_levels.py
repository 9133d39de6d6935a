"""Following the log levels that operators order."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from kvpilot.bus import Bus
from kvpilot.levels import follow_log_levels
from kvpilot.log import LogLevel
from kvpilot.process import cancelled
from kvpilot.v1 import operator_pb2
from tests.jobs_help import until

pytestmark = pytest.mark.anyio


async def test_an_error_that_nobody_foresaw_does_not_end_the_following(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, failures, levels = bus.log_levels, [], []

    async def fails_twice() -> dict[str, operator_pb2.LogLevelOrder]:
        if len(failures) < 2:
            failures.append(True)
            raise RuntimeError("nobody foresaw this")
        return await read()

    monkeypatch.setattr(bus, "log_levels", fails_twice)
    monkeypatch.setattr("kvpilot.levels.set_level", levels.append)  # the tests' own logging stays as it is
    await bus.order_log_level(operator_pb2.LogLevelOrder(level=operator_pb2.LOG_LEVEL_DEBUG))
    with capture_logs() as logs:
        following = asyncio.create_task(follow_log_levels(bus, "w1", LogLevel.INFO, poll_s=0.01))
        try:
            await until(lambda: levels[-1:] == [LogLevel.DEBUG])
        finally:
            await cancelled(following)
    assert [entry["event"] for entry in logs if entry.get("exc_info")] == ["log levels cannot be read"]
