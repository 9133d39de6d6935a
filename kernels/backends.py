"""Choosing a kernel backend by name."""

from __future__ import annotations

import importlib.util

import torch

from kernels.api import Backend, Tables
from kernels.cpu import CpuBackend
from kernels.layout import CacheShape
from kernels.reference import ReferenceBackend

NAMES = ("cpu", "reference", "triton")


def make_backend(name: str, shape: CacheShape, arenas: tuple[torch.Tensor, ...], tables: Tables) -> Backend:
    """Builds the backend called ``name``; ``auto`` is :func:`best_for` these arenas.

    Raises:
        ValueError: for an unknown name, or arenas that the backend cannot use.
        ImportError: for ``triton`` where it is not installed.
    """
    if name == "auto":
        name = best_for(arenas)
    if name == "cpu":
        return CpuBackend(shape, arenas, tables)
    if name == "reference":
        return ReferenceBackend(shape, arenas, tables)
    if name == "triton":
        from kernels.triton_backend import TritonBackend  # not everywhere installed: wheels are for Linux only

        return TritonBackend(shape, arenas, tables)
    raise ValueError(f"backend {name!r}: must be one of {', '.join(['auto', *NAMES])}")


def best_for(arenas: tuple[torch.Tensor, ...]) -> str:
    """The fastest backend that can use these arenas: ``cpu`` in RAM, ``triton`` on CUDA, else ``reference``."""
    if all(arena.device.type == "cpu" for arena in arenas):
        return "cpu"
    if arenas[0].device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        return "triton"
    return "reference"
