"""The stack's processes: ready, restarted, stopped in order, and never left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cli import stack as stack_module
from cli import tether
from cli.child import Child, ChildError
from cli.plan import StackPlan
from cli.redis_server import RedisServer, StateInUseError
from cli.stack import Stack, StackError

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(not tether.SUPPORTED, reason="needs Linux")]
TIMEOUT_S = 30.0

SERVE = """
import os, pathlib, signal, sys
if sys.argv[2] == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
ready = pathlib.Path(sys.argv[1])
ready.with_suffix(".part").write_text(f"127.0.0.1:{os.getpid()}")
ready.with_suffix(".part").rename(ready)
while True:
    signal.pause()
"""
PARENT = """
import asyncio, pathlib, sys
from cli.child import Child

async def main(folder):
    ready = folder / "ready"
    child = Child("child", [sys.executable, "-c", sys.argv[2], str(ready), "plain"], None, {}, ready)
    await child.start()
    await child.ready(30)
    print(child.pid, flush=True)
    await child.wait()

asyncio.run(main(pathlib.Path(sys.argv[1])))
"""


def serving(folder: Path, manner: str = "plain") -> Child:
    ready = folder / "ready"
    return Child("child", (sys.executable, "-c", SERVE, str(ready), manner), folder / "log", {}, ready)


async def gone(pid: int) -> None:
    """Waits until no process has this id (a child of ours must have been waited for)."""
    async with asyncio.timeout(TIMEOUT_S):
        while Path(f"/proc/{pid}").exists():
            await asyncio.sleep(0.01)


async def test_child_is_ready_and_stops(tmp_path: Path) -> None:
    child = serving(tmp_path)
    await child.start()
    assert await child.ready(TIMEOUT_S) == f"127.0.0.1:{child.pid}"
    await child.stop(TIMEOUT_S)
    assert child.describe_exit() == "was killed by SIGTERM"


async def test_stubborn_child_is_killed(tmp_path: Path) -> None:
    child = serving(tmp_path, "stubborn")
    await child.start()
    await child.ready(TIMEOUT_S)
    await child.stop(0.05)
    assert child.describe_exit() == "was killed by SIGKILL"


async def test_child_that_ends_before_it_is_ready_shows_its_last_words(tmp_path: Path) -> None:
    program = "import sys; sys.exit('no such model')"
    child = Child("worker-0", (sys.executable, "-c", program), tmp_path / "log", {}, tmp_path / "ready")
    await child.start()
    with pytest.raises(ChildError, match=r"(?s)worker-0 ended with exit code 1 before it was ready.*no such model"):
        await child.ready(TIMEOUT_S)


async def test_stale_ready_file_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "ready").write_text("127.0.0.1:1")
    child = serving(tmp_path)
    await child.start()
    assert await child.ready(TIMEOUT_S) == f"127.0.0.1:{child.pid}"
    await child.stop(TIMEOUT_S)


async def test_killed_parent_leaves_no_orphan(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), SERVE], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    os.kill(pid, 0)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    await gone(pid)


async def test_embedded_job_store_keeps_its_data_and_its_folder(tmp_path: Path) -> None:
    import redis

    server = RedisServer(tmp_path / "redis", None)
    child = server.child()
    await child.start()
    await child.ready(TIMEOUT_S)
    with redis.Redis.from_url(server.url) as client:
        client.set("job", "1")
    with pytest.raises(redis.AuthenticationError), redis.Redis(port=server.port) as stranger:
        stranger.get("job")
    with pytest.raises(StateInUseError, match="--state"):
        RedisServer(tmp_path / "redis", None).child()
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    await child.wait()
    server.release()

    again = RedisServer(tmp_path / "redis", None)
    child = again.child()
    await child.start()
    await child.ready(TIMEOUT_S)
    with redis.Redis.from_url(again.url) as client:
        assert client.get("job") == b"1"
    await child.stop(TIMEOUT_S)
    again.release()


class FakeStack(Stack):
    """A stack whose processes only say that they are ready."""

    def _child(self, name: str, module: str, environment: dict[str, str], prefix: str) -> Child:
        child = super()._child(name, module, environment, prefix)
        child.command = (sys.executable, "-c", SERVE, str(child.ready_file), "plain")
        return child


def fake_stack(folder: Path, said: list[str], workers: int = 2) -> FakeStack:
    plan = StackPlan({}, tuple({"KVPILOT_WORKER_NAME": f"worker-{number}"} for number in range(workers)))
    return FakeStack(plan, folder, "", said.append)


def by_name(stack: Stack, name: str) -> Child:
    return next(child for child in stack.children if child.name == name)


async def test_stack_starts_in_order_and_stops_everything(tmp_path: Path) -> None:
    said: list[str] = []
    async with fake_stack(tmp_path, said) as stack:
        assert [child.name for child in stack.children] == ["redis", "controller", "worker-0", "worker-1"]
        assert stack.endpoint == f"127.0.0.1:{by_name(stack, 'controller').pid}"
        worker = by_name(stack, "worker-0")
        assert worker.environment["KVPILOT_WORKER_CONTROLLERS"] == stack.endpoint
        assert worker.environment["KVPILOT_WORKER_REDIS_URL"].startswith("redis://:")
        pids = [child.pid for child in stack.children]
    for pid in pids:
        assert pid is not None
        await gone(pid)


async def test_dead_worker_is_started_again(tmp_path: Path) -> None:
    said: list[str] = []
    async with fake_stack(tmp_path, said) as stack:
        watching = asyncio.create_task(stack.watch())
        worker = by_name(stack, "worker-1")
        first = worker.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        async with asyncio.timeout(TIMEOUT_S):
            while "worker-1 is back" not in said:
                await asyncio.sleep(0.01)
        assert worker.pid not in (None, first)
        assert "worker-1 was killed by SIGKILL; restarting it (1 of 5)" in said
        watching.cancel()


async def test_process_that_keeps_dying_ends_the_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack_module, "RESTARTS", 2)
    monkeypatch.setattr(stack_module, "RESTART_WAIT_S", 0.0)
    said: list[str] = []
    async with fake_stack(tmp_path, said) as stack:
        controller = by_name(stack, "controller")
        controller.command = (sys.executable, "-c", "import sys; sys.exit('broken settings')")
        assert controller.pid is not None
        os.kill(controller.pid, signal.SIGKILL)
        async with asyncio.timeout(TIMEOUT_S):
            with pytest.raises(StackError, match=r"(?s)controller .*given up after 2 restarts.*broken settings"):
                await stack.watch()
    assert len([line for line in said if line.startswith("controller")]) == 2


async def test_failed_start_stops_what_was_started(tmp_path: Path) -> None:
    class NoWorkers(FakeStack):
        def _child(self, name: str, module: str, environment: dict[str, str], prefix: str) -> Child:
            child = super()._child(name, module, environment, prefix)
            if module == "workers":
                child.command = (sys.executable, "-c", "import sys; sys.exit('no memory')")
            return child

    plan = StackPlan({}, ({"KVPILOT_WORKER_NAME": "worker-0"},))
    stack = NoWorkers(plan, tmp_path, "", lambda line: None)
    with pytest.raises(StackError, match=r"(?s)worker-0 ended with exit code 1.*no memory"):
        async with stack:
            raise AssertionError("it must not start")
    for child in stack.children:
        assert child.pid is not None
        await gone(child.pid)
