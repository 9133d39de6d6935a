"""The worker process around a scripted engine: it serves, stops when asked, and fails when its engine dies."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvpilot.bus import Bus
from kvpilot.v1 import generation_pb2, job_pb2, policy_pb2
from tests.controller.scripted import controller, until
from tests.engines import MODEL, ScriptedEngine, scripted_tokens
from tests.jobs_help import TIMEOUT_S, result_of, until_offset
from workers.process import HEALTH_SERVICE, EngineDiedError, run_worker
from workers.settings import WorkerSettings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module", autouse=True)
async def one_event_loop(anyio_backend: str) -> AsyncIterator[None]:
    """See tests/controller/conftest.py."""
    yield  # noqa: PT022  # keeps the loop alive until the last test


class SteerableEngine(ScriptedEngine):
    """A scripted engine that also listens to controllers, and can be told to die."""

    controller = ""

    def hello(self) -> policy_pb2.Hello:
        said = super().hello()
        said.raw_dtype = "float32"
        return said

    def configure(self, welcome: policy_pb2.Welcome) -> None:
        self.controller = welcome.controller

    def steered(self, connected: bool) -> None: ...

    def die(self, error: BaseException) -> None:
        self._on_death(error)


def worker_settings(redis_url: str, tmp_path: Path, **changes: object) -> WorkerSettings:
    return WorkerSettings.load(
        **{"name": "w0", "model": tmp_path, "redis_url": redis_url, "ready_file": tmp_path / "ready", **changes}
    )


@pytest.mark.anyio
async def test_it_serves_jobs_reports_and_stops_when_asked(redis_url: str, tmp_path: Path) -> None:
    engine = SteerableEngine()
    async with controller() as server:
        settings = worker_settings(redis_url, tmp_path, controllers=(server.address,))
        process = asyncio.create_task(run_worker(settings, lambda _: engine))
        await until((tmp_path / "ready").exists)
        async with grpc.aio.insecure_channel((tmp_path / "ready").read_text().strip()) as channel:
            check = health_pb2.HealthCheckRequest(service=HEALTH_SERVICE)
            assert (await health_pb2_grpc.HealthStub(channel).Check(check)).status == 1
        assert server.steering is not None
        steering = server.steering
        await until(lambda: "scripted" in steering.state.workers)
        await until(lambda: engine.controller == "test-controller")

        bus = await Bus.connect(redis_url)
        request = generation_pb2.GenerateRequest(prompt="hello", model=MODEL)
        request.sampling.max_tokens = 5
        job = job_pb2.Job(job_id="job-1", request=request)
        await bus.submit(job)
        tokens = [
            token.id async for event in bus.events("job-1") if event.HasField("tokens") for token in event.tokens.tokens
        ]
        assert tokens == scripted_tokens("hello", 5)
        os.kill(os.getpid(), signal.SIGTERM)
        await process
        assert not await bus.cards()
        await bus.close()


async def begun_job(bus: Bus, tokens: int) -> None:
    """Submits job-1 and waits for its first tokens."""
    request = generation_pb2.GenerateRequest(prompt="hello", model=MODEL)
    request.sampling.max_tokens = 8
    await bus.submit(job_pb2.Job(job_id="job-1", request=request))
    await until_offset(bus, "job-1", 2 + tokens)


@pytest.mark.anyio
async def test_from_the_signal_on_it_is_not_ready_and_its_jobs_finish(redis_url: str, tmp_path: Path) -> None:
    engine = SteerableEngine(steps=3)
    process = asyncio.create_task(run_worker(worker_settings(redis_url, tmp_path), lambda _: engine))
    await until((tmp_path / "ready").exists)
    bus = await Bus.connect(redis_url)
    await begun_job(bus, 3)
    async with grpc.aio.insecure_channel((tmp_path / "ready").read_text().strip()) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service=HEALTH_SERVICE))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(TIMEOUT_S):
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1  # alive: it has work to finish
        assert (await bus.record("job-1")).state == generation_pb2.JOB_STATE_RUNNING
        engine.allow(100)
        await process
    assert (await result_of(bus, "job-1")).token_ids == scripted_tokens("hello", 8)
    await bus.close()


@pytest.mark.anyio
async def test_a_second_signal_hands_its_jobs_over(redis_url: str, tmp_path: Path) -> None:
    settings = worker_settings(redis_url, tmp_path, drain_timeout_s=TIMEOUT_S)
    process = asyncio.create_task(run_worker(settings, lambda _: SteerableEngine(steps=3)))
    await until((tmp_path / "ready").exists)
    bus = await Bus.connect(redis_url)
    await begun_job(bus, 3)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(0.2)
    assert not process.done()
    os.kill(os.getpid(), signal.SIGTERM)
    await process
    (claim,) = await bus.claim("other", MODEL, 1)
    assert claim.progress.token_ids == scripted_tokens("hello", 3)
    await bus.close()


@pytest.mark.anyio
async def test_an_engine_that_dies_while_jobs_finish_ends_it(redis_url: str, tmp_path: Path) -> None:
    engine = SteerableEngine(steps=3)
    settings = worker_settings(redis_url, tmp_path, drain_timeout_s=10 * TIMEOUT_S)
    process = asyncio.create_task(run_worker(settings, lambda _: engine))
    await until((tmp_path / "ready").exists)
    bus = await Bus.connect(redis_url)
    await begun_job(bus, 3)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(0.1)
    engine.die(MemoryError("the arena is gone"))
    with pytest.raises(EngineDiedError, match="the arena is gone"):
        await process
    await bus.close()


@pytest.mark.anyio
async def test_it_fails_when_its_engine_dies(redis_url: str, tmp_path: Path) -> None:
    engine = SteerableEngine()
    process = asyncio.create_task(run_worker(worker_settings(redis_url, tmp_path), lambda _: engine))
    await until((tmp_path / "ready").exists)
    engine.die(MemoryError("the arena is gone"))
    with pytest.raises(EngineDiedError, match="the arena is gone"):
        await process


@pytest.mark.anyio
async def test_it_can_be_stopped_while_it_waits_for_the_job_store(tmp_path: Path) -> None:
    process = asyncio.create_task(run_worker(worker_settings("redis://127.0.0.1:1/0", tmp_path), lambda _: None))
    await asyncio.sleep(0)
    os.kill(os.getpid(), signal.SIGTERM)
    await process
    assert not (tmp_path / "ready").exists()


def run_program(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "workers", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_help_names_every_setting_without_loading_torch() -> None:
    done = run_program("--help")
    assert done.returncode == 0
    for name in WorkerSettings.model_fields:
        assert f"--{name.replace('_', '-')}" in done.stdout


def test_bad_settings_are_named() -> None:
    done = run_program("--model", "x", "--device-budget-bytes", "much", "--default-pipeline", "full |")
    assert done.returncode == 2
    assert "device_budget_bytes" in done.stderr
    assert "expected a stage name" in done.stderr


def test_sizes_may_be_written_for_people(tmp_path: Path) -> None:
    settings = WorkerSettings.load(model=tmp_path, device_budget_bytes="64MiB", host_budget_bytes="1GB")
    assert (settings.device_budget_bytes, settings.host_budget_bytes) == (64 << 20, 10**9)
    assert settings.served_name == tmp_path.name


def test_controllers_are_a_comma_separated_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPILOT_WORKER_CONTROLLERS", "a:1, b:2")
    assert WorkerSettings.load(model=tmp_path).controllers == ("a:1", "b:2")
    with pytest.raises(ValueError, match="expected host:port"):
        WorkerSettings.load(model=tmp_path, controllers="a")
