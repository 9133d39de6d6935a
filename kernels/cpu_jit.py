"""How this package uses Numba: typed decorators whose cache notices every change of the kernels' source."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numba
from numba.extending import intrinsic as numba_intrinsic

P = ParamSpec("P")
R = TypeVar("R")

Float = Any  # numpy.float32, of whose arithmetic mypy makes Any
Array = Any  # numpy arrays of the types that kernels.api names


def _sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("cpu*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_SOURCES = _sources()


def _compiled(function: Callable[P, R], **options: Any) -> Callable[P, R]:
    dispatcher: Any = numba.njit(function, cache=True, nogil=True, error_model="numpy", **options)
    # Numba dates a cached function by its own file alone, and so would go on using one whose callees have changed.
    dispatcher._cache._cache_file._source_stamp = _SOURCES
    typed: Callable[P, R] = dispatcher
    return typed


def intrinsic(function: Callable[..., Any]) -> Any:
    """Makes a Numba function of one that returns its signature and a generator of its LLVM IR."""
    return numba_intrinsic(function)


def jit(function: Callable[P, R]) -> Callable[P, R]:
    """Compiles a function for one thread; its arithmetic is that of IEEE 754, operation by operation."""
    return _compiled(function)


def fast_jit(function: Callable[P, R]) -> Callable[P, R]:
    """As ``jit``, but sums may be reordered and NaNs neglected, which lets LLVM use vectors for reductions."""
    return _compiled(function, fastmath={"reassoc", "contract", "nsz", "nnan"})
