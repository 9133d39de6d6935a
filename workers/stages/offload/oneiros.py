"""Oneiros: everything stays on the device, in memory that layers of the model lend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvpilot.bounds import Bounds
from workers.stages.base import LossClass, Placer, parameter


@dataclass(frozen=True)
class Oneiros(Placer):
    """No block moves; while it is in force, ``layers`` of the model's layers or more lend their memory to the cache.

    The weights of such a layer are read from a copy on the host in every pass, ahead of their use, and are the same: so
    are the logits, bit for bit. All requests of the worker share the room, and the time it costs
    (``workers/engine/lending.py``, which also says where this is not the paper's). Under pressure a worker with
    ``lendable_layers`` lends without being asked to, before it touches any request.

    Source: Li et al., Oneiros: KV Cache Optimization through Parameter Remapping for Multi-tenant LLM Serving, arXiv
    2507.11507.
    """

    name: ClassVar[str] = "oneiros"
    summary: ClassVar[str] = "All blocks on the device, with room that layers lend; their weights come from the host."
    layers: int = parameter(1, Bounds(least=1), "layers of the model, at most the worker's lendable_layers")

    @property
    def loss_class(self) -> LossClass:
        """Exact."""
        return LossClass.EXACT

    def device_tokens(self) -> None:
        """All."""
        return

    def lent_layers(self) -> int:
        """``layers``."""
        return self.layers
