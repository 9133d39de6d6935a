"""What a dataset says, as arrays."""

from __future__ import annotations

import numpy as np

from models.examples import Examples, LongRange
from models.features import NAMES, Family
from tests.models.synthetic import PIPELINES, table, usual


def test_places_are_told_apart() -> None:
    examples = Examples.of(table(documents=5, windows=2))
    assert examples.windows == 10
    assert examples.documents == 5
    naive: dict[tuple[str, int], int] = {}
    for row in range(len(examples)):
        key = (str(examples.document[row]), int(examples.at_token[row]))
        assert naive.setdefault(key, int(examples.window[row])) == examples.window[row]
    assert len(set(naive.values())) == len(naive) == 10
    assert (np.bincount(examples.window) == len(PIPELINES)).all()


def test_rows_that_lose_nothing_do_not_count_as_lossy() -> None:
    examples = Examples.of(usual())
    short = (examples.pipeline == "window(recent=512)") & (examples.at_token < 512)
    assert short.any()
    assert not examples.lossy[short].any()
    assert not examples.evicting[short].any()
    assert not examples.lossy[examples.family == Family.EXACT.value].any()
    assert examples.lossy[examples.pipeline == "int8"].all()
    assert not examples.evicting[examples.pipeline == "int8"].any()
    assert (examples.divergence[examples.lossy] > 0).all()
    assert (examples.divergence[~examples.lossy] == 0).all()


def test_long_range_labels_come_from_the_window_nearest_to_256() -> None:
    examples = Examples.of(usual())
    found = LongRange.of(examples)
    assert len(found.needed) == examples.windows
    chosen = examples.pipeline == "window(recent=256)"
    order = np.argsort(examples.window[chosen])
    expected = examples.divergence[chosen][order] > 0.05
    np.testing.assert_array_equal(found.needed, expected)
    np.testing.assert_array_equal(found.states, examples.rows[chosen][order][:, : found.states.shape[1]])
    assert 0.1 < expected.mean() < 0.9


def test_without_that_window_the_nearest_one_is_taken() -> None:
    examples = Examples.of(usual())
    found = LongRange.of(examples.take(examples.pipeline != "window(recent=256)"))
    where = examples.rows[:, NAMES.index("log2_recent")]
    for row in range(0, examples.windows, 7):
        at = np.flatnonzero((examples.window == row) & (examples.family == "window"))
        at = at[examples.pipeline[at] != "window(recent=256)"]
        nearest = at[np.argmin(np.abs(where[at] - 8))]
        assert found.needed[row] == (examples.divergence[nearest] > 0.05)
