"""One supervised process: start it, know when it is ready, stop it politely and then less so."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from cli import tether
from kvpilot.process import read_ready_file

READY_POLL_S = 0.05
TAIL_LINES = 15


class ChildError(Exception):
    """A process could not be started or did not become ready; ``str(error)`` ends with its last log lines."""


class Child:
    """A process with a log file, tied to this one: it does not outlive us (see ``cli.tether``).

    Args:
        name: for people, e.g. ``worker-0``.
        command: program and arguments.
        log: file its output is appended to; None: it writes to our own output.
        environment: added to ours.
        ready_file: file it writes its address to once it serves.
        probe: for a program that writes no such file: gives its address once it serves, ``""`` before.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path | None,
        environment: Mapping[str, str],
        ready_file: Path,
        probe: Callable[[], Awaitable[str]] | None = None,
    ) -> None:
        self.name = name
        self.command = tuple(command)
        self.log = log
        self.environment = dict(environment)
        self.ready_file = ready_file
        self._probe = probe or self._read_ready_file
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """Its process id; None before the first start."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Starts it. Call from the main thread: the kernel ties the child to the thread that starts it."""
        self.ready_file.unlink(missing_ok=True)
        command = [sys.executable, "-IS", tether.__file__, str(os.getpid()), *self.command]
        with contextlib.ExitStack() as stack:
            output = None if self.log is None else stack.enter_context(self.log.open("ab"))
            self._process = await asyncio.create_subprocess_exec(
                *command,
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # a terminal's Ctrl-C is for us: we stop the children, in order
            )

    async def ready(self, timeout_s: float) -> str:
        """Waits until it serves and returns its address.

        Raises:
            ChildError: if it ends before, or takes longer.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while not (address := await self._probe()):
                    if self._running.returncode is not None:
                        raise ChildError(f"{self.name} {self.describe_exit()} before it was ready{self.log_tail()}")
                    await asyncio.sleep(READY_POLL_S)
        except TimeoutError:
            raise ChildError(f"{self.name} was not ready after {timeout_s:.0f} s{self.log_tail()}") from None
        return address

    async def _read_ready_file(self) -> str:
        ready = read_ready_file(self.ready_file)
        return ready.address if ready else ""

    @property
    def metrics(self) -> str:
        """``host:port`` of its metrics; empty if it serves none, or not yet."""
        ready = read_ready_file(self.ready_file)
        return ready.metrics if ready else ""

    @property
    def _running(self) -> asyncio.subprocess.Process:
        if self._process is None:
            raise RuntimeError(f"{self.name} was never started")
        return self._process

    async def wait(self) -> int:
        """Waits for its end; the exit code, negative for a signal."""
        return await self._running.wait()

    def describe_exit(self) -> str:
        """How it ended, e.g. ``was killed by SIGKILL`` or ``ended with exit code 1``."""
        code = self._running.returncode
        if code is not None and code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"

    async def stop(self, timeout_s: float) -> None:
        """SIGTERM, and SIGKILL if it has not ended in time. Nothing happens if it runs no more."""
        if self._process is None or self._process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            async with asyncio.timeout(timeout_s):
                await self._process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    def log_tail(self) -> str:
        """Its last log lines, indented, after a newline; empty if it keeps no log."""
        if self.log is None or not self.log.exists():
            return ""
        lines = self.log.read_bytes().decode(errors="replace").splitlines()[-TAIL_LINES:]
        return "".join(f"\n  {line}" for line in lines) + f"\n  (from {self.log})"
