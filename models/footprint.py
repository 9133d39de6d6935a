"""What a pipeline would take on the device and the host, estimated from its text: for planning, not for accounting.

Built-in stages only. 32 tokens a block; int8, int4 and int2 codes in groups of 32 with two 16-bit numbers a group for
keys (per channel) and values (per token), fp8 with one; TurboQuant's codes with a 16-bit norm a token; the last block
stays raw. Budgets are shared out among heads and layers without a change of the sum: what a head keeps is the mean.
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
SHARE_EVICTORS: Mapping[str, int] = {
    "expected_attention": 2,
    "h2o": 2,
    "hashevict": 2,
    "keydiff": 2,
    "knorm": 2,
    "kvzip": 2,
    "merge": 2,
    "nacl": 2,
    "qhitter": 2,
    "scissorhands": 2,
    "snapkv": 3,
}
"""Stages that keep the share ``keep`` of all tokens, chosen by a score; and the blocks that stay in any case."""
HEAVY_HITTERS = ("h2o", "merge", "qhitter")
"""Those of them that keep the last tokens with half of what they may keep."""
FIXED_EVICTORS = ("morphkv", "tova")
"""Stages that keep ``size`` tokens, chosen by a score."""
CODECS: Mapping[str, int] = {"fp8": 8, "int8": 8, "kivi": 4, "turboquant": 4}
"""Stages that store older blocks in fewer bits, and how many unless a parameter says."""
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

    def block_bytes(self, bits: int | None, codec: str = "kivi") -> int:
        """Bytes of one block: raw for None, else in codes of so many bits; always a whole number of 256-byte units."""
        if bits is None:
            payload = 2 * BLOCK_TOKENS * self.head_dim * self.raw_dtype_bytes
        else:
            codes = 2 * BLOCK_TOKENS * -(-self.head_dim * bits // 8)
            payload = codes + 2 * (2 * BLOCK_TOKENS if codec == "turboquant" else self._group_numbers(codec))
        return -(-payload // UNIT_BYTES) * UNIT_BYTES

    def _group_numbers(self, codec: str) -> int:
        """Scales of a block's groups, and zeros where the format has them."""
        groups = self.head_dim + BLOCK_TOKENS * -(-self.head_dim // GROUP_CHANNELS)
        return groups if codec == "fp8" else 2 * groups


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
    kept, codec, bits, device_tokens, shadows = tokens, "", None, None, []
    for name, given in pipeline:
        parameters: Mapping[str, Value] = dict(given)
        match name:
            case "full":
                pass
            case "window":
                kept = np.minimum(tokens, int(parameters["sinks"]) + int(parameters["recent"]) + BLOCK_TOKENS)
            case _ if name in SHARE_EVICTORS:
                share = np.ceil(float(parameters["keep"]) * tokens).astype(np.int64)
                kept = np.minimum(tokens, np.maximum(SHARE_EVICTORS[name] * BLOCK_TOKENS, share))
            case _ if name in FIXED_EVICTORS:
                kept = np.minimum(tokens, int(parameters["size"]))
            case _ if name in CODECS:
                codec, bits = name, code_bits(pipeline)
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
    shadowed = none
    if shadows and all(shadows):  # all full blocks; where nothing is dropped, raw blocks on the host are copies already
        shadowed = tokens // BLOCK_TOKENS - np.where(kept == tokens, raw_on_host, 0)
    coded_bytes, raw_bytes = (layout.heads * layout.block_bytes(width, codec) for width in (bits, None))
    return Footprints(
        kept_tokens=kept,
        coded_tokens=coded * BLOCK_TOKENS,
        host_tokens=on_host * BLOCK_TOKENS,
        device_bytes=(coded - coded_on_host) * coded_bytes + (blocks - coded - raw_on_host) * raw_bytes,
        host_bytes=coded_on_host * coded_bytes + raw_on_host * raw_bytes,
        shadow_bytes=shadowed * raw_bytes,
    )


def code_bits(pipeline: PipelineKey) -> int | None:
    """Bits of an older block's number under a pipeline; None: they stay raw."""
    for name, given in pipeline:
        if name in CODECS:
            bits = dict(given).get("bits", CODECS[name])
            assert isinstance(bits, int)
            return bits
    return None
