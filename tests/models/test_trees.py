"""The compiled helpers beside the trees' own answers, which test_training holds to scikit-learn's."""

from __future__ import annotations

import numpy as np

from models.trees import begins_run, join_rows


def test_rows_that_differ_from_the_one_before_begin_a_run() -> None:
    rows = np.array([[1.0, np.nan], [1.0, np.nan], [1.0, 2.0], [1.0, np.nan], [-0.0, np.nan], [0.0, np.nan]])
    assert begins_run(rows.view(np.int64)).tolist() == [True, False, True, True, True, True]
    assert begins_run(np.empty((0, 2), np.int64)).tolist() == []


def test_rows_are_joined_of_a_request_and_one_of_its_candidates() -> None:
    rng = np.random.default_rng(0)
    states, parts = rng.random((3, 4)), rng.random((3, 5, 2))
    request, candidate = np.array([0, 2, 2]), np.array([4, 0, 3])
    out = np.full((4, 6), np.nan)
    join_rows(states, parts, request, candidate, out)
    assert np.array_equal(out[:3], np.hstack([states[request], parts[request, candidate]]))
    assert np.isnan(out[3]).all(), "what is behind belongs to somebody else"
