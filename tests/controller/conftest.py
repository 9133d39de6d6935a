"""One event loop for all tests here: grpc.aio has one poller per process, and its late events for a test's closed loop
would fail the next test."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
async def one_event_loop(anyio_backend: str) -> AsyncIterator[None]:
    yield  # noqa: PT022  # keeps the loop alive until the last test
