"""What a pipeline would take on the device and the host, estimated from its text: for planning, not for accounting.

The block layout is that of kvpilot's built-in formats: 32 tokens a block, int8 or int4 codes in groups of 32 with two
16-bit numbers a group for keys (per channel) and values (per token); the last block stays raw.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kvpilot.catalog import PipelineKey
from kvpilot.pipeline import Value

I64: TypeAlias = npt.NDArray[np.int64]

BLOCK_TOKENS = 32
GROUP_CHANNELS = 32
UNIT_BYTES = 256
_DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class CacheLayout:
    """What the estimate needs of a worker's model."""

    layers: int
    kv_heads: int
    head_dim: int
    raw_dtype_bytes: int

    @classmethod
    def of(cls, layers: int, kv_heads: int, head_dim: int, raw_dtype: str) -> CacheLayout:
        """From Hello's fields.

        Raises:
            ValueError: for a dtype whose size is not known.
        """
        if raw_dtype not in _DTYPE_BYTES:
            raise ValueError(f"raw_dtype {raw_dtype!r}: expected one of {', '.join(_DTYPE_BYTES)}")
        return cls(layers, kv_heads, head_dim, _DTYPE_BYTES[raw_dtype])

    @property
    def heads(self) -> int:
        """KV heads over all layers."""
        return self.layers * self.kv_heads

    def block_bytes(self, bits: int | None) -> int:
        """Bytes of one block: raw for None, else quantised to ``bits``; always a whole number of 256-byte units."""
        if bits is None:
            payload = 2 * BLOCK_TOKENS * self.head_dim * self.raw_dtype_bytes
        else:
            codes = 2 * BLOCK_TOKENS * self.head_dim * bits // 8
            key_groups = 4 * self.head_dim
            value_groups = 4 * BLOCK_TOKENS * -(-self.head_dim // GROUP_CHANNELS)
            payload = codes + key_groups + value_groups
        return -(-payload // UNIT_BYTES) * UNIT_BYTES


@dataclass(frozen=True)
class Footprint:
    """Estimated bytes of one request's cache."""

    device_bytes: int
    host_bytes: int
    """Blocks that attention reads there."""
    shadow_bytes: int
    """Exact copies, host tier."""

    @property
    def lower_tier_bytes(self) -> int:
        """Everything off the device."""
        return self.host_bytes + self.shadow_bytes


@dataclass(frozen=True)
class Footprints:
    """The same of one pipeline for R requests: int64 [R] each."""

    kept_tokens: I64
    """Tokens a KV head keeps."""
    coded_tokens: I64
    """Of these, in fewer bits than raw."""
    host_tokens: I64
    """Of these, on the host."""
    device_bytes: I64
    host_bytes: I64
    shadow_bytes: I64


def estimate(pipeline: PipelineKey, tokens: int, layout: CacheLayout) -> Footprint | None:
    """Bytes of ``tokens`` tokens (seen so far, kept or not) under a pipeline; None where a stage is not known here."""
    many = estimate_many(pipeline, np.array([tokens]), layout)
    if many is None:
        return None
    return Footprint(int(many.device_bytes[0]), int(many.host_bytes[0]), int(many.shadow_bytes[0]))


def estimate_many(pipeline: PipelineKey, tokens: I64, layout: CacheLayout) -> Footprints | None:
    """:func:`estimate` for R requests of ``tokens`` [R] each."""
    kept, bits, device_tokens, shadows = tokens, None, None, []
    for name, given in pipeline:
        parameters: Mapping[str, Value] = dict(given)
        match name:
            case "full":
                pass
            case "window":
                kept = np.minimum(tokens, int(parameters["sinks"]) + int(parameters["recent"]) + BLOCK_TOKENS)
            case "h2o" | "snapkv":
                share = (float(parameters["keep"]) * tokens).astype(np.int64)
                kept = np.minimum(tokens, np.maximum(3 * BLOCK_TOKENS, share))
            case "kivi":
                bits = int(parameters["bits"])
            case "int8":
                bits = 8
            case "host":
                device_tokens = int(parameters["recent"])
            case _:
                return None
        if "shadow" in parameters:
            shadows.append(parameters["shadow"] is True)
    none = np.zeros_like(tokens)
    blocks = -(-kept // BLOCK_TOKENS)
    coded = np.maximum(0, kept // BLOCK_TOKENS - 1) if bits else none  # full blocks without any of the last 32 tokens
    on_host = none if device_tokens is None else np.maximum(0, (kept - device_tokens) // BLOCK_TOKENS)
    coded_on_host, raw_on_host = np.minimum(coded, on_host), np.maximum(0, on_host - coded)
    shadowed = -(-tokens // BLOCK_TOKENS) - (blocks - coded) if shadows and all(shadows) else none
    coded_bytes, raw_bytes = (layout.heads * layout.block_bytes(width) for width in (bits, None))
    return Footprints(
        kept_tokens=kept,
        coded_tokens=coded * BLOCK_TOKENS,
        host_tokens=on_host * BLOCK_TOKENS,
        device_bytes=(coded - coded_on_host) * coded_bytes + (blocks - coded - raw_on_host) * raw_bytes,
        host_bytes=coded_on_host * coded_bytes + raw_on_host * raw_bytes,
        shadow_bytes=shadowed * raw_bytes,
    )
