"""A model's attention modules, called with inputs of one's own up to where they have made queries, keys and values.

Works for any model that kvpilot serves, since what is called is the model's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from workers.engine.attention import STEP_ARGUMENT

Given = Callable[[int, tuple[Any, ...], dict[str, Any]], None]
Made = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def attention_modules(model: torch.nn.Module) -> dict[int, torch.nn.Module]:
    """The modules that attend, by layer."""
    # a module comes before those inside it: the innermost that knows its layer is the one that attends
    return {
        int(module.layer_idx): module  # type: ignore[arg-type]
        for module in model.modules()
        if hasattr(module, "layer_idx")
    }


def made_by(module: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Made:
    """Queries [B, query_heads, S, D], keys and values [B, kv_heads, S, D], rotated, that a module makes of arguments.

    Raises:
        RuntimeError: it did not come to attend.
    """
    try:
        module(*args, **{**kwargs, STEP_ARGUMENT: _Stop()})
    except _MadeError as made:
        return made.made
    raise RuntimeError(f"attention of layer {module.layer_idx} did not attend")


def watch(modules: Mapping[int, torch.nn.Module], given: Given) -> list[RemovableHandle]:
    """Has ``given`` told of a layer and the arguments that its module is called with, but for :func:`made_by`."""

    def tell(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not isinstance(kwargs.get(STEP_ARGUMENT), _Stop):
            given(int(module.layer_idx), args, kwargs)  # type: ignore[arg-type]

    return [module.register_forward_pre_hook(tell, with_kwargs=True) for module in modules.values()]


class _MadeError(Exception):
    def __init__(self, made: Made) -> None:
        self.made = made


class _Stop:
    """Attention that goes no further than what it is given."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
        raise _MadeError((q, k, v))
