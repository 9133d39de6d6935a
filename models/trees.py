"""Fast answers of gradient-boosted trees: all rows go down a tree together, level by level, compiled by Numba.

scikit-learn's own ``predict`` takes rows one by one through each tree; a tick of a planner asks for thousands of rows
of three models. The answers are the same to the bit: the same comparisons, the same sums in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numba
import numpy as np
import numpy.typing as npt

from models.features import F64

I32: TypeAlias = npt.NDArray[np.int32]
U32: TypeAlias = npt.NDArray[np.uint32]
TILE_ROWS = 256
"""Rows that go down together: their places and the columns they need stay in the core's cache."""


@dataclass(frozen=True)
class Columns:
    """Rows laid out for trees, once for all models that look at them."""

    values: F64
    """[features and copies, N], C-contiguous. NaN is above nothing and so goes left; in the copies it is infinite."""
    right: U32
    """[features] which of ``values`` to look at where NaN goes right."""

    @classmethod
    def of(cls, rows: F64, *models: Trees) -> Columns:
        """Lays out rows [N, features] for some models, all of which look at as many features."""
        count, features = rows.shape
        sent = np.zeros(features, bool)
        for model in models:
            if model.features != features:
                raise ValueError(f"{features} features given; these trees look at {model.features}")
            sent |= model.sent_right
        missing = np.flatnonzero(sent)
        missing = missing[np.isnan(rows[:, missing]).any(0)]
        values = np.empty((features + len(missing), count))
        values[:features] = rows.T
        copies = values[features:]
        copies[:] = values[missing]
        copies[np.isnan(copies)] = np.inf
        right = np.arange(features, dtype=np.uint32)
        right[missing] = features + np.arange(len(missing), dtype=np.uint32)
        return cls(values, right)


@dataclass(frozen=True)
class Trees:
    """The trees of one model, end to end. A leaf leads to itself."""

    features: int
    """Columns that it looks at."""
    base: float
    roots: U32
    """[T] first node of each tree."""
    depths: I32
    """[T] steps from the root to the deepest leaf."""
    feature: U32
    """[nodes]"""
    threshold: F64
    """[nodes] to the left at or below."""
    child: U32
    """[nodes] left child; the right one is next to it. A leaf's is itself, and no number lies above its threshold."""
    missing_right: npt.NDArray[np.bool_]
    """[nodes] whether NaN goes right."""
    value: F64
    """[nodes] of leaves."""

    @classmethod
    def of(cls, model: Any) -> Trees:
        """Reads a fitted histogram gradient boosting model with one output and no categorical features.

        Raises:
            ValueError: it is not such a model.
        """
        iterations = getattr(model, "_predictors", None)
        if not iterations or any(len(trees) != 1 for trees in iterations):
            raise ValueError(f"{type(model).__name__}: expected a fitted gradient boosting model with one output")
        nodes = [trees[0].nodes for trees in iterations]
        depths = [_checked_depth(tree, int(model.n_features_in_)) for tree in nodes]
        sizes = np.array([len(tree) for tree in nodes])
        roots = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        every = np.concatenate([_by_level(tree) for tree in nodes])
        leaf = every["is_leaf"].astype(bool)
        return cls(
            features=int(model.n_features_in_),
            base=float(np.asarray(model._baseline_prediction).ravel()[0]),
            roots=roots.astype(np.uint32),
            depths=np.array(depths, np.int32),
            feature=np.where(leaf, 0, every["feature_idx"]).astype(np.uint32),
            threshold=np.where(leaf, np.inf, np.minimum(every["num_threshold"], np.finfo(np.float64).max)),
            child=np.where(leaf, np.arange(len(every)), np.repeat(roots, sizes) + every["left"]).astype(np.uint32),
            missing_right=~leaf & (every["missing_go_to_left"] == 0),
            value=np.where(leaf, every["value"], 0.0),
        )

    def answer(self, columns: Columns) -> F64:
        """Raw predictions [N] for rows that were laid out for these trees, maybe among others."""
        rows = columns.values.shape[1]
        column = np.concatenate([np.arange(self.features, dtype=np.uint32), columns.right])
        offset = column[self.feature + np.uint32(self.features) * self.missing_right] * np.uint32(rows)
        out = np.full(rows, self.base)
        _descend(
            columns.values.reshape(-1),
            self.roots,
            self.depths,
            offset,
            self.threshold,
            self.child,
            self.value,
            out,
        )
        return out

    @cached_property
    def sent_right(self) -> npt.NDArray[np.bool_]:
        """[features] whose missing values some node sends to the right."""
        sent = np.zeros(self.features, bool)
        sent[self.feature[self.missing_right]] = True
        return sent


def _checked_depth(tree: Any, features: int) -> int:
    """Depth of a tree, whose nodes come from a file: what they point at is used as an index without further checks.

    Raises:
        ValueError: a node that is not the child of exactly one node before it, or a feature that does not exist.
    """
    inner = np.flatnonzero(tree["is_leaf"] == 0)
    if not len(tree) or tree["is_categorical"].any():
        raise ValueError("a tree without nodes or with categorical splits")
    children = np.concatenate([tree["left"][inner], tree["right"][inner]]).astype(np.int64)
    if (children <= np.tile(inner, 2)).any() or not np.array_equal(np.sort(children), np.arange(1, len(tree))):
        raise ValueError("a tree whose nodes lead out of it or back, or to the same node twice")
    if ((tree["feature_idx"][inner] < 0) | (tree["feature_idx"][inner] >= features)).any():
        raise ValueError("a tree that looks at a feature that does not exist")
    depth = np.zeros(len(tree), np.int64)
    for node in inner:  # children stand behind their parents
        for side in ("left", "right"):
            child = tree[side][node]
            depth[child] = max(depth[child], depth[node] + 1)
    return int(depth.max())


def _by_level(tree: Any) -> Any:
    """The nodes renumbered from the root down, so that the two children of a node stand side by side."""
    order = [0]
    for node in order:
        if not tree["is_leaf"][node]:
            order += [int(tree["left"][node]), int(tree["right"][node])]
    place = np.empty(len(tree), np.int64)
    place[order] = np.arange(len(tree))
    level = tree[order]
    level["left"], level["right"] = place[level["left"]], place[level["right"]]
    return level


def _walk(
    columns: Any,
    roots: Any,
    depths: Any,
    offset: Any,
    threshold: Any,
    child: Any,
    value: Any,
    out: Any,
) -> None:
    # Unsigned indices: Numba then need not look for negative ones, and the inner loop becomes gathers without branches.
    place = np.empty(TILE_ROWS, np.uint32)
    for first in range(0, len(out), TILE_ROWS):
        rows = min(TILE_ROWS, len(out) - first)
        for tree in range(len(roots)):
            for row in range(rows):
                place[row] = roots[tree]
            for _ in range(depths[tree]):
                for row in range(rows):
                    node = np.uint64(place[row])
                    x = columns[np.uint64(offset[node]) + np.uint64(first + row)]
                    place[row] = child[node] + np.uint32(x > threshold[node])
            for row in range(rows):
                out[first + row] += value[np.uint64(place[row])]


_descend = numba.njit(_walk, cache=True, nogil=True, error_model="numpy")
