"""The controller's bookkeeping without streams or clocks."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.state import AttachedWorker, BackOff, BackOffPolicy, ControllerState, Outcome, Override
from kvpilot.v1 import common_pb2, policy_pb2
from kvpilot.v1.common_pb2 import Orderer
from tests.controller.scripted import hello, request_state, worker_state

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
POLICY = BackOffPolicy(first_s=1, longest_s=30)


def worker_with(*states: policy_pb2.RequestState, epochs: dict[str, int] | None = None) -> AttachedWorker:
    worker = AttachedWorker(hello(epochs=epochs), NOON)
    worker.take_report(policy_pb2.Report(worker=worker_state(), requests=states), NOON)
    return worker


def directive(epoch: int, nonce: str = "n", pipeline: str = "int8") -> policy_pb2.Directive:
    return policy_pb2.Directive(nonce=nonce, epoch=epoch, request_id="job-1", pipeline=pipeline, reason="because")


def test_a_second_directive_needs_the_first_ones_answer() -> None:
    worker = worker_with(request_state())
    worker.send(directive(1), NOON, 0)
    with pytest.raises(ValueError, match="outstanding"):
        worker.send(directive(2), NOON, 0)


def test_epochs_must_rise() -> None:
    worker = worker_with(request_state(), epochs={"job-1": 7})
    assert worker.requests["job-1"].epoch == 7
    with pytest.raises(ValueError, match="epoch 7 is not above 7"):
        worker.send(directive(7), NOON, 0)


def test_an_ack_moves_the_request_and_is_counted_once() -> None:
    worker = worker_with(request_state())
    live = worker.send(directive(3), NOON, 0)
    ack = policy_pb2.Ack(nonce="n", request_id="job-1", epoch=3, applied=common_pb2.Switch(to_pipeline="int8"))
    answer = worker.take_ack(ack)
    assert answer is not None
    assert (answer.sent.from_pipeline, live.state.pipeline, live.state.epoch) == ("full", "int8", 3)
    assert live.decision is not None
    assert live.decision.outcome is Outcome.APPLIED
    assert worker.take_ack(ack) is None


def test_a_nack_leaves_the_request_where_it_was() -> None:
    worker = worker_with(request_state())
    live = worker.send(directive(1), NOON, 0)
    problem = common_pb2.Problem(code=8, message="no room")
    worker.take_nack(policy_pb2.Nack(nonce="n", request_id="job-1", problem=problem), POLICY, now_s=100)
    assert live.state.pipeline == "full"
    assert live.decision is not None
    assert (live.decision.outcome, live.decision.refusal) == (Outcome.REFUSED, "no room")
    assert not live.may_try("int8", 100.9)
    assert live.may_try("int8", 101)
    assert live.may_try("host", 100)


def test_an_overdue_answer_counts_as_refused() -> None:
    worker = worker_with(request_state())
    live = worker.send(directive(1), NOON, 0)
    assert worker.give_up(POLICY, now_s=30, after_s=30) == []
    (answer,) = worker.give_up(POLICY, now_s=30.1, after_s=30)
    assert answer.problem is not None
    assert live.sent is None


@given(st.integers(1, 60))
def test_back_off_doubles_up_to_its_limit(refusals: int) -> None:
    back_off: BackOff | None = None
    for _ in range(refusals):
        back_off = POLICY.next(back_off, code=8, now_s=0)
    assert back_off is not None
    assert back_off.until_s == min(30, 2 ** (refusals - 1))
    assert POLICY.next(back_off, code=3, now_s=0).until_s == math.inf


def test_a_detached_worker_is_forgotten_unless_a_newer_one_has_its_name() -> None:
    state = ControllerState()
    older, newer = state.attach(hello(), NOON), state.attach(hello(), NOON)
    state.detach(older)
    assert state.workers == {"w0": newer}
    state.detach(newer)
    assert not state.workers


def test_a_request_on_two_workers_belongs_to_the_later_one() -> None:
    state = ControllerState()
    for name, minutes in (("w0", 0), ("w1", 1)):
        worker = state.attach(hello(name), NOON + timedelta(minutes=minutes))
        state.report(worker, policy_pb2.Report(requests=[request_state()]), NOON)
    found = state.find("job-1")
    assert found is not None
    assert found[0].name == "w1"


def test_an_override_holds_until_it_is_known_that_its_request_ended() -> None:
    state = ControllerState()
    worker = state.attach(hello(), NOON)
    state.report(worker, policy_pb2.Report(requests=[request_state()]), NOON)
    state.overrides["job-1"] = Override("int8", "to see")
    assert state.override_due(worker, worker.requests["job-1"], 0) is not None
    assert state.view(worker, 0).requests[0].overridden
    assert state.report(worker, policy_pb2.Report(ended_request_ids=["job-1"]), NOON) == ["job-1"]
    assert state.overrides  # it may go on elsewhere


def test_a_request_that_another_worker_has_is_not_gone() -> None:
    state = ControllerState()
    older, newer = state.attach(hello("w0"), NOON), state.attach(hello("w1"), NOON)
    for worker in (older, newer):
        state.report(worker, policy_pb2.Report(requests=[request_state()]), NOON)
    assert state.report(older, policy_pb2.Report(ended_request_ids=["job-1"]), NOON) == []
    assert state.report(newer, policy_pb2.Report(ended_request_ids=["job-1"]), NOON) == ["job-1"]


OPERATOR, CONTROLLER = Orderer.ORDERER_OPERATOR, Orderer.ORDERER_CONTROLLER


@pytest.mark.parametrize(
    ("in_force", "ordered_by", "due"),
    [
        ("kivi(bits=4)", OPERATOR, False),
        ("kivi", OPERATOR, False),  # the same in other words
        ("kivi(bits=2)", OPERATOR, True),  # an older override
        ("kivi(bits=4)", CONTROLLER, True),  # the planner may have meant it for a while only
        ("full", None, True),
    ],
)
def test_a_restored_override_is_due_unless_it_is_obeyed(in_force: str, ordered_by: Orderer | None, due: bool) -> None:
    state = ControllerState()
    worker = state.attach(hello(epochs={"job-1": 5}), NOON)
    incoming = request_state(pipeline=in_force, epoch=5)
    if ordered_by is not None:
        incoming.last_switch.CopyFrom(common_pb2.Switch(to_pipeline=in_force, ordered_by=ordered_by))
    state.report(worker, policy_pb2.Report(requests=[incoming]), NOON)
    live = worker.requests["job-1"]
    state.overrides["job-1"] = Override("kivi(bits=4)", "to see", restored=True)
    assert (state.override_due(worker, live, 0) is not None) == due
    assert (state.override_due(worker, live, 0) is not None) == due
    if not due:  # from here on as if we had sent it: a worker that takes the request over has to be told
        assert state.overrides["job-1"] == Override("kivi(bits=4)", "to see", epoch=5)
        other = state.attach(hello("w1"), NOON)
        state.report(other, policy_pb2.Report(requests=[request_state()]), NOON)
        assert state.override_due(other, other.requests["job-1"], 0) is not None


def test_the_view_names_what_is_outstanding_and_refused() -> None:
    state = ControllerState()
    worker = state.attach(hello(), NOON)
    state.report(worker, policy_pb2.Report(requests=[request_state()]), NOON)
    live = worker.send(directive(1), NOON, 0)
    live.back_offs["host"] = BackOff(1, until_s=10)
    (request,) = state.view(worker, now_s=5).requests
    assert (request.outstanding, request.refused) == ("int8", {"host"})
    assert state.view(worker, now_s=10).requests[0].refused == frozenset()
