"""``kvpilot demo``: a stack of its own, real jobs at once, and what steering did to each of them."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import grpc
from rich.console import Console

from cli.demo_jobs import DemoJob, demo_jobs
from cli.demo_run import Run
from cli.demo_view import Board, summary
from cli.errors import FailedError
from cli.jobs import follow
from cli.redis_server import free_port
from cli.settings import load_settings
from cli.up import make_stack, until_signal, wait_attached
from kvpilot.v1 import operator_pb2, operator_pb2_grpc

DEVICE_BUDGET = "160MiB"
"""Small enough that the jobs together press against it, large enough for the longest of them alone."""
HOST_BUDGET = "512MiB"
LOOK_EVERY_S = 0.5


def demo(file: Path | None, model: str | None, device_budget: str | None, threads: int | None) -> None:
    """Runs the demo and prints its summary.

    Raises:
        FailedError: the fact was missed, a job failed, or the controller switched nothing in mid-generation.
    """
    console = Console(highlight=False)
    started = time.monotonic()
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(prefix="kvpilot-demo-") as folder:
        settings = load_settings(
            None,
            endpoint=f"127.0.0.1:{free_port()}",
            model=model,
            device_budget=device_budget or DEVICE_BUDGET,
            host_budget=HOST_BUDGET,
            threads=threads,
            state=Path(folder),
            workers=1,
            redis_url="",
            mode="active",
        )

        async def run() -> None:
            async with make_stack(settings, console.print) as stack:
                await wait_attached(stack.endpoint, settings.workers)
                watching = asyncio.create_task(stack.watch())
                working = asyncio.create_task(_work(stack.endpoint, runs, console))
                try:
                    await asyncio.wait({watching, working}, return_when=asyncio.FIRST_COMPLETED)
                    if watching.done():
                        watching.result()
                    await working
                finally:
                    watching.cancel()
                    working.cancel()

        if asyncio.run(until_signal(run())):
            raise KeyboardInterrupt
    failures = judge(runs)
    console.print(summary(runs))
    console.print(f"took {time.monotonic() - started:.0f} s")
    if file is not None:
        document = {"requests": [run.document() for run in runs], "failures": failures}
        file.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if failures:
        raise FailedError("the demo did not go well:\n" + "\n".join(f"  {failure}" for failure in failures))


def judge(runs: list[Run]) -> list[str]:
    """What did not go as it must, one line each."""
    failures = [f"{run.name}: {_said(run)}" for run in runs if run.result.finish_reason in (None, "failed")]
    failures += [f"{run.name}: {run.answer!r} is not in its text" for run in runs if run.fact_found is False]
    if not any(run.steered_midway for run in runs):
        failures.append("the controller switched no request in the middle of its generation")
    return failures


def _said(run: Run) -> str:
    finished = run.result.finished
    return finished.problem.message if finished is not None else "did not finish"


async def _work(endpoint: str, runs: list[Run], console: Console) -> None:
    """Submits all jobs at once and waits for them, showing what happens."""
    jobs = demo_jobs()
    for job in jobs:
        console.print(f"  [bold]{job.name}[/bold]: {job.what}")
    with Board(console, runs) as board:
        async with grpc.aio.insecure_channel(endpoint) as channel:
            looking = asyncio.create_task(_look(channel, board))
            try:
                async with asyncio.TaskGroup() as group:
                    for job in jobs:
                        group.create_task(_converse(endpoint, job, runs, board))
            finally:
                looking.cancel()
    order = [job.name for job in jobs]
    runs.sort(key=lambda run: (order.index(run.name.partition("-")[0]), run.name))


async def _converse(endpoint: str, job: DemoJob, runs: list[Run], board: Board) -> None:
    """A job's turns, one after the other; each sends the whole conversation so far."""
    said: tuple[tuple[str, str], ...] = ()
    for number, order in enumerate(job.orders, 1):
        run = Run(job.name if len(job.orders) == 1 else f"{job.name}-{number}", job.answer)
        runs.append(run)
        said += order.turns
        async for event in follow(endpoint, replace(order, turns=said)):
            run.result.add(event.message)
            if event.kind == "tokens" and not run.first_token_at:
                run.first_token_at = time.monotonic()
            board.note(run, event.message)
        said += (("assistant", run.result.text),)


async def _look(channel: grpc.aio.Channel, board: Board) -> None:
    """Keeps the board's cache bytes fresh."""
    operator = operator_pb2_grpc.OperatorServiceStub(channel)  # type: ignore[no-untyped-call]
    while True:
        answer = await operator.ListRequests(operator_pb2.ListRequestsRequest(), wait_for_ready=True)
        board.look(list(answer.requests))
        await asyncio.sleep(LOOK_EVERY_S)
