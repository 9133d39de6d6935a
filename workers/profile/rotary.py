"""A model's rotary positions: found in the loaded model, checked against what it does, and undone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from models.profiles import ProfileError

_CHANGING = ("dynamic", "longrope")
"""Kinds of scaling whose angles depend on how long the text is."""
_MOST_DEVIATION = 0.02


@dataclass(frozen=True, eq=False)
class Rope:
    """Rotary position embedding (Su et al., RoFormer, arXiv 2104.09864): channels i and i + D/2 turn as a pair.

    Angles, scaling included, are those of the model's own module. A key or query x before the rotation is
    ``x * cos + half(x) * sin`` after it, half(x) being (-x2, x1) of x = (x1, x2).
    """

    module: Any  # of transformers: called with a tensor and positions, it gives cos and sin
    dtype: torch.dtype
    """The model's, to which it rounds cos and sin."""

    def __call__(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin at positions of any shape [...]: float32 [..., D], as the model rounds them."""
        flat = positions.reshape(1, -1)
        cos, sin = self.module(torch.empty(0, dtype=self.dtype, device=positions.device), flat)
        size = (*positions.shape, -1)
        return cos.float().reshape(size), sin.float().reshape(size)

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Queries or keys [..., n, D] from before the rotation, at positions [n] or [..., n]: float32."""
        return rotate(x.float(), *self(positions))

    def undo(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Queries or keys [..., n, D] as they were before :meth:`rotate`: float32. Scaling and rounding of cos and sin
        are undone too."""
        cos, sin = self(positions)
        length = cos.square() + sin.square()
        return rotate(x.float(), cos / length, -sin / length)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns x [..., D] by angles given as cos and sin [..., D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def rope_of(model: Any, head_dim: int) -> Rope:
    """The rotary positions of a transformers model.

    Raises:
        ProfileError: it has none, or several, or such as :class:`Rope` does not describe, naming the model type.
    """
    kind, module = f"model type {model.config.model_type!r}", rotary_embedding(model)
    parameter = next(model.parameters())
    with torch.inference_mode():
        answer = module(
            torch.empty(0, dtype=parameter.dtype, device=parameter.device),
            torch.zeros(1, 1, dtype=torch.int64, device=parameter.device),
        )
    if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], torch.Tensor)):
        raise ProfileError(f"{kind} has a rotary embedding that does not give cos and sin")
    if answer[0].shape[-1] != head_dim:
        raise ProfileError(f"{kind} rotates {answer[0].shape[-1]} of {head_dim} channels; profiles need all rotated")
    return Rope(module, parameter.dtype)


def rotary_embedding(model: Any) -> Any:
    """The module that gives a transformers model the angles of all positions.

    Raises:
        ProfileError: it has none, or several, or one whose angles are not always the same, naming the model type.
    """
    kind = f"model type {model.config.model_type!r}"
    found = [module for module in model.modules() if isinstance(getattr(module, "inv_freq", None), torch.Tensor)]
    if len(found) != 1:
        raise ProfileError(f"{kind} has {len(found) or 'no'} rotary embeddings; models with one are accepted")
    scaling = getattr(found[0], "rope_type", "default")
    if scaling in _CHANGING:
        raise ProfileError(
            f"{kind} has rotary positions of type {scaling!r}, whose angles change with the text's length"
        )
    return found[0]


def check_rope(rope: Rope, positions: torch.Tensor, turned: list[torch.Tensor], model_type: str) -> None:
    """Holds a rope against what the model does to one and the same token at several positions.

    Args:
        rope: as found.
        positions: [n], the first of them 0.
        turned: of each layer, queries and keys [heads, n, D] of n equal tokens, which differ by the rotation alone.
        model_type: for the error.

    Raises:
        ProfileError: the model rotates otherwise, or not in all layers.
    """
    for layer, x in enumerate(turned):
        wanted = rope.rotate(rope.undo(x[:, :1], positions[:1]), positions)
        deviation = float((x.float() - wanted).norm() / wanted.norm().clamp(min=1e-12))
        if not deviation <= _MOST_DEVIATION:
            raise ProfileError(
                f"model type {model_type!r} does not rotate queries and keys of layer {layer} by halves"
                f" (relative deviation {deviation:.2g}); profiles are of models that do so in every layer"
            )
