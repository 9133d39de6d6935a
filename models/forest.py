"""The three models of a predictor, and what they answer before calibration."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

from models.features import F64, REQUEST_FEATURES, SIGNAL_FEATURES
from models.trees import Trees, begins_run

Index: TypeAlias = npt.NDArray[np.intp]
STATE_FEATURES = len(REQUEST_FEATURES) + len(SIGNAL_FEATURES)
"""The first columns of a row, equal for all candidates of a request."""


@dataclass(frozen=True)
class Answer:
    """Of N rows, not calibrated."""

    point: F64
    """[N] log nats."""
    upper: F64
    """[N] log nats."""
    long_range: F64
    """[N] probability."""


@dataclass(frozen=True)
class Models:
    """Fitted scikit-learn models."""

    point: HistGradientBoostingRegressor
    """Log divergence."""
    upper: HistGradientBoostingRegressor
    """Its 1 - alpha quantile."""
    long_range: HistGradientBoostingClassifier
    """Whether the local window is too short; sees request and signal features only."""

    def prepare(self) -> None:
        """Reads the trees, which :meth:`answer` otherwise does when it is first called.

        Raises:
            ValueError: they are not sound.
        """
        _ = self._trees

    @cached_property
    def _trees(self) -> tuple[Trees, Trees]:
        return Trees.of(self.point, self.upper), Trees.of(self.long_range)

    def answer(self, rows: F64) -> Answer:
        """Asks all three about rows [N, features] at once; N may be 0.

        Rows of one request that follow each other are looked at once by the long-range model.
        """
        divergence, long_range = self._trees
        point, upper = divergence.answer(rows)
        first, request = _requests(rows[:, :STATE_FEATURES])
        (need,) = long_range.answer(rows[first, :STATE_FEATURES])
        return Answer(point=point, upper=upper, long_range=(1.0 / (1.0 + np.exp(-need)))[request])


def _requests(states: F64) -> tuple[Index, Index]:
    """First rows of runs of equal rows in ``states`` [N, features], and each row's run."""
    new = begins_run(states.view(np.int64))  # as bits: NaN equals NaN
    return np.flatnonzero(new), np.cumsum(new) - 1
