"""One plan of one worker: admit by bound, choose by cost and bytes, and say why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from controller.costs import Bytes
from controller.desk import RequestNumbers, WorkerDesk
from controller.knapsack import Assignment, Columns, assign
from controller.planner import Decision, Forecast, RequestView, WorkerView
from controller.rule import size_text
from kvpilot.pipeline import PipelineError
from kvpilot.v1 import common_pb2
from kvpilot.v1.common_pb2 import LossClass
from models.features import F64
from models.footprint import estimate


@dataclass(frozen=True)
class Limits:
    """Every number the planner decides by, beside the costs. Shares are of a tier's budget."""

    dwell_tokens: int = 32
    """Generated tokens between two switches of a request: one horizon, so that a switch shows its effect first."""
    min_remaining_tokens: int = 16
    """A request with fewer tokens left to generate stays where it is."""
    margin: float = 0.05
    """A switch gains at least this much cost; the full cache costs latency_weight + memory_weight."""
    entry_share: float = 0.9
    """A pipeline is entered with a bound of at most this share of what the request admits; left beyond all of it."""
    device_high: float = 0.85
    """Device use from which requests must give way ..."""
    device_relief: float = 0.75
    """... until the estimate is down to this ..."""
    device_refill: float = 0.70
    """... and up to which richer pipelines may fill it. In between, the sum of all does not rise."""
    waiting_relief: float = 0.10
    """Use that each plan gives back while requests wait for memory."""
    host_full: float = 0.90
    """Host use that offloading and shadows may not push the tier beyond."""


class Choice:
    """One plan of one worker: arrays over its R requests and the C candidates, with one column more for a pipeline in
    force that is not among them."""

    def __init__(
        self,
        limits: Limits,
        worker: WorkerView,
        desk: WorkerDesk,
        seats: Sequence[tuple[RequestView, RequestNumbers]],
        others: Sequence[Decision],
        bundle: str,
    ) -> None:
        self.limits, self.worker, self.table, self.bundle = limits, worker, desk.table, bundle
        self.requests = [request for request, _ in seats]
        self.numbers = [numbers for _, numbers in seats]
        self.rows = np.arange(len(seats))
        count, columns = len(seats), len(desk.table) + 1
        stacked = np.concatenate([numbers.block for numbers in self.numbers]).reshape(count, -1, columns)
        self.divergence, self.bound = stacked[:, 0], stacked[:, 1].copy()
        device, host, shadow, kept = (stacked[:, place] for place in range(2, 6))
        facts = np.array([numbers.facts for numbers in self.numbers])  # [R, 5]
        self.admitted, latency_weight, memory_weight, full_bytes, kept_now = facts.T
        self.own = np.array([numbers.place for numbers in self.numbers], np.intp)
        self.lost = np.array([request.state.loss_class == LossClass.LOSS_CLASS_PERMANENT for request in self.requests])
        if self.lost.any():  # what is dropped does not come back: no pipeline holds more than is there
            scale = np.where(self.lost[:, None], np.minimum(1.0, kept_now[:, None] / np.maximum(1.0, kept)), 1.0)
            device, host, shadow = device * scale, host * scale, shadow * scale
            floor = np.where(self.lost, self._at(self.bound, self.own), 0.0)
            self.bound = np.maximum(self.bound, floor[:, None])
        self.bytes = Bytes(device, host, shadow)
        costs = desk.costs
        remaining = np.array([request.remaining_tokens for request in self.requests], np.float64)
        own_bytes = (self._at(device, self.own), self._at(host, self.own), self._at(shadow, self.own))
        moving = costs.switching(self.bytes, own_bytes, full_bytes, latency_weight, remaining) + limits.margin
        moving[self.rows, self.own] = 0.0
        self.cost = costs.standing(self.bytes, full_bytes, latency_weight, memory_weight) + moving
        self.holds = [self._hold(request) for request in self.requests]
        self._admit()
        self.result: Assignment = self._assign(others)

    def _at(self, values: F64, columns: Columns) -> F64:
        return np.asarray(values[self.rows, columns])

    def _hold(self, request: RequestView) -> str:
        """Why a request stays for now if its bound allows; empty if it need not."""
        limits = self.limits
        if request.remaining_tokens < limits.min_remaining_tokens:
            return f"{request.remaining_tokens} tokens left to generate < {limits.min_remaining_tokens}"
        since = request.tokens_since_switch
        if since is not None and since < limits.dwell_tokens:
            return f"switched {since} tokens ago < {limits.dwell_tokens}"
        return ""

    def _admit(self) -> None:
        """Which columns each request may choose, [R, C + 1]."""
        table, last = self.table, len(self.table)
        edge = np.array([numbers.edge for numbers in self.numbers])
        considered = np.zeros(self.cost.shape, bool)
        considered[:, :last] = ~table.edge_only | edge[:, None]
        exact_only = np.array([numbers.exact_only for numbers in self.numbers])
        considered[:, :last] &= table.exact | ~exact_only[:, None]
        own_exact = np.array([numbers.own_exact for numbers in self.numbers])
        exact = np.hstack([np.broadcast_to(table.exact, (len(self.rows), last)), own_exact[:, None]])
        considered[self.rows, self.own] = True
        keeps = self.bound <= self.limits.entry_share * self.admitted[:, None]  # NaN keeps nothing
        keeps[self.rows, self.own] = self._at(self.bound, self.own) <= self.admitted
        # What was lost already may be more than is admitted: then at least nothing more is.
        self.beyond = self.lost & ~(self._at(self.bound, self.own) <= self.admitted)
        keeps[self.beyond] = exact[self.beyond]
        self.refused = np.zeros_like(considered)
        for row, request in enumerate(self.requests):
            for text in request.refused:
                place = self._place(text)
                if place != self.own[row] and place < last:
                    self.refused[row, place] = True
        self.considered = considered
        allowed = considered & keeps & ~self.refused
        self.own_keeps = self._at(allowed, self.own).astype(bool)
        held = np.array([bool(hold) for hold in self.holds]) & self.own_keeps
        stuck = ~allowed.any(axis=1)  # the worker refused all that would do
        stay = held | stuck
        allowed[stay] = False
        allowed[self.rows[stay], self.own[stay]] = True
        self.held, self.stuck, self.allowed = held, stuck, allowed

    def _place(self, pipeline: str) -> int:
        try:
            return self.table.place(pipeline)
        except PipelineError:
            return len(self.table)

    def _assign(self, others: Sequence[Decision]) -> Assignment:
        """Chooses within what the tiers have left beside everything that is not planned here."""
        device_bytes, lower_bytes = self.bytes.device, self.bytes.lower_tier
        device, host = self.worker.tier("device"), self.worker.tier("host")
        under_way = self._under_way(others)
        device_used, host_used = device.used_bytes + under_way[0], host.used_bytes + under_way[1]
        limits, budget = self.limits, device.budget_bytes
        self.device_share = device_used / budget if budget else 1.0
        if device_used > limits.device_high * budget:
            capacity = limits.device_relief * budget
        else:
            capacity = max(device_used, limits.device_refill * budget)
        if self.worker.state.waiting:
            capacity = min(limits.device_relief * budget, device_used - limits.waiting_relief * budget)
        now = self._at(device_bytes, self.own)
        leaving = ~self._at(self.allowed, self.own).astype(bool)
        if leaving.any():  # what must leave for quality's sake may take room up to the high mark
            smallest = np.where(self.allowed, device_bytes, np.inf).min(axis=1)
            needed = float(np.maximum(0.0, smallest - now)[leaving].sum())
            capacity = max(capacity, min(limits.device_high * budget, capacity + needed))
        host_capacity = max(host_used, limits.host_full * host.budget_bytes)
        return assign(
            self.cost,
            device_bytes,
            lower_bytes,
            self.allowed,
            capacity - device_used + float(now.sum()),
            host_capacity - host_used + float(self._at(lower_bytes, self.own).sum()),
            self.own,
        )

    def _under_way(self, others: Sequence[Decision]) -> tuple[float, float]:
        """Bytes that directives without an answer yet, and what the rule has just decided, will add to the tiers."""
        wanted = {one.request_id: one.pipeline for one in others}
        device = host = 0.0
        for request in self.worker.requests:
            pipeline = request.outstanding or wanted.get(request.request_id)
            if pipeline is None or pipeline == request.state.pipeline:
                continue
            try:
                before, after = (
                    estimate(self.worker.catalog.key(text), request.seen_tokens, self.worker.layout)
                    for text in (request.state.pipeline, pipeline)
                )
            except PipelineError:
                continue
            if before and after:  # else a stage that the estimate cannot price; the next reports will show its bytes
                device += after.device_bytes - before.device_bytes
                host += after.lower_tier_bytes - before.lower_tier_bytes
        return device, host

    def decide(self) -> list[Decision]:
        """The decisions, with what speaks for each."""
        chosen, prices = self.result.choice, (self.result.device_price, self.result.host_price)
        self.priced = self.cost + prices[0] * self.bytes.device + prices[1] * self.bytes.lower_tier
        rivals = np.where(self.considered, np.nan_to_num(self.priced, nan=np.inf), np.inf)
        rivals[self.rows, chosen] = np.inf
        second = rivals.argmin(axis=1)
        rivalled = np.isfinite(self._at(rivals, second)).tolist()
        worker = f"device {self.device_share:.0%} full"
        if prices[0]:
            worker += f", a MiB costs {prices[0] * 2**20:.2g}"
        if not self.result.fits:
            worker += ", even the densest admissible pipelines do not fit"
        table = {
            "divergence": self._at(self.divergence, chosen),
            "bound": self._at(self.bound, chosen),
            "cost": self._at(self.priced, chosen),
            "cost_now": self._at(self.priced, self.own),
            "device": self._at(self.bytes.device, chosen),
            "device_now": self._at(self.bytes.device, self.own),
            "lower": self._at(self.bytes.lower_tier, chosen),
            "lower_now": self._at(self.bytes.lower_tier, self.own),
        }
        facts = np.stack(list(table.values()), axis=1).tolist()
        decisions = []
        for row, (column, rival) in enumerate(zip(chosen.tolist(), second.tolist(), strict=True)):
            numbers = self.numbers[row]
            runner_up = self._name(row, rival) if rivalled[row] else ""
            forecast = Forecast(
                self.bundle, facts[row][0], facts[row][1], runner_up, numbers.family(column), numbers.row(column)
            )
            beside = f"; runner-up {runner_up}: {self._lost_by(row, rival, facts[row][2])}" if runner_up else ""
            decisions.append(
                Decision(
                    numbers.request_id,
                    self._name(row, column),
                    f"{self._because(row, column, facts[row])}{beside}; {worker}; bundle {self.bundle}",
                    forecast,
                    self._cause(row, column, facts[row]),
                )
            )
        return decisions

    def _cause(self, row: int, column: int, facts: list[float]) -> common_pb2.Cause:
        """What a choice is for. Where bytes of the device have a price, or nothing admissible fits, memory is short."""
        if column == self.own[row]:
            return common_pb2.CAUSE_UNSPECIFIED
        if not self.own_keeps[row]:
            return common_pb2.CAUSE_QUALITY
        device, device_now = facts[4], facts[5]
        tight = bool(self.result.device_price) or not self.result.fits
        return common_pb2.CAUSE_PRESSURE if tight and device < device_now else common_pb2.CAUSE_COST

    def _because(self, row: int, column: int, facts: list[float]) -> str:
        divergence, bound, cost, cost_now, device, device_now, lower, lower_now = facts
        request, limit = self.requests[row], self.numbers[row].admitted
        kept = f"predicted {divergence:.2g}, bound {bound:.2g} of {limit:g} nats"
        if self.numbers[row].is_exact(column):
            kept = f"exact, {limit:g} nats admitted"
        if self.beyond[row]:
            kept = f"what is lost stays lost (bound {bound:.2g} > {limit:g} nats): nothing more is"
        elif self.stuck[row]:
            kept = f"{kept}, the worker refused all that would keep it"
        words = f"{self.numbers[row].scenario}, {request.seen_tokens} tokens: {kept}"
        if not math.isnan(need := self.numbers[row].long_range_need):
            words += f", long-range need {need:.0%}"
        if column == self.own[row]:
            hold = f", {self.holds[row]}" if self.held[row] else ""
            return f"{words}; stays{hold}; device {size_text(int(device))}, host {size_text(int(lower))}"
        cause = f"cost {cost_now:.3f} -> {cost:.3f}"
        if not self.own_keeps[row]:
            cause = f"leaves a bound of {self._at_row(self.bound, row, self.own[row]):.2g}, {cause}"
        return (
            f"{words}; device {size_text(int(device_now))} -> {size_text(int(device))},"
            f" host {size_text(int(lower_now))} -> {size_text(int(lower))}; {cause}"
        )

    def _lost_by(self, row: int, rival: int, cost: float) -> str:
        """Why the runner-up lost."""
        bound = self._at_row(self.bound, row, rival)
        if self.refused[row, rival]:
            return "refused by the worker"
        if not self.allowed[row, rival]:
            if self.held[row]:
                return "not now"
            share = 1.0 if rival == self.own[row] else self.limits.entry_share
            return f"bound {bound:.2g} > {share * self.numbers[row].admitted:.2g}"
        theirs = self._at_row(self.priced, row, rival)
        return f"costs {theirs:.3f}, this {cost:.3f}" if theirs >= cost else "does not fit"

    @staticmethod
    def _at_row(values: F64, row: int, column: int) -> float:
        return float(values[row, column])

    def _name(self, row: int, column: int) -> str:
        """The pipeline of a column as text; the one in force as its worker spells it."""
        return self.numbers[row].pipeline if column == self.own[row] else self.table.pipelines[column]
