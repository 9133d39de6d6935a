"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import TypeAlias

Machine: TypeAlias = dict[str, str | int | float]
BUSY = 0.5
"""Load average per core before the start from which the figures say more about the other work."""


def describe_machine(threads: int) -> Machine:
    """CPU, cores, memory, the versions that matter, and how busy it is now with other work."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 1,
        "threads_used": threads,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "transformers": metadata.version("transformers"),
        "kvpilot": metadata.version("kvpilot"),
    }


def busy_note(machine: Machine) -> str:
    """A line for a report where other work kept the machine busy; empty where it did not."""
    load, cores = float(machine["load_average"]), int(machine["cores"])
    if load <= BUSY * cores:
        return ""
    return f"\nNOT TO BE RELIED ON: other work kept the machine busy before the start (load average {load})"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
