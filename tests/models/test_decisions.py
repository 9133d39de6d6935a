"""Entries of the log join by the decision's id, and bundles are scored by what was measured."""

from __future__ import annotations

import math

import pytest

from kvpilot.v1 import job_pb2, policy_pb2
from kvpilot.v1.operator_pb2 import DecisionOutcome
from models.decisions import join, scores
from models.features import NAMES, SCHEMA_HASH


def decided(name: str, bundle: str = "a", shadow: str = "", **changes: object) -> job_pb2.DecisionEvent:
    content = job_pb2.Decided(outcome=DecisionOutcome.DECISION_OUTCOME_SENT, pipeline="int8", bundle=bundle)
    if bundle:
        content.predicted_divergence, content.bound, content.feature_schema_hash = 0.01, 0.02, SCHEMA_HASH
        content.features.extend([1.5, *[math.nan] * (len(NAMES) - 1)])
    if shadow:
        content.shadow_bundle, content.shadow_divergence, content.shadow_bound = shadow, 0.02, 0.04
    content.MergeFrom(job_pb2.Decided(**changes))
    return job_pb2.DecisionEvent(decision_id=name, request_id=f"job-of-{name}", worker="w0", decided=content)


def answered(name: str, outcome: DecisionOutcome) -> job_pb2.DecisionEvent:
    return job_pb2.DecisionEvent(decision_id=name, answered=job_pb2.Answered(outcome=outcome))


def measured(name: str, at_token: int, divergence: float) -> job_pb2.DecisionEvent:
    audit = policy_pb2.Audit(at_token=at_token, divergence=divergence, tokens=32)
    return job_pb2.DecisionEvent(decision_id=name, measured=job_pb2.Measured(audit=audit, bound=0.02))


def test_entries_join_by_id_whatever_stands_between_them_and_however_often() -> None:
    entries = [
        decided("1"),
        decided("2", bundle=""),
        answered("1", DecisionOutcome.DECISION_OUTCOME_APPLIED),
        measured("2", 3, 0.5),
        measured("1", 40, 0.01),
        measured("1", 40, 0.01),
        measured("1", 99, 0.03),
        measured("dropped from the log", 1, 9.0),
    ]
    one, other = join(entries)
    assert (one.decision_id, one.request_id, one.outcome) == ("1", "job-of-1", DecisionOutcome.DECISION_OUTCOME_APPLIED)
    assert sorted(one.audits) == [40, 99]
    assert one.measured == pytest.approx(0.02)
    assert one.features()[NAMES[0]] == 1.5
    assert one.features()[NAMES[1]] is None
    assert (other.outcome, other.measured) == (DecisionOutcome.DECISION_OUTCOME_SENT, 0.5)
    assert other.features() == {}


def test_features_of_another_schema_have_no_names_here() -> None:
    [one] = join([decided("1", feature_schema_hash="f" * 16)])
    assert one.features() == {}


def test_active_and_shadow_are_scored_by_the_same_audits() -> None:
    entries = [decided("1", shadow="b"), decided("2", shadow="b"), decided("3", bundle="")]
    audits = [0.01, 0.03, 0.05]
    entries += [measured("1", token, divergence) for token, divergence in enumerate(audits)]
    found = scores(join(entries))
    assert list(found) == [("active", "a"), ("shadow", "b")]
    active, shadow = found.values()
    assert (active.decisions, active.audits, active.exceeded) == (2, 3, 2)  # above 0.02
    assert (shadow.decisions, shadow.audits, shadow.exceeded) == (2, 3, 1)  # above 0.04
    assert active.measured == shadow.measured == pytest.approx(sum(audits) / 3)
    assert (active.predicted, shadow.bound) == (pytest.approx(0.01), pytest.approx(0.04))
