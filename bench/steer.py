"""What steering costs: the same requests with planning on and off, in turn, on one running stack.

Planning is on in mode ``advisory``: reports are read, every tick predicts and decides, decisions are logged, but none
is sent, so that both sides compute the same tokens with the same cache and only the cost of steering differs. Each
round has prompts of its own; which mode goes first alternates, so that a drift of the machine shows and cancels.

The signals that reports carry are measured by the worker in either mode. What that takes is counted by the worker
itself, and given beside the ratio as a share of the time it spent on decoding.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from rich import box
from rich.console import Console
from rich.table import Table

from bench.machine import busy_note, describe_machine
from bench.serve import Figures, figures_of
from bench.stack import bench_settings, generate_timed
from cli.demo_jobs import licence_text
from cli.settings import CliSettings
from cli.up import make_stack, until_signal, wait_attached
from kvpilot.v1 import operator_pb2, operator_pb2_grpc
from kvpilot.v1.operator_pb2 import Mode


@dataclass(frozen=True)
class Round:
    """Both modes' runs over equally long prompts."""

    off: Figures
    advisory: Figures
    signal_share: float
    """Time the worker spent on signals over that it spent on decode steps, in both runs."""


def bench(
    file: Path | None,
    model: str | None,
    requests: int,
    max_tokens: int,
    prompt_tokens: int,
    rounds: int,
    threads: int | None,
) -> None:
    """Runs the benchmark, prints it, and writes it to ``file``."""
    console = Console(highlight=False)
    used_threads = threads or os.cpu_count() or 1
    machine = describe_machine(used_threads)
    done: list[Round] = []
    with tempfile.TemporaryDirectory(prefix="kvpilot-bench-") as folder:
        settings = bench_settings(Path(folder), model, used_threads, requests, "off")
        work = _run(settings, requests, max_tokens, prompt_tokens, rounds, done, console)
        if asyncio.run(until_signal(work)):
            raise KeyboardInterrupt
    report = make_report(done, machine, settings.model, requests, max_tokens, prompt_tokens)
    console.print(render(report))
    if file is not None:
        file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


async def _run(
    settings: CliSettings,
    requests: int,
    max_tokens: int,
    prompt_tokens: int,
    rounds: int,
    done: list[Round],
    console: Console,
) -> None:
    async with make_stack(settings, console.print) as stack:
        await wait_attached(stack.endpoint, settings.workers)
        async with grpc.aio.insecure_channel(stack.endpoint) as channel:
            operator = operator_pb2_grpc.OperatorServiceStub(channel)  # type: ignore[no-untyped-call]
            prompts = _Prompts(licence_text(), prompt_tokens)
            await _generate_all(stack.endpoint, prompts.take(requests), max_tokens)
            console.print("warmed up")
            for number in range(rounds):
                before = await _worker_ms(operator)
                found: dict[Mode, Figures] = {}
                modes = [Mode.MODE_OFF, Mode.MODE_ADVISORY]
                for mode in modes if number % 2 == 0 else reversed(modes):
                    await operator.SetMode(operator_pb2.SetModeRequest(mode=mode))
                    found[mode] = await _generate_all(stack.endpoint, prompts.take(requests), max_tokens)
                signal_ms, decode_ms = (
                    now - then for now, then in zip(await _worker_ms(operator), before, strict=True)
                )
                one = Round(found[Mode.MODE_OFF], found[Mode.MODE_ADVISORY], signal_ms / decode_ms)
                done.append(one)
                console.print(
                    f"round {number + 1}: off {one.off.decode_tokens_per_s:.1f}, advisory "
                    f"{one.advisory.decode_tokens_per_s:.1f} decode tokens/s; signals {one.signal_share:.2%}"
                )


class _Prompts:
    """Different texts of about the same number of tokens, from one long text."""

    def __init__(self, text: str, tokens: int) -> None:
        self._text = text
        self._characters = 4 * tokens
        self._next = 0

    def take(self, count: int) -> list[str]:
        found = []
        for _ in range(count):
            start = self._next % max(1, len(self._text) - self._characters)
            found.append(self._text[start : start + self._characters])
            self._next += self._characters // 3 + 1
        return found


async def _generate_all(endpoint: str, prompts: list[str], max_tokens: int) -> Figures:
    started = time.perf_counter()
    streams = await asyncio.gather(
        *(generate_timed(endpoint, prompt=prompt, scenario="mixed", max_tokens=max_tokens) for prompt in prompts)
    )
    return figures_of(streams, started)


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
    max_tokens: int,
    prompt_tokens: int,
) -> dict[str, Any]:
    """Medians over the rounds, and every round beside them."""
    ratios = [one.advisory.decode_tokens_per_s / one.off.decode_tokens_per_s for one in rounds]
    signals = statistics.median(one.signal_share for one in rounds)
    return {
        "machine": machine,
        "model": model,
        "requests": requests,
        "prompt_tokens": prompt_tokens,
        "max_tokens": max_tokens,
        "off_tokens_per_s": round(statistics.median(one.off.decode_tokens_per_s for one in rounds), 2),
        "advisory_tokens_per_s": round(statistics.median(one.advisory.decode_tokens_per_s for one in rounds), 2),
        "planning_overhead": round(1 - statistics.median(ratios), 4),
        "signal_share": round(signals, 4),
        "steering_overhead": round(1 - statistics.median(ratios) + signals, 4),
        "rounds": [
            {
                "off_tokens_per_s": round(one.off.decode_tokens_per_s, 2),
                "advisory_tokens_per_s": round(one.advisory.decode_tokens_per_s, 2),
                "signal_share": round(one.signal_share, 4),
            }
            for one in rounds
        ],
    }


def render(report: dict[str, Any]) -> Table:
    """The report for people."""
    machine = report["machine"]
    caption = f"medians of {len(report['rounds'])} rounds in one run; a negative cost is noise"
    caption += busy_note(machine)
    table = Table(
        title=f"{report['requests']} requests of about {report['prompt_tokens']} + {report['max_tokens']} tokens, "
        f"{report['model']}\n{machine['cpu']}, {machine['threads_used']} of {machine['cores']} cores",
        caption=caption,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
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
