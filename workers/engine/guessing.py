"""Guesses of a layer's queries before it runs: from what the layer before attends with.

Between two layers a model adds little to its hidden states, so what goes into one layer's attention, sent through the
next layer's query projection, gives about what that layer will ask (InfiniGen, arXiv 2406.19707).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from workers.engine.modules import attention_modules, made_by, watch


class QueryGuesser:
    """Calls the next layer's attention module with this layer's input, up to where it has made its queries.

    The keys and values that it makes beside the queries are thrown away.

    Args:
        model: a transformers model.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._modules = attention_modules(model)
        self._called: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Has an eye on what the model's layers attend with."""
        hooks = watch(self._modules, self._note)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._called = ((), {})

    def next_queries(self, layer: int) -> torch.Tensor | None:
        """While a layer attends: the guess [B, query_heads, S, D] of the next one's queries; None behind the last."""
        module = self._modules.get(layer + 1)
        return None if module is None else made_by(module, *self._called)[0]

    def _note(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._called = (args, kwargs)
