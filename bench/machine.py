"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import TypeAlias

Machine: TypeAlias = dict[str, str | int | float]


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


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
