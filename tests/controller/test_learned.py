"""The learned planner: examples one can read, then invariants over a simulated worker."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.candidates import EDGE_PIPELINES
from controller.choice import Limits
from controller.learned import LearnedPlanner, measure_tick_ms
from controller.planner import Decision, RequestView, WorkerView
from controller.rule import RulePlanner
from kvpilot.v1 import common_pb2, policy_pb2
from kvpilot.v1.common_pb2 import LossClass, Scenario
from models.candidates import CANDIDATES
from models.features import NAMES, SCHEMA_HASH, Family, family_of
from models.footprint import estimate
from models.scenarios import fill_objective
from tests.controller.predictors import LOSSES, FakePredictor, Holding
from tests.controller.scripted import CATALOG, MIB, request_state, worker_view

LIMITS = Limits()
SCENARIOS = [Scenario.Value(name) for name in Scenario.keys() if name != "SCENARIO_UNSPECIFIED"]  # noqa: SIM118
MIXED, EDGE = Scenario.SCENARIO_MIXED, Scenario.SCENARIO_EDGE
EXACT = Scenario.SCENARIO_ACCURACY_CRITICAL
INT4 = "kivi(bits=4)"


def view(*requests: policy_pb2.RequestState | RequestView, **worker: float) -> WorkerView:
    seen = worker_view(*requests, **worker)
    seen.hello.feature_schema_hash = SCHEMA_HASH
    return seen


def decide(
    request: policy_pb2.RequestState | RequestView, predictor: FakePredictor | None = None, **worker: float
) -> Decision:
    (decision,) = LearnedPlanner(Holding(predictor or FakePredictor())).plan(view(request, **worker))
    return decision


def admits(divergence: float, **fields: object) -> policy_pb2.RequestState:
    return request_state(scenario=MIXED, objective=common_pb2.Objective(max_divergence=divergence), **fields)


def family(pipeline: str) -> Family:
    return family_of(CATALOG.key(pipeline))


def test_a_loose_bound_takes_the_densest_and_says_why() -> None:
    decision = decide(admits(1.0))
    assert family(decision.pipeline) in (Family.SCORED_QUANTISE, Family.WINDOW_QUANTISE)
    assert decision.forecast is not None
    assert decision.forecast.bundle == "v1"
    assert decision.forecast.bound == pytest.approx(2 * decision.forecast.divergence)
    assert decision.forecast.family is family(decision.pipeline)
    assert decision.forecast.row.shape == (len(NAMES),)
    for words in ("mixed, 2016 tokens", "predicted", "of 1 nats", "device ", "cost ", "runner-up ", "bundle v1"):
        assert words in decision.reason
    assert "long-range need 11%" in decision.reason
    assert decision.forecast.runner_up in decision.reason


def test_what_may_lose_nothing_is_asked_nothing() -> None:
    assert "long-range need" not in decide(admits(0.0)).reason


def test_the_row_in_the_forecast_is_that_of_the_pipeline() -> None:
    decision = decide(admits(0.01))
    assert decision.pipeline == INT4
    assert decision.forecast is not None
    assert decision.forecast.row[NAMES.index("bits")] == 4
    assert decision.forecast.row[NAMES.index("kept_share")] == 1


def test_what_exceeds_its_bound_loses_and_the_reason_names_it() -> None:
    decision = decide(admits(0.01))  # 4 bits lose 0.004, bound 0.008; evicting loses more
    assert "bound" in decision.reason.split("runner-up")[1]
    assert "> 0.009" in decision.reason


def test_a_tight_bound_takes_eight_bits_and_a_tighter_one_none() -> None:
    gentle = FakePredictor(losses={**LOSSES, Family.QUANTISE: 0.001})
    assert decide(admits(0.003), gentle).pipeline == INT4
    assert decide(admits(0.0006), gentle).pipeline == "int8"
    assert decide(admits(0.0004), gentle).pipeline == "full"


def test_an_unsure_bundle_stays_exact() -> None:
    assert decide(admits(0.03), FakePredictor(caution=1000)).pipeline == "full"


def test_what_breaks_its_bound_is_left_within_the_dwell() -> None:
    state = admits(0.0001, pipeline=INT4, last_switch=common_pb2.Switch(at_token=15))
    decision = decide(state)
    assert decision.pipeline == "full"
    assert "leaves a bound of" in decision.reason


def test_entering_needs_some_distance_to_the_bound() -> None:
    bound = 0.008
    assert decide(admits(1.05 * bound)).pipeline != INT4
    assert decide(admits(1.05 * bound, pipeline=INT4)).pipeline == INT4
    assert decide(admits(1.2 * bound)).pipeline == INT4


def test_exact_requests_take_exact_pipelines_only_and_ask_nothing_of_the_predictor() -> None:
    holding = Holding()
    for state in (request_state(scenario=EXACT), admits(0.0), request_state(scenario=EXACT, far_mass=())):
        (decision,) = LearnedPlanner(holding).plan(view(state, device=0.95))
        assert family(decision.pipeline) is Family.EXACT
    assert holding.active is not None
    assert holding.active.calls == []


def test_pressure_sends_the_exact_to_the_host() -> None:
    state = request_state(scenario=EXACT)
    assert decide(state, device=0.5).pipeline == "full"
    assert decide(state, device=0.95).pipeline == "host"


def test_requests_that_wait_are_pressure() -> None:
    state = request_state(scenario=EXACT)
    assert decide(state, device=0.5, waiting=1).pipeline == "host"


def test_a_full_host_takes_no_shadow() -> None:
    assert decide(admits(1.0), host=0.95).pipeline == "full"


def test_shadowless_pipelines_are_for_the_edge_alone() -> None:
    assert decide(request_state(scenario=EDGE), host=0.95).pipeline in EDGE_PIPELINES
    assert decide(admits(0.1), host=0.95).pipeline not in EDGE_PIPELINES


def test_refused_pipelines_are_passed_over() -> None:
    first = decide(admits(1.0))
    second = decide(RequestView(admits(1.0), refused=frozenset({first.pipeline})))
    assert second.pipeline != first.pipeline
    assert f"{first.pipeline}: refused by the worker" in second.reason


def test_dwell_and_the_end_hold_a_request() -> None:
    held = decide(admits(1.0, last_switch=common_pb2.Switch(at_token=10)))
    assert held.pipeline == "full"
    assert "switched 6 tokens ago < 32" in held.reason
    ending = decide(admits(1.0, generated_tokens=390))
    assert ending.pipeline == "full"
    assert "10 tokens left to generate < 16" in ending.reason


def test_a_small_gain_is_not_worth_a_switch() -> None:
    (stays,) = LearnedPlanner(Holding(), Limits(margin=10.0)).plan(view(admits(1.0)))
    assert stays.pipeline == "full"
    assert "; stays; " in stays.reason


def test_what_is_lost_is_not_predicted_as_if_it_came_back() -> None:
    """`full` after a permanent loss has the loss of what is in force; nothing more may be lost than is admitted."""
    dense = "snapkv(keep=0.25)"
    lost = {"pipeline": dense, "loss_class": LossClass.LOSS_CLASS_PERMANENT, "kept_tokens": 504.0}
    decision = decide(admits(0.01, **lost))
    assert family(decision.pipeline) is Family.EXACT
    assert decision.forecast is not None
    assert decision.forecast.bound > 0.01
    assert "what is lost stays lost" in decision.reason
    recoverable = decide(admits(0.01, **{**lost, "loss_class": LossClass.LOSS_CLASS_RECOVERABLE}))
    assert recoverable.pipeline == INT4


def test_a_pipeline_off_the_list_is_predicted_too() -> None:
    decision = decide(admits(0.5, pipeline="window(sinks=4, recent=64) | kivi(bits=2)"))
    assert decision.forecast is not None
    assert decision.pipeline == "window(sinks=4, recent=64) | kivi(bits=2)" or "cost" in decision.reason
    assert decide(admits(0.01, pipeline="window(sinks=4, recent=64)")).pipeline == INT4


def test_int8_is_eight_bits_however_it_is_spelled() -> None:
    assert decide(request_state(scenario=MIXED, pipeline="int8", generated_tokens=399)).pipeline == "int8"


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (request_state(pipeline="telepathy"), "unknown stage"),
        (request_state(scenario=77), "by the rule: left alone: scenario 77"),
    ],
)
def test_what_cannot_be_predicted_the_rule_decides(state: policy_pb2.RequestState, words: str) -> None:
    planner = LearnedPlanner(Holding())
    both = planner.plan(view(state, request_state("other")))
    by_id = {decision.request_id: decision for decision in both}
    ruled = by_id["job-1"]
    assert words in ruled.reason
    assert ruled.forecast is None
    assert ruled.pipeline == RulePlanner().plan(view(state))[0].pipeline
    assert by_id["other"].forecast is not None


def test_nothing_is_done_to_what_has_shown_nothing_yet() -> None:
    state = request_state(far_mass=())
    assert RulePlanner().plan(view(state))[0].pipeline != "full"
    (decision,) = LearnedPlanner(Holding()).plan(view(state))
    assert decision.pipeline == "full"
    assert decision.reason == "no signals measured yet: stays; bundle v1"


def test_signals_are_kept_through_a_report_without_any() -> None:
    planner = LearnedPlanner(Holding())
    assert planner.plan(view(request_state()))[0].forecast is not None
    assert planner.plan(view(request_state(far_mass=(), generated_tokens=20)))[0].forecast is not None


def test_another_schema_is_the_rules_business() -> None:
    seen = view(request_state())
    seen.hello.feature_schema_hash = "another"
    (decision,) = LearnedPlanner(Holding()).plan(seen)
    assert decision.forecast is None
    assert "the worker reports another, by the rule: " in decision.reason


class BrokenPredictor(FakePredictor):
    def predict(self, rows: np.ndarray, families: object) -> None:  # type: ignore[override]
        raise RuntimeError("no trees")


def test_a_failing_predictor_is_the_rules_business() -> None:
    decision = decide(request_state(), BrokenPredictor())
    assert "bundle v1 failed: no trees, by the rule: " in decision.reason


def test_without_a_bundle_the_rule_decides_and_learned_says_so() -> None:
    seen = view(request_state())
    assert LearnedPlanner(Holding(None)).plan(seen) == RulePlanner().plan(seen)
    assert LearnedPlanner(Holding(None), insist=True).plan(seen)[0].reason.startswith("no active bundle, by the rule: ")


def test_one_call_predicts_for_all_and_a_tick_without_news_asks_nothing() -> None:
    holding = Holding()
    planner = LearnedPlanner(holding)
    assert holding.active is not None
    seen = view(*(request_state(f"r{number}", scenario=MIXED) for number in range(5)))
    planner.plan(seen)
    assert holding.active.calls == [5 * (len(CANDIDATES) - 2)]
    planner.plan(seen)
    assert len(holding.active.calls) == 1
    planner.plan(replace(seen, requests=(*seen.requests[:4], RequestView(request_state("r4", generated_tokens=32)))))
    assert holding.active.calls[1:] == [len(CANDIDATES) - 2]
    holding.active = FakePredictor("v2")
    assert planner.plan(seen)[0].reason.endswith("bundle v2")


def test_pinned_prefilling_overridden_and_outstanding_requests_get_no_decision() -> None:
    seen = view(
        request_state("pinned", pinned=True),
        request_state("prefilling", prefilling=True),
        RequestView(request_state("overridden"), overridden=True),
        RequestView(request_state("outstanding"), outstanding=INT4),
        request_state("free"),
    )
    assert [decision.request_id for decision in LearnedPlanner(Holding()).plan(seen)] == ["free"]


def test_outstanding_directives_count_as_done() -> None:
    other = request_state("other", scenario=EXACT, prompt_tokens=2900)
    sent = request_state("sent", scenario=EXACT, prompt_tokens=2900)

    def wanted(outstanding: str | None) -> str:
        seen = view(RequestView(sent, outstanding=outstanding), other, device=0.9)
        return {one.request_id: one.pipeline for one in LearnedPlanner(Holding()).plan(seen)}["other"]

    assert wanted("host(recent=256)") == "full"
    assert wanted("kivi(bits=8, shadow=false)") == "full"
    assert wanted("full") == "host"


def test_the_benchmark_measures_fresh_reports() -> None:
    holding = Holding()
    assert measure_tick_ms(LearnedPlanner(holding), view(request_state(scenario=MIXED)), times=3) > 0
    assert holding.active is not None
    assert len(holding.active.calls) == 3


# --- invariants -------------------------------------------------------------------------------------------------------


class SimulatedWorker:
    """Carries decisions out as a worker with exact estimates would: bytes by `estimate`, predictions constant."""

    def __init__(self, states: list[policy_pb2.RequestState], others_bytes: int, host_share: float) -> None:
        self.states = states
        self.others_bytes = others_bytes
        self.host_share = host_share
        self.planner = LearnedPlanner(Holding())
        self.history = {state.request_id: [state.pipeline] for state in states}

    def bytes_of(self, pipeline: str, state: policy_pb2.RequestState) -> int:
        seen = view(state)
        found = estimate(CATALOG.key(pipeline), state.prompt_tokens + state.generated_tokens, seen.layout)
        assert found is not None
        return found.device_bytes

    def device_bytes(self) -> int:
        return self.others_bytes + sum(self.bytes_of(state.pipeline, state) for state in self.states)

    def plan(self) -> list[Decision]:
        device = self.device_bytes() / (512 * MIB)
        return self.planner.plan(view(*map(copied, self.states), device=device, host=self.host_share))

    def step(self, tokens: int) -> list[Decision]:
        decisions = self.plan()
        by_id = {decision.request_id: decision for decision in decisions}
        for state in self.states:
            wanted = by_id[state.request_id].pipeline
            if wanted != state.pipeline:
                switch = common_pb2.Switch(at_token=state.generated_tokens, to_pipeline=wanted)
                state.last_switch.CopyFrom(switch)
                state.pipeline = wanted
                self.history[state.request_id].append(wanted)
            state.generated_tokens += tokens
        return decisions


def copied(state: policy_pb2.RequestState) -> policy_pb2.RequestState:
    """As a new report would hold it."""
    again = policy_pb2.RequestState()
    again.CopyFrom(state)
    return again


states = st.builds(
    request_state,
    request_id=st.uuids().map(str),
    scenario=st.sampled_from(SCENARIOS),
    prompt_tokens=st.integers(1, 4000),
    generated_tokens=st.just(0),
    max_tokens=st.just(10_000),
    objective=st.one_of(
        st.just(common_pb2.Objective()),
        st.builds(common_pb2.Objective, max_divergence=st.sampled_from([0.0, 0.0005, 0.002, 0.01, 0.5])),
    ),
)
workers = st.builds(
    SimulatedWorker,
    st.lists(states, min_size=1, max_size=6),
    others_bytes=st.integers(0, 512 * MIB),
    host_share=st.sampled_from([0.0, 0.5, 0.95]),
)


@settings(max_examples=25)
@given(workers)
def test_bounds_and_dwell_are_kept(worker: SimulatedWorker) -> None:
    for _ in range(10):
        before = {one.request_id: (one.pipeline, one.generated_tokens, copied(one)) for one in worker.states}
        for decision in worker.step(12):
            pipeline, generated, state = before[decision.request_id]
            limit = fill_objective(state.scenario, state.objective).max_divergence
            assert decision.forecast is not None
            assert decision.forecast.bound <= limit
            if limit == 0 or state.scenario == EXACT:
                assert family(decision.pipeline) is Family.EXACT
            if decision.pipeline != pipeline and state.HasField("last_switch"):
                assert generated - state.last_switch.at_token >= LIMITS.dwell_tokens


@settings(max_examples=20)
@given(workers)
def test_constant_input_does_not_flap(worker: SimulatedWorker) -> None:
    """Same predictions, growing contexts: nothing is left twice."""
    for _ in range(24):
        worker.step(16)
    for history in worker.history.values():
        left = history[:-1]
        assert len(left) == len(set(left)), history


@settings(max_examples=50)
@given(workers)
def test_budgets_are_kept_where_that_can_be(worker: SimulatedWorker) -> None:
    """Estimated use after the plan is at most the high mark, unless even the smallest admissible are above."""
    by_id = {state.request_id: state for state in worker.states}
    decisions = worker.plan()
    after = worker.others_bytes + sum(worker.bytes_of(one.pipeline, by_id[one.request_id]) for one in decisions)
    if after > LIMITS.device_high * 512 * MIB:
        assert any("do not fit" in one.reason for one in decisions)
        smallest = 0
        for state in worker.states:
            limit = fill_objective(state.scenario, state.objective).max_divergence
            exact = limit == 0 or state.scenario == EXACT
            texts = ["full", "host(recent=256)"] if exact else [*CANDIDATES, *EDGE_PIPELINES]
            smallest += min(worker.bytes_of(text, state) for text in texts)
        if worker.host_share == 0 and all(state.scenario == EXACT for state in worker.states):
            assert worker.others_bytes + smallest > LIMITS.device_relief * 512 * MIB


@settings(max_examples=25)
@given(workers, st.floats(0, 1.2), st.integers(0, 3))
def test_every_decision_is_valid_and_says_why(worker: SimulatedWorker, device: float, waiting: int) -> None:
    seen = view(*worker.states, device=device, waiting=waiting)
    decisions = worker.planner.plan(seen)
    assert sorted(one.request_id for one in decisions) == sorted(state.request_id for state in worker.states)
    for decision in decisions:
        CATALOG.check(decision.pipeline)
        assert "bundle v1" in decision.reason
    assert decisions == LearnedPlanner(Holding()).plan(seen)
