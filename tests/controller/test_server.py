"""The controller process: roles, health, reflection, life and death, and what it must never import."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from controller.server import ControllerServer
from controller.settings import ControllerSettings, Role, SteeringMode
from kvpilot.bus import BusSettings
from kvpilot.v1 import generation_pb2, generation_pb2_grpc, operator_pb2, operator_pb2_grpc
from tests.conftest import RedisProcess, free_port
from tests.controller.scripted import WAIT_S, ScriptedWorker, controller, request_state, until
from tests.jobs_help import connected, make_card

ROOT = Path(__file__).resolve().parents[2]
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health_of(channel: grpc.aio.Channel, service: str) -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


@pytest.mark.anyio
async def test_health_knows_each_role_and_the_whole() -> None:
    async with controller(roles="steering") as server, grpc.aio.insecure_channel(server.address) as channel:
        assert await health_of(channel, "") == SERVING
        assert await health_of(channel, "kvpilot.v1.SteeringService") == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health_of(channel, "kvpilot.v1.OperatorService")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.anyio
async def test_health_says_when_it_stops() -> None:
    async with controller() as server, grpc.aio.insecure_channel(server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        stopping = asyncio.create_task(server.stop(10))
        assert (await watch.read()).status == NOT_SERVING
        watch.cancel()
        await stopping


@pytest.mark.anyio
async def test_a_store_that_hangs_does_not_hold_up_the_end_of_the_open_streams(forgetful_redis: RedisProcess) -> None:
    patient = BusSettings(timeout_s=60.0)
    async with (
        connected(forgetful_redis.url, patient) as bus,
        controller(bus, roles="generation,steering,operator") as server,
        grpc.aio.insecure_channel(server.address) as channel,
        ScriptedWorker.attach(server.address) as worker,
    ):
        await bus.heartbeat(make_card("w1"), [])
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        stream = stub.Generate(generation_pb2.GenerateRequest(prompt="hello"))
        await stream.read()
        forgetful_redis.pause()
        try:
            stopping = asyncio.create_task(server.stop(0))
            async with asyncio.timeout(WAIT_S):
                assert await stream.code() is grpc.StatusCode.UNAVAILABLE
            assert await worker.ended_with() is grpc.StatusCode.UNAVAILABLE
            assert not stopping.done()  # it still waits to be taken off the list of controllers
        finally:
            forgetful_redis.resume()
        await stopping


@pytest.mark.anyio
async def test_reflection_lists_the_services() -> None:
    async with controller() as server, grpc.aio.insecure_channel(server.address) as channel:
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        names = {service.name for service in (await call.read()).list_services_response.service}
        call.cancel()
    assert {"kvpilot.v1.SteeringService", "kvpilot.v1.OperatorService", "grpc.health.v1.Health"} <= names
    assert "kvpilot.v1.GenerationService" not in names


@pytest.mark.anyio
async def test_a_role_that_is_off_is_not_served() -> None:
    async with controller(roles="steering") as server, grpc.aio.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await operator_pb2_grpc.OperatorServiceStub(channel).GetMode(operator_pb2.GetModeRequest())
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.anyio
async def test_a_taken_port_is_an_error() -> None:
    async with controller() as server:
        with pytest.raises(RuntimeError):
            await ControllerServer(ControllerSettings.load(listen=server.address, roles="steering")).start()


def test_generation_needs_the_job_store() -> None:
    with pytest.raises(ValueError, match="job store"):
        ControllerServer(ControllerSettings.load(roles="generation"))


def test_the_controller_imports_neither_torch_nor_workers() -> None:
    probe = (
        "import sys, controller.server, controller.__main__, models.scenarios\n"
        "for module in ('controller.generation', 'controller.validation'):\n"
        "    __import__(module)\n"
        "seen = {name.split('.')[0] for name in sys.modules}\n"
        "bad = {'torch', 'transformers', 'workers', 'kernels', 'numba'} & seen\n"
        "sys.exit(', '.join(sorted(bad)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.anyio
async def test_the_program_serves_until_it_is_asked_to_stop(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    command = [sys.executable, "-m", "controller", "--listen", "127.0.0.1:0", "--roles", "steering,operator"]
    command += ["--redis-url", f"redis://127.0.0.1:{free_port()}/0"]  # nobody there: it serves all the same
    process = await asyncio.create_subprocess_exec(*command, "--ready-file", str(ready), cwd=ROOT)
    try:
        await until(ready.exists, 30)
        async with ScriptedWorker.attach(ready.read_text().strip()) as worker:
            process.send_signal(signal.SIGTERM)
            assert await worker.ended_with() is grpc.StatusCode.UNAVAILABLE
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()


@pytest.mark.anyio
async def test_the_program_steers_before_the_job_store_is_there(tmp_path: Path, forgetful_redis: RedisProcess) -> None:
    forgetful_redis.kill()
    ready = tmp_path / "ready"
    command = [sys.executable, "-m", "controller", "--listen", "127.0.0.1:0", "--redis-url", forgetful_redis.url]
    process = await asyncio.create_subprocess_exec(*command, "--ready-file", str(ready), cwd=ROOT)
    try:
        await until(ready.exists, 30)
        address = ready.read_text().strip()
        async with ScriptedWorker.attach(address) as worker, grpc.aio.insecure_channel(address) as channel:
            await worker.report(request_state())
            assert (await worker.directive()).request_id == "job-1"
            generation = generation_pb2_grpc.GenerationServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await generation.ListModels(generation_pb2.ListModelsRequest())
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            forgetful_redis.start()
            await generation.ListModels(generation_pb2.ListModelsRequest())
    finally:
        process.kill()
        await process.wait()


@pytest.mark.anyio
async def test_a_killed_program_comes_back_with_the_mode_that_was_set(tmp_path: Path, redis_url: str) -> None:
    modes = []
    for number, wanted in enumerate((operator_pb2.MODE_OFF, operator_pb2.MODE_ADVISORY)):
        ready = tmp_path / f"ready-{number}"
        command = [sys.executable, "-m", "controller", "--listen", "127.0.0.1:0", "--roles", "steering,operator"]
        command += ["--redis-url", redis_url, "--ready-file", str(ready)]
        process = await asyncio.create_subprocess_exec(*command, cwd=ROOT)
        try:
            await until(ready.exists, 30)
            async with grpc.aio.insecure_channel(ready.read_text().strip()) as channel:
                stub = operator_pb2_grpc.OperatorServiceStub(channel)
                modes.append((await stub.SetMode(operator_pb2.SetModeRequest(mode=wanted))).previous)
        finally:
            process.kill()
            await process.wait()
    assert modes == [operator_pb2.MODE_ACTIVE, operator_pb2.MODE_OFF]


def run_controller(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "controller", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_help_names_every_setting() -> None:
    done = run_controller("--help")
    assert done.returncode == 0
    for name in ControllerSettings.model_fields:
        assert f"--{name.replace('_', '-')}" in done.stdout


def test_bad_settings_are_named() -> None:
    done = run_controller("--listen", "nowhere", "--roles", "operator")
    assert done.returncode == 2
    assert "address 'nowhere': expected host:port" in done.stderr
    assert "role operator needs role steering" in done.stderr
    assert "role generation needs a redis_url" in run_controller("--redis-url", "").stderr


def test_settings_come_from_file_environment_and_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "controller.toml"
    file.write_text('tick_ms = 1\ncoalesce_ms = 1\nmode = "off"\nroles = ["steering"]\n')
    monkeypatch.setenv("KVPILOT_CONTROLLER_COALESCE_MS", "2")
    monkeypatch.setenv("KVPILOT_CONTROLLER_MODE", "advisory")
    loaded = ControllerSettings.from_command_line(["--config", str(file), "--mode", "active"], "controller")
    assert (loaded.tick_ms, loaded.coalesce_ms, loaded.mode) == (1, 2, SteeringMode.ACTIVE)
    assert loaded.roles == {Role.STEERING}
    assert ControllerSettings.load(file, tick_ms=3, mode=None).tick_ms == 3


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("guard_error", "0", "greater than 0"),
        ("guard_error", "1", "less than 1"),
        ("guard_least_audits", "0", "greater than or equal to 1"),
        ("guard_rollback", "sometimes", "valid boolean"),
    ],
)
def test_settings_of_the_guard_are_checked(
    name: str, value: str, accepted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"KVPILOT_CONTROLLER_{name.upper()}", value)
    with pytest.raises(ValueError, match=f"{name}\n.*{accepted}"):
        ControllerSettings.load()


def test_unknown_keys_in_the_file_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "controller.toml"
    file.write_text("tick = 1\n")
    with pytest.raises(ValueError, match="tick"):
        ControllerSettings.load(file)
