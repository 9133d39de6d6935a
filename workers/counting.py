"""Compiled passes over a request's tokens, for signals: each reads its tables once, head by head."""

from __future__ import annotations

import numpy as np

from kernels.cpu_jit import Array, fast_jit, jit
from kernels.layout import BLOCK_TOKENS

_SHIFT = 7
_BINS, _FINE = 1 << 8, 1 << _SHIFT
"""Votes are not negative float16, so their 15 bits, read as numbers, are in their order: the upper 8 name a bin."""
_LANES = 4
"""Histograms counted side by side: equal votes that follow each other need not wait for each other."""


@fast_jit
def count_votes(
    bits: Array, length: Array, halves: Array, may_stay: Array, by_block: Array, rest: Array, least: Array
) -> None:
    """Sums the votes of each block, and those of all tokens but the best, for some numbers of these.

    Args:
        bits: uint16 [L, H, T] votes as float16; beyond ``length`` anything.
        length: int32 [L, H] kept tokens.
        halves: float32 [65536] every float16 by its bits.
        may_stay: int64 [K], each at least 1.
        by_block: float64 [L, H, B], zeros; receives sums.
        rest: float64 [L, H, K], zeros; receives the votes of all but the best ``may_stay`` tokens.
        least: uint16 [L, H, K], zeros; receives the bits of the least vote of those best; stays 0 where all may stay.
    """
    lanes = np.empty((_LANES, _BINS), np.int32)
    row = np.empty(_BINS, np.uint8)
    fine = np.empty((len(may_stay) + 1, _FINE), np.int32)
    values = np.empty(bits.shape[2], np.float32)
    for layer in range(length.shape[0]):
        for head in range(length.shape[1]):
            kept = length[layer, head]
            votes = bits[layer, head, :kept]
            for token in range(kept):
                values[token] = halves[votes[token]]
            for block in range((kept + BLOCK_TOKENS - 1) // BLOCK_TOKENS):
                total = 0.0
                for token in range(block * BLOCK_TOKENS, min(kept, (block + 1) * BLOCK_TOKENS)):
                    total += np.float64(values[token])
                by_block[layer, head, block] = total
            if kept <= may_stay.min():
                continue
            _count_bins(votes, lanes)
            _count_within(votes, lanes[0], may_stay, row, fine)
            for place in range(len(may_stay)):
                if kept > may_stay[place]:
                    bin_, better = _bin_with(lanes[0], may_stay[place])
                    step, within = _bin_with(fine[row[bin_]], may_stay[place] - better)
                    bound, better = (bin_ << _SHIFT) + step, better + within
                    total = (may_stay[place] - better) * -np.float64(halves[bound])  # ties that may stay
                    for token in range(kept):
                        total += np.float64(values[token]) if votes[token] <= bound else 0.0
                    rest[layer, head, place] = total
                    least[layer, head, place] = bound


@jit
def _count_bins(votes: Array, lanes: Array) -> None:
    """Counts the votes of each bin, into the first lane."""
    lanes[:] = 0
    whole = len(votes) // _LANES * _LANES
    for token in range(0, whole, _LANES):
        for lane in range(_LANES):
            lanes[lane, votes[token + lane] >> _SHIFT] += 1
    for token in range(whole, len(votes)):
        lanes[0, votes[token] >> _SHIFT] += 1
    for lane in range(1, _LANES):
        lanes[0] += lanes[lane]


@jit
def _bin_with(bins: Array, best: int) -> tuple[int, int]:
    """The bin that has the least of the ``best`` largest votes, and how many votes are in those above it."""
    bin_, above = len(bins) - 1, 0
    while bin_ > 0 and above + bins[bin_] < best:
        above += bins[bin_]
        bin_ -= 1
    return bin_, above


@jit
def _count_within(votes: Array, bins: Array, may_stay: Array, row: Array, fine: Array) -> None:
    """Counts the votes within the bins that are asked about.

    Args:
        votes: uint16 [T].
        bins: int32 [_BINS] how many are in each bin.
        may_stay: int64 [K].
        row: uint8 [_BINS], receives the bin's row in ``fine``.
        fine: int32 [K + 1, _FINE], receives the counts; the last row those of no bin that is asked about.
    """
    row[:] = len(may_stay)
    for place in range(len(may_stay)):
        row[_bin_with(bins, may_stay[place])[0]] = place
    fine[:] = 0
    for vote in votes:
        fine[row[vote >> _SHIFT], vote & (_FINE - 1)] += 1


@fast_jit
def set_levels(bits: Array, length: Array, least: Array, recent: int, level: Array) -> None:
    """Counts at how many numbers of tokens that may stay each token would go.

    Args:
        bits: uint16 [L, H, T] votes as float16.
        length: int32 [L, H] kept tokens.
        least: uint16 [L, H, K] bits of the least vote that stays.
        recent: last tokens that stay anyway.
        level: uint8 [L, H, T'], zeros; receives the counts.
    """
    for layer in range(length.shape[0]):
        for head in range(length.shape[1]):
            old = max(0, length[layer, head] - recent)
            votes, found = bits[layer, head, :old], level[layer, head, :old]
            for place in range(least.shape[2]):
                bound = least[layer, head, place]
                for token in range(old):
                    found[token] += np.uint8(votes[token] < bound)


@jit
def sum_by_level(mass: Array, length: Array, level: Array, sums: Array) -> None:
    """Adds up masses by the level of their token.

    Args:
        mass: float32 [L, H, T].
        length: int32 [L, H] kept tokens.
        level: uint8 [L, H, T'].
        sums: float64 [L, H, levels + 1], zeros; receives the sums, those of tokens beyond T' last.
    """
    levels = sums.shape[2] - 1
    for layer in range(length.shape[0]):
        for head in range(length.shape[1]):
            known = min(length[layer, head], level.shape[2])
            for token in range(known):
                sums[layer, head, level[layer, head, token]] += mass[layer, head, token]
            for token in range(known, length[layer, head]):
                sums[layer, head, levels] += mass[layer, head, token]
