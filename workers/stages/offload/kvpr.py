"""KVPR: older blocks come from the host, or a part of them what they were computed from, which is less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvpilot.bounds import Bounds
from workers.stages.base import LossClass, Placer, parameter, whole_blocks


@dataclass(frozen=True)
class KVPR(Placer):
    """Blocks older than the last ``recent`` tokens live on the host and pass through the device layer by layer. A share
    of them, ``recompute`` of a layer's, is not copied: what the layer was given comes, and keys and values are made of
    it again on the device.

    A token's input has as many numbers as the model is wide. Where every query head has a KV head of its own that is
    half of what its key and value have together, so with ``recompute=0.5`` a quarter less crosses the link. Models with
    grouped queries are served, but there inputs are as large as keys and values or larger (at four query heads to a KV
    head, twice as large), and **more** crosses the link: ``recompute=0`` is right for them (:func:`best_split`).

    In each decode step a layer's inputs are brought first. While its keys and values are made, with the model's own
    projections, norms and rotation, its other blocks and then the next layer's are under way. Nothing is dropped, but
    a product of matrices of another shape may be rounded otherwise: logits are those of ``full`` up to that, not bit
    for bit, so rows computed under it are not published as prefixes.

    Inputs of the first rows of 32 tokens, that share of the longest text that the request may have, are noted on the
    host as its tokens are computed, while the host has room that nobody else wants, and are given up when somebody
    does. Of what was noted as much is made again as that share allows, from the first row on. Rows that were computed
    before (by an earlier turn, for another request, under another pipeline) are copied; so is everything beside a codec
    or an evictor, and nothing is noted there.

    Source: Jiang et al., KVPR: Efficient LLM Inference with I/O-Aware KV Cache Partial Recomputation, arXiv 2411.17089.
    There the host has inputs instead of those keys and values. Here it has both, up to half as much again: so a switch
    away needs nothing, evictors and audits read what was stored, and only the link carries less. There a layer's other
    blocks come while the device makes the first ones; here the next layer's come then too, hence the other split. And
    there the split is found for each machine; here it is given, so that a pipeline means the same on every worker.
    """

    name: ClassVar[str] = "kvpr"
    summary: ClassVar[str] = (
        "Older blocks on the host, fetched a layer ahead; a share is made again on the device from its inputs, which"
        " are smaller where queries are not grouped, else larger."
    )
    fetches: ClassVar[bool] = True
    recent: int = whole_blocks(256)
    recompute: float = parameter(0.5, Bounds(least=0, most=1), "share of a layer's older blocks")

    @property
    def loss_class(self) -> LossClass:
        """Recoverable: nothing is lost, but what is made again may be rounded otherwise. Exact if nothing is."""
        return LossClass.RECOVERABLE if self.recompute else LossClass.EXACT

    def device_tokens(self) -> int:
        """``recent``."""
        return self.recent

    def recomputed(self) -> float:
        """``recompute``."""
        return self.recompute


@dataclass(frozen=True)
class Split:
    """A share to make again, and why it is that."""

    share: float
    reason: str


def best_split(
    kv_bytes: int, input_bytes: int, flops: float, bytes_per_s: float, flops_per_s: float, layer_s: float = 0.0
) -> Split:
    """The share of a layer's older blocks with which decode steps take least time.

    With a share x, the link is busy for ``(x A + (1 - x) K) / B`` a layer, K and A being bytes of keys and values and
    of inputs, and the device for ``x F / C + T``. Each works ahead of the other by a layer, so a layer takes the longer
    of the two. The first falls with x where inputs are smaller, the second rises: the best is where they meet, ::

        x = (K / B - T) / ((K - A) / B + F / C)

    or the nearer of 0 and 1.

    Args:
        kv_bytes: K, of one layer's keys and values on the host.
        input_bytes: A, of what they were all computed from.
        flops: F, of making all of them again: for each token 4 times the width of the model, times KV heads, times
            channels of a head.
        bytes_per_s: B, copied from the host to the device, as the worker measures it.
        flops_per_s: C, of the device at such products.
        layer_s: T, what the device takes for one layer of a decode step beside that, seconds.

    Raises:
        ValueError: a rate or ``kv_bytes`` that is not above 0, or another figure below it.
    """
    for name, value in (("kv_bytes", kv_bytes), ("bytes_per_s", bytes_per_s), ("flops_per_s", flops_per_s)):
        if not value > 0:
            raise ValueError(f"{name}: {value!r} given; more than 0 is accepted")
    for name, value in (("input_bytes", input_bytes), ("flops", flops), ("layer_s", layer_s)):
        if not value >= 0:
            raise ValueError(f"{name}: {value!r} given; 0 or more is accepted")
    if input_bytes >= kv_bytes:
        return Split(0.0, f"inputs of {input_bytes} bytes are no smaller than keys and values of {kv_bytes}")
    copy_s = kv_bytes / bytes_per_s
    if copy_s <= layer_s:
        return Split(0.0, "copies are done before the layer is")
    share = (copy_s - layer_s) / ((kv_bytes - input_bytes) / bytes_per_s + flops / flops_per_s)
    if share >= 1:
        return Split(1.0, "the device is done with all of it before the inputs have come")
    return Split(share, "the link and the device are done at once")
