"""What the learned planner keeps of one worker: each request's numbers, worked out once per report."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
import structlog

from controller.candidates import CandidateTable
from controller.costs import CostModel
from controller.planner import WorkerView
from kvpilot.v1 import policy_pb2
from kvpilot.v1.common_pb2 import Scenario
from models.features import F64, NAMES, REQUEST_FEATURES, Candidate, Family, FeatureBuilder, family_of, seen_tokens
from models.footprint import estimate_many
from models.predictor import Predictor
from models.scenarios import fill_objective, scenario_word

log = structlog.get_logger()

NUMBERS = ("divergence", "bound", "device_bytes", "host_bytes", "shadow_bytes", "kept_tokens")
"""Rows of :attr:`RequestNumbers.block`."""
_AUDITED = NAMES.index("audited_log_divergence")


class RequestNumbers:
    """A request's report in numbers, and what was predicted of it.

    Attributes:
        block: [NUMBERS, C + 1]; the last column is the pipeline in force where it is off the list, else nothing.
        facts: most divergence, latency weight, memory weight, full-cache bytes, kept tokens.
        long_range_need: probability that a short window would not do; NaN where nothing was asked.
    """

    def __init__(self, state: policy_pb2.RequestState, table: CandidateTable, builder: FeatureBuilder) -> None:
        self.state = state
        self.request_id: str = state.request_id
        self.seen = seen_tokens(state)
        self.scenario = scenario_word(state.scenario)
        self.state_row: F64 = builder.state_row(state)
        objective = fill_objective(state.scenario, state.objective)
        self.admitted: float = objective.max_divergence
        self.exact_only = state.scenario == Scenario.SCENARIO_ACCURACY_CRITICAL or self.admitted <= 0
        self.edge = state.scenario == Scenario.SCENARIO_EDGE
        kept = state.kept_tokens or float(self.seen)
        self.facts = (self.admitted, objective.latency_weight, objective.memory_weight, math.nan, kept)
        self.measured = bool(state.signals.steps)
        self.pipeline = ""
        self.place = -1
        self.own_family = Family.OTHER
        self.block: F64 = np.empty((0, 0))
        self.long_range_need = math.nan
        self._table = table
        self._parts: F64 = np.empty((0, 0))  # [C, candidate features]
        self._own_row: F64 = np.empty(0)
        self._predictor: Predictor | None = None
        self._predicted_for = ""

    def follow(self, older: RequestNumbers | None) -> None:
        """Takes an earlier report's signals where nothing was decoded since; audits stay known until a switch."""
        if older is None:
            return
        audited = self.state_row[_AUDITED]
        if older.measured and not self.measured:
            self.state_row[len(REQUEST_FEATURES) :] = older.state_row[len(REQUEST_FEATURES) :]
            self.measured = True
        if older.state.pipeline == self.state.pipeline and math.isnan(audited):
            audited = older.state_row[_AUDITED]
        self.state_row[_AUDITED] = audited

    @property
    def off_list(self) -> str:
        """The pipeline in force if it is no candidate, else empty."""
        return self.pipeline if self.place == len(self._table) else ""

    @property
    def own_exact(self) -> bool:
        """Whether the pipeline in force loses nothing."""
        return self.own_family is Family.EXACT

    def family(self, column: int) -> Family:
        """Of a column."""
        return self._table.families[column] if column < len(self._table) else self.own_family

    def is_exact(self, column: int) -> bool:
        """Whether a column loses nothing."""
        return self.family(column) is Family.EXACT

    def row(self, column: int) -> F64:
        """The feature row of a column, [features]."""
        if column < len(self._table):
            return np.concatenate([self.state_row, self._parts[column]])
        return self._own_row

    def predicted_by(self, predictor: Predictor) -> bool:
        """Whether the block is of this predictor and of the pipeline in force."""
        return self._predictor is predictor and self._predicted_for == self.off_list

    def take(self, predictor: Predictor, block: F64, parts: F64, own_row: F64 | None, full_bytes: float) -> None:
        """Takes what was predicted."""
        self._predictor, self._predicted_for = predictor, self.off_list
        self.block, self._parts = block, parts
        if own_row is not None:
            self._own_row = own_row
        self.facts = (*self.facts[:3], full_bytes, self.facts[4])


class UnmeasuredError(Exception):
    """Nothing of a request's attention has been seen yet."""


class WorkerDesk:
    """The requests of one attached worker."""

    def __init__(self, worker: WorkerView) -> None:
        self.table = CandidateTable(worker.catalog)
        self.costs = CostModel.of(worker.hello)
        self._catalog = worker.catalog
        self._layout = worker.layout
        self._builder = FeatureBuilder(worker.catalog, worker.layout, worker.hello.far_horizons_tokens)
        self._numbers: dict[str, RequestNumbers] = {}
        self._said: set[tuple[str, str]] = set()

    def note(self, state: policy_pb2.RequestState) -> None:
        """Works a report out. What is wrong with it, :meth:`usable` says."""
        older = self._numbers.pop(state.request_id, None)
        try:
            numbers = RequestNumbers(state, self.table, self._builder)
        except ValueError:  # PipelineError is one
            return
        numbers.follow(older)
        self._numbers[state.request_id] = numbers

    def usable(self, state: policy_pb2.RequestState) -> RequestNumbers:
        """The numbers of a request's last report.

        Raises:
            UnmeasuredError: it has not shown anything yet.
            ValueError: why nothing can be predicted for it.
        """
        numbers = self._numbers.get(state.request_id)
        if numbers is None or numbers.state is not state:
            older = numbers
            numbers = self._numbers[state.request_id] = RequestNumbers(state, self.table, self._builder)
            numbers.follow(older)
        if numbers.pipeline != state.pipeline:
            key = self._catalog.key(state.pipeline)
            numbers.pipeline, numbers.place = state.pipeline, self.table.place(state.pipeline)
            numbers.own_family = family_of(key)
        if numbers.own_family is Family.OTHER:
            raise ValueError(f"pipeline {state.pipeline!r} has a stage that no predictor knows")
        if not (numbers.measured or numbers.exact_only):
            raise UnmeasuredError
        return numbers

    def keep_only(self, request_ids: Collection[str]) -> None:
        """Forgets all other requests."""
        for request_id in self._numbers.keys() - request_ids:
            del self._numbers[request_id]

    def say_once(self, event: str, why: str, **bound: str) -> None:
        """Logs a warning, the first time it is said of this worker."""
        if (event, why) not in self._said:
            self._said.add((event, why))
            log.warning(event, why=why, **bound)

    def predict(self, requests: Sequence[RequestNumbers], predictor: Predictor) -> None:
        """Predicts, in one call, for all requests that have news since they were last predicted.

        Raises:
            Exception: whatever the predictor raises; nothing has changed then.
        """
        stale = [numbers for numbers in requests if not numbers.predicted_by(predictor)]
        if not stale:
            return
        count, columns = len(stale), len(self.table)
        states = np.stack([numbers.state_row for numbers in stale])
        seen = np.array([max(1, numbers.seen) for numbers in stale], np.int64)
        candidates = [self._builder.describe(pipeline, seen) for pipeline in self.table.pipelines]
        parts = self._builder.candidate_part(states, seen, candidates)
        block = np.full((count, len(NUMBERS), columns + 1), np.nan)
        block[:, 1] = np.inf
        block[:, 2:] = 0.0
        for place, candidate in enumerate(candidates):
            _price(block[:, :, place], candidate)
        own_rows: dict[int, F64] = {}
        for text in sorted({numbers.off_list for numbers in stale} - {""}):
            group = np.array([row for row, numbers in enumerate(stale) if numbers.off_list == text])
            candidate = self._builder.describe(text, seen[group])
            built = self._builder.fill(states[group], seen[group], [candidate])[:, 0]
            own_rows |= dict(zip(group.tolist(), built, strict=True))
            priced = block[group, :, columns]
            _price(priced, candidate)
            block[group, :, columns] = priced
        needs = self._fill_predictions(block, states, parts, own_rows, stale, predictor)
        full = estimate_many((("full", ()),), seen, self._layout)
        assert full is not None
        for row, numbers in enumerate(stale):
            numbers.take(predictor, block[row], parts[row], own_rows.get(row), float(full.device_bytes[row]))
            numbers.long_range_need = float(needs[row])

    def _fill_predictions(
        self,
        block: F64,
        states: F64,
        parts: F64,
        own_rows: dict[int, F64],
        stale: Sequence[RequestNumbers],
        predictor: Predictor,
    ) -> F64:
        """Predicts what may come into question: not the exact, not for exact-only requests, edge's for edge alone.

        Returns:
            [N] the requests' long-range need; NaN where nothing was asked.
        """
        needs = np.full(len(stale), np.nan)
        lossy = np.array([not numbers.exact_only for numbers in stale])
        edge = np.array([numbers.edge for numbers in stale])
        places = np.array([numbers.place for numbers in stale])
        wanted = lossy[:, None] & ~self.table.exact & (~self.table.edge_only | edge[:, None])
        here = np.flatnonzero(lossy & (places < len(self.table)))
        wanted[here, places[here]] = ~self.table.exact[places[here]]
        asked, columns = np.nonzero(wanted)
        own = [row for row in own_rows if lossy[row] and not stale[row].own_exact]
        families = [self.table.families[column] for column in columns.tolist()]
        families += [stale[row].own_family for row in own]
        if not families:
            return needs
        from models.trees import join_rows  # with Numba, which a controller loads with its first predictor

        flat = np.empty((len(families), states.shape[1] + parts.shape[2]))
        join_rows(states, parts, asked, columns, flat)
        if own:
            flat[len(asked) :] = [own_rows[row] for row in own]
        found = predictor.predict(flat, families)
        for number, values in enumerate((found.divergence, found.bound)):
            if values.shape != (len(families),):
                raise ValueError(f"{len(families)} rows predicted as {values.shape}")
            block[asked, number, columns] = values[: len(asked)]
            block[own, number, len(self.table)] = values[len(asked) :]
        needs[np.r_[asked, np.array(own, np.intp)]] = found.long_range  # the same in all rows of a request
        return needs


def _price(out: F64, candidate: Candidate) -> None:
    """Writes bytes and kept tokens, [N, NUMBERS]; columns that lose nothing get zeros for their divergence."""
    out[:, 2], out[:, 3], out[:, 4] = candidate.device_bytes, candidate.host_bytes, candidate.shadow_bytes
    out[:, 5] = candidate.kept_tokens
    if candidate.family is Family.EXACT:
        out[:, :2] = 0.0
