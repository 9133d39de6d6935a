"""LayerKV: some layers' older blocks stay on the device, the others' are fetched behind their backs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from kvpilot.bounds import Bounds
from workers.stages.base import LayerPlace, LossClass, Placer, Places, parameter, whole_blocks

_SLACK = 1e-9  # of a share that stands for a whole number of layers


@dataclass(frozen=True)
class LayerKV(Placer):
    """Blocks older than the last ``recent`` tokens live on the host, but for those of a share of the layers, which stay
    on the device.

    The layers that stay, ``resident`` of all, rounded up, are spread evenly among the others. In each decode step the
    blocks of a layer whose home is the host pass through a staging area on the device, two layers of the request in
    size: while one such layer and the resident ones behind it are computed, the next one's are copied. Nothing is
    dropped or rounded: the logits are those of the same blocks on the device, bit for bit. A prompt's blocks leave the
    device as their chunk is computed, so that a prompt takes less of it, and the next one is admitted sooner.

    How many layers must stay for copies to hide depends on the machine and on the text's length
    (:func:`least_resident`); what is written is what is done, whichever worker the pipeline comes to.

    Source: Xiong et al., LayerKV: Optimizing Large Language Model Serving with Layer-wise KV Cache Management, arXiv
    2410.00428. There the share follows from the times that a prompt and its copies out of the device take, more blocks
    are offloaded as memory runs out, and a scheduler keeps to a latency objective: here the share is given, and
    pressure moves whole requests.
    """

    name: ClassVar[str] = "layerkv"
    summary: ClassVar[str] = "Older blocks of some layers on the host, fetched a layer ahead; the other layers' stay."
    fetches: ClassVar[bool] = True
    recent: int = whole_blocks(256)
    resident: float = parameter(0.5, Bounds(least=0, most=1), "share of the layers")

    @property
    def loss_class(self) -> LossClass:
        """Exact."""
        return LossClass.EXACT

    def device_tokens(self) -> int:
        """``recent``; in resident layers all."""
        return self.recent

    def places(self, layer: LayerPlace) -> Places:
        """None in resident layers."""
        away = layer.shape.layers - resident_layers(self.resident, layer.shape.layers)
        before, behind = (index * away // layer.shape.layers for index in (layer.index, layer.index + 1))
        return super().places(layer) if behind > before else ()


def resident_layers(share: float, layers: int) -> int:
    """How many of so many layers a share of them is."""
    return math.ceil(share * layers - _SLACK)


def least_resident(layers: int, fetch_bytes: int, bytes_per_s: float, layer_s: float) -> int:
    """The fewest resident layers with which no layer waits for its blocks.

    A fetch begins when the layer fetched before it does, so it may take as long as the layers in between, that one
    included. Of N layers among L, spread evenly, two that follow each other are L // N apart at least; hence N is the
    most with ``fetch_bytes / bytes_per_s <= (L // N) * layer_s``.

    Args:
        layers: L, all that the model has.
        fetch_bytes: of one layer's blocks on the host.
        bytes_per_s: copied from the host to the device, as the worker measures it.
        layer_s: what one layer of a decode step takes, seconds.

    Raises:
        ValueError: a time or rate that is not above 0.
    """
    for name, value in (("bytes_per_s", bytes_per_s), ("layer_s", layer_s)):
        if not value > 0:
            raise ValueError(f"{name}: {value!r} given; more than 0 is accepted")
    apart = max(1, math.ceil(fetch_bytes / bytes_per_s / layer_s - _SLACK))
    return layers - layers // apart
