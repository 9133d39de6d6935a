"""``kvpilot up`` with the real model: it serves, mends itself, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cli import tether
from kvpilot.client import AsyncClient
from models import store

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.model,
    pytest.mark.slow,
    pytest.mark.skipif(not tether.SUPPORTED, reason="needs Linux"),
]
TIMEOUT_S = 240.0


class Up:
    """A running ``kvpilot up``."""

    def __init__(self, process: asyncio.subprocess.Process, endpoint: str) -> None:
        self.process = process
        self.endpoint = endpoint

    def children(self) -> dict[str, int]:
        """Process ids of ``redis``, ``controller`` and ``workers``."""
        tasks = Path(f"/proc/{self.process.pid}/task")
        pids: list[int] = []
        for task in tasks.iterdir():
            with contextlib.suppress(FileNotFoundError):  # the thread has ended meanwhile
                pids += map(int, (task / "children").read_text().split())
        commands = {pid: Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0") for pid in pids}
        return {"redis" if "valkey" in command[0] else command[-1]: pid for pid, command in commands.items()}

    async def heard(self, line: str) -> None:
        """Waits until this is said on stderr."""
        assert self.process.stderr is not None
        async for said in self.process.stderr:
            if said.decode().startswith(line):
                return
        raise AssertionError(f"it ended without saying {line!r}")


@asynccontextmanager
async def up(folder: Path) -> AsyncIterator[Up]:
    words = ("up", "--model", store.DEFAULT_MODEL, "--endpoint", "127.0.0.1:0", "--state", str(folder / "state"))
    budgets = ("--device-budget", "64MiB", "--host-budget", "64MiB")
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "from cli.main import app; app()",
        *words,
        *budgets,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=folder,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(TIMEOUT_S):
            endpoint = (await process.stdout.readline()).decode().strip()
            assert endpoint.startswith("127.0.0.1:")
            yield Up(process, endpoint)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def all_gone(pids: list[int]) -> None:
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        await asyncio.sleep(0.01)


async def answer(endpoint: str) -> list[int]:
    async with AsyncClient(endpoint) as client:
        return (await client.complete("Once upon a time", max_tokens=4, ignore_eos=True)).token_ids


async def test_up_serves_mends_itself_and_stops_cleanly(tmp_path: Path) -> None:
    async with up(tmp_path) as running:
        before = running.children()
        assert set(before) == {"redis", "controller", "workers"}
        first = await answer(running.endpoint)
        assert len(first) == 4

        for victim, name in (("workers", "worker-0"), ("controller", "controller"), ("redis", "redis")):
            os.kill(before[victim], signal.SIGKILL)
            await running.heard(f"{name} was killed by SIGKILL; restarting it (1 of 5)")
            await running.heard(f"{name} is back")
        assert await answer(running.endpoint) == first

        after = running.children()
        assert not set(before.values()) & set(after.values())
        running.process.send_signal(signal.SIGTERM)
        assert await running.process.wait() == 0
        await all_gone(list(after.values()))


async def test_killed_up_leaves_nothing_behind(tmp_path: Path) -> None:
    async with up(tmp_path) as running:
        pids = list(running.children().values())
        assert len(pids) == 3
        running.process.kill()
        await running.process.wait()
        await all_gone(pids)
