"""The kernels beside the machine's memory and beside torch: decode attention per backend, format and context length.

Attention of one token reads every key and value once and computes little, so the speed of a good kernel is that of the
memory, and quantised blocks are worth what they leave unread. In each round of one run, in turn: the kernel with every
format; torch's ``scaled_dot_product_attention`` in two forms over the same numbers; a copy and a sum for the memory.

Each pass walks over the layers of a cache, ours and the peers' alike, so many that the smallest format's blocks are
several times the last level cache. Planning (host decisions once a step) is timed apart from the kernel. What a format
switch stalls a request for is measured beside the attention of its decode step.

With OMP_WAIT_POLICY unset, OpenMP's threads (torch's, which our kernels use too) spin between calls; where other work
holds a core, all times are then multiples of the scheduler's slice. Where that cannot be helped, set it to ``passive``.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console

from bench.kernel_cache import BlockCache, Case, LayerData, grouped_attention, make_data, packed_attention
from bench.kernel_report import COPY, READ, Report, Skipped, make_row, make_switch, markdown, render
from bench.kernel_timing import Bandwidth, Contestant, time_in_turn
from bench.machine import Machine, describe_machine
from cli.errors import BadInputError, FailedError
from kernels.api import Tables
from kernels.backends import best_for, make_backend
from kernels.layout import UNIT_BYTES, CacheShape, Format

CONTEXTS = {"cpu": (2048, 8192), "cuda": (8192, 32768)}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CACHES_WALKED = 4
"""Last level caches that a pass walks over, by default."""
USUAL_CACHE_BYTES = 32 * 2**20
"""Taken for the last level cache where the system does not tell."""
MEMORY_SHARE = 0.8
"""Of the machine's memory, which the benchmark may take."""
SWITCH_LAYERS = 30
"""SmolLM2-135M's; its KV heads and head_dim are the defaults of Settings."""
UNSUPPORTED = (ValueError, NotImplementedError, KeyError)
"""What a backend may raise for a format that it does not do."""

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What is measured. Empty or None: this machine's default."""

    backends: tuple[str, ...] = ()
    formats: tuple[Format, ...] = tuple(Format)
    contexts: tuple[int, ...] = ()
    batch: int = 4
    kv_heads: int = 3
    queries_per_kv_head: int = 3
    head_dim: int = 64
    dtype: str = "float32"
    repeats: int = 7
    switch_tokens: int = 4096
    """0: no switches."""
    walk_bytes: int | None = None
    """Least bytes of blocks of a pass; None: CACHES_WALKED last level caches."""
    threads: int | None = None
    device: str | None = None

    def shape(self, layers: int) -> CacheShape:
        """A cache of this many layers."""
        heads = self.kv_heads * self.queries_per_kv_head
        return CacheShape(layers, self.kv_heads, heads, self.head_dim, DTYPES[self.dtype])


def bench(settings: Settings, json_file: Path | None, markdown_file: Path | None, plot_file: Path | None) -> None:
    """Runs the benchmark, prints it, and writes it to the files.

    Args:
        settings: what to measure.
        json_file: gets the report's document.
        markdown_file: gets the tables as Markdown; ``-``: they are printed, instead of the others.
        plot_file: gets a picture, PNG.

    Raises:
        BadInputError: for sizes or names that cannot be measured here.
        FailedError: if a kernel computes something else than torch.
    """
    instead = markdown_file is not None and str(markdown_file) == "-"
    console = Console(highlight=False, stderr=instead)
    report = measure(settings, console)
    if instead:
        print(markdown(report), end="")
    else:
        console.print(*render(report), sep="\n")
    if markdown_file is not None and not instead:
        markdown_file.write_text(markdown(report), encoding="utf-8")
    if json_file is not None:
        json_file.write_text(json.dumps(report.document(), indent=2) + "\n", encoding="utf-8")
    if plot_file is not None:
        from bench.kernel_plot import plot

        plot_file.write_bytes(plot(report))


def measure(settings: Settings, console: Console) -> Report:
    """See :func:`bench`; ``console`` is told how far it is."""
    device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in CONTEXTS or (device.type == "cuda" and not torch.cuda.is_available()):
        raise BadInputError(f"--device {device}: must be one of {', '.join(CONTEXTS)} that torch finds here")
    threads_before = torch.get_num_threads()
    threads = settings.threads or os.cpu_count() or 1
    contexts = settings.contexts or CONTEXTS[device.type]
    walk_bytes = settings.walk_bytes or CACHES_WALKED * last_cache_bytes(device)
    machine = describe_machine(threads) | {"last_cache_bytes": last_cache_bytes(device)}
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    try:
        torch.set_num_threads(threads)
        cases = [_make_case(settings, context, walk_bytes, device) for context in contexts]
        backends = [_check_backend(name, settings, device) for name in settings.backends or ("auto",)]
        report = _empty_report(settings, machine, walk_bytes, device)
        with torch.inference_mode():
            bandwidth = Bandwidth(walk_bytes, device)
            for case in cases:
                data = make_data(case)
                for backend in backends:
                    console.print(
                        f"{backend}, context {case.context_tokens}: {case.shape.layers} layers, "
                        f"{case.raw_bytes * case.shape.layers / 2**20:.0f} MiB of raw K and V"
                    )
                    _measure_attention(report, backend, settings, case, data, bandwidth)
                del data
            if settings.switch_tokens:
                for backend in backends:
                    console.print(f"{backend}: format switches of {settings.switch_tokens} tokens")
                    _measure_switches(report, backend, settings, device)
    finally:
        torch.set_num_threads(threads_before)
    return report


def _measure_attention(
    report: Report, backend: str, settings: Settings, case: Case, data: list[LayerData], bandwidth: Bandwidth
) -> None:
    """Adds a row for each format that the backend does."""
    caches: dict[Format, BlockCache] = {}
    for fmt in settings.formats:
        made = _if_supported(report, backend, case, data, fmt)
        if made is not None:
            caches[fmt] = made
    differences = {fmt: _difference(backend, cache) for fmt, cache in caches.items()}
    contestants = {
        "packed": Contestant(lambda: [packed_attention(layer.q, layer.k, layer.v) for layer in data]),
        "gqa": Contestant(lambda: [grouped_attention(layer.q, layer.k, layer.v) for layer in data]),
        COPY: Contestant(bandwidth.copy),
        READ: Contestant(bandwidth.read),
        **{fmt.name: Contestant(cache.step, cache.plan) for fmt, cache in caches.items()},
    }
    runs, plans = time_in_turn(contestants, settings.repeats, case.device)
    counted = {COPY: bandwidth.copy_bytes, READ: bandwidth.read_bytes}
    for fmt in caches:
        report.rows.append(make_row(case, backend, fmt, runs, plans, counted, differences[fmt]))


def _measure_switches(report: Report, backend: str, settings: Settings, device: torch.device) -> None:
    """Adds raw to every other format and back, each beside the decode step of the format switched from."""
    case = _checked(lambda: Case(settings.shape(SWITCH_LAYERS), 1, settings.switch_tokens, device))
    data = make_data(case)
    skipped = {one.format for one in report.skipped if one.backend == backend}
    others = tuple(fmt for fmt in settings.formats if fmt is not Format.RAW and fmt.name.lower() not in skipped)
    caches = {Format.RAW: BlockCache(backend, case, data, Format.RAW, others)}
    caches |= {fmt: BlockCache(backend, case, data, fmt, (Format.RAW,)) for fmt in others}
    pairs = [pair for fmt in others for pair in ((Format.RAW, fmt), (fmt, Format.RAW))]
    steps = {fmt.name: Contestant(cache.step, cache.plan) for fmt, cache in caches.items()}
    switches = {f"{start.name} {to.name}": Contestant(partial(caches[start].transcode, to)) for start, to in pairs}
    runs, _ = time_in_turn(steps | switches, settings.repeats, device)
    for start, to in pairs:
        made = make_switch(case, backend, start, to, runs[f"{start.name} {to.name}"], runs[start.name])
        report.switches.append(made)


def _if_supported(report: Report, backend: str, case: Case, data: list[LayerData], fmt: Format) -> BlockCache | None:
    """A cache of the format; None, and a note in the report, if the backend refuses it."""
    try:
        return BlockCache(backend, case, data, fmt)
    except UNSUPPORTED as error:
        if fmt is Format.RAW:  # a backend that does nothing at all
            raise BadInputError(f"backend {backend}: {error}") from error
        one = Skipped(backend, fmt.name.lower(), str(error) or type(error).__name__)
        if one not in report.skipped:
            report.skipped.append(one)
        return None


def _difference(backend: str, cache: BlockCache) -> float:
    try:
        return cache.difference()
    except RuntimeError as error:
        raise FailedError(f"backend {backend}: {error}") from error


def _make_case(settings: Settings, context: int, walk_bytes: int, device: torch.device) -> Case:
    """As many layers as it takes for the smallest format's blocks to be ``walk_bytes``."""
    one = _checked(lambda: Case(settings.shape(1), settings.batch, context, device))
    layers = math.ceil(walk_bytes / min(one.block_bytes(fmt) for fmt in settings.formats))
    needed = layers * (one.raw_bytes + sum(one.block_bytes(fmt) for fmt in settings.formats)) + 2 * walk_bytes
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > MEMORY_SHARE * there:
        raise BadInputError(
            f"context {context}, batch {settings.batch}: needs {needed / 2**30:.1f} GiB of {there / 2**30:.1f} GiB; "
            "a smaller --context, --batch or --walk-mib, or fewer --formats, need less"
        )
    return Case(settings.shape(layers), settings.batch, context, device)


def _check_backend(name: str, settings: Settings, device: torch.device) -> str:
    """Warms the backend up, which refuses unknown names and devices; its own name where ``auto`` was asked for."""

    def make() -> str:
        shape = settings.shape(1)
        host = torch.zeros(UNIT_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
        arenas = (torch.zeros(UNIT_BYTES, dtype=torch.uint8, device=device), host)
        backend = make_backend(name, shape, arenas, Tables.allocate(1, shape, 1))
        backend.warm_up()
        return best_for(arenas) if name == "auto" else name

    return _checked(make)


def _checked(make: Callable[[], T]) -> T:
    """What ``make`` makes; what it refuses is the command line's fault."""
    try:
        return make()
    except ValueError as error:
        raise BadInputError(str(error)) from error


def last_cache_bytes(device: torch.device) -> int:
    """The GPU's L2, or the largest cache of the first core; USUAL_CACHE_BYTES where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [file.read_text().strip() for file in files]
    units = {"K": 2**10, "M": 2**20}
    found = [int(size[:-1]) * units[size[-1]] for size in sizes if size[:-1].isdigit() and size[-1] in units]
    return max(found, default=USUAL_CACHE_BYTES)


def formats_of(text: str | None) -> tuple[Format, ...]:
    """The formats of a list such as ``raw,int8``, each once; None: all.

    Raises:
        BadInputError: for a word that is none.
    """
    names = {fmt.name.lower(): fmt for fmt in Format}
    words = list(names) if text is None else [word.strip().lower() for word in text.split(",")]
    for word in words:
        if word not in names:
            raise BadInputError(f"--formats {word!r}: must be some of {', '.join(names)}")
    return tuple(dict.fromkeys(names[word] for word in words))


def _empty_report(settings: Settings, machine: Machine, walk_bytes: int, device: torch.device) -> Report:
    chosen = {
        "device": str(device),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "unset"),
        "dtype": settings.dtype,
        "batch": settings.batch,
        "kv_heads": settings.kv_heads,
        "queries_per_kv_head": settings.queries_per_kv_head,
        "head_dim": settings.head_dim,
        "formats": [fmt.name.lower() for fmt in settings.formats],
        "repeats": settings.repeats,
        "walk_bytes": walk_bytes,
        "switch_tokens": settings.switch_tokens,
        "switch_layers": SWITCH_LAYERS,
    }
    return Report(machine, chosen)
