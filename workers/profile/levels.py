"""Levels of a quantiser that fit how numbers are spread: one-dimensional k-means, many rows at once."""

from __future__ import annotations

import torch

ROUNDS = 40


def fit_levels(ordered: torch.Tensor, count: int) -> torch.Tensor:
    """The levels of each row of numbers, by Lloyd's iteration from equal shares of the row.

    A level is the mean of the numbers it is the nearest one to (Lloyd, Least squares quantization in PCM, 1982). Rows
    are sorted, so what belongs to a level is a slice, and its sum a difference of running sums.

    Args:
        ordered: [rows, n], each row rising.
        count: levels, at most n.

    Returns:
        [rows, count], rising, in the numbers' dtype. A level that no number is nearest to stays where it is.
    """
    rows, n = ordered.shape
    zero = torch.zeros(rows, 1, dtype=torch.float64, device=ordered.device)
    sums = torch.cat((zero, ordered.double().cumsum(1)), 1)  # [rows, n + 1]
    middles = (torch.arange(count, device=ordered.device) + 0.5) / count * n
    level = ordered[:, middles.long()].double()
    first = torch.zeros(rows, 1, dtype=torch.int64, device=ordered.device)
    values = ordered.double().contiguous()
    for _ in range(ROUNDS):
        cut = torch.searchsorted(values, ((level[:, 1:] + level[:, :-1]) / 2).contiguous())
        edge = torch.cat((first, cut, first + n), 1)
        size = edge.diff(dim=1)
        new = torch.where(size > 0, sums.gather(1, edge).diff(dim=1) / size.clamp(min=1), level)
        if torch.equal(new, level):
            break
        level = new
    return level.to(ordered.dtype)
