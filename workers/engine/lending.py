"""Layers of the model that lend the device memory of their weights to the cache, and get it back.

The weights of some layers lie in regions behind the device tier's budget (``workers/cache/arena.py``), with an exact
copy on the host. While nothing is lent they are computed with where they are, and the device holds what it held without
all this. When a layer lends its memory its region becomes pages for blocks, and from then on its weights are copied to
a *slot* on the device in every pass, ahead of their use. There are two slots, the homes of two more layers' weights,
which stream through them as well as long as anything is lent. So to lend n layers takes n + 2 copies a pass and no byte
beyond what the model and the budget have anyway, whole pages apart; the first layer lent costs three copies, each
further one one more. Copies are the same bytes, and aligned alike, so logits are too.

When a streamed layer has been computed, the weights of the one after the next are copied to its slot: on a GPU from
pinned memory on a stream of their own, with events between the two; on a CPU then and there. Layers that lend are
spread evenly over the model, so that each copy has the time that the layers between take.

Source: Li et al., Oneiros, arXiv 2507.11507, which remaps the pages of CUDA's virtual memory, takes memory from models
that are not in use first, and finds from measured times how many layers hide their copies. Here there is one model,
pages are the arena's own, what is needed is lent, and copies that take longer are waited for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog
import torch
from torch.utils.hooks import RemovableHandle

from kernels.layout import UNIT_BYTES
from workers.cache.kvcache import KVCache

SLOTS = 2
"""One is computed from while the other is filled."""

log = structlog.get_logger(__name__)


@dataclass(eq=False)
class LayerWeights:
    """The weights of one layer, and an exact copy on the host."""

    index: int
    module: torch.nn.Module
    parameters: list[torch.nn.Parameter]
    offsets: list[int]
    copy: torch.Tensor
    """uint8 [nbytes], each parameter at its offset; pinned where there is a GPU."""

    @property
    def nbytes(self) -> int:
        """Bytes of all of them, each from a unit of 256 bytes on."""
        return len(self.copy)

    def views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """The parameters as they lie in bytes that hold the copy."""
        return [
            memory[offset : offset + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
            for parameter, offset in zip(self.parameters, self.offsets, strict=True)
        ]

    def use(self, views: list[torch.Tensor]) -> None:
        """Has the layer compute with these."""
        for parameter, view in zip(self.parameters, views, strict=True):
            parameter.data = view


@dataclass(eq=False)
class _Slot:
    """Device memory that weights pass through."""

    memory: torch.Tensor
    views: dict[LayerWeights, list[torch.Tensor]]
    filled: torch.cuda.Event | None = None
    """When what it holds is there; None: at once."""
    holds: LayerWeights | None = None


def weights_to_lend(model: Any, lendable: int) -> list[LayerWeights]:
    """Copies the weights of so many of a model's layers, and of those that lend slots, to the host; the layers then
    compute with the copy, until a :class:`Lending` has them.

    Args:
        model: a transformers model.
        lendable: how many layers may lend their memory; 0: nothing is done.

    Returns:
        Those of slots first, the others in the order in which they lend.

    Raises:
        ValueError: the model has too few layers, or weights that its layers share.
    """
    if not lendable:
        return []
    layers = _layers(model)
    if lendable > len(layers) - SLOTS:
        raise ValueError(
            f"lendable_layers {lendable}: this model has {len(layers)} layers, of which"
            f" {max(0, len(layers) - SLOTS)} can lend their memory; weights pass through that of {SLOTS} others"
        )
    users = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    chosen = [(index, layers[index]) for index in spread(len(layers), lendable + SLOTS)]
    for index, layer in chosen:
        if shared := [name for name, parameter in layer.named_parameters() if users[id(parameter)] > 1]:
            raise ValueError(f"lendable_layers {lendable}: layer {index} of this model shares {', '.join(shared)}")
    found = [_copied(index, layer) for index, layer in chosen]
    for weights in found:
        weights.use(weights.views(weights.copy))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what they have left, for the arena
    return found


def spread(layers: int, count: int) -> list[int]:
    """So many of a model's layers, the last one first, each then as far from those before it as can be.

    A pass follows a pass, so the last layer is next to the first.
    """
    chosen: list[int] = []
    while len(chosen) < count:
        rest = [layer for layer in range(layers) if layer not in chosen]
        apart = [
            min((min(abs(layer - other), layers - abs(layer - other)) for other in chosen), default=layer)
            for layer in rest
        ]
        chosen.append(rest[apart.index(max(apart))])
    return chosen


def _layers(model: Any) -> torch.nn.ModuleList:
    """The list of a model's layers.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            return module
    raise ValueError(f"lendable_layers: model type {model.config.model_type!r} has no list of its layers")


def _copied(index: int, layer: torch.nn.Module) -> LayerWeights:
    parameters, offsets, end = list(layer.parameters()), [], 0
    for parameter in parameters:
        offsets.append(end)
        end += -(-parameter.nbytes // UNIT_BYTES) * UNIT_BYTES
    copy = torch.zeros(end, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    weights = LayerWeights(index, layer, parameters, offsets, copy)
    for parameter, view in zip(parameters, weights.views(copy), strict=True):
        view.copy_(parameter.data)
    return weights


class Lending:
    """What layers have lent to a cache. Used by the engine thread alone, to lend and take back between passes.

    Args:
        layers: from :func:`weights_to_lend`; their homes are made here.
        cache: made with the bytes of those that may lend, in their order.
    """

    def __init__(self, layers: Sequence[LayerWeights], cache: KVCache) -> None:
        self._layers = layers
        self._device = cache.device
        self._cache = cache
        where = cache.device.data.device
        self._copying: torch.cuda.Stream | None = None
        if layers and where.type == "cuda":
            self._copying = torch.cuda.Stream(where)  # type: ignore[no-untyped-call]
        most = max((layer.nbytes for layer in layers), default=0)
        self._slots = []
        for layer in layers[:SLOTS]:
            memory = torch.zeros(most, dtype=torch.uint8, device=where)
            slot = _Slot(memory, {other: other.views(memory) for other in layers})
            if self._copying:
                slot.filled = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._slots.append(slot)
            self._fill(slot, layer)
            self._wait(slot)
        self._homes = dict(zip(layers[SLOTS:], cache.device.regions, strict=True))
        for layer in self._homes:
            self._bring_home(layer)
        self._streamed: list[LayerWeights] = []  # in the order of a pass
        self._hooks: list[RemovableHandle] = []
        self.lent = 0
        """Layers that lend their memory now."""

    @property
    def lendable_bytes(self) -> int:
        """What the device tier can still be lent."""
        return self._device.most_bytes - self._device.budget_bytes

    @property
    def last_bytes(self) -> int:
        """What the last layer has lent."""
        return self._device.region_bytes(self._homes[self._last]) if self.lent else 0

    @property
    def _last(self) -> LayerWeights:
        return self._layers[SLOTS + self.lent - 1]

    def lend(self) -> int:
        """Has one more layer lend its memory.

        Returns:
            Bytes that the device tier has got; 0: all layers that may lend do.
        """
        if self.lent == len(self._homes):
            return 0
        self.lent += 1
        self._stream()
        self._device.lend(self._homes[self._last])
        log.info("layer lends its memory", layer=self._last.index, lent=self.lent, bytes=self.last_bytes)
        return self.last_bytes

    def take_back(self) -> bool:
        """Gives its memory back to the layer that was the last to lend it; blocks that lie there move.

        Returns:
            False: not now; see ``KVCache.take_back``.

        Raises:
            RuntimeError: a copy fails. Everything is as before.
        """
        layer = self._last
        if not self._cache.take_back(self._homes[layer]):
            return False
        try:
            if self._copying:
                torch.cuda.current_stream(self._device.data.device).wait_stream(self._copying)
            self._bring_home(layer)
            if self.lent == 1:
                for slot, own in zip(self._slots, self._layers, strict=False):
                    self._fill(slot, own)
                    self._wait(slot)
        except BaseException:
            self._device.lend(self._homes[layer])
            raise
        self.lent -= 1
        self._stream()
        log.info("layer has its memory back", layer=layer.index, lent=self.lent)
        return True

    def close(self) -> None:
        """Ends it: the layers have their weights on the host, and the model nothing of all this."""
        self._unhook()
        for layer in self._layers:
            layer.use(layer.views(layer.copy))

    # -- passes --------------------------------------------------------------------------------------------------------

    def _stream(self) -> None:
        """Has the weights of those that lend, and of the slots' layers, come in every pass; of no others."""
        self._unhook()
        streamed = self._layers[: SLOTS + self.lent] if self.lent else []
        self._streamed = sorted(streamed, key=lambda layer: layer.index)
        for layer in self._streamed:
            inner = [module for module in layer.module.modules() if hasattr(module, "layer_idx")]
            self._hooks += [
                layer.module.register_forward_pre_hook(partial(self._enter, layer)),
                layer.module.register_forward_hook(partial(self._leave, layer)),
                # called alone where a query is guessed a layer ahead (``guessing.py``)
                *(module.register_forward_pre_hook(partial(self._come, layer)) for module in inner),
            ]

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _enter(self, layer: LayerWeights, *_: object) -> None:
        """A layer is about to be computed: its weights are here, and the next one's here or on their way."""
        self._come(layer)
        self._slot(self._behind(layer, 1), layer)

    def _come(self, layer: LayerWeights, *_: object) -> None:
        self._wait(self._slot(layer, layer))

    def _leave(self, layer: LayerWeights, *_: object) -> None:
        """A layer has been computed: its slot is for the one after the next."""
        self._fill(self._slot(layer, layer), self._behind(layer, 2))

    def _slot(self, layer: LayerWeights, now: LayerWeights) -> _Slot:
        """Where a layer's weights are. If they are nowhere, since a pass did not reach its end, they take the place of
        what is needed last from layer ``now`` on."""
        for slot in self._slots:
            if slot.holds is layer:
                return slot
        slot = max(self._slots, key=lambda slot: self._distance(now, slot.holds))
        self._fill(slot, layer)
        return slot

    def _behind(self, layer: LayerWeights, count: int) -> LayerWeights:
        return self._streamed[(self._streamed.index(layer) + count) % len(self._streamed)]

    def _distance(self, layer: LayerWeights, other: LayerWeights | None) -> int:
        """How many streamed layers further a pass comes to the other; most if it is not streamed."""
        if other not in self._streamed:
            return len(self._streamed)
        return (self._streamed.index(other) - self._streamed.index(layer)) % len(self._streamed)

    def _fill(self, slot: _Slot, layer: LayerWeights) -> None:
        """Begins to copy a layer's weights to a slot, behind all that was computed from what it holds."""
        if slot.holds is layer:
            return
        slot.holds = None
        memory = slot.memory[: layer.nbytes]
        if slot.filled is None or self._copying is None:
            memory.copy_(layer.copy)
        else:
            self._copying.wait_stream(torch.cuda.current_stream(memory.device))
            with torch.cuda.stream(self._copying):
                memory.copy_(layer.copy, non_blocking=True)
                slot.filled.record(self._copying)
        slot.holds = layer
        layer.use(slot.views[layer])

    def _wait(self, slot: _Slot) -> None:
        if slot.filled is not None:
            torch.cuda.current_stream(slot.memory.device).wait_event(slot.filled)

    def _bring_home(self, layer: LayerWeights) -> None:
        """Copies a layer's weights to its region, which nothing else uses, for good."""
        for slot in self._slots:
            if slot.holds is layer:
                slot.holds = None
        memory = self._device.memory(self._homes[layer])
        memory[: layer.nbytes].copy_(layer.copy, non_blocking=True)
        layer.use(layer.views(memory))
