"""What a parked session is worth: time to the first token of its next turn, resumed from host or disk, and cold.

One engine in this process, one request at a time. The first turn is a long prompt. A later turn is that conversation
and a question, another one each time but of the same length, so that all of them have the same to compute: resumed
ones the question and the row it falls into, cold ones everything. A round is one turn of each kind: from disk, once the
session has left the host; from the host, right behind it; and cold, without a session, with the question of the turn
from disk, whose answer must be the same. Published prefixes are dropped before every turn, or they would serve all.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bench.decode import Stepper, prompt_ids
from bench.machine import busy_note, describe_machine
from kernels.layout import BLOCK_TOKENS, Format
from kvpilot.log import LogFormat, LogLevel, configure_logging
from models import store
from workers.engine.attention import cache_shape
from workers.engine.engine import Engine
from workers.engine.runner import LoadedModel, load_model
from workers.settings import WorkerSettings

ANSWER_TOKENS = 16
SESSION = "bench"
HOST_S = 1.0
"""How long the session stays on the host: long enough to be met there, short enough to wait for."""
KINDS = ("disk", "host", "cold")
_PATIENCE_S = 60.0
_LOOK_S = 0.02


def bench(
    file: Path | None, model: str | None, prompt_tokens: int, question_tokens: int, rounds: int, threads: int | None
) -> None:
    """Runs the benchmark, prints it, and writes it to ``file``."""
    configure_logging(LogLevel.WARNING, LogFormat.AUTO)
    import_module("transformers.utils.logging").disable_progress_bar()
    console = Console(highlight=False)
    report = measure(
        model or "smollm2-135m-instruct",
        prompt_tokens,
        question_tokens,
        rounds,
        threads or os.cpu_count() or 1,
        console,
    )
    console.print(render(report))
    if file is not None:
        file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def measure(
    model: str, prompt_tokens: int, question_tokens: int, rounds: int, threads: int, console: Console
) -> dict[str, Any]:
    """The report.

    Args:
        model: name in the store, or a folder.
        prompt_tokens: length of the first turn's prompt.
        question_tokens: what later turns add.
        rounds: later turns of each kind.
        threads: CPU threads.
        console: is told how far it is.

    Raises:
        RuntimeError: a resumed turn was not resumed, or answered otherwise than a cold one.
    """
    machine = describe_machine(threads)
    loaded = load_model(store.resolve(model), model, torch.device("cpu"), torch.float32)
    text = prompt_ids(loaded, prompt_tokens + 2 * rounds * question_tokens)
    questions = [text[at : at + question_tokens] for at in range(prompt_tokens, len(text), question_tokens)]
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory(prefix="kvpilot-bench-") as folder:
        engine = _engine(loaded, prompt_tokens + question_tokens, threads, Path(folder))
        stepper = Stepper(engine)
        try:
            first = text[:prompt_tokens]
            first_s = _turn(engine, stepper, first, SESSION)
            console.print(f"first turn, {prompt_tokens} tokens: {first_s:.2f} s to its first token")
            conversation = [*first, *stepper.token_ids]
            resumable = (len(conversation) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
            session_bytes = resumable // BLOCK_TOKENS * engine.cache.worst_bytes(1)
            for number in range(rounds):
                _wait_for_disk(engine)
                asked = [*conversation, *questions[2 * number]]
                seconds["disk"].append(_turn(engine, stepper, asked, SESSION))
                answer = stepper.token_ids
                seconds["host"].append(_turn(engine, stepper, [*conversation, *questions[2 * number + 1]], SESSION))
                if engine.sessions.counts.restored_tokens != 2 * (number + 1) * resumable:
                    raise RuntimeError(f"a turn was not resumed as it should be: {engine.sessions.counts}")
                seconds["cold"].append(_turn(engine, stepper, asked, ""))
                if stepper.token_ids != answer:
                    raise RuntimeError(f"resumed: {answer}; cold: {stepper.token_ids}")
                said = ", ".join(f"{kind} {seconds[kind][-1]:.3f} s" for kind in KINDS)
                console.print(f"round {number + 1}: {said}")
        finally:
            stepper.stop()
        disk = engine.disk_counts
    return {
        "machine": machine,
        "model": model,
        "prompt_tokens": prompt_tokens,
        "answer_tokens": ANSWER_TOKENS,
        "question_tokens": question_tokens,
        "resumed_tokens": resumable,
        "session_bytes": session_bytes,
        "disk_read_bytes_per_s": round(disk.read_bytes / disk.read_s) if disk and disk.read_s else None,
        "first_turn_s": round(first_s, 4),
        "first_token_s": {kind: round(statistics.median(times), 4) for kind, times in seconds.items()},
        "times_sooner": {
            kind: round(
                statistics.median(cold / mine for mine, cold in zip(seconds[kind], seconds["cold"], strict=True)), 2
            )
            for kind in KINDS
        },
        "turns_s": {kind: [round(time_s, 4) for time_s in times] for kind, times in seconds.items()},
    }


def _engine(loaded: LoadedModel, tokens: int, threads: int, folder: Path) -> Engine:
    """An engine with room for two such conversations on each tier."""
    shape = cache_shape(loaded.model.config, torch.float32)
    row_bytes = shape.layers * shape.kv_heads * shape.block_bytes(Format.RAW)
    budget = 2 * (tokens // BLOCK_TOKENS + 8) * row_bytes
    settings = WorkerSettings(
        name="bench",
        model=Path(loaded.name),
        device_budget_bytes=budget,
        host_budget_bytes=budget,
        disk_folder=folder,
        disk_budget_bytes=2 * budget,
        session_host_s=HOST_S,
        threads=threads,
    )
    return Engine(settings, loaded)


def _turn(engine: Engine, stepper: Stepper, token_ids: list[int], session_id: str) -> float:
    """Seconds to the first token of a turn, which is then waited out."""
    engine.forget_prefixes()
    began = time.perf_counter()
    stepper.begin(token_ids, "", ANSWER_TOKENS, session_id)
    first = stepper.times(1)[0]
    stepper.times()
    return first - began


def _wait_for_disk(engine: Engine) -> None:
    """Until all of the session is on disk and none on the host."""
    deadline = time.monotonic() + _PATIENCE_S
    while engine.sessions.host_bytes or not engine.sessions.disk_bytes:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the session is not on disk after {_PATIENCE_S:.0f} s")
        time.sleep(_LOOK_S)


def render(report: dict[str, Any]) -> Table:
    """The figures for people."""
    machine = report["machine"]
    conversation = report["prompt_tokens"] + report["answer_tokens"]
    table = Table(
        title=(
            f"A session's next turn: {conversation} tokens of conversation, {report['question_tokens']} new ones,"
            f" {report['model']}, float32\n{machine['cpu']}, {machine['threads_used']} of {machine['cores']} cores,"
            f" {machine['memory_bytes'] / 2**30:.0f} GiB; torch {machine['torch']}"
        ),
        caption=(
            f"medians of {len(report['turns_s']['cold'])} turns, and of the ratios within a round;"
            f" {report['resumed_tokens']} tokens resumed, {report['session_bytes'] / 2**20:.0f} MiB"
            + busy_note(machine)
        ),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    for place, column in enumerate(("resumed from", "first token, s", "sooner than cold")):
        table.add_column(column, justify="right" if place else "left")
    names = {"host": "host tier", "disk": "disk", "cold": "nothing (cold)"}
    for kind, name in names.items():
        table.add_row(name, f"{report['first_token_s'][kind]:.3f}", f"{report['times_sooner'][kind]:.1f}x")
    return table
