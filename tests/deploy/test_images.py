"""The build files' own steps, carried out in clean environments, give processes that start and turn healthy."""

from __future__ import annotations

import os
import re
import shutil
import signal
import site
import subprocess
import sys
import time
import venv
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import kvpilot
from controller.server import SERVICE_NAMES
from tests.conftest import free_port
from tests.deploy.building import IMAGES, BuildFile, carry_out, context, elsewhere
from tests.deploy.rendering import ROOT
from workers.process import HEALTH_SERVICE

START_S = 240.0
STOP_S = 60.0
TORCH = ("torch", "torchgen", "functorch")
"""Brought from this environment: half a gigabyte that every run would copy."""


class Image:
    """What a build file makes, in a folder instead of an image."""

    def __init__(self, role: str, folder: Path) -> None:
        self._build, self._run = BuildFile.read(IMAGES / f"{role}.Containerfile").stages
        self.prefix = folder / "opt" / "kvpilot"
        self.cache = folder / "cache"
        self.temporary = folder / "tmp"
        context(folder / "context")
        for made in (self.cache, self.temporary):
            made.mkdir()
        self._folders = {
            ".": folder / "context",
            "/build": folder / "build",
            "/src": folder / "src",
            "/opt/kvpilot": self.prefix,
            "/var/cache/kvpilot": self.cache,
            "/tmp": self.temporary,
        }

    def build(self) -> None:
        """Carries out the stage that installs."""
        # pip's own settings stay as they are here; compiling to bytecode is most of the work, and shows nothing.
        passed_on = re.compile(r"PATH$|HOME$|PIP_|SSL_|.*proxy$", re.IGNORECASE)
        kept = {name: value for name, value in os.environ.items() if passed_on.match(name)}
        carry_out(self._build, self._folders, kept | {"PIP_NO_COMPILE": "no", "PYTHON": sys.executable})

    @contextmanager
    def running(self, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
        """Its process with its own environment and these variables, until it was told to end."""
        (command,) = self._run.of("ENTRYPOINT")
        words = [word.strip(' "') for word in elsewhere(command, self._folders).strip("[]").split(",")]
        own = {name: elsewhere(value, self._folders) for name, value in self._run.environment().items()}
        environment = own | {"TMPDIR": str(self.temporary), "PATH": "/usr/bin:/bin"} | settings
        with (self.temporary / "log").open("wb") as log:
            process = subprocess.Popen(words, env=environment, cwd=self.cache, stdout=log, stderr=log)
        try:
            yield process
            process.send_signal(signal.SIGTERM)
            assert process.wait(STOP_S) == 0, self.log()
        finally:
            process.kill()
            process.wait()

    def log(self) -> str:
        """What it said."""
        return (self.temporary / "log").read_text()

    def packages(self) -> Path:
        """Where its packages are."""
        (found,) = self.prefix.glob("lib/python*/site-packages")
        return found

    def files(self) -> set[Path]:
        """All that is installed."""
        return set(self.prefix.rglob("*"))


def _wait_serving(image: Image, process: subprocess.Popen[bytes], port: int, services: list[str]) -> None:
    """Asks as the chart's probes do."""
    deadline = time.monotonic() + START_S
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in services:
            while True:
                assert process.poll() is None, image.log()
                assert time.monotonic() < deadline, image.log()
                try:
                    request = health_pb2.HealthCheckRequest(service=service)
                    if health.Check(request, timeout=5, wait_for_ready=True).status == 1:
                        break
                except grpc.RpcError:
                    continue


def _pip_list(image: Image) -> Mapping[str, str]:
    lock = {}
    code = "from importlib import metadata\nfor d in metadata.distributions(): print(d.name, d.version)"
    done = subprocess.run([str(image.prefix / "bin/python"), "-c", code], capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        name, version = line.split()
        lock[name.lower().replace("_", "-").replace(".", "-")] = version
    return lock


def _locked(role: str) -> dict[str, str]:
    lines = (IMAGES / f"{role}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def _seed(worker: Image, controller: Image) -> None:
    """Gives the worker's environment what would cost minutes to fetch and unpack a second time, at the same versions.

    That is torch, from the environment of the tests, and what the controller's build has just installed.
    """
    venv.create(worker.prefix, with_pip=True, symlinks=True)
    target, source = worker.packages(), controller.packages()
    ours = {path.name for path in (ROOT / "protos").iterdir()} | {path.name for path in ROOT.iterdir()}
    for part in source.iterdir():
        if part.name not in ours and not part.name.startswith("kvpilot-") and not (target / part.name).exists():
            if part.is_dir():
                shutil.copytree(part, target / part.name, copy_function=os.link)
            else:
                os.link(part, target / part.name)
    here = Path(site.getsitepackages()[0])
    for part in (*(here / name for name in TORCH), *here.glob("torch-*.dist-info")):
        if part.exists():
            (target / part.name).symlink_to(part)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_both_images_serve_a_request(tmp_path: Path, redis_url: str) -> None:
    controller, worker = Image("controller", tmp_path / "controller"), Image("worker", tmp_path / "worker")
    controller.build()
    _seed(worker, controller)
    worker.build()

    installed = _pip_list(controller)
    assert installed == _locked("controller") | {"kvpilot": installed["kvpilot"]}, "no torch, no pip, nothing else"
    assert _locked("worker").items() <= _pip_list(worker).items()

    model = _tiny_model(tmp_path / "models" / "tiny")
    before = controller.files(), worker.files()
    front, health = free_port(), free_port()
    settings = {
        "KVPILOT_WORKER_MODEL": str(model),
        "KVPILOT_WORKER_REDIS_URL": redis_url,
        "KVPILOT_WORKER_CONTROLLERS": f"127.0.0.1:{front}",
        "KVPILOT_WORKER_HEALTH_LISTEN": f"127.0.0.1:{health}",
        "KVPILOT_WORKER_DEVICE_BUDGET_BYTES": "16MiB",
        "KVPILOT_WORKER_HOST_BUDGET_BYTES": "16MiB",
        "KVPILOT_WORKER_DISK_BUDGET_BYTES": "0",
        "KVPILOT_WORKER_THREADS": "1",
        # To compile the CPU's kernels from nothing takes longer than all else here.
        "KVPILOT_WORKER_KERNEL_BACKEND": "reference",
    }
    listen = {"KVPILOT_CONTROLLER_LISTEN": f"127.0.0.1:{front}", "KVPILOT_CONTROLLER_REDIS_URL": redis_url}
    with controller.running(**listen) as serving:
        _wait_serving(controller, serving, front, ["", *SERVICE_NAMES.values()])
        with worker.running(**settings) as working:
            _wait_serving(worker, working, health, ["", HEALTH_SERVICE])
            with kvpilot.Client(f"127.0.0.1:{front}") as client:
                result = client.complete("Hello", max_tokens=4, pipeline="kivi(bits=4)")
            assert result.usage.generated_tokens > 0
    assert (controller.files(), worker.files()) == before, "a read-only root would not take what was written"


def _tiny_model(folder: Path) -> Path:
    from tests.tiny import tiny_model, tiny_tokenizer  # with torch

    tiny_model(attention="sdpa").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
