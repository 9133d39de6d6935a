"""Choosing a kernel backend by name."""

from __future__ import annotations

import torch

from kernels.api import Backend, Tables
from kernels.cpu import CpuBackend
from kernels.layout import CacheShape
from kernels.reference import ReferenceBackend

BACKENDS: dict[str, type[CpuBackend] | type[ReferenceBackend]] = {"cpu": CpuBackend, "reference": ReferenceBackend}


def make_backend(name: str, shape: CacheShape, arenas: tuple[torch.Tensor, ...], tables: Tables) -> Backend:
    """Builds the backend called ``name``; ``auto`` is ``cpu`` where all arenas are in RAM, else ``reference``.

    Raises:
        ValueError: for an unknown name, or arenas that the backend cannot use.
    """
    if name == "auto":
        name = "cpu" if all(arena.device.type == "cpu" for arena in arenas) else "reference"
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r}: must be one of {', '.join(['auto', *BACKENDS])}")
    return BACKENDS[name](shape, arenas, tables)
