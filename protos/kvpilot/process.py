"""What every kvpilot process does at its edges: wait for the job store, say where it serves, stop when asked to."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import structlog

from kvpilot.bus import Bus, BusSettings, BusUnavailableError

log = structlog.get_logger(__name__)


METRICS_LINE = "metrics="


@dataclass(frozen=True)
class Ready:
    """What a process says of itself once it serves: ``host:port`` of its service, and of its metrics if they are."""

    address: str
    metrics: str = ""


def write_ready_file(path: Path, ready: Ready) -> None:
    """Writes these to a file, a line each, whole or not at all: a reader never sees half of it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    lines = [ready.address, *([f"{METRICS_LINE}{ready.metrics}"] if ready.metrics else [])]
    partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    partial.replace(path)


def read_ready_file(path: Path) -> Ready | None:
    """What a process wrote; None: nothing yet."""
    try:
        address, *others = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    found = [line.removeprefix(METRICS_LINE) for line in others if line.startswith(METRICS_LINE)]
    return Ready(address, *found[:1])


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


async def cancelled(task: asyncio.Task[None]) -> None:
    """Ends a task that nothing else ends."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def check_listen(value: str) -> str:
    """A setting that is an address or empty.

    Raises:
        ValueError: it is neither.
    """
    if value:
        split_address(value)
    return value


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
