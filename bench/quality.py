"""What every cache stage and recipe costs in quality, at how many bytes: four tables, on one model in this process.

A prompt is computed once with the full cache; each pipeline is put in force on a fork of it, and what follows is scored
behind the fork and behind the full cache. Long generations and conversations are decoded step by step, many forks as
one batch, with evictors at work as in the engine. ``bench.quality_tables`` has the four, ``bench.quality_subjects``
what is measured at which share of the bytes, ``bench.quality_tasks`` the texts. The pipelines are shared out to several
processes, each with a model and a cache of its own: small forwards keep one core busy, not two.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import import_module
from itertools import groupby, zip_longest
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numba
import torch
from rich.console import Console

from bench.machine import describe_machine
from bench.quality_lab import Clock
from bench.quality_report import Report, render, summary
from bench.quality_rows import Row, Table
from bench.quality_subjects import Subject, all_subjects
from bench.quality_tables import FULL_SIZES, QUICK_SIZES, Sizes, Tables
from bench.quality_tasks import Words, conversations, long_answers, needles, texts
from cli import tether
from cli.errors import BadInputError, FailedError
from cli.profile import make
from kvpilot.log import LogFormat, LogLevel, configure_logging
from models import store
from models.profiles import ProfileError
from workers.engine.attention import cache_shape
from workers.engine.runner import LoadedModel, load_model
from workers.profile.files import save

PROFILE_TOKENS = 4096
"""Of text, for the profile of a model that has none yet."""


@dataclass(frozen=True)
class Files:
    """What is written. None: nothing."""

    json: Path | None = None
    html: Path | None = None
    plot: Path | None = None


@dataclass(frozen=True)
class Part:
    """What one of several processes measures: a share of the pipelines, and the full cache."""

    index: int = 0
    of: int = 1

    def share(self, subjects: Sequence[Subject]) -> list[Subject]:
        """Its own of all subjects, of which the first is the full cache. One name's stay together: what the model must
        do for the first of them, such as repeating a text, need not be done again."""
        names = list(dict.fromkeys(subject.name for subject in subjects[1:]))
        mine = names[self.index :: self.of]
        return [subjects[0], *(subject for subject in subjects[1:] if subject.name in mine)]


_WHOLE = Part()


def bench(quick: bool, model: str | None, only: Sequence[str], files: Files, processes: int | None = None) -> None:
    """Runs the benchmark, prints it, and writes it to the files.

    Args:
        quick: fewer and shorter texts.
        model: name or folder; None: the default.
        only: names of stages, recipes and combinations; empty: all.
        files: to write.
        processes: among which the pipelines are shared out; None: one a core.

    Raises:
        BadInputError: a name that is no stage, recipe or combination, a model that lacks what is needed, or a file that
            cannot be written.
        FailedError: a pipeline raised; everything was printed and written all the same.
    """
    configure_logging(LogLevel.WARNING, LogFormat.AUTO)
    import_module("transformers.utils.logging").disable_progress_bar()
    for option, file in asdict(files).items():
        if file is not None and not file.absolute().parent.is_dir():
            raise BadInputError(f"--{option}: {str(file)!r} given; accepted: a file in a folder that exists")
    folder = store.resolve(model or store.DEFAULT_MODEL)
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    processes = processes or threads
    torch.set_num_threads(threads)
    said = Console(stderr=True, highlight=False)
    with said.status("loading the model"):
        loaded = load_model(folder, store.model_name(folder), torch.device("cpu"), torch.float32)
    if loaded.profile is None:
        loaded = _profiled(loaded, folder, said)
    words = ["kvpilot", "bench", "quality", *(["--quick"] if quick else []), *(["--model", model] if model else [])]
    words += [word for name in only for word in ("--only", name)]
    words += ["--processes", str(processes)] if processes != threads else []
    sizes = QUICK_SIZES if quick else FULL_SIZES
    report = _measure_together(loaded, folder, sizes, only, shlex.join(words), said, processes)
    console = Console(highlight=False)
    for table in Table:
        console.print(*render(report, table), sep="\n")
    console.print(summary(report), markup=False)
    write(report, files)
    if report.failed:
        names = ", ".join(dict.fromkeys(f"{row.label} ({row.table})" for row in report.failed))
        raise FailedError(f"{len(report.failed)} of {len(report.rows)} rows are errors: {names}")


def _measure_together(
    loaded: LoadedModel,
    folder: Path,
    sizes: Sizes,
    only: Sequence[str],
    command: str,
    said: Console,
    processes: int,
) -> Report:
    """The report, by this process or by several others; arguments as for :func:`measure`."""
    if processes == 1:
        return measure(loaded, sizes, only, command, said)
    began, threads = time.perf_counter(), max(1, torch.get_num_threads() // processes)
    with (
        _environment(OMP_NUM_THREADS=str(threads), OMP_WAIT_POLICY="passive"),
        ProcessPoolExecutor(processes, get_context("spawn"), _tied, (os.getpid(),)) as pool,
    ):
        parts = [
            pool.submit(_measure_part, folder, sizes, only, command, Part(index, processes))
            for index in range(processes)
        ]
        report = joined([part.result() for part in parts])
    report.machine, report.seconds = describe_machine(torch.get_num_threads()), time.perf_counter() - began
    return report


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Sets variables for the processes that are started meanwhile. Threads are counted before torch is loaded there:
    counted down later, its own go on waiting for work at the cost of the other processes."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _tied(parent: int) -> None:
    """A process of several does not outlive the one that gathers their rows."""
    if tether.SUPPORTED:
        tether.tether(parent)


def _measure_part(folder: Path, sizes: Sizes, only: Sequence[str], command: str, part: Part) -> Report:
    """One process's share; the first one tells how far it is."""
    configure_logging(LogLevel.WARNING, LogFormat.AUTO)
    import_module("transformers.utils.logging").disable_progress_bar()
    threads = int(os.environ["OMP_NUM_THREADS"])
    torch.set_num_threads(threads)
    numba.set_num_threads(min(threads, numba.get_num_threads()))
    loaded = load_model(folder, store.model_name(folder), torch.device("cpu"), torch.float32)
    said = Console(stderr=True, quiet=part.index > 0, highlight=False)
    return measure(loaded, sizes, only, command, said, part)


def joined(parts: Sequence[Report]) -> Report:
    """One report of what parts 0, 1, ... have measured: rows in the order of one process, seconds spent by all."""
    tables = [groupby(report.rows, lambda row: (row.table, row.context, row.query_aware)) for report in parts]
    rows: list[Row] = []
    for of_table in zip(*([list(rows) for _, rows in table] for table in tables), strict=True):
        rows.append(of_table[0][0])  # the full cache
        by_name = [[list(own) for _, own in groupby(rows[1:], lambda row: row.name)] for rows in of_table]
        rows += [row for turn in zip_longest(*by_name, fillvalue=()) for own in turn for row in own]
    spent: Counter[str] = Counter()
    for report in parts:
        spent.update(report.spent)
    return replace(parts[0], rows=rows, spent=dict(spent), settings=parts[0].settings | {"processes": len(parts)})


def measure(
    loaded: LoadedModel, sizes: Sizes, only: Sequence[str], command: str, said: Console, part: Part = _WHOLE
) -> Report:
    """The report.

    Args:
        loaded: the model.
        sizes: what is measured; lengths that the model's context does not hold are left out.
        only: names of stages, recipes and combinations beside the full cache; empty: all.
        command: for the report's head.
        said: is told how far it is.
        part: of the pipelines.

    Raises:
        BadInputError: see :func:`bench`.
    """
    began = time.perf_counter()
    sizes = _fitting(sizes, loaded)
    shape = cache_shape(loaded.model.config, next(loaded.model.parameters()).dtype)
    try:
        subjects = all_subjects(shape, only, loaded.profile)
    except KeyError as error:
        raise BadInputError(f"--only: {error.args[0]}") from None
    clock, tokens = Clock(), Words(loaded)
    report = Report(
        describe_machine(torch.get_num_threads()),
        loaded.name,
        datetime.now(UTC).date().isoformat(),
        command,
        asdict(sizes) | {"subjects": len(subjects)},
    )
    with said.status(f"{len(subjects)} pipelines") as status:

        def say(what: str) -> None:
            status.update(what)
            said.print(f"{time.perf_counter() - began:6.0f} s  {what}", markup=False)

        with clock("finding texts"):
            lengths = [length for length in sizes.contexts if length <= sizes.text_tokens]
            found = texts(tokens, sizes.texts, max(lengths) + sizes.horizon + 1)
            stacks = [
                stack for length in sizes.contexts for stack in needles(tokens, sizes.haystacks, sizes.needles, length)
            ]
            chats = conversations(tokens, sizes.conversations, sizes.turn_tokens)
            prompts = long_answers(tokens, sizes.prompts, sizes.prompt_tokens)
        report.settings["sources"] = {
            "text": [text.name for text in found],
            "retrieval": [stack.name for stack in stacks],
            "conversation": [chat.name for chat in chats],
            "generation": [prompt.name for prompt in prompts],
        }
        tables = Tables(loaded, part.share(subjects), clock, say)
        report.rows += tables.text(found, lengths, sizes.horizon)
        report.rows += tables.retrieval(stacks, sizes.asked)
        report.rows += tables.conversation(chats)
        report.rows += tables.generation(prompts, sizes.answer_tokens)
    report.seconds = time.perf_counter() - began
    counted = clock.seconds
    report.spent = counted | {"the rest": report.seconds - sum(counted.values())}
    return report


def write(report: Report, files: Files) -> None:
    """Writes what is asked for."""
    if files.json is not None:
        files.json.write_text(_json(report.document()), encoding="utf-8")
    if files.html is None and files.plot is None:
        return
    from bench.quality_page import page
    from bench.quality_plot import plot

    picture = plot(report)
    if files.plot is not None:
        files.plot.write_bytes(picture)
    if files.html is not None:
        files.html.write_text(page(report, picture), encoding="utf-8")


def _json(document: dict[str, Any]) -> str:
    """As JSON, with one row a line, so that two runs can be compared by line."""
    rows = ",\n  ".join(json.dumps(row, allow_nan=False) for row in document["rows"])
    head = json.dumps(document | {"rows": []}, indent=1, allow_nan=False)
    return head.replace('"rows": []', f'"rows": [\n  {rows}\n ]') + "\n"


def _profiled(loaded: LoadedModel, folder: Path, said: Console) -> LoadedModel:
    """The model with its profile, which some stages need; without one where it cannot have any."""
    with said.status("finding the model's profile, once") as status:
        try:
            profile = make(
                loaded, folder, PROFILE_TOKENS, lambda done, total: status.update(f"profile: {done}/{total}")
            )
        except ProfileError as error:
            said.print(f"no profile, and no figures of stages that need one: {error}", markup=False)
            return loaded
        save(profile)
    return replace(loaded, profile=profile)


def _fitting(sizes: Sizes, loaded: LoadedModel) -> Sizes:
    """The sizes without the lengths that the model's context does not hold."""
    if loaded.tokenizer is None:
        raise BadInputError(f"--model: {loaded.name!r} has no tokenizer; accepted: a model with one")
    spare = 2 * sizes.horizon + 64  # what follows, or a question and its answer
    contexts = tuple(length for length in sizes.contexts if length + spare <= loaded.context_tokens)
    needed = max(min(sizes.contexts) + spare, sizes.prompt_tokens + sizes.answer_tokens, 2 * sizes.turn_tokens)
    if not contexts or needed > loaded.context_tokens:
        raise BadInputError(
            f"--model: {loaded.name!r} has a context of {loaded.context_tokens} tokens; accepted: at least {needed}"
        )
    return replace(sizes, contexts=contexts)
