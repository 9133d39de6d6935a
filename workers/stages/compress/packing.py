"""Codes of a few bits, packed without gaps: the lowest bits of a row's first byte are its first code."""

from __future__ import annotations

import torch
from torch.nn import functional


def packed_bytes(codes: int, bits: int) -> int:
    """Bytes of a row of so many codes."""
    return -(-codes * bits // 8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [..., n] below 2 ** bits, bits at most 8, as uint8 [..., packed_bytes]."""
    at = torch.arange(bits, device=codes.device)
    each = (codes[..., None].to(torch.uint8) >> at.to(torch.uint8)) & 1  # [..., n, bits]
    row = packed_bytes(codes.shape[-1], bits)
    flat = functional.pad(each.flatten(-2), (0, 8 * row - codes.shape[-1] * bits))
    weights = (1 << torch.arange(8, device=codes.device)).to(torch.uint8)
    by_byte = flat.view(*codes.shape[:-1], row, 8)
    return (by_byte * weights).sum(-1, dtype=torch.uint8)


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first ``count`` codes of each row of uint8 [..., bytes], as int64 [..., count]."""
    wide = functional.pad(packed, (0, 1)).int()  # a code may end in the next byte
    first = torch.arange(count, device=packed.device) * bits
    byte = first // 8
    return ((wide[..., byte] | wide[..., byte + 1] << 8) >> (first % 8).int() & (1 << bits) - 1).long()


def stored_places(place: torch.Tensor) -> torch.Tensor:
    """Numbers [N, n] below 65,536 as uint16, in bytes: uint8 [N, 2 n]."""
    return torch.stack([place & 255, place >> 8], 2).to(torch.uint8).flatten(1)


def places_of(stored: torch.Tensor) -> torch.Tensor:
    """Back from :func:`stored_places`: int64 [N, n]."""
    each = stored.reshape(len(stored), -1, 2).long()
    return each[..., 0] | each[..., 1] << 8
