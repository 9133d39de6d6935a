"""What a worker's desk keeps of a request from one report to the next."""

from __future__ import annotations

import math

import numpy as np
import pytest

from controller.desk import WorkerDesk
from kvpilot.v1 import policy_pb2
from models.features import NAMES
from tests.controller.scripted import LOUD, QUIET, request_state, worker_view

KIVI = "kivi(bits=4)"


@pytest.fixture
def desk() -> WorkerDesk:
    return WorkerDesk(worker_view())


def report(
    desk: WorkerDesk, *audited: float, pipeline: str = KIVI, under: str | None = None, decoded: bool = True, **fields
) -> dict[str, float]:
    """Notes a report with audits of these divergences, and gives the state's row after it."""
    state = request_state(pipeline=pipeline, far_mass=fields.pop("far_mass", QUIET) if decoded else (), **fields)
    state.audits.extend(policy_pb2.Audit(pipeline=under or pipeline, divergence=lost) for lost in audited)
    desk.note(state)
    return dict(zip(NAMES, desk.usable(state).state_row.tolist(), strict=False))


def audited(row: dict[str, float]) -> float:
    return row["audited_log_divergence"]


def test_the_last_audit_is_kept_over_reports_without_one(desk: WorkerDesk) -> None:
    assert math.isnan(audited(report(desk)))
    assert audited(report(desk, 0.01)) == pytest.approx(math.log(0.01))
    for generated in (32, 48, 64):
        assert audited(report(desk, generated_tokens=generated)) == pytest.approx(math.log(0.01))
    assert audited(report(desk, 0.04, 0.02)) == pytest.approx(math.log(0.04 * 0.02) / 2)  # newer ones replace it
    assert audited(report(desk)) == pytest.approx(math.log(0.04 * 0.02) / 2)


def test_a_switch_makes_it_unknown_until_the_next_audit(desk: WorkerDesk) -> None:
    report(desk, 0.01)
    assert math.isnan(audited(report(desk, pipeline="int8")))
    assert math.isnan(audited(report(desk, pipeline="int8")))
    assert audited(report(desk, 0.001, pipeline="int8")) == pytest.approx(math.log(0.001))
    assert math.isnan(audited(report(desk)))  # and what was known of a pipeline before does not come back with it


def test_an_audit_from_before_the_switch_is_not_taken(desk: WorkerDesk) -> None:
    assert math.isnan(audited(report(desk, 0.01, pipeline="int8", under=KIVI)))


def test_signals_of_before_are_taken_where_nothing_was_decoded_but_audits_only_of_the_pipeline_in_force(
    desk: WorkerDesk,
) -> None:
    report(desk, 0.01, far_mass=LOUD)
    same = report(desk, decoded=False)
    assert (same["far_mass_32"], audited(same)) == (LOUD[0], pytest.approx(math.log(0.01)))
    newly = report(desk, 0.05, decoded=False)
    assert (newly["far_mass_32"], audited(newly)) == (LOUD[0], pytest.approx(math.log(0.05)))
    switched = report(desk, pipeline="int8", decoded=False)
    assert switched["far_mass_32"] == LOUD[0]
    assert math.isnan(audited(switched))


def test_only_audits_are_kept_where_something_was_decoded(desk: WorkerDesk) -> None:
    first = report(desk, 0.01, far_mass=LOUD)
    second = report(desk, far_mass=QUIET)
    assert (first["far_mass_32"], second["far_mass_32"]) == (LOUD[0], QUIET[0])
    fresh = WorkerDesk(worker_view())
    expected = report(fresh, 0.01, far_mass=QUIET)
    np.testing.assert_equal(second, expected)


def test_requests_have_audits_of_their_own(desk: WorkerDesk) -> None:
    report(desk, 0.01)
    assert math.isnan(audited(report(desk, request_id="job-2")))
    assert audited(report(desk)) == pytest.approx(math.log(0.01))
