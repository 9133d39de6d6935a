"""What codecs' decoded blocks should be, written a second time, with loops over numbers and none of their code.

Each takes one block: k and v [32, D] as float64, q [G, n, D] the last queries of the heads that read it, and what else
is known of its tokens; it gives K and V as they should be decoded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import scipy.stats

from workers.stages.compress.turboquant import rotation

F64 = npt.NDArray[np.float64]


@dataclass
class PlainBlock:
    """One block of one head and what an encoder may know of it."""

    k: F64  # [32, D]
    v: F64
    q: F64  # [G, n, D]
    votes: F64  # [32]
    position: npt.NDArray[np.int64]  # [32]
    seen: int
    key_basis: F64  # [D, D] of its head
    value_basis: F64
    frequency: F64  # [D / 2] radians a position
    key_levels: dict[int, F64]  # by how many: [D, levels]
    value_levels: dict[int, F64]  # by how many: [levels]


def think(block: PlainBlock, channels: float) -> tuple[F64, F64]:
    """Channels in the order of |Q_i| |K_i|; the others are zeros."""
    d = block.k.shape[1]
    weight = []
    for i in range(d):
        of_queries = math.sqrt(sum(float(q[i]) ** 2 for head in block.q for q in head))
        of_keys = math.sqrt(sum(float(k[i]) ** 2 for k in block.k))
        weight.append(of_queries * of_keys)
    best = sorted(range(d), key=lambda i: -weight[i])[: int(channels * d)]
    k = np.zeros_like(block.k)
    for i in best:
        k[:, i] = block.k[:, i]
    return k, block.v


def turboquant(block: PlainBlock, bits: int) -> tuple[F64, F64]:
    """Each vector's direction, turned, goes to the nearest levels; back, and to its length."""
    d = block.k.shape[1]
    turn = rotation(d).double().numpy()
    levels = lloyd_max(d, bits)
    out = []
    for x in (block.k, block.v):
        decoded = np.zeros_like(x)
        for t, row in enumerate(x):
            norm = math.sqrt(sum(float(number) ** 2 for number in row))
            unit = [sum(row[i] * turn[i, j] for i in range(d)) / norm for j in range(d)]
            near = [min(levels, key=lambda level: abs(level - u)) for u in unit]
            stored = float(np.float16(norm))
            decoded[t] = [stored * sum(near[j] * turn[i, j] for j in range(d)) for i in range(d)]
        out.append(decoded)
    return out[0], out[1]


@cache
def lloyd_max(d: int, bits: int) -> list[float]:
    """Levels of the least mean squared error for a coordinate of a random unit vector, (1 + x) / 2 of which is
    Beta((d - 1) / 2, (d - 1) / 2): each is its cell's mean, whose integral has a closed form."""
    distribution = scipy.stats.beta((d - 1) / 2, (d - 1) / 2)
    factor = math.gamma(d / 2) / math.gamma((d - 1) / 2) / math.sqrt(math.pi)
    levels = np.linspace(-3, 3, 2**bits) / math.sqrt(d)
    for _ in range(2000):
        between = np.array([-1, *((levels[1:] + levels[:-1]) / 2), 1])
        moment = -factor * (1 - between * between) ** ((d - 1) / 2) / (d - 1)
        levels = np.diff(moment) / np.diff(distribution.cdf((between + 1) / 2))
    return levels.tolist()


def half(x: float) -> float:
    return float(np.float16(np.float32(x)))


def integers(numbers: list[float], bits: int) -> list[float]:
    """Asymmetric integers of numbers that share a scale and a zero; in float32, for halves to be rounded alike."""
    single = np.float32
    zero = single(half(min(numbers)))
    scale = single(half((single(max(numbers)) - zero) / single(2**bits - 1)))
    codes = [min(max(int(np.rint((single(x) - zero) / scale)), 0), 2**bits - 1) for x in numbers]
    return [code * float(scale) + float(zero) for code in codes]


def zipcache(block: PlainBlock, high: int, low: int, share: float) -> tuple[F64, F64]:
    """Tokens in the order of votes over what the queries behind them could have given."""
    most = []
    for votes, position in zip(block.votes, block.position, strict=True):
        could = sum((1 - 1 / 64) ** i for i in range(block.seen - int(position)))
        most.append(votes / could)
    salient = sorted(range(32), key=lambda t: -most[t])[: int(share * 32)]
    out = []
    for x in (block.k, block.v):
        factor = [half(math.sqrt(max(abs(x[t, i]) for t in range(32)))) for i in range(x.shape[1])]
        rows = ([np.float32(x[t, i]) / np.float32(factor[i]) for i in range(x.shape[1])] for t in range(32))
        coded = [integers(row, high if t in salient else low) for t, row in enumerate(rows)]
        out.append(np.array(coded) * factor)
    return out[0], out[1]


def gear(block: PlainBlock, bits: int, rank: int, share: float) -> tuple[F64, F64]:
    """Groups are rows here: keys are turned over first. The residual is projected on what the power iteration finds."""
    d = block.k.shape[1]
    begin = np.random.default_rng(2403_05527).standard_normal((d, rank))
    out = []
    for x, by_channel in ((block.k.T, True), (block.v, False)):
        far = {(g, i): abs(number - row.mean()) for g, row in enumerate(x) for i, number in enumerate(row)}
        outliers = set(sorted(far, key=lambda at: -far[at])[: math.ceil(share * x.size)])
        coded = np.zeros_like(x)
        for g, row in enumerate(x):
            inside = [i for i in range(len(row)) if (g, i) not in outliers]
            for i, number in zip(inside, integers([row[i] for i in inside], bits), strict=True):
                coded[g, i] = number
        left = x - coded
        for at in outliers:
            left[at] = 0
        left = left.T if by_channel else left  # [32, D]
        right = begin
        for _ in range(3):
            basis = np.linalg.qr(left @ right)[0]
            right = left.T @ basis
        added = np.float16(basis).astype(np.float64) @ np.float16(right).astype(np.float64).T
        coded += added.T if by_channel else added
        for at in outliers:
            coded[at] = half(x[at])
        out.append(coded.T if by_channel else coded)
    return out[0], out[1]


def turned(x: F64, position: npt.NDArray[np.int64], frequency: F64, way: int) -> F64:
    """Keys [32, D] rotated by position, forth or back: channels i and i + D / 2 are a pair."""
    pairs, out = len(frequency), np.zeros_like(x)
    for t in range(len(x)):
        for i in range(pairs):
            angle = way * position[t] * frequency[i]
            a, b = x[t, i], x[t, i + pairs]
            out[t, i] = a * math.cos(angle) - b * math.sin(angle)
            out[t, i + pairs] = b * math.cos(angle) + a * math.sin(angle)
    return out


def lowrank(block: PlainBlock, share: float) -> tuple[F64, F64]:
    """Projections on the first directions; keys before their rotation."""
    rank = int(share * block.k.shape[1])
    keys, values = block.key_basis[:, :rank], block.value_basis[:, :rank]
    before = turned(block.k, block.position, block.frequency, -1)
    k, v = (np.float16(x @ basis).astype(np.float64) @ basis.T for x, basis in ((before, keys), (block.v, values)))
    return turned(k, block.position, block.frequency, 1), v


def kvquant(block: PlainBlock, bits: int) -> tuple[F64, F64]:
    """The nearest level of each number; those that fit worst are exact."""
    count, d = 2**bits, block.k.shape[1]
    keep = math.ceil(0.01 * 32 * d)

    def nearest(x: float, levels: F64) -> float:
        return float(min(levels, key=lambda level: abs(level - x)))

    before = turned(block.k, block.position, block.frequency, -1)
    k = np.array([[nearest(before[t, i], block.key_levels[count][i]) for i in range(d)] for t in range(32)])
    places = [(t, i) for t in range(32) for i in range(d)]
    for at in sorted(places, key=lambda at: -abs(before[at] - k[at]))[:keep]:
        k[at] = half(before[at])
    v = np.zeros_like(block.v)
    exact = sorted(places, key=lambda at: -abs(block.v[at] - block.v[at[0]].mean()))[:keep]
    for t in range(32):
        inside = [block.v[t, i] for i in range(d) if (t, i) not in exact]
        low, high = half(min(inside)), half(max(inside))
        for i in range(d):
            scaled = (block.v[t, i] - (low + high) / 2) / ((high - low) / 2)
            v[t, i] = nearest(scaled, block.value_levels[count]) * (high - low) / 2 + (low + high) / 2
    for at in exact:
        v[at] = half(block.v[at])
    return turned(k, block.position, block.frequency, 1), v


PLAIN: dict[str, Callable[[PlainBlock], tuple[F64, F64]]] = {
    "think(channels=0.6)": lambda block: think(block, 0.6),
    "think(channels=0.4)": lambda block: think(block, 0.4),
    "turboquant(bits=4)": lambda block: turboquant(block, 4),
    "turboquant(bits=3)": lambda block: turboquant(block, 3),
    "zipcache(bits_high=4, bits_low=2, share=0.5)": lambda block: zipcache(block, 4, 2, 0.5),
    "zipcache(bits_high=8, bits_low=3, share=0.25)": lambda block: zipcache(block, 8, 3, 0.25),
    "gear(bits=4, rank=2, outliers=0.02)": lambda block: gear(block, 4, 2, 0.02),
    "gear(bits=2, rank=4, outliers=0.0)": lambda block: gear(block, 2, 4, 0.0),
    "lowrank(rank=0.5)": lambda block: lowrank(block, 0.5),
    "lowrank(rank=0.75)": lambda block: lowrank(block, 0.75),
    "kvquant(bits=3)": lambda block: kvquant(block, 3),
    "kvquant(bits=4)": lambda block: kvquant(block, 4),
}
"""By pipeline text, a reference for each setting of each codec."""
