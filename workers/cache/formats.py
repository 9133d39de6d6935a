"""All formats of blocks by the number that block tables hold: the kernels' own, and those of codecs that bring theirs.

A codec's format has a number from the first time that anything asks for it until the process ends; equal codecs share
one, with a shadow or without.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kernels.layout import BlockFormat, CacheShape, ForeignFormat, Format
from kvpilot.pipeline import StageSpec, format_pipeline

if TYPE_CHECKING:
    from workers.stages.base import Coded

MOST_FORMATS = 256
"""A table holds a byte."""

_formats: list[BlockFormat] = list(Format)
_of_codec: dict[Coded, CodedFormat] = {}
_lock = threading.Lock()


class CodedFormat(ForeignFormat):
    """The format of blocks that a codec encodes and decodes by itself."""

    codec: Coded

    def __new__(cls, number: int, codec: Coded) -> CodedFormat:
        """A format of that number; :func:`coded_format` gives numbers out."""
        fmt = super().__new__(cls, number)
        fmt.codec = codec
        spec = codec.spec()
        own = tuple(item for item in spec.parameters if item[0] != "shadow")
        fmt.name = format_pipeline((StageSpec(spec.name, own),)).upper()
        return fmt

    def __repr__(self) -> str:
        return f"<CodedFormat {self.name}: {int(self)}>"

    def payload_bytes(self, shape: CacheShape) -> int:
        """See ``kernels.layout.ForeignFormat``."""
        return self.codec.nbytes(shape)


def coded_format(codec: Coded) -> CodedFormat:
    """The format of a codec's blocks.

    Raises:
        ValueError: as many different codecs were used before as there are numbers.
    """
    key = codec.without_shadow()
    with _lock:
        known = _of_codec.get(key)
        if known is None:
            if len(_formats) == MOST_FORMATS:
                raise ValueError(f"stage {codec.name!r}: {MOST_FORMATS} formats are in use; no more are accepted")
            known = _of_codec[key] = CodedFormat(len(_formats), key)
            _formats.append(known)
        return known


def format_of(number: int) -> BlockFormat:
    """The format that a block table means by a number."""
    return _formats[number]


def as_read(numbers: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Formats by which blocks of these formats are read: the kernels' own for those that are laid out like them."""
    plain = [fmt.codec.plain if isinstance(fmt, CodedFormat) else None for fmt in _formats]
    return np.array([fmt if own is None else own for fmt, own in zip(_formats, plain, strict=True)], np.uint8)[numbers]


def formats() -> tuple[BlockFormat, ...]:
    """All formats that have a number, in the order of these."""
    return tuple(_formats)
