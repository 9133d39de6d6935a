"""How the tokens that an evictor keeps are shared out over layers and heads, whatever their scores are made of.

Protected tokens (first and last) stay everywhere; a rule shares out the rest, n tokens a head in the mean.

========  ===========================================================================================================
uniform   n for each head
pyramid   less from layer to layer: a layer's heads have from 2 n - n / 20 in the first to n / 20 in the last, linearly
          (PyramidKV, arXiv 2406.02069, beta 20); less steeply where the first would have more than there are
ada       the H n best of a layer, whichever head has them; each head keeps at least the best n / 5 of its own
          (Ada-KV, arXiv 2407.11550)
per-head  what the stage says for each head, by what the head does; no parameter chooses this rule
========  ===========================================================================================================
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

UNIFORM, PYRAMID, ADA, PER_HEAD = "uniform", "pyramid", "ada", "per-head"
RULES = (UNIFORM, PYRAMID, ADA)
"""Those that a parameter can choose."""
PYRAMID_BETA = 20
ADA_FLOOR = 0.2
Scores = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]


def free_tokens(rule: str, layer: int, layers: int, free: int, most: int) -> int:
    """Tokens beyond the protected ones that each head of a layer keeps, in the mean.

    Args:
        rule: one of RULES.
        layer, layers: which layer of how many.
        free: the mean over all layers.
        most: tokens of the request that are not protected, of which no head can keep more.
    """
    if rule != PYRAMID or layers == 1 or free >= most:
        return free
    first = min(2 * free - free / PYRAMID_BETA, most)
    last = 2 * free - first
    return round(first - (first - last) * layer / (layers - 1))


def best(rule: str, score: Scores, protected: Mask, valid: Mask, fixed: int, free: int | Counts) -> Mask:
    """Which tokens [H, T] of a layer stay: ``fixed`` + ``free`` a head, those protected first.

    Ties go to later tokens of a head, and between heads to what stands further back in its table.

    Args:
        rule: one of RULES, or PER_HEAD.
        score: [H, T].
        protected, valid: [H, T] tokens that come before all others, and which entries are tokens.
        fixed: how many tokens are protected.
        free: what :func:`free_tokens` says; with PER_HEAD one number for each head, [H].
    """
    ranked = np.where(valid, np.where(protected, np.inf, score), -np.inf)
    if rule != ADA:
        return _top(ranked, fixed + free) & valid
    assert isinstance(free, int)
    floor = int(ADA_FLOOR * free)
    keep = _top(ranked, fixed + floor) & valid
    # one row of all heads, those of a token side by side, so that ties still go to the later token
    together = np.where(valid & ~keep, score, -np.inf).T.reshape(1, -1)
    chosen = _top(together, len(score) * (free - floor)) & (together > -np.inf)
    return keep | chosen.reshape(score.shape[::-1]).T


def _top(score: Scores, count: int | Counts) -> Mask:
    """The best ``count`` entries of each row, or of each its own number; among equals the later ones."""
    chosen = np.zeros(score.shape, bool)
    order = np.argsort(-score[:, ::-1], axis=1, kind="stable")
    taken = np.arange(score.shape[1]) < np.reshape(count, (-1, 1))
    np.put_along_axis(chosen, score.shape[1] - 1 - order, np.broadcast_to(taken, score.shape), axis=1)
    return chosen
