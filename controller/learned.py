"""The learned planner: predicts every candidate of every live request of a worker in one call, and chooses by cost.

A pipeline is admissible where its calibrated bound keeps the request's ``max_divergence``. Among these the knapsack
(:mod:`controller.knapsack`) takes the cheapest by :mod:`controller.costs` that fits the worker's tiers. A request stays
where it is unless a switch gains more than a margin, for a minimum dwell after each switch, and near its end; but what
breaks its bound it leaves at once.

What the predictor cannot be used for, the rule decides, and the reason says why.
"""

from __future__ import annotations

import time
import weakref
from dataclasses import replace
from typing import Protocol

from controller.choice import Choice, Limits
from controller.desk import RequestNumbers, UnmeasuredError, WorkerDesk
from controller.planner import Decision, Planner, RequestView, WorkerView
from controller.rule import RulePlanner
from models.features import SCHEMA_HASH
from models.predictor import Predictor


class Predictors(Protocol):
    """Where the predictor in force is; it may be another at each plan."""

    @property
    def active(self) -> Predictor | None:
        """None: there is none, the rule decides."""
        ...


class LearnedPlanner:
    """See the module. Keeps, per worker, the numbers of its requests' last reports; everything else is in the view.

    Args:
        predictors: holder of the predictor.
        limits: numbers to decide by.
        rule: decides where the predictor cannot.
        insist: a missing predictor is said in each reason.
    """

    def __init__(
        self,
        predictors: Predictors,
        limits: Limits | None = None,
        rule: Planner | None = None,
        insist: bool = False,
    ) -> None:
        self.limits = limits or Limits()
        self._predictors = predictors
        self._rule = rule or RulePlanner()
        self._insist = insist
        self._desks: weakref.WeakKeyDictionary[object, WorkerDesk] = weakref.WeakKeyDictionary()

    def prepare(self, worker: WorkerView) -> None:
        """Works out the rows of the requests in ``worker``, so that the next plan need not."""
        self._rule.prepare(worker)
        if self._predictors.active is not None:
            desk = self._desk(worker)
            for request in worker.requests:
                desk.note(request.state)

    def plan(self, worker: WorkerView) -> list[Decision]:
        """Decides for every request that is neither pinned, overridden, prefilling nor awaiting an answer."""
        predictor = self._predictors.active
        if predictor is None:
            why = "no active bundle" if self._insist else ""
            return self._by_rule(worker, {request.request_id: why for request in worker.requests})
        desk = self._desk(worker)
        desk.keep_only({request.request_id for request in worker.requests})
        if why := _mismatch(worker, predictor):
            desk.say_once("predictor not used", why, worker=worker.hello.worker)
            return self._by_rule(worker, {request.request_id: why for request in worker.requests})
        seats: list[tuple[RequestView, RequestNumbers]] = []
        ruled: dict[str, str] = {}
        waiting: list[Decision] = []
        for request in worker.requests:
            state = request.state
            if request.outstanding is None and not (state.pinned or request.overridden or state.prefilling):
                try:
                    seats.append((request, desk.usable(state)))
                except UnmeasuredError:  # a few tokens more, and what it may lose can be bounded
                    stays = f"no signals measured yet: stays; bundle {predictor.version}"
                    waiting.append(Decision(request.request_id, state.pipeline, stays))
                except ValueError as error:  # PipelineError is one
                    ruled[request.request_id] = str(error)
        try:
            desk.predict([numbers for _, numbers in seats], predictor)
        except Exception as error:
            desk.say_once("predictor failed", str(error), worker=worker.hello.worker, bundle=predictor.version)
            ruled |= {request.request_id: f"bundle {predictor.version} failed: {error}" for request, _ in seats}
            seats = []
        decisions = self._by_rule(worker, ruled) if ruled else []
        if seats:
            decisions += Choice(self.limits, worker, desk, seats, decisions, predictor.version).decide()
        return decisions + waiting

    def _desk(self, worker: WorkerView) -> WorkerDesk:
        desk = self._desks.get(worker.catalog)
        if desk is None:
            desk = self._desks[worker.catalog] = WorkerDesk(worker)
        return desk

    def _by_rule(self, worker: WorkerView, why: dict[str, str]) -> list[Decision]:
        """The rule's decisions for these requests, with the cause in front."""
        requests = tuple(one for one in worker.requests if one.request_id in why or one.outstanding is not None)
        decisions = self._rule.plan(replace(worker, requests=requests))
        return [
            replace(one, reason=f"{cause}, by the rule: {one.reason}") if (cause := why[one.request_id]) else one
            for one in decisions
        ]


def _mismatch(worker: WorkerView, predictor: Predictor) -> str:
    """Why this predictor cannot read this worker's reports; empty if it can."""
    theirs, ours = worker.hello.feature_schema_hash, predictor.schema_hash
    if theirs != ours or ours != SCHEMA_HASH:
        return (
            f"bundle {predictor.version} reads feature schema {ours or 'none'}, this controller makes {SCHEMA_HASH},"
            f" the worker reports {theirs or 'none'}"
        )
    return ""


def measure_tick_ms(planner: Planner, worker: WorkerView, times: int = 20) -> float:
    """Median CPU milliseconds, of all threads, of a plan for which every request of ``worker`` has just reported."""
    taken = []
    for _ in range(times):
        fresh = replace(worker, requests=tuple(map(_again, worker.requests)))
        planner.prepare(fresh)
        begin = time.process_time()
        planner.plan(fresh)
        taken.append(1e3 * (time.process_time() - begin))
    return sorted(taken)[len(taken) // 2]


def _again(request: RequestView) -> RequestView:
    """The request in a report of its own."""
    state = type(request.state)()
    state.CopyFrom(request.state)
    return replace(request, state=state)
