"""Timing things that share a machine in turn, so that a drift of the machine meets them all."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from bench.kernel_cache import empty

Times: TypeAlias = dict[str, list[float]]
"""Seconds of each round, by contestant; entry i of all of them is of the same round."""
WARM_UP_ROUNDS = 2


@dataclass(frozen=True)
class Contestant:
    """Something that is timed."""

    run: Callable[[], object]
    prepare: Callable[[], object] | None = None
    """Called before every run and timed apart."""


def time_in_turn(contestants: dict[str, Contestant], repeats: int, device: torch.device) -> tuple[Times, Times]:
    """Runs all of them once a round: A B C, B C A, ... Rounds to warm up come first and are not counted.

    Returns:
        Seconds of ``run`` and of ``prepare`` (0 where there is none).
    """
    names = list(contestants)
    runs: Times = {name: [] for name in names}
    preparations: Times = {name: [] for name in names}
    for number in range(-WARM_UP_ROUNDS, repeats):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            one = contestants[name]
            prepare_s = elapsed_s(one.prepare, device) if one.prepare else 0.0
            run_s = elapsed_s(one.run, device)
            if number >= 0:
                preparations[name].append(prepare_s)
                runs[name].append(run_s)
    return runs, preparations


def elapsed_s(run: Callable[[], object], device: torch.device) -> float:
    """Seconds a call takes: on a GPU between two events of its stream, with the stream empty at the start."""
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    torch.cuda.synchronize(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(end)) / 1000


class Bandwidth:
    """The machine's own memory, by torch: a copy, and a sum, over buffers of ``size_bytes`` each."""

    def __init__(self, size_bytes: int, device: torch.device) -> None:
        count = max(1, size_bytes // 4)
        self._from = empty((count,), torch.float32, device).fill_(1)  # memory never written is not there to be read
        self._to = empty((count,), torch.float32, device).fill_(1)
        self.read_bytes = 4 * count
        self.copy_bytes = 2 * self.read_bytes  # read and written

    def copy(self) -> None:
        """Reads and writes ``copy_bytes`` together."""
        self._to.copy_(self._from)

    def read(self) -> torch.Tensor:
        """Reads ``read_bytes``."""
        return self._from.sum()
