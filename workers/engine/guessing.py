"""Guesses of a layer's queries before it runs: from what the layer before attends with.

Between two layers a model adds little to its hidden states, so what goes into one layer's attention, sent through the
next layer's query projection, gives about what that layer will ask (InfiniGen, arXiv 2406.19707).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from workers.engine.attention import STEP_ARGUMENT


class QueryGuesser:
    """Calls the next layer's attention module with this layer's input, up to where it has made its queries.

    Works for any model that kvpilot serves, since what is called is the model's own code; the keys and values that it
    makes beside the queries are thrown away.

    Args:
        model: a transformers model.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        # a module comes before those inside it: the innermost that knows its layer is the one that attends
        self._modules: dict[int, torch.nn.Module] = {
            int(module.layer_idx): module  # type: ignore[arg-type]
            for module in model.modules()
            if hasattr(module, "layer_idx")
        }
        self._called: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Has an eye on what the model's layers attend with."""
        hooks = [module.register_forward_pre_hook(self._note, with_kwargs=True) for module in self._modules.values()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._called = ((), {})

    def next_queries(self, layer: int) -> torch.Tensor | None:
        """While a layer attends: the guess [B, query_heads, S, D] of the next one's queries; None behind the last."""
        module, (args, kwargs) = self._modules.get(layer + 1), self._called
        if module is None:
            return None
        try:
            module(*args, **kwargs | {STEP_ARGUMENT: _Stop()})
        except _QueriesMadeError as made:
            return made.q
        raise RuntimeError(f"attention of layer {layer + 1} did not attend")

    def _note(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not isinstance(kwargs.get(STEP_ARGUMENT), _Stop):
            self._called = (args, kwargs)


class _QueriesMadeError(Exception):
    def __init__(self, q: torch.Tensor) -> None:
        self.q = q


class _Stop:
    """Attention that goes no further than its queries."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
        raise _QueriesMadeError(q)
