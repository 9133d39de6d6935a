"""How this package uses Numba: typed decorators whose cache notices every change of the kernels' source."""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Callable
from functools import wraps
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
    share(dispatcher._cache._cache_file)
    typed: Callable[P, R] = dispatcher
    return typed


def share(cache_file: Any) -> None:
    """Lets processes that compile at once have a cache in common.

    Numba reads a function's index, adds to it, and writes index and code as two files: two processes that do so at once
    give two variants the same file, and run one as if it were the other.
    """
    lock = Path(cache_file._cache_path) / "kernels.lock"
    cache_file.load, cache_file.save = _alone(cache_file.load, lock), _alone(cache_file.save, lock)


def _alone(method: Callable[P, R], lock: Path) -> Callable[P, R]:
    @wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with lock.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            return method(*args, **kwargs)

    return call


def intrinsic(function: Callable[..., Any]) -> Any:
    """Makes a Numba function of one that returns its signature and a generator of its LLVM IR."""
    return numba_intrinsic(function)


def jit(function: Callable[P, R]) -> Callable[P, R]:
    """Compiles a function for one thread; its arithmetic is that of IEEE 754, operation by operation."""
    return _compiled(function)


def fast_jit(function: Callable[P, R]) -> Callable[P, R]:
    """As ``jit``, but sums may be reordered and NaNs neglected, which lets LLVM use vectors for reductions."""
    return _compiled(function, fastmath={"reassoc", "contract", "nsz", "nnan"})
