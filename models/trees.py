"""Fast answers of gradient-boosted trees: a tile of rows goes down a tree together, level by level, compiled by Numba.

scikit-learn's own ``predict`` takes rows one by one through each tree; a tick of a planner asks for thousands of rows
of three models. The answers are the same to the bit: the same comparisons, the same sums in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numba
import numpy as np
import numpy.typing as npt

from models.features import F64

I32: TypeAlias = npt.NDArray[np.int32]
U32: TypeAlias = npt.NDArray[np.uint32]
TILE_ROWS = 256
"""Rows that go down together: their columns and places stay in the core's cache."""
_STRIDE = TILE_ROWS + 8
"""Numbers from one column of a tile to the next: a power of two would put all of a row into few lines of a cache."""


@dataclass(frozen=True)
class Trees:
    """The trees of M models that look at the same rows, end to end. A leaf leads to itself."""

    features: int
    """Columns that they look at."""
    bases: F64
    """[M]"""
    model: U32
    """[T] whose tree it is."""
    roots: U32
    """[T] first node of each tree."""
    depths: I32
    """[T] steps from the root to the deepest leaf."""
    looked_at: U32
    """[nodes] the feature, or ``features`` more where its missing values go right."""
    threshold: F64
    """[nodes] to the left at or below."""
    child: U32
    """[nodes] left child; the right one is next to it. A leaf's is itself, and no number lies above its threshold."""
    value: F64
    """[nodes] of leaves."""

    @classmethod
    def of(cls, *models: Any) -> Trees:
        """Reads fitted histogram gradient boosting models, each with one output and no categorical features.

        Raises:
            ValueError: one is no such model, or they look at different numbers of features.
        """
        features = {int(getattr(model, "n_features_in_", 0)) for model in models}
        if len(features) != 1:
            raise ValueError(f"models of {sorted(features)} features: expected equally many")
        (count,) = features
        trees = [(owner, tree.nodes) for owner, model in enumerate(models) for tree in _trees(model)]
        sizes = np.array([len(nodes) for _, nodes in trees])
        roots = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        depths = [_checked_depth(nodes, count) for _, nodes in trees]
        every = np.concatenate([_by_level(nodes) for _, nodes in trees])
        leaf = every["is_leaf"].astype(bool)
        right = ~leaf & (every["missing_go_to_left"] == 0)
        return cls(
            features=count,
            bases=np.array([float(np.asarray(model._baseline_prediction).ravel()[0]) for model in models]),
            model=np.array([owner for owner, _ in trees], np.uint32),
            roots=roots.astype(np.uint32),
            depths=np.array(depths, np.int32),
            looked_at=np.where(leaf, 0, every["feature_idx"] + count * right).astype(np.uint32),
            threshold=np.where(leaf, np.inf, np.minimum(every["num_threshold"], np.finfo(np.float64).max)),
            child=np.where(leaf, np.arange(len(every)), np.repeat(roots, sizes) + every["left"]).astype(np.uint32),
            value=np.where(leaf, every["value"], 0.0),
        )

    def answer(self, rows: F64) -> F64:
        """Raw predictions [M, N] for rows [N, features].

        Raises:
            ValueError: rows of another shape.
        """
        if rows.ndim != 2 or rows.shape[1] != self.features:
            raise ValueError(f"rows {rows.shape}: expected [N, {self.features}]")
        out = np.repeat(self.bases[:, None], len(rows), axis=1)
        _descend(
            np.ascontiguousarray(rows, np.float64),
            self.model,
            self.roots,
            self.depths,
            self.looked_at,
            self.threshold,
            self.child,
            self.value,
            out,
        )
        return out


def _trees(model: Any) -> list[Any]:
    iterations = getattr(model, "_predictors", None)
    if not iterations or any(len(trees) != 1 for trees in iterations):
        raise ValueError(f"{type(model).__name__}: expected a fitted gradient boosting model with one output")
    return [tree for (tree,) in iterations]


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
    rows: Any,
    model: Any,
    roots: Any,
    depths: Any,
    looked_at: Any,
    threshold: Any,
    child: Any,
    value: Any,
    out: Any,
) -> None:
    # Unsigned indices: Numba then need not look for negative ones, and the inner loop becomes gathers without branches.
    count, features = rows.shape
    columns = np.empty(2 * features * _STRIDE)  # of a tile; behind those of the features, those with infinity for NaN
    start = np.empty(2 * features, np.uint32)
    offset = np.empty(len(looked_at), np.uint32)
    place = np.empty(TILE_ROWS, np.uint32)
    missing = np.empty(features, np.bool_)
    for first in range(0, count, TILE_ROWS):
        tile = min(TILE_ROWS, count - first)
        missing[:] = False
        for row in range(tile):
            for feature in range(features):
                x = rows[first + row, feature]
                columns[feature * _STRIDE + row] = x
                missing[feature] |= x != x
        copies = features
        for feature in range(features):
            start[feature] = start[features + feature] = feature * _STRIDE
            if missing[feature]:  # NaN is above nothing and so goes left; infinity goes right
                start[features + feature] = copies * _STRIDE
                for row in range(tile):
                    x = columns[feature * _STRIDE + row]
                    columns[copies * _STRIDE + row] = np.inf if x != x else x
                copies += 1
        for each in range(len(looked_at)):
            offset[each] = start[looked_at[each]]
        for tree in range(len(roots)):
            for row in range(tile):
                place[row] = roots[tree]
            for _ in range(depths[tree]):
                for row in range(tile):
                    node = np.uint64(place[row])
                    x = columns[np.uint64(offset[node]) + np.uint64(row)]
                    place[row] = child[node] + np.uint32(x > threshold[node])
            owner = model[tree]
            for row in range(tile):
                out[owner, first + row] += value[np.uint64(place[row])]


_descend = numba.njit(_walk, cache=True, nogil=True, error_model="numpy")


def _differs(rows: Any) -> Any:
    new = np.ones(len(rows), np.bool_)
    for row in range(1, len(rows)):
        new[row] = False
        for column in range(rows.shape[1]):
            if rows[row, column] != rows[row - 1, column]:
                new[row] = True
                break
    return new


_differs_fast = numba.njit(_differs, cache=True, nogil=True, error_model="numpy")


def begins_run(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which of ``rows`` [N, columns] differ from the one before, [N]; the first one does."""
    return np.asarray(_differs_fast(rows))


def _join(states: Any, parts: Any, request: Any, candidate: Any, out: Any) -> None:
    known = states.shape[1]
    for row in range(len(request)):
        for column in range(known):
            out[row, column] = states[request[row], column]
        for column in range(parts.shape[2]):
            out[row, known + column] = parts[request[row], candidate[row], column]


_join_fast = numba.njit(_join, cache=True, nogil=True, error_model="numpy")


def join_rows(states: F64, parts: F64, request: Any, candidate: Any, out: F64) -> None:
    """Writes whole rows: those of requests, ``states`` [R, S], before those of their candidates, ``parts`` [R, C, K].

    Args:
        request, candidate: [N] of which each row is.
        out: [N or more, S + K] takes them.
    """
    _join_fast(states, parts, request, candidate, out)
