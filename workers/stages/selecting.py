"""Stages that have each query read only some blocks: what they see, and what they say.

A block that is not read stays where it is, so nothing is lost: the loss is in the reading, and ends with it. Only full
blocks that are older than the last tokens of a table can be skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import torch

from kernels.layout import BLOCK_TOKENS, CacheShape
from kvpilot.bounds import Bounds
from workers.profile.profile import ROPE
from workers.stages.base import LayerPlace, Placer, parameter, whole_blocks

CHUNK_TOKENS = 8
"""Tokens of a chunk: a part of a block."""


class Digest(Enum):
    """What is kept on the device of each block's keys, so that a query can judge blocks that it has not read."""

    LOW = "low"
    """The least value of each channel, [D] in the model's dtype."""
    HIGH = "high"
    """The greatest value of each channel, [D] in the model's dtype."""
    MEAN = "mean"
    """The mean key, [D] in the model's dtype."""
    RADIUS = "radius"
    """The greatest distance of a key from the mean as it is kept, float32."""


@dataclass(frozen=True)
class BlockView:
    """The blocks of one layer that a query may skip, by KV head, in the order of the tables; H heads, B blocks of the
    longest. All on the model's device."""

    index: int  # which layer
    layers: int  # how many there are
    valid: torch.Tensor  # bool [H, B] which entries are blocks
    budget: torch.Tensor  # int64 [H] how many of them the stage's budget allows
    tier: torch.Tensor  # uint8 [H, B] where they live, kernels.layout.Tier
    scaling: float  # the model's factor on attention scores
    digests: dict[Digest, torch.Tensor]  # those the stage declares: [H, B, D], radius [H, B]
    votes: Callable[[], torch.Tensor]  # float32 [H, B] attention received from about the last 64 queries
    asked_before: torch.Tensor | None = None  # [query_heads, D] the query of the step before
    read_before: torch.Tensor | None = None  # bool [H, B'] what that query read of the first B' of these blocks

    def grouped(self, q: torch.Tensor) -> torch.Tensor:
        """Queries [query_heads, D] by the KV head that they read: float32 [H, G, D]."""
        return q.float().view(len(self.valid), -1, q.shape[-1])

    def best(self, score: torch.Tensor, budget: torch.Tensor | None = None) -> torch.Tensor:
        """The ``budget`` blocks of highest score [H, B] in each head; among equals the later ones."""
        most = self.budget if budget is None else budget
        last = score.shape[1] - 1
        ranked = score.masked_fill(~self.valid, -torch.inf).flip(1)
        order = last - ranked.argsort(dim=1, descending=True, stable=True)  # [H, B] places, best first
        among = torch.arange(last + 1, device=score.device) < most[:, None]
        chosen = torch.zeros_like(self.valid).scatter_(1, order, among)
        return chosen & self.valid


def block_share(default: float = 0.25) -> Any:
    """The parameter that says how many of the blocks that it may skip a query reads."""
    return parameter(default, Bounds(above=0, most=1), "share of a head's older blocks")


def dense_layers(default: int) -> Any:
    """The parameter that says how many of the first layers read everything."""
    return parameter(default, Bounds(least=0, most=1024), "layers", minor=True)


def upper_bound(q: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The most that q . k can be for a key between the bounds, of the group's queries the highest: float32 [H, B].

    Args:
        q: float32 [H, G, D].
        low, high: [H, B, D].
    """
    return (q.clamp(min=0) @ high.float().mT + q.clamp(max=0) @ low.float().mT).amax(dim=1)


@dataclass(frozen=True)
class Selector(Placer):
    """A placer that also says which blocks each query reads.

    It is asked in every layer of every decode step, before the layer attends. Blocks that live on the host and are read
    come to the device first, as far as there is room in a pool of ``pool_blocks`` a head; beyond it they are read where
    they are.
    """

    selects: ClassVar[bool] = True
    guesses: ClassVar[bool] = False
    """Whether the query it is asked about is a guess, made a layer ahead from the hidden state there. The first layer,
    for which there is none, reads everything."""

    @property
    def digests(self) -> tuple[Digest, ...]:
        """What is kept of each block."""
        return ()

    def device_tokens(self) -> int | None:
        """All stay, unless a stage says otherwise."""
        return None

    def selects_in(self, layer: LayerPlace) -> bool:
        """Whether queries of a layer choose. In others they read everything, and nothing is kept for a choice.

        It must not depend on ``seen``.
        """
        return True

    def always(self) -> int:
        """Tokens at the end of each table that every query reads, 32 or more; of their blocks nobody is asked."""
        return BLOCK_TOKENS

    def budget(self, older: int) -> int:
        """How many of a table's blocks a query reads of those that it may skip, ``older``."""
        raise NotImplementedError

    def pool_blocks(self, older: int) -> int:
        """For how many of them the device has room beside the blocks that live there."""
        return 0

    def select(self, view: BlockView, q: torch.Tensor) -> torch.Tensor:
        """Which blocks the query [query_heads, D] reads: bool [H, B]. The others get no mass from it.

        It must not depend on anything but its arguments: scoring asks about several tokens without any step.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Recalling(Selector):
    """One whose older blocks live on the host, with room on the device for the ``share`` of them that a query reads."""

    recent: int = whole_blocks(256)
    share: float = block_share()

    def device_tokens(self) -> int | None:
        """``recent``."""
        return self.recent

    def always(self) -> int:
        """What lives on the device."""
        return self.recent

    def budget(self, older: int) -> int:
        """The share, rounded up."""
        return math.ceil(self.share * older)

    def pool_blocks(self, older: int) -> int:
        """As many as a query reads."""
        return self.budget(older)


@dataclass(frozen=True)
class Reconstructing(Recalling):
    """One whose queries read chunks of blocks (``CHUNK_TOKENS``), with keys that are made again on the device.

    The device keeps ``width`` numbers for a token's keys before their rotation in all heads of a layer, of each chunk a
    landmark, its mean key, and of some chunks all, exactly; those are always read. Of the others ``select`` chooses:
    what it sees as blocks are chunks, and their landmarks are ``Digest.MEAN``. So are what ``budget`` and
    ``pool_blocks`` count. Values come from the host, to a pool of chunks.
    """

    needs: ClassVar[tuple[str, ...]] = (ROPE,)

    def refuses(self, shape: CacheShape) -> str | None:
        """Models with very many key channels: a chunk's numbers must fit a page of memory."""
        most = 4 * 2 * BLOCK_TOKENS * shape.head_dim // CHUNK_TOKENS
        width = self.width(shape)
        return f"{width} numbers a token are to stand for its keys; at most {most} can" if width > most else None

    def width(self, shape: CacheShape) -> int:
        """How many numbers stand for a token's keys in all heads of a layer."""
        raise NotImplementedError

    def basis(self, moment: torch.Tensor, width: int) -> torch.Tensor:
        """What a layer's keys become these numbers by, and come back: orthonormal columns, float64 [H * D, width].

        Args:
            moment: float64 [H * D, H * D] the sum of the outer products of the keys, of all heads together.
            width: how many.
        """
        raise NotImplementedError

    def exact_chunks(self, older: int) -> int:
        """How many of a head's ``older`` chunks are kept exactly; with each further one, at most one more."""
        raise NotImplementedError

    def fit(self, keys: torch.Tensor, landmarks: torch.Tensor) -> torch.Tensor:
        """How well landmarks [N, D] stand for their chunks' keys [N, 8, D]: float [N]. The worst are kept exactly."""
        raise NotImplementedError
