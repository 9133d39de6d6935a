"""What a format is worth while decoding, and what a live switch to it costs: one engine in this process, no controller.

Speed: a window is one request that decodes so many tokens, with the same prompt for every pipeline; its exact blocks
are computed once and reused. A round is a window of each pipeline, and which goes first alternates, so that a drift of
the machine meets all of them. Tokens per second count from a window's first token on; ratios are taken within a round.

Switches: one request is moved from the full cache to the last pipeline and back, several times, while it decodes.
The time between two of its tokens is a step. Given are the median of the steps before a switch, the longest of those
from its directive to its commit, the stall (how much longer that was, in steps), how many steps it took, and the pause
that the worker counted itself.
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import statistics
import time
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bench.machine import busy_note, describe_machine
from cli.errors import BadInputError
from kernels.layout import BLOCK_TOKENS, Format
from kvpilot.log import LogFormat, LogLevel, configure_logging
from kvpilot.v1 import generation_pb2, job_pb2, policy_pb2
from models import store
from workers.engine.api import Event
from workers.engine.attention import cache_shape
from workers.engine.engine import Engine
from workers.engine.runner import LoadedModel, load_model
from workers.settings import WorkerSettings

FULL = "full"
QUIET_TOKENS = 24
"""Tokens before the first switch, and behind every one before the next."""
PATIENCE_S = 600.0
"""For the next token of a request, the first one's prompt included."""
_SPARE_ROWS = 64
"""Room for what is generated, in rows of blocks."""


@dataclass(frozen=True)
class Stall:
    """One live switch."""

    to_pipeline: str
    step_ms: float
    """Median of the steps before it."""
    longest_ms: float
    steps: int
    """Decode steps from its directive to its commit."""
    pause_ms: float
    """Longest pause by the worker's own count."""

    @property
    def stall_steps(self) -> float:
        """How much longer its longest step was than the median, in steps."""
        return (self.longest_ms - self.step_ms) / self.step_ms


class Stepper:
    """An engine on its own thread, and when each token of the one request it serves came."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._events: queue.SimpleQueue[tuple[float, generation_pb2.GenerationEvent | BaseException]] = (
            queue.SimpleQueue()
        )
        self._jobs = self._tokens = 0
        self.token_ids: list[int] = []
        """What the request at work, or the last one, has generated."""
        engine.start(self._take, lambda report: None, lambda error: self._events.put((0.0, error)))

    def _take(self, events: list[Event]) -> None:
        now = time.perf_counter()
        for _, event in events:
            self._events.put((now, event))

    def begin(self, token_ids: list[int], pipeline: str, max_tokens: int, session_id: str = "") -> str:
        """Submits a request; without a pipeline it may be switched."""
        self._jobs += 1
        self._tokens, self.token_ids = 0, []
        request = generation_pb2.GenerateRequest(
            token_ids=generation_pb2.TokenIds(ids=token_ids),
            sampling=generation_pb2.Sampling(max_tokens=max_tokens, ignore_eos=True),
            pipeline=pipeline,
            session_id=session_id,
        )
        job_id = f"bench-{self._jobs}"
        self._engine.submit(job_pb2.Job(job_id=job_id, request=request))
        return job_id

    def times(self, tokens: int | None = None) -> list[float]:
        """When the next ``tokens`` tokens came; None: all to the request's end."""
        times: list[float] = []
        while tokens is None or len(times) < tokens:
            moment, event = self._events.get(timeout=PATIENCE_S)
            if isinstance(event, BaseException):
                raise event
            self.token_ids += [token.id for token in event.tokens.tokens]
            times += [moment] * len(event.tokens.tokens)
            self._tokens += len(event.tokens.tokens)
            if event.HasField("finished"):
                if event.finished.HasField("problem") or tokens is not None:
                    raise RuntimeError(f"the request ended: {event.finished.problem.message or 'too early'}")
                break
        return times

    def window(self, token_ids: list[int], pipeline: str, tokens: int) -> float:
        """Tokens per second of one request with that pipeline."""
        self.begin(token_ids, pipeline, tokens)
        times = self.times()
        return (len(times) - 1) / (times[-1] - times[0])

    def switch(self, job_id: str, pipeline: str, epoch: int, before: list[float]) -> tuple[Stall, list[float]]:
        """Moves the request to a pipeline. ``before``: when its last tokens came; also returns when later ones did."""
        sent_at = self._tokens
        directive = policy_pb2.Directive(nonce=f"{epoch}", epoch=epoch, request_id=job_id, pipeline=pipeline)
        answer = self._engine.direct(directive)
        times = before[-1:]
        while not answer.done():
            times += self.times(1)
        applied = answer.result().applied
        times += self.times(QUIET_TOKENS)
        steps = applied.at_token - sent_at  # the commit delays the step behind them
        longest_ms = max(_steps_ms(times[: steps + 2]))
        step_ms = statistics.median(_steps_ms(before))
        stall = Stall(applied.to_pipeline, step_ms, longest_ms, steps, applied.stall_ms)
        return stall, times[-QUIET_TOKENS:]

    def stop(self) -> None:
        """Ends the engine's thread."""
        self._engine.stop(PATIENCE_S)


def _steps_ms(times: list[float]) -> list[float]:
    return [(after - before) * 1e3 for before, after in itertools.pairwise(times)]


def bench(
    file: Path | None,
    model: str | None,
    pipelines: str,
    contexts: str,
    tokens: int,
    rounds: int,
    switches: int,
    threads: int | None,
) -> None:
    """Runs the benchmark, prints it, and writes it to ``file``."""
    names = [name.strip() for name in pipelines.split(";") if name.strip()]
    try:
        lengths = [int(length) for length in contexts.split(",")]
    except ValueError:
        raise BadInputError(f"--contexts: {contexts!r}; numbers of tokens, separated by commas") from None
    configure_logging(LogLevel.WARNING, LogFormat.AUTO)
    import_module("transformers.utils.logging").disable_progress_bar()
    console = Console(highlight=False)
    report = measure(model or "smollm2-135m-instruct", names, lengths, tokens, rounds, switches, threads, console)
    console.print(render(report))
    if switches:
        console.print(render_switches(report))
    if file is not None:
        file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def measure(
    model: str,
    pipelines: list[str],
    contexts: list[int],
    tokens: int,
    rounds: int,
    switches: int,
    threads: int | None,
    console: Console,
) -> dict[str, Any]:
    """The report: speeds at every context, and live switches at the first one.

    Args:
        model: name in the store, or a folder.
        pipelines: the first one is what the others are compared with.
        contexts: lengths of prompts, tokens.
        tokens: tokens of a window.
        rounds: windows of each pipeline that count.
        switches: times there and back; 0: none.
        threads: CPU threads; None: one per core.
        console: is told how far it is.
    """
    used_threads = threads or os.cpu_count() or 1
    machine = describe_machine(used_threads)
    loaded = load_model(store.resolve(model), model, torch.device("cpu"), torch.float32)
    most = max(tokens, (2 * switches + 1) * QUIET_TOKENS * 4)
    stepper = Stepper(_engine(loaded, contexts, used_threads))
    try:
        speeds = []
        for context in contexts:
            ids = prompt_ids(loaded, context)
            windows = _speeds(stepper, ids, pipelines, tokens, rounds, console)
            speeds.append(_summary(context, windows))
        stalls = []
        if switches:
            room = min(most, loaded.context_tokens - contexts[0])
            stalls = _switches(stepper, prompt_ids(loaded, contexts[0]), pipelines[-1], switches, room, console)
    finally:
        stepper.stop()
    return {
        "machine": machine,
        "model": model,
        "tokens": tokens,
        "pipelines": pipelines,
        "decode": speeds,
        "switch_context_tokens": contexts[0],
        "switches": [asdict(stall) | {"stall_steps": round(stall.stall_steps, 3)} for stall in stalls],
    }


def _engine(loaded: LoadedModel, contexts: list[int], threads: int) -> Engine:
    """An engine with room for every prompt and for two requests beside them, raw; nothing is audited."""
    shape = cache_shape(loaded.model.config, torch.float32)
    row_bytes = shape.layers * shape.kv_heads * shape.block_bytes(Format.RAW)
    prompts, longest = (-(-length // BLOCK_TOKENS) + _SPARE_ROWS for length in (sum(contexts), max(contexts)))
    settings = WorkerSettings(
        name="bench",
        model=Path(loaded.name),
        device_budget_bytes=(prompts + 2 * longest) * row_bytes,
        host_budget_bytes=2 * longest * row_bytes,
        audit_every_tokens=0,
        threads=threads,
    )
    return Engine(settings, loaded)


def prompt_ids(loaded: LoadedModel, tokens: int) -> list[int]:
    """A prompt of real text: what Python says about itself."""
    from pydoc_data.topics import topics

    ids: list[int] = []
    for text in topics.values():
        ids += loaded.tokenizer(text)["input_ids"]
        if len(ids) >= tokens:
            return ids[:tokens]
    raise BadInputError(f"--contexts: {tokens} tokens are more than the text of {len(ids)} holds")


def _speeds(
    stepper: Stepper, ids: list[int], pipelines: list[str], tokens: int, rounds: int, console: Console
) -> dict[str, list[float]]:
    windows: dict[str, list[float]] = {pipeline: [] for pipeline in pipelines}
    stepper.window(ids, FULL, 2)  # computes the prompt, which the others reuse
    for number in range(rounds + 1):
        for pipeline in pipelines if number % 2 else pipelines[::-1]:
            speed = stepper.window(ids, pipeline, tokens)
            if number:
                windows[pipeline].append(speed)
        if number:
            said = ", ".join(f"{pipeline} {speeds[-1]:.1f}" for pipeline, speeds in windows.items())
            console.print(f"{len(ids)} tokens, round {number}: {said} tokens/s", soft_wrap=True, markup=False)
    return windows


def _summary(context: int, windows: dict[str, list[float]]) -> dict[str, Any]:
    """Medians of each pipeline, and of its ratio to the first one's window of the same round."""
    first = next(iter(windows.values()))
    return {
        "context_tokens": context,
        "tokens_per_s": {name: round(statistics.median(speeds), 2) for name, speeds in windows.items()},
        "ratio": {
            name: round(statistics.median(mine / base for mine, base in zip(speeds, first, strict=True)), 3)
            for name, speeds in windows.items()
        },
        "windows": {name: [round(speed, 2) for speed in speeds] for name, speeds in windows.items()},
    }


def _switches(
    stepper: Stepper, ids: list[int], pipeline: str, switches: int, max_tokens: int, console: Console
) -> list[Stall]:
    """One request there and back; the first time is not counted: nothing was measured yet to size slices by."""
    job_id = stepper.begin(ids, "", max_tokens)
    before = stepper.times(QUIET_TOKENS)
    stalls = []
    for number in range(switches + 1):
        for way, wanted in enumerate((pipeline, FULL), start=1):
            stall, before = stepper.switch(job_id, wanted, 2 * number + way, before)
            if number:
                stalls.append(stall)
    console.print(f"{len(stalls)} switches made")
    return stalls


def _title(report: dict[str, Any], what: str) -> str:
    machine = report["machine"]
    return (
        f"{what}, {report['model']}, float32, greedy, one request\n"
        f"{machine['cpu']}, {machine['threads_used']} of {machine['cores']} cores, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB; torch {machine['torch']}"
    )


def render(report: dict[str, Any]) -> Table:
    """Speeds for people."""
    rounds = len(report["decode"][0]["windows"][report["pipelines"][0]])
    caption = f"tokens/s, medians of {rounds} windows of {report['tokens']} tokens, and of the ratios within a round"
    table = Table(
        title=_title(report, "Decoding"),
        caption=caption + busy_note(report["machine"]),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("context", justify="right")
    for pipeline in report["pipelines"]:
        table.add_column(pipeline, justify="right")
    for row in report["decode"]:
        cells = [f"{row['tokens_per_s'][name]:.1f} ({row['ratio'][name]:.2f}x)" for name in report["pipelines"]]
        table.add_row(str(row["context_tokens"]), *cells)
    return table


def render_switches(report: dict[str, Any]) -> Table:
    """Live switches for people."""
    context = report["switch_context_tokens"]
    table = Table(
        title=_title(report, f"Switching while decoding at {context} tokens"),
        caption="medians, and the worst in brackets; a stall: how much longer the longest step was than the median one",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    columns = ("switch to", "step ms", "longest ms", "stall, steps", "worker's pause, ms", "steps it took")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    for pipeline in dict.fromkeys(stall["to_pipeline"] for stall in report["switches"]):
        rows = [stall for stall in report["switches"] if stall["to_pipeline"] == pipeline]
        cells = []
        for key, digits in (("step_ms", 1), ("longest_ms", 1), ("stall_steps", 2), ("pause_ms", 1), ("steps", 0)):
            values = [row[key] for row in rows]
            cells.append(f"{statistics.median(values):.{digits}f} ({max(values):.{digits}f})")
        table.add_row(pipeline, *cells)
    return table
