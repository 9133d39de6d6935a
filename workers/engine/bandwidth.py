"""How fast bytes come from each tier, measured when a worker starts."""

from __future__ import annotations

import time

import torch

from kernels.layout import Tier
from workers.cache.kvcache import KVCache


def measure_bandwidths(cache: KVCache) -> dict[Tier, float]:
    """Copy bandwidth in bytes per second: within the device tier, from the host tier to it, and from disk to memory."""
    device, host = cache.device.data[: cache.device.budget_bytes], cache.host.data
    size = min(len(device) // 2, 16 << 20)
    bandwidths = {Tier.DEVICE: copy_rate(device[:size], device[size : 2 * size])}
    size = min(size, len(host))
    bandwidths[Tier.HOST] = copy_rate(host[:size], device[:size]) if size else 0.0
    if cache.disk:
        bandwidths[Tier.DISK] = cache.disk.store.measure()
    return bandwidths


def copy_rate(source: torch.Tensor, target: torch.Tensor) -> float:
    """Bytes per second at which bytes are copied from one tensor to one of the same size; the best of three times."""
    best = float("inf")
    for _ in range(3):
        if target.is_cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source)
        if target.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return len(source) / best
