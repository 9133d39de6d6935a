"""What steering costs: planning is switched on and off in turn while the same requests are decoded on a running stack.

Planning is on in mode ``advisory``: reports are read, every tick predicts and decides, decisions are logged, but none
is sent, so that both sides compute the same tokens with the same cache and only the cost of steering differs. A round
is a window of tokens in each mode; which goes first alternates, so that longer contexts and a drift of the machine
cancel.

The signals that reports carry are measured by the worker in either mode. What that takes is counted by the worker
itself, and given beside the ratio as a share of the time it spent on decoding.

Where controller and worker share their cores, what the controller computes is taken from the worker; so its CPU time is
given too, in both modes: it wavers less than tokens per second do.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from bench.machine import busy_note, describe_machine
from bench.stack import bench_settings
from cli.demo_jobs import licence_text
from cli.settings import CliSettings
from cli.up import make_stack, until_signal, wait_attached
from kvpilot.client import AsyncClient
from kvpilot.v1 import operator_pb2, operator_pb2_grpc
from kvpilot.v1.operator_pb2 import Mode

REQUESTS, WINDOW_TOKENS, PROMPT_TOKENS = 8, 8, 256
_SETTLING_TOKENS = 2
"""Of each request after a change of mode, not counted: what was planned before it is still under way."""


@dataclass(frozen=True)
class Run:
    """A window of tokens in one mode."""

    decode_tokens_per_s: float
    controller_share: float
    """CPU seconds of the controller over seconds."""


@dataclass(frozen=True)
class Round:
    """Both modes' windows, one after the other."""

    off: Run
    advisory: Run
    signal_share: float
    """Time the worker spent on signals over that it spent on decode steps, in both windows."""

    @property
    def ratio(self) -> float:
        """Tokens per second with planning over those without."""
        return self.advisory.decode_tokens_per_s / self.off.decode_tokens_per_s


def bench(
    file: Path | None,
    model: str | None,
    requests: int,
    window_tokens: int,
    prompt_tokens: int,
    rounds: int,
    threads: int | None,
) -> None:
    """Runs the benchmark, prints it, and writes it to ``file``."""
    console = Console(highlight=False)
    report = measure(model, rounds, console, requests, window_tokens, prompt_tokens, threads)
    console.print(render(report))
    if file is not None:
        file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def measure(
    model: str | None,
    rounds: int,
    console: Console,
    requests: int = REQUESTS,
    window_tokens: int = WINDOW_TOKENS,
    prompt_tokens: int = PROMPT_TOKENS,
    threads: int | None = None,
) -> dict[str, Any]:
    """Runs a stack of its own, in turn in both modes; see :func:`make_report`.

    Args:
        model: a name from the store, or a folder; None: the usual one.
        rounds: windows of each mode.
        console: is told how far it is.
        requests: at once.
        window_tokens: that each generates in a window.
        prompt_tokens: of each prompt, about.
        threads: CPU threads of the worker; None: one per core.

    Raises:
        KeyboardInterrupt: it was stopped.
    """
    used_threads = threads or os.cpu_count() or 1
    machine = describe_machine(used_threads)
    done: list[Round] = []
    with tempfile.TemporaryDirectory(prefix="kvpilot-bench-") as folder:
        settings = bench_settings(Path(folder), model, used_threads, requests, "off")
        work = _run(settings, requests, window_tokens, prompt_tokens, rounds, done, console)
        if asyncio.run(until_signal(work)):
            raise KeyboardInterrupt
    return make_report(done, machine, settings.model, requests, window_tokens, prompt_tokens)


async def _run(
    settings: CliSettings,
    requests: int,
    window_tokens: int,
    prompt_tokens: int,
    rounds: int,
    done: list[Round],
    console: Console,
) -> None:
    async with (
        make_stack(settings, console.print) as stack,
        grpc.aio.insecure_channel(stack.endpoint) as channel,
        asyncio.TaskGroup() as streams,
    ):
        await wait_attached(stack.endpoint, settings.workers)
        operator = operator_pb2_grpc.OperatorServiceStub(channel)  # type: ignore[no-untyped-call]
        controller = next(child.pid for child in stack.children if child.name == "controller")
        assert controller is not None
        flow = _Flow(requests, controller)
        most = (2 * rounds + 1) * (window_tokens + _SETTLING_TOKENS) + 2 * prompt_tokens  # some begin before others
        reading = [
            streams.create_task(flow.read(number, stack.endpoint, prompt, most))
            for number, prompt in enumerate(_prompts(licence_text(), prompt_tokens, requests))
        ]
        await flow.all_decode()
        await flow.window(window_tokens)
        console.print("warmed up")
        for number in range(rounds):
            before = await _worker_ms(operator)
            found: dict[Mode, Run] = {}
            modes = [Mode.MODE_OFF, Mode.MODE_ADVISORY]
            for mode in modes if number % 2 == 0 else reversed(modes):
                await operator.SetMode(operator_pb2.SetModeRequest(mode=mode))
                await flow.window(_SETTLING_TOKENS)
                found[mode] = await flow.window(window_tokens)
            signal_ms, decode_ms = (now - then for now, then in zip(await _worker_ms(operator), before, strict=True))
            one = Round(found[Mode.MODE_OFF], found[Mode.MODE_ADVISORY], signal_ms / decode_ms if decode_ms else 0.0)
            done.append(one)
            console.print(
                f"round {number + 1}: off {one.off.decode_tokens_per_s:.1f}, advisory "
                f"{one.advisory.decode_tokens_per_s:.1f} decode tokens/s; signals {one.signal_share:.2%}"
            )
        for task in reading:
            task.cancel()


class _Flow:
    """Counts the tokens of some requests as they come."""

    def __init__(self, requests: int, controller: int) -> None:
        self._controller = controller
        self._came = [0] * requests
        self._news = asyncio.Condition()

    async def read(self, number: int, endpoint: str, prompt: str, max_tokens: int) -> None:
        """Generates one of the requests; again from the start if it ends before it is cancelled."""
        request: dict[str, Any] = {"prompt": prompt, "scenario": "mixed", "max_tokens": max_tokens, "ignore_eos": True}
        async with AsyncClient(endpoint) as client:
            while True:
                async for event in client.generate(**request):
                    async with self._news:
                        self._came[number] += len(event.token_ids)
                        self._news.notify_all()

    async def all_decode(self) -> None:
        """Waits until each has a token."""
        async with self._news:
            await self._news.wait_for(lambda: all(self._came))

    async def window(self, tokens: int) -> Run:
        """What happens while as many tokens come as if each request had generated ``tokens``."""
        first, started, used_s = sum(self._came), time.perf_counter(), _cpu_s(self._controller)
        async with self._news:
            await self._news.wait_for(lambda: sum(self._came) >= first + tokens * len(self._came))
        took = time.perf_counter() - started
        return Run((sum(self._came) - first) / took, (_cpu_s(self._controller) - used_s) / took)


def _prompts(text: str, tokens: int, count: int) -> list[str]:
    """Different texts of about the same number of tokens, from one long text."""
    characters = 4 * tokens
    starts = [number * (characters // 3 + 1) % max(1, len(text) - characters) for number in range(count)]
    return [text[start : start + characters] for start in starts]


def _cpu_s(pid: int) -> float:
    """CPU seconds that a process has used, all threads; NaN where the system does not tell."""
    stat = Path(f"/proc/{pid}/stat")
    if not stat.exists():
        return math.nan
    user, system = stat.read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


async def _worker_ms(operator: operator_pb2_grpc.OperatorServiceStub) -> tuple[float, float]:
    """Milliseconds that the worker has spent on signals and on decode steps so far, by its last report."""
    response = await operator.ListWorkers(operator_pb2.ListWorkersRequest())
    return (
        sum(worker.state.signal_ms for worker in response.workers),
        sum(worker.state.decode_ms for worker in response.workers),
    )


def make_report(
    rounds: list[Round],
    machine: dict[str, str | int | float],
    model: str,
    requests: int,
    window_tokens: int,
    prompt_tokens: int,
) -> dict[str, Any]:
    """Medians over the rounds, and every round beside them."""
    signals = statistics.median(one.signal_share for one in rounds)
    low, high = _interval([one.ratio for one in rounds])
    ratio = statistics.median(one.ratio for one in rounds)
    return {
        "machine": machine,
        "model": model,
        "requests": requests,
        "prompt_tokens": prompt_tokens,
        "window_tokens": window_tokens,
        "off_tokens_per_s": round(statistics.median(one.off.decode_tokens_per_s for one in rounds), 2),
        "advisory_tokens_per_s": round(statistics.median(one.advisory.decode_tokens_per_s for one in rounds), 2),
        "planning_overhead": round(1 - ratio, 4),
        "planning_overhead_low": round(1 - high, 4),
        "planning_overhead_high": round(1 - low, 4),
        "signal_share": round(signals, 4),
        "steering_overhead": round(1 - ratio + signals, 4),
        "controller_share_off": _rounded(statistics.median(one.off.controller_share for one in rounds)),
        "controller_share_advisory": _rounded(statistics.median(one.advisory.controller_share for one in rounds)),
        "rounds": [
            {
                "off_tokens_per_s": round(one.off.decode_tokens_per_s, 2),
                "advisory_tokens_per_s": round(one.advisory.decode_tokens_per_s, 2),
                "signal_share": round(one.signal_share, 4),
            }
            for one in rounds
        ],
    }


def _interval(ratios: list[float]) -> tuple[float, float]:
    """95 % interval of the median, by resampling rounds."""
    drawn = np.random.default_rng(0).choice(np.array(ratios), (2000, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return float(low), float(high)


def _rounded(share: float) -> float | None:
    return None if math.isnan(share) else round(share, 4)


def render(report: dict[str, Any]) -> Table:
    """The report for people."""
    machine = report["machine"]
    caption = (
        f"medians of {len(report['rounds'])} rounds in one run; a negative cost is noise\n95 % of planning costs: "
    )
    caption += f"{report['planning_overhead_low']:.2%} to {report['planning_overhead_high']:.2%}"
    if report["controller_share_off"] is not None:
        caption += (
            f"\ncontroller: {report['controller_share_off']:.2%} of a core without planning, "
            f"{report['controller_share_advisory']:.2%} with it"
        )
    caption += busy_note(machine)
    title = (
        f"{report['requests']} requests of about {report['prompt_tokens']} tokens, windows of "
        f"{report['window_tokens']} tokens, {report['model']}\n"
        f"{machine['cpu']}, {machine['threads_used']} of {machine['cores']} cores"
    )
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    for column in ("decode tokens/s, off", "advisory", "planning costs", "signals cost", "together"):
        table.add_column(column, justify="right")
    table.add_row(
        f"{report['off_tokens_per_s']:.1f}",
        f"{report['advisory_tokens_per_s']:.1f}",
        f"{report['planning_overhead']:.2%}",
        f"{report['signal_share']:.2%}",
        f"{report['steering_overhead']:.2%}",
    )
    return table
