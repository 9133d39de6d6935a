"""The log teaches bounds what live audits had taught them, from wherever it begins and whoever wrote it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest

from kvpilot.v1 import job_pb2, policy_pb2
from models.bundle import predict
from models.features import SCHEMA_HASH, Family
from models.online import AdaptivePredictor, OnlineCalibrator
from models.predictor import Prediction
from models.relearning import audits_of, relearn
from tests.models.fitted import held_out, trained

HARDER = 5.0
"""Live text loses so much more than that of the training."""


class Fitted:
    version, schema_hash, alpha = "fitted", SCHEMA_HASH, 0.1

    def predict(self, rows: np.ndarray, families: Sequence[Family]) -> Prediction:
        return predict(trained().models, trained().calibration, rows, families)


def serve(calibrator: OnlineCalibrator, picked: Sequence[int], controller: str = "one") -> list[job_pb2.DecisionEvent]:
    """Decides and audits one example after the other, and returns the log."""
    rows, families, divergence = lossy()
    predictor = AdaptivePredictor(Fitted(), calibrator)
    events = []
    for turn, example in enumerate(picked):
        family = families[example]
        said = predictor.predict(rows[example : example + 1], [family])
        measured, bound = HARDER * float(divergence[example]), float(said.bound[0])
        calibrator.observe(family, bound, measured)
        events += logged(f"{controller}-{turn}", rows[example], family, bound, measured)
    return events


@cache
def lossy() -> tuple[np.ndarray, list[Family], np.ndarray]:
    """Rows as the log keeps them, in 32 bits; families; divergences."""
    examples = held_out().take(held_out().lossy)
    return examples.rows.astype(np.float32).astype(np.float64), list(examples.families), examples.divergence


def logged(
    name: str, row: np.ndarray, of: Family, bound: float, measured: float, **changes: object
) -> list[job_pb2.DecisionEvent]:
    usual = {"bundle": "fitted", "feature_schema_hash": SCHEMA_HASH, "features": row, "family": of.value}
    decided = job_pb2.Decided(bound=bound, **{**usual, **changes})
    audit = policy_pb2.Audit(at_token=16, divergence=measured)
    return [
        job_pb2.DecisionEvent(decision_id=name, decided=decided),
        job_pb2.DecisionEvent(decision_id=name, measured=job_pb2.Measured(audit=audit, bound=bound)),
    ]


def learnt(events: Sequence[job_pb2.DecisionEvent]) -> OnlineCalibrator:
    calibrator = OnlineCalibrator(0.1)
    relearn(calibrator, Fitted(), audits_of("fitted", events))
    return calibrator


def picks(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(len(lossy()[1]), size=count).tolist()


def exceeded(calibrator: OnlineCalibrator) -> float:
    """Share of harder text that is above the bounds now."""
    rows, families, divergence = lossy()
    bound = AdaptivePredictor(Fitted(), calibrator).predict(rows, families).bound
    return float((HARDER * divergence > bound).mean())


def test_the_whole_log_teaches_the_very_offsets_that_were_learnt() -> None:
    live = OnlineCalibrator(0.1)
    again = learnt(serve(live, picks(600)))
    assert max(live.offset(family) for family in Family) > 0.5
    for family in Family:
        assert again.audits(family) == live.audits(family)
        assert again.offset(family) == live.offset(family)


def test_the_end_of_a_long_log_teaches_bounds_that_hold() -> None:
    live = OnlineCalibrator(0.1)
    events = serve(live, picks(4000))
    assert exceeded(OnlineCalibrator(0.1)) > 0.3
    assert 0.05 < exceeded(live) < 0.2
    assert 0.05 < exceeded(learnt(events[-4000:])) < 0.2  # in which bounds had settled long ago


def test_what_several_controllers_learnt_is_not_added_up() -> None:
    logs = [serve(OnlineCalibrator(0.1), picks(1500, seed), f"c{seed}") for seed in range(3)]
    turns = [[log[at : at + 2] for at in range(0, len(log), 2)] for log in logs]
    mixed = [event for turn in zip(*turns, strict=True) for pair in turn for event in pair]
    assert 0.05 < exceeded(learnt(mixed)) < 0.2


def test_audits_that_teach_nothing_are_left_out() -> None:
    row, family = lossy()[0][0], lossy()[1][0]
    one = logged("one", row, family, 0.1, 0.2)
    events = [
        *one,
        one[1],  # twice, after a lost answer
        *logged("other bundle", row, family, 0.1, 0.2, bundle="other"),
        *logged("other schema", row, family, 0.1, 0.2, feature_schema_hash="f" * 16),
        *logged("other family", row, family, 0.1, 0.2, family="telepathic"),
        *logged("other width", row, family, 0.1, 0.2, features=[1.0]),
        logged("decided before the log begins", row, family, 0.1, 0.2)[1],
        logged("never audited", row, family, 0.1, 0.2)[0],
    ]
    (audit,) = audits_of("fitted", events)
    assert (audit.family, audit.divergence) == (family, 0.2)
    np.testing.assert_array_equal(audit.features, row)


@pytest.mark.parametrize("measured", [math.nan, math.inf])
def test_what_is_no_number_is_above_every_bound(measured: float) -> None:
    row, family = lossy()[0][0], lossy()[1][0]
    assert learnt(logged("one", row, family, 0.1, measured)).audits(family) == (1, 1)


def test_an_empty_log_teaches_nothing() -> None:
    assert all(learnt([]).audits(family) == (0, 0) for family in Family)
