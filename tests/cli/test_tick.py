"""The worker made of messages that a planning tick is timed with."""

from __future__ import annotations

from bench.tick import crowded_worker, tick_ms
from controller.learned import LearnedPlanner
from models.candidates import CANDIDATES
from models.scenarios import PRESETS
from tests.controller.test_learned import FakePredictor, Holding


def test_every_request_is_planned_by_prediction_under_pressure() -> None:
    worker = crowded_worker(40)
    assert worker.tier("device").share() > 0.85
    decisions = LearnedPlanner(Holding()).plan(worker)
    assert len(decisions) == 40
    assert all(decision.forecast is not None for decision in decisions)
    assert len({decision.pipeline for decision in decisions}) > 1
    assert {request.state.scenario for request in worker.requests} == set(PRESETS)


def test_a_tick_asks_for_every_lossy_candidate_of_every_request_at_once() -> None:
    predictor = FakePredictor()
    assert tick_ms(predictor, requests=20, times=3) > 0
    lossy = len(CANDIDATES) - 2  # full and host lose nothing
    exact_only = 20 // len(PRESETS)
    assert len(predictor.calls) == 3  # one a tick
    assert min(predictor.calls) >= (20 - exact_only) * lossy
