"""Upper bounds that hold: split conformal prediction in log space, one correction per pipeline family.

A bound is ``exp(upper(x) + shift)``: the upper-quantile model's answer, moved by what it takes to cover 1 - alpha of
windows that it was not fitted on (conformalised quantile regression, one-sided: Romano, Patterson and Candes 2019,
arXiv 1905.03222). For exchangeable windows ``P(divergence > bound) <= alpha``, whatever the model.

Windows of one document resemble each other, so documents, not windows, are nearly exchangeable; with many documents of
a few windows each the guarantee is close, with a handful of long ones it is not. A new kind of text is not exchangeable
with the old ones at all: that is what :mod:`models.online` is for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from models.features import F64, Family
from models.scale import FLOOR

if TYPE_CHECKING:
    from models.examples import Examples

MIN_WINDOWS = 100
MIN_DOCUMENTS = 8
"""A family with fewer of either is covered by the correction of all families together."""
ALPHA = 0.1


class CalibrationError(ValueError):
    """Too little to calibrate on; says how much it takes."""


@dataclass(frozen=True)
class Shift:
    """What is added to the models' log divergences for one family."""

    bound: float
    """To the upper model's."""
    point: float
    """To the point model's: its median error."""
    windows: int
    documents: int
    """Calibrated on this many."""


@dataclass(frozen=True)
class Calibration:
    """Corrections by family. A family that is not named has the pooled one."""

    alpha: float
    pooled: Shift
    families: Mapping[Family, Shift]

    def shift(self, family: Family) -> Shift:
        """The correction that holds for a family."""
        return self.families.get(family, self.pooled)

    def shifts(self, families: Sequence[Family]) -> tuple[F64, F64]:
        """Corrections of the bound and of the point prediction, [N] each."""
        bound = {family: self.shift(family).bound for family in Family}
        point = {family: self.shift(family).point for family in Family}
        return np.array([bound[family] for family in families]), np.array([point[family] for family in families])


def conformal_quantile(scores: F64, alpha: float) -> float:
    """The ceil((n + 1)(1 - alpha))-th smallest score: exceeded by a new exchangeable one with probability <= alpha.

    Raises:
        CalibrationError: fewer scores than any finite bound takes.
    """
    rank = math.ceil(round((len(scores) + 1) * (1 - alpha), 9))  # 100 * 0.9 is 90, whatever its last bit
    if rank > len(scores):
        raise CalibrationError(f"{len(scores)} windows: alpha {alpha} takes at least {math.ceil(1 / alpha) - 1}")
    return float(np.partition(scores, rank - 1)[rank - 1])


def calibrate(examples: Examples, point: F64, upper: F64, alpha: float = ALPHA) -> Calibration:
    """Corrections for predictions [N] in log nats on windows that no model was fitted on.

    Raises:
        CalibrationError: alpha is no share, or there are too few windows for it.
    """
    if not 0 < alpha < 1:
        raise CalibrationError(f"alpha {alpha}: expected a share above 0 and below 1")
    lossy = np.flatnonzero(examples.lossy)
    families: dict[Family, Shift] = {}
    for family in Family:
        chosen = lossy[examples.family[lossy] == family.value]
        documents = len(np.unique(examples.source[chosen]))
        if len(chosen) >= max(MIN_WINDOWS, math.ceil(1 / alpha)) and documents >= MIN_DOCUMENTS:
            families[family] = _shift(examples.take(chosen), point[chosen], upper[chosen], alpha)
    pooled = _shift(examples.take(lossy), point[lossy], upper[lossy], alpha)
    return Calibration(alpha=alpha, pooled=pooled, families=families)


def _shift(examples: Examples, point: F64, upper: F64, alpha: float) -> Shift:
    # A divergence at the floor is below every bound, however low the model's answer.
    scores = np.where(examples.target <= FLOOR, -np.inf, examples.target - upper)
    finite_low = FLOOR - float(upper.max(initial=FLOOR))
    return Shift(
        bound=max(finite_low, conformal_quantile(scores, alpha)),
        point=float(np.median(examples.target - point)),
        windows=len(examples),
        documents=examples.documents,
    )
