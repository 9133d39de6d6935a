"""What every kvpilot process does at its edges: wait for the job store, say where it serves, stop when asked to."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import structlog

from kvpilot.bus import Bus, BusSettings, BusUnavailableError

log = structlog.get_logger(__name__)


def write_ready_file(path: Path, address: str) -> None:
    """Writes ``host:port`` to a file, whole or not at all: a reader never sees half of it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(f"{address}\n", encoding="utf-8")
    partial.replace(path)


@contextlib.contextmanager
def stop_on_signals(hurry: asyncio.Event | None = None) -> Iterator[asyncio.Event]:
    """An event that SIGTERM or SIGINT sets.

    The second of them sets ``hurry``. Whatever was set before, one more signal of the kind ends the process at once.
    """
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()

    def ask(number: signal.Signals) -> None:
        if hurry is not None and asked.is_set():
            hurry.set()
        asked.set()
        if hurry is None or hurry.is_set():
            loop.remove_signal_handler(number)  # back to the default action

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ask, number)
    try:
        yield asked
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def split_address(address: str) -> tuple[str, int]:
    """``host:port`` in parts; an IPv6 host keeps its brackets.

    Raises:
        ValueError: not of that form, or a port beyond 65535.
    """
    host, colon, port = address.rpartition(":")
    if not host or not colon or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"address {address!r}: expected host:port with a port from 0 to 65535")
    return host, int(port)


async def connect_bus(url: str, stop: asyncio.Event, settings: BusSettings | None = None) -> Bus | None:
    """Connects to the job store, waiting for it where it is not there yet; None if ``stop`` was set meanwhile."""
    wait_s = 0.1
    while not stop.is_set():
        try:
            return await Bus.connect(url, settings)
        except BusUnavailableError as error:
            log.warning("waiting for the job store", error=str(error))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await stop.wait()
        wait_s = min(2.0, 2 * wait_s)
    return None
