"""Keys and values made again from what a layer's attention was given for them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from models.profiles import ProfileError
from workers.engine.attention import Attend
from workers.engine.modules import attention_modules, made_by, watch
from workers.profile.rotary import rotary_embedding

_POSITIONS = (0, 5, 31, 64)
"""Of the tokens that tell whether it works."""
_MOST_DEVIATION = 0.02

Run = Callable[[list[list[int]], list[list[int]], Attend, int], object]
"""A forward pass of token ids and positions [B, S], with so many of the last logits."""


class ModelRemaker:
    """Calls a layer's attention module with inputs that were noted, at their positions, up to where it has made keys
    and values: projections, norms and rotation are the model's own (``workers.cache.inputs.Remaker``).

    It is held against what the model does to a few tokens when it is made.

    Args:
        model: a transformers model.
        run: its forward passes.
    """

    def __init__(self, model: Any, run: Run) -> None:
        self.width = 0
        """Channels of an input."""
        self.refusal: str | None = None
        """Why it cannot be done with this model, if so."""
        self._modules = attention_modules(model)
        try:
            self._rotary = rotary_embedding(model)
        except ProfileError as error:
            self.refusal = str(error)
        else:
            self._check(str(model.config.model_type), run)

    @contextlib.contextmanager
    def watching(self, note: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
        """Has ``note`` told of each layer and the input [B, S, width] of its attention."""
        hooks = watch(self._modules, lambda layer, args, kwargs: note(layer, _input(args, kwargs)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def make(self, layer: int, inputs: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotated keys, and values, [kv_heads, N, D] of inputs [N, width] of a layer at positions int64 [N]."""
        angles = self._rotary(inputs[None], position[None])
        rest = {"attention_mask": None, "position_embeddings": angles}
        _, k, v = made_by(self._modules[layer], (inputs[None],), rest)
        return k[0], v[0]

    @torch.inference_mode()
    def _check(self, model_type: str, run: Run) -> None:
        given: dict[int, torch.Tensor] = {}
        made = _Made()
        with self.watching(given.__setitem__):
            run([list(range(len(_POSITIONS)))], [list(_POSITIONS)], made, 1)
        self.width = given[0].shape[-1]
        position = torch.tensor(_POSITIONS, device=given[0].device)
        for layer, wanted in made.by_layer.items():
            try:
                found = self.make(layer, given[layer][0], position)
            except Exception as error:  # the model's own code: it serves as before
                self.refusal = f"attention of model type {model_type!r} cannot be called by itself ({error!r})"
                return
            for again, once in zip(found, wanted, strict=True):
                deviation = float((again - once).float().norm() / once.float().norm().clamp(min=1e-12))
                if not deviation <= _MOST_DEVIATION:
                    self.refusal = (
                        f"model type {model_type!r} makes keys and values of layer {layer} from more than its"
                        f" attention's input and positions (relative deviation {deviation:.2g})"
                    )
                    return


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    found: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return found


class _Made:
    """Attention that takes note of keys and values."""

    def __init__(self) -> None:
        self.by_layer: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
        """See ``workers.engine.attention.Attend``; nothing is attended to."""
        self.by_layer[layer] = k[0], v[0]
        return torch.zeros_like(q).transpose(1, 2)
