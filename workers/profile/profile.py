"""A model's profile: named tensors that stages ask for, and the model's rotary positions.

L layers, H KV heads, Q query heads, D channels. Queries and keys are those before the rotation by position. All tensors
are float32.

===================  =================  ==============================================================================
name                 shape              what
===================  =================  ==============================================================================
``query_mean``       [L, Q, D]          mean of a head's queries
``query_cov``        [L, Q, D, D]       their covariance
``retrieval``        [L, H]             share of attention that tokens of a passage seen again pay to its first copy,
                                        near their own place there; the greatest within the query group
``echo``             [L, Q]             attention that random tokens pay to themselves in earlier copies
``induction``        [L, Q]             attention that they pay to what followed them there
``concentration``    [L]                attention that a text's last queries pay to the sixteenth of tokens that they
                                        pay most to
``key_basis``        [L, H, D, D]       in its columns the eigenvectors of the keys' second moment, the greatest first:
                                        ``k @ basis[..., :r]`` are the r numbers that keep most of a key [.., D]
``key_spectrum``     [L, H, D]          the eigenvalues: mean squares of those numbers
``value_basis``      [L, H, D, D]       the same of values
``value_spectrum``   [L, H, D]
``key_range``        [L, H, D, 2]       1st and 99th percentile of each channel of keys
``value_range``      [L, H, D, 2]       the same of values
``key_levels_n``     [L, H, D, n]       for n of 4, 8 and 16: rising, the n numbers that stand best, by square error,
                                        for each channel of keys within ``key_range``
``value_levels_n``   [L, H, n]          the same for values, each token's scaled so that its least channel is -1 and its
                                        greatest is 1
===================  =================  ==============================================================================
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from kernels.layout import CacheShape
from models.profiles import ProfileError
from workers.profile.rotary import Rope

ROPE = "rope"
"""What a stage needs that turns keys back: rotary positions, found in the model and held against what it does."""
LEVELS = (4, 8, 16)
"""How many levels there are tables of: for 2, 3 and 4 bits."""


@dataclass(frozen=True)
class Kind:
    """What a tensor is, in words, and its shape: letters as above, or numbers."""

    words: str
    dims: tuple[str | int, ...]

    def shape(self, of: CacheShape) -> tuple[int, ...]:
        """The shape for a model."""
        sizes = {"L": of.layers, "H": of.kv_heads, "Q": of.query_heads, "D": of.head_dim}
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in self.dims)


KINDS: Mapping[str, Kind] = {
    "query_mean": Kind("query statistics", ("L", "Q", "D")),
    "query_cov": Kind("query statistics", ("L", "Q", "D", "D")),
    "retrieval": Kind("retrieval heads", ("L", "H")),
    "echo": Kind("retrieval heads", ("L", "Q")),
    "induction": Kind("retrieval heads", ("L", "Q")),
    "concentration": Kind("concentration of attention", ("L",)),
    "key_basis": Kind("bases of keys", ("L", "H", "D", "D")),
    "key_spectrum": Kind("bases of keys", ("L", "H", "D")),
    "value_basis": Kind("bases of values", ("L", "H", "D", "D")),
    "value_spectrum": Kind("bases of values", ("L", "H", "D")),
    "key_range": Kind("ranges of keys", ("L", "H", "D", 2)),
    "value_range": Kind("ranges of values", ("L", "H", "D", 2)),
    **{f"key_levels_{count}": Kind("levels of keys", ("L", "H", "D", count)) for count in LEVELS},
    **{f"value_levels_{count}": Kind("levels of values", ("L", "H", count)) for count in LEVELS},
}


def missing(needed: Collection[str], available: Collection[str]) -> str | None:
    """Why a stage that needs these tensors cannot do with those there are; None if it can."""
    lacking = [name for name in needed if name not in available]
    known = {name: kind.words for name, kind in KINDS.items()} | {ROPE: "rotary positions"}
    words = dict.fromkeys(known.get(name, repr(name)) for name in lacking)
    return f"it needs the model's {' and '.join(words)}; `kvpilot model profile NAME` finds them" if words else None


@dataclass(frozen=True, eq=False)
class ModelProfile:
    """A model's profile, in memory.

    Attributes:
        model: its name.
        hash: its ``models.profiles.hash_model``.
        shape: its cache dimensions.
        tokens: of text that the statistics are of.
        tensors: by name, as listed above.
        rope: the rotary positions of the model as it is loaded.

    Raises:
        ProfileError: a tensor of another shape or dtype, or with a number that is not finite, naming it.
    """

    model: str
    hash: str
    shape: CacheShape
    tokens: int
    tensors: Mapping[str, torch.Tensor]
    rope: Rope

    def __post_init__(self) -> None:
        for name, kind in KINDS.items():
            tensor, wanted = self.tensors.get(name), kind.shape(self.shape)
            if tensor is None:
                raise ProfileError(f"profile of {self.model!r}: no tensor {name!r}")
            if tuple(tensor.shape) != wanted or tensor.dtype != torch.float32:
                raise ProfileError(
                    f"profile of {self.model!r}: {name!r} is {tensor.dtype} {list(tensor.shape)}; expected"
                    f" torch.float32 {list(wanted)}"
                )
            if not bool(torch.isfinite(tensor).all()):
                raise ProfileError(f"profile of {self.model!r}: {name!r} has numbers that are not finite")

    @property
    def names(self) -> frozenset[str]:
        """What it has: its tensors, and rotary positions."""
        return frozenset((*self.tensors, ROPE))

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor of all layers.

        Raises:
            KeyError: there is none of this name.
        """
        return self.tensors[name]

    def layer(self, index: int) -> LayerProfile:
        """What it says of one layer."""
        return LayerProfile(index, self)


@dataclass(frozen=True, eq=False)
class LayerProfile:
    """One layer's part of a profile."""

    index: int
    model: ModelProfile

    def tensor(self, name: str) -> torch.Tensor:
        """This layer's slice of a tensor: the shapes above without L.

        Raises:
            KeyError: there is none of this name.
        """
        return self.model.tensor(name)[self.index]

    @property
    def rope(self) -> Rope:
        """The model's rotary positions, the same in every layer."""
        return self.model.rope


def names_of(profile: ModelProfile | None) -> frozenset[str]:
    """What there is of a profile; nothing without one."""
    return profile.names if profile else frozenset()
