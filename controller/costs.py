"""What a pipeline costs a request, in one number: shares of what its full cache would cost, weighted by its objective.

Latency: a decode step reads every block once, from where it lives, so its time is taken to be ``device bytes / device
bandwidth + host bytes / host bandwidth`` with the bandwidths the worker measured. Unpacking codes is not counted: the
kernels are bound by memory. Memory: device bytes. Both are divided by those of the full cache on the device, so that a
weight means the same for a short context as for a long one; what a byte is worth to the others while memory is short,
the knapsack's price adds.

A switch reads what is there, writes what is wanted, and stalls the step: its time, in steps of the full cache, is
spread over the tokens that are still to come.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvpilot.v1 import policy_pb2
from models.features import F64


@dataclass(frozen=True)
class Bytes:
    """Of R requests under C pipelines each, [R, C] float64; shadows are not read while decoding."""

    device: F64
    host: F64
    shadow: F64

    @property
    def lower_tier(self) -> F64:
        """Everything that counts against the host's budget."""
        return self.host + self.shadow


@dataclass(frozen=True)
class CostModel:
    """Turns bytes into costs, with one worker's bandwidths."""

    device_bytes_per_s: float
    host_bytes_per_s: float
    switch_ms: float = 5.0
    """Of every switch, whatever its bytes."""
    stall_weight: float = 0.25
    """Least weight of a switch's stall: the other requests of the batch wait for it too."""

    @classmethod
    def of(cls, hello: policy_pb2.Hello) -> CostModel:
        """With what the worker measured; 10 GB/s for a device, a quarter of the device's for a host, not measured."""
        speed = {tier.name: tier.bandwidth_bytes_per_s for tier in hello.tiers}
        device = speed.get("device") or 10e9
        return cls(device, speed.get("host") or device / 4)

    def standing(self, bytes_: Bytes, full_bytes: F64, latency_weight: F64, memory_weight: F64) -> F64:
        """Cost of being there, [R, C]; full_bytes, latency_weight and memory_weight [R]."""
        read_s = bytes_.device / self.device_bytes_per_s + bytes_.host / self.host_bytes_per_s
        full_s = (full_bytes / self.device_bytes_per_s)[:, None]
        share = bytes_.device / full_bytes[:, None]
        return np.asarray(latency_weight[:, None] * read_s / full_s + memory_weight[:, None] * share)

    def switching(
        self, bytes_: Bytes, own: tuple[F64, F64, F64], full_bytes: F64, latency_weight: F64, remaining_tokens: F64
    ) -> F64:
        """Cost of going there from where one is, [R, C]; ``own`` is device, host and shadow bytes now, [R] each."""
        device, host, shadow = (values[:, None] for values in own)
        lower = np.abs(bytes_.host - host) + np.maximum(0.0, bytes_.shadow - shadow)
        switch_s = (device + bytes_.device) / self.device_bytes_per_s + lower / self.host_bytes_per_s
        steps = (switch_s + self.switch_ms / 1e3) / (full_bytes / self.device_bytes_per_s)[:, None]
        weight = np.maximum(latency_weight, self.stall_weight)[:, None]
        return np.asarray(weight * steps / np.maximum(1.0, remaining_tokens)[:, None])
