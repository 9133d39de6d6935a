"""Eight requests at once through kvpilot against the same eight one after another with transformers' ``generate``.

Both sides get the same token ids, model, dtype and number of threads, choose greedily and do not stop at the end token.
kvpilot runs as users run it: job store, controller and worker processes, called over gRPC; its pipeline is ``full``, so
both compute the same thing. Each round has prompts of its own (nothing can be reused from an earlier one), both sides
run in every round, and which of them goes first alternates, so that a drift of the machine shows and cancels.

Two speeds are given, tokens per second over all eight requests:

* decode: without prompts. For transformers: tokens after each request's first, over the time they took. For kvpilot:
  tokens that arrive between the moment when all requests have their first and the moment when the first one ends.
* end to end: all generated tokens over the time from the start to the last token, prompts included.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench.machine import Machine, busy_note, describe_machine
from bench.stack import Timed, bench_settings, generate_timed
from cli.demo_jobs import licence_text
from cli.settings import CliSettings
from cli.up import make_stack, until_signal, wait_attached
from models import store


@dataclass(frozen=True)
class Figures:
    """One side's run over all requests of a round."""

    decode_tokens_per_s: float
    end_to_end_tokens_per_s: float
    token_ids: list[list[int]] = field(repr=False)


@dataclass(frozen=True)
class Round:
    """Both sides' runs over the same prompts."""

    peer: Figures
    ours: Figures

    @property
    def same_requests(self) -> int:
        """Requests whose tokens are equal on both sides."""
        return sum(a == b for a, b in zip(self.peer.token_ids, self.ours.token_ids, strict=True))


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
    with tempfile.TemporaryDirectory(prefix="kvpilot-bench-") as folder:
        settings = bench_settings(Path(folder), model, used_threads, requests, "active", dtype="float32")
        peer = Peer(store.resolve(settings.model), used_threads)
        prompts = peer.prompts((rounds + 1) * requests, prompt_tokens)
        done: list[Round] = []
        work = _run(settings, peer, prompts, requests, max_tokens, done, console)
        if asyncio.run(until_signal(work)):
            raise KeyboardInterrupt
    report = make_report(done, machine, settings.model, requests, max_tokens, prompt_tokens)
    console.print(render(report))
    if file is not None:
        file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


async def _run(
    settings: CliSettings,
    peer: Peer,
    prompts: list[list[int]],
    requests: int,
    max_tokens: int,
    done: list[Round],
    console: Console,
) -> None:
    async with make_stack(settings, console.print) as stack:
        await wait_attached(stack.endpoint, settings.workers)
        for number, start in enumerate(range(0, len(prompts), requests)):
            batch = prompts[start : start + requests]
            if number % 2:
                theirs = await peer.run(batch, max_tokens)
                ours = await run_ours(stack.endpoint, batch, max_tokens)
            else:
                ours = await run_ours(stack.endpoint, batch, max_tokens)
                theirs = await peer.run(batch, max_tokens)
            if number == 0:
                console.print("warmed up")
                continue
            done.append(Round(theirs, ours))
            console.print(
                f"round {number}: transformers {theirs.decode_tokens_per_s:.1f}, "
                f"kvpilot {ours.decode_tokens_per_s:.1f} decode tokens/s"
            )


class Peer:
    """transformers' ``generate``, one request at a time."""

    def __init__(self, folder: Path, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        import_module("transformers.utils.logging").disable_progress_bar()
        torch.set_num_threads(threads)
        self._torch = torch
        self._stop = threading.Event()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(str(folder))
        self._model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)

    def prompts(self, count: int, tokens: int) -> list[list[int]]:
        """``count`` different prompts of ``tokens`` tokens from real text."""
        ids: list[int] = self._tokenizer(licence_text())["input_ids"]
        stride = max(1, (len(ids) - tokens) // count)
        if len(ids) < tokens + stride * (count - 1) or tokens >= len(ids):
            raise ValueError(f"{count} prompts of {tokens} tokens are more than the text of {len(ids)} tokens holds")
        return [ids[start : start + tokens] for start in range(0, stride * count, stride)]

    async def run(self, prompts: list[list[int]], max_tokens: int) -> Figures:
        """Generates for one prompt after the other, in a thread, so that signals and dying processes are heeded."""
        try:
            return await asyncio.to_thread(self._run, prompts, max_tokens)
        except asyncio.CancelledError:
            self._stop.set()
            raise

    def _run(self, prompts: list[list[int]], max_tokens: int) -> Figures:
        started = time.perf_counter()
        outputs: list[list[int]] = []
        decode_s = 0.0
        for prompt in prompts:
            clock = _Clock(self._stop)
            ids = self._torch.tensor([prompt])  # [1, tokens]
            output = self._model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                max_new_tokens=max_tokens,
                min_new_tokens=max_tokens,
                do_sample=False,
                eos_token_id=None,
                streamer=clock,
            )
            outputs.append(output[0, len(prompt) :].tolist())
            decode_s += clock.times[-1] - clock.times[0]
        total = sum(len(output) for output in outputs)
        elapsed = time.perf_counter() - started
        return Figures((total - len(outputs)) / decode_s, total / elapsed, outputs)


class _Clock:
    """A transformers streamer that notes when each token came."""

    def __init__(self, stop: threading.Event) -> None:
        self.times: list[float] = []
        self._stop = stop
        self._prompt_seen = False

    def put(self, value: object) -> None:
        if self._stop.is_set():
            raise InterruptedError("the benchmark was stopped")
        if self._prompt_seen:
            self.times.append(time.perf_counter())
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is held back."""


async def run_ours(endpoint: str, prompts: list[list[int]], max_tokens: int) -> Figures:
    """Submits all prompts at once and waits for all of them."""
    started = time.perf_counter()
    streams = await asyncio.gather(
        *(generate_timed(endpoint, token_ids=prompt, pipeline="full", max_tokens=max_tokens) for prompt in prompts)
    )
    return figures_of(streams, started)


def figures_of(streams: list[Timed], started: float) -> Figures:
    """Speeds from when each request's tokens came, and the tokens; ``started`` by the same clock."""
    all_decode = max(times[0] for times, _ in streams)
    first_end = min(times[-1] for times, _ in streams)
    arrived = sum(all_decode < moment <= first_end for times, _ in streams for moment in times)
    elapsed = max(times[-1] for times, _ in streams) - started
    outputs = [ids for _, ids in streams]
    decode = arrived / (first_end - all_decode) if first_end > all_decode else 0.0
    return Figures(decode, sum(len(ids) for ids in outputs) / elapsed, outputs)


def make_report(
    rounds: list[Round],
    machine: Machine,
    model: str,
    requests: int,
    max_tokens: int,
    prompt_tokens: int,
) -> dict[str, Any]:
    """Medians over the rounds, their ratio, and every round beside them."""

    def compare(name: str) -> dict[str, Any]:
        theirs = [getattr(one.peer, name) for one in rounds]
        ours = [getattr(one.ours, name) for one in rounds]
        return {
            "transformers": round(statistics.median(theirs), 2),
            "kvpilot": round(statistics.median(ours), 2),
            "ratio": round(statistics.median(mine / peer for mine, peer in zip(ours, theirs, strict=True)), 3),
            "rounds": [
                {"transformers": round(peer, 2), "kvpilot": round(mine, 2)}
                for peer, mine in zip(theirs, ours, strict=True)
            ],
        }

    return {
        "machine": machine,
        "model": model,
        "requests": requests,
        "prompt_tokens": prompt_tokens,
        "max_tokens": max_tokens,
        "decode_tokens_per_s": compare("decode_tokens_per_s"),
        "end_to_end_tokens_per_s": compare("end_to_end_tokens_per_s"),
        "requests_with_equal_tokens": sum(one.same_requests for one in rounds),
        "requests_compared": sum(len(one.ours.token_ids) for one in rounds),
    }


def render(report: dict[str, Any]) -> Table:
    """The report for people."""
    machine = report["machine"]
    title = (
        f"{report['requests']} requests, {report['prompt_tokens']} + {report['max_tokens']} tokens each, "
        f"{report['model']}, float32, greedy\n{machine['cpu']}, {machine['threads_used']} of {machine['cores']} cores, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB; torch {machine['torch']}, transformers {machine['transformers']}"
    )
    caption = (
        f"medians of {len(report['decode_tokens_per_s']['rounds'])} rounds in one run; "
        f"{report['requests_with_equal_tokens']} of {report['requests_compared']} requests gave equal tokens"
    )
    caption += busy_note(machine)
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    table.add_column("tokens/s over all requests")
    for column in ("transformers, one by one", "kvpilot, at once", "ratio"):
        table.add_column(column, justify="right")
    for key, words in (("decode_tokens_per_s", "decode"), ("end_to_end_tokens_per_s", "end to end")):
        row = report[key]
        table.add_row(words, f"{row['transformers']:.1f}", f"{row['kvpilot']:.1f}", f"{row['ratio']:.2f}x")
    return table
