"""How quantised blocks are packed for their time in files: constants that follow from others go, codes are
entropy-coded.

A block of the int8 layout (``kernels.layout``) of which most groups have the step of their whole block, or token, and
codes about 128, holds much that is known: the scales of all key channels are one, so are those of all groups of a
token's values, and their zeros are -128 scales. Each constant is stored as its difference from what these rules
foretell, mostly 0, whatever it is: any bytes come back as they were.

Packed: float16 first key scale, [D] key zeros, [32] first value scale of each token, as they are, since they are
noise to an entropy coder; then a Zstandard frame of the codes, the differences and the padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import zstandard

from kernels.api import U8
from kernels.layout import BLOCK_TOKENS, CacheShape, Format

LEVEL = 1
"""Of compression. Codes have no repetitions: what higher ones take longer to look for is not there."""
U16 = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class CodePacking:
    """Packs blocks of the int8 layout (``workers.cache.disk.Packing``)."""

    shape: CacheShape

    def pack(self, blocks: U8) -> list[bytes]:
        """See ``Packing``."""
        codes, k_scale, k_zero, v_scale, v_zero, padding = self._parts(blocks)
        apart = np.concatenate([k_scale[:, :1], k_zero, v_scale[:, :, 0]], 1).view(np.uint8)
        differences = (k_scale ^ k_scale[:, :1], v_scale ^ v_scale[..., :1], v_zero ^ _foretold_zero(v_scale))
        flat = (part.reshape(len(blocks), -1).view(np.uint8) for part in differences)
        bodies = np.concatenate([codes, *flat, padding], 1)
        compressor = zstandard.ZstdCompressor(level=LEVEL, write_content_size=False)
        return [known.tobytes() + compressor.compress(body.data) for known, body in zip(apart, bodies, strict=True)]

    def unpack(self, packed: Sequence[U8]) -> U8:
        """See ``Packing``."""
        d, count = self.shape.head_dim, len(packed)
        before = 2 * (1 + d + BLOCK_TOKENS)
        apart = np.stack([block[:before] for block in packed]).view(np.uint16)
        k_first, k_zero, v_first = apart[:, :1], apart[:, 1 : 1 + d], apart[:, 1 + d :]
        body_bytes = self.shape.block_bytes(Format.INT8) - k_zero.nbytes // count
        decompressor = zstandard.ZstdDecompressor()
        bodies = b"".join(decompressor.decompress(block[before:].data, max_output_size=body_bytes) for block in packed)
        body = np.frombuffer(bodies, np.uint8).reshape(count, body_bytes)
        codes, constants, padding = np.split(
            body, [self._code_bytes, self._code_bytes + self._difference_bytes], axis=1
        )
        differences = np.ascontiguousarray(constants).view(np.uint16)
        k_scale = differences[:, :d] ^ k_first
        v_scale, v_zero = differences[:, d:].reshape(count, 2, BLOCK_TOKENS, -1).swapaxes(0, 1)
        v_scale = v_scale ^ v_first[..., None]
        v_zero = v_zero ^ _foretold_zero(v_scale)
        flat = (part.reshape(count, -1).view(np.uint8) for part in (k_scale, k_zero.copy(), v_scale, v_zero))
        return np.concatenate([codes, *flat, padding], 1)

    def _parts(self, blocks: U8) -> tuple[U8, U16, U16, U16, U16, U8]:
        """Codes, key scales and zeros [N, D], value scales and zeros [N, 32, G], and what is behind them."""
        d, count = self.shape.head_dim, len(blocks)
        payload = self.shape.payload_bytes(Format.INT8)
        codes, constants, padding = np.split(blocks, [self._code_bytes, payload], axis=1)
        each = np.ascontiguousarray(constants).view(np.uint16)
        v_scale, v_zero = each[:, 2 * d :].reshape(count, 2, BLOCK_TOKENS, -1).swapaxes(0, 1)
        return codes, each[:, :d], each[:, d : 2 * d], v_scale, v_zero, padding

    @property
    def _code_bytes(self) -> int:
        return 2 * BLOCK_TOKENS * self.shape.head_dim

    @property
    def _difference_bytes(self) -> int:
        return 2 * (self.shape.head_dim + 2 * BLOCK_TOKENS * self.shape.value_groups)


def _foretold_zero(scale: U16) -> U16:
    """The zero that makes 128 the code of 0: exact, since float16 scales by a power of 2 without rounding."""
    with np.errstate(over="ignore", invalid="ignore"):
        return (np.ascontiguousarray(scale).view(np.float16) * np.float16(-128)).view(np.uint16)
