"""skops' reader and writer, without torch.

To list the estimators that it trusts, skops imports all of scikit-learn when it is imported itself, adapters for other
array libraries included, and these import torch where it is installed: seconds, and hundreds of megabytes, in a
controller that needs none of it. A name that ``sys.modules`` maps to None cannot be imported, which the adapters allow
for.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def _hidden(*names: str) -> Iterator[None]:
    hidden = [name for name in names if name not in sys.modules]
    modules: dict[str, Any] = sys.modules
    modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            del modules[name]


with _hidden("torch", "cupy", "jax", "dask"):
    from skops.io import dumps, get_untrusted_types, loads

__all__ = ["dumps", "get_untrusted_types", "loads"]
