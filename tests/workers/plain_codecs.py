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
import torch

from workers.stages.compress.turboquant import rotation

F64 = npt.NDArray[np.float64]


@dataclass
class PlainBlock:
    """One block of one head and what an encoder may know of it."""

    k: F64  # [32, D]
    v: F64
    q: F64  # [G, n, D]
    mass: F64  # [32]
    position: npt.NDArray[np.int64]  # [32]
    dtype: torch.dtype


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


PLAIN: dict[str, Callable[[PlainBlock], tuple[F64, F64]]] = {
    "think(channels=0.6)": lambda block: think(block, 0.6),
    "think(channels=0.4)": lambda block: think(block, 0.4),
    "turboquant(bits=4)": lambda block: turboquant(block, 4),
    "turboquant(bits=3)": lambda block: turboquant(block, 3),
}
"""By pipeline text, a reference for each setting of each codec."""
