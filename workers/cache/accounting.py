"""What a request's cache takes, to the byte: blocks as allocated, and the tables that describe them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import numpy.typing as npt

from kernels.api import U8
from kernels.layout import BLOCK_TOKENS, MEMORY_TIERS, CacheShape, Format, Tier
from kvpilot.v1 import common_pb2
from workers.cache.formats import formats

TABLE_BYTES_PER_BLOCK = 4 + 1 + 1 + BLOCK_TOKENS * (4 + 4 + 2)
"""Address, format and tier of a block; position, mass and votes of its tokens (``kernels.api.Tables``)."""


@dataclass(frozen=True)
class CacheUse:
    """Bytes of one request's cache; the ``_16bit`` figures are as if the model's dtype had 16 bits."""

    device_bytes: int = 0
    host_bytes: int = 0
    shadow_bytes: int = 0
    full_bytes: int = 0
    device_bytes_16bit: int = 0
    full_bytes_16bit: int = 0
    peak_device_bytes: int = 0
    peak_device_bytes_16bit: int = 0
    disk_bytes: int = 0

    def peak_with(self, now: CacheUse) -> CacheUse:
        """The larger device figures of a peak so far and ``now``."""
        return replace(
            now,
            peak_device_bytes=max(self.peak_device_bytes, now.device_bytes),
            peak_device_bytes_16bit=max(self.peak_device_bytes_16bit, now.device_bytes_16bit),
        )

    def with_peak(self, peak: CacheUse) -> CacheUse:
        """These figures with the peaks of ``peak``."""
        return peak.peak_with(self)

    def plus_raw_device_blocks(self, shape: CacheShape, blocks: int) -> CacheUse:
        """These figures with so many more raw blocks on the device."""
        return replace(
            self,
            device_bytes=self.device_bytes + blocks * (shape.block_bytes(Format.RAW) + TABLE_BYTES_PER_BLOCK),
            device_bytes_16bit=self.device_bytes_16bit
            + blocks * (shape.block_bytes_16bit(Format.RAW) + TABLE_BYTES_PER_BLOCK),
        )

    def plus_device_bytes(self, device_bytes: int, device_bytes_16bit: int) -> CacheUse:
        """These figures with so many more bytes on the device."""
        return replace(
            self,
            device_bytes=self.device_bytes + device_bytes,
            device_bytes_16bit=self.device_bytes_16bit + device_bytes_16bit,
        )

    def plus_area(self, tier: Tier, nbytes: int, nbytes_16bit: int) -> CacheUse:
        """These figures with a staging area on the device or the host."""
        if tier is Tier.DEVICE:
            return self.plus_device_bytes(nbytes, nbytes_16bit)
        return self.plus_host_bytes(nbytes)

    def plus_host_bytes(self, host_bytes: int) -> CacheUse:
        """These figures with so many more bytes on the host."""
        return replace(self, host_bytes=self.host_bytes + host_bytes)

    def plus_built_ahead(self, shape: CacheShape, format_: U8, tier: U8, disk_bytes: int) -> CacheUse:
        """These figures with blocks [N] that no table refers to yet, as a switch is being prepared; those on disk take
        ``disk_bytes``."""
        sizes, sizes_16bit = _block_sizes(shape, len(formats()))
        device, host = (np.bincount(format_[tier == which], minlength=len(sizes)) for which in MEMORY_TIERS)
        return replace(
            self,
            device_bytes=self.device_bytes + int(device @ sizes),
            host_bytes=self.host_bytes + int(host @ sizes),
            disk_bytes=self.disk_bytes + disk_bytes,
            device_bytes_16bit=self.device_bytes_16bit + int(device @ sizes_16bit),
        )

    def to_proto(self) -> common_pb2.CacheBytes:
        """The API's form."""
        return common_pb2.CacheBytes(
            device_bytes=self.device_bytes,
            host_bytes=self.host_bytes,
            shadow_bytes=self.shadow_bytes,
            peak_device_bytes=self.peak_device_bytes,
            full_cache_bytes=self.full_bytes,
            device_bytes_16bit=self.device_bytes_16bit,
            peak_device_bytes_16bit=self.peak_device_bytes_16bit,
            full_cache_bytes_16bit=self.full_bytes_16bit,
            disk_bytes=self.disk_bytes,
        )


@cache
def _block_sizes(shape: CacheShape, known: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Bytes of a block of each of the first ``known`` formats, and as if the model's dtype had 16 bits."""
    return (
        np.array([shape.block_bytes(fmt) for fmt in formats()[:known]]),
        np.array([shape.block_bytes_16bit(fmt) for fmt in formats()[:known]]),
    )


def measure(
    shape: CacheShape,
    valid: npt.NDArray[np.bool_],
    format_: U8,
    tier: U8,
    seen: int,
    shadow_bytes: int,
    disk_bytes: int | None = None,
) -> CacheUse:
    """Counts the blocks [L, H, B] that ``valid`` marks; tables are charged to the device, where kernels read them.

    ``disk_bytes`` is what those on disk take there. None: what they take in memory, the most that it can be.
    """
    sizes, sizes_16bit = _block_sizes(shape, len(formats()))
    kinds = tier[valid].astype(int) * len(sizes) + format_[valid]
    blocks = np.bincount(kinds, minlength=len(Tier) * len(sizes)).reshape(len(Tier), len(sizes))
    on_device, on_host, on_disk = blocks
    tables = int(blocks.sum()) * TABLE_BYTES_PER_BLOCK
    rows = -(-seen // BLOCK_TOKENS) * shape.layers * shape.kv_heads
    return CacheUse(
        device_bytes=int(on_device @ sizes) + tables,
        host_bytes=int(on_host @ sizes),
        disk_bytes=int(on_disk @ sizes) if disk_bytes is None else disk_bytes,
        shadow_bytes=shadow_bytes,
        full_bytes=rows * (int(sizes[Format.RAW]) + TABLE_BYTES_PER_BLOCK),
        device_bytes_16bit=int(on_device @ sizes_16bit) + tables,
        full_bytes_16bit=rows * (int(sizes_16bit[Format.RAW]) + TABLE_BYTES_PER_BLOCK),
    )
