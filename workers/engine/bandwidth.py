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
    bandwidths = {Tier.DEVICE: _copy_rate(device[:size], device[size : 2 * size])}
    size = min(size, len(host))
    bandwidths[Tier.HOST] = _copy_rate(host[:size], device[:size]) if size else 0.0
    if cache.disk:
        bandwidths[Tier.DISK] = cache.disk.store.measure()
    return bandwidths


def _copy_rate(source: torch.Tensor, target: torch.Tensor) -> float:
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
