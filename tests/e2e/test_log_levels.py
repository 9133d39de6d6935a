"""Log levels of running processes, set by an operator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner

from cli import tether
from cli.main import app
from kvpilot.client import AsyncClient
from kvpilot.v1 import operator_pb2
from tests.e2e.serving import TIMEOUT_S, Running, operator_of, serving

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.timeout(4 * TIMEOUT_S),
    pytest.mark.skipif(not tether.SUPPORTED, reason="needs Linux"),
]


@pytest.fixture(scope="module")
async def stack(
    anyio_backend: str, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Running]:
    settings = {"worker": {"log_format": "json"}, "controller": {"log_format": "json", "log_level": "warning"}}
    async with serving(tiny_folder, tmp_path_factory.mktemp("levels"), **settings) as running:
        yield running


def said(stack: Running, process: str, event: str) -> list[dict[str, object]]:
    return [line for line in stack.logged(process) if line["event"] == event]


async def until_level(stack: Running, process: str, now: str, times: int = 1) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while len([line for line in said(stack, process, "log level") if line["now"] == now]) < times:
            await asyncio.sleep(0.05)


async def command(stack: Running, *words: str) -> tuple[int, str]:
    result = await asyncio.to_thread(
        CliRunner().invoke, app, ["log-level", *words, "-e", stack.endpoint], env={"NO_COLOR": "1"}
    )
    return result.exit_code, result.output


async def test_levels_change_while_processes_run(stack: Running) -> None:
    assert await command(stack) == (0, "every process logs as it was configured\n")
    assert await command(stack, "debug") == (0, "all: debug\n")
    await until_level(stack, "controller", "debug")
    await until_level(stack, "worker-0", "debug")
    assert said(stack, "controller", "log level")[0]["before"] == "warning"
    async with AsyncClient(stack.endpoint) as client:
        first = await client.complete("Hello", max_tokens=40, ignore_eos=True)
    accepted = said(stack, "controller", "job accepted")
    assert [line["request"] for line in accepted] == [first.job_id]
    assert [line["process"] for line in accepted] == ["controller"]
    async with asyncio.timeout(TIMEOUT_S):
        while not said(stack, "controller", "decision"):  # of those that change nothing: debug
            await asyncio.sleep(0.05)

    assert await command(stack, "error", "--process", "worker-0") == (0, "worker-0: error\n")
    assert (await command(stack))[1] == "all: debug\nworker-0: error\n"
    await until_level(stack, "worker-0", "error")
    claimed = len(said(stack, "worker-0", "job claimed"))
    async with AsyncClient(stack.endpoint) as client:
        await client.complete("Hello", max_tokens=4)
    assert len(said(stack, "worker-0", "job claimed")) == claimed == 1
    assert len(said(stack, "controller", "job accepted")) == 2

    await command(stack, "configured", "--process", "worker-0")
    await command(stack, "configured")
    await until_level(stack, "controller", "warning")
    await until_level(stack, "worker-0", "info")
    assert await command(stack) == (0, "every process logs as it was configured\n")


async def test_an_order_for_a_time_ends_by_itself(stack: Running) -> None:
    back = len([line for line in said(stack, "controller", "log level") if line["now"] == "warning"])
    code, answer = await command(stack, "debug", "--for", "4s", "--process", "controller")
    assert (code, answer) == (0, "controller: debug for 4s\n")
    assert (await command(stack))[1].startswith("controller: debug until ")
    await until_level(stack, "controller", "warning", back + 1)
    assert await command(stack) == (0, "every process logs as it was configured\n")


async def test_a_process_that_starts_later_obeys_too(stack: Running) -> None:
    await command(stack, "error", "--process", "worker-0")
    await until_level(stack, "worker-0", "error")
    serving_lines = len(said(stack, "worker-0", "serving"))
    await stack.kill("worker-0")
    await stack.restart("worker-0")
    await until_level(stack, "worker-0", "error", 2)
    assert len(said(stack, "worker-0", "serving")) == serving_lines
    await command(stack, "configured", "--process", "worker-0")


@pytest.mark.parametrize(
    ("words", "named"),
    [(("debug", "--for", "soon"), "--for 'soon'"), (("loud",), "loud"), (("debug", "--for", "0s"), "0s")],
)
async def test_bad_orders_are_refused_by_the_command(stack: Running, words: tuple[str, ...], named: str) -> None:
    code, answer = await command(stack, *words)
    assert code == 2
    assert named in answer


async def test_bad_orders_are_refused_by_the_service(stack: Running) -> None:
    async with operator_of(stack) as operator:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await operator.stub.SetLogLevel(operator_pb2.SetLogLevelRequest(duration_ms=-1))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "level: 0" in refused.value.details()
    assert "duration_ms: -1" in refused.value.details()
