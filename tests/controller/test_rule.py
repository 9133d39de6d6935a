"""The rule: examples one can read, then invariants over a simulated worker."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.ladders import Thresholds
from controller.planner import Decision, RequestView
from controller.rule import RulePlanner
from kvpilot.v1 import common_pb2, policy_pb2
from kvpilot.v1.common_pb2 import Scenario
from models.footprint import estimate
from tests.controller.scripted import HORIZONS, LOUD, MIB, QUIET, hello, request_state, worker_view

LIMITS = Thresholds()
SCENARIOS = [Scenario.Value(name) for name in Scenario.keys() if name != "SCENARIO_UNSPECIFIED"]  # noqa: SIM118
EVICTING = ("window", "h2o", "snapkv")


def decide(state: policy_pb2.RequestState, **worker: float) -> Decision:
    (decision,) = RulePlanner().plan(worker_view(state, **worker))
    return decision


@dataclass(frozen=True)
class Example:
    name: str
    state: policy_pb2.RequestState
    wanted: str
    device: float = 0.1
    host: float = 0.0
    waiting: int = 0
    words: tuple[str, ...] = ()


LONG, STREAM = Scenario.SCENARIO_LONG_CONTEXT, Scenario.SCENARIO_STREAMING
CHAT, EXACT = Scenario.SCENARIO_MULTI_TURN, Scenario.SCENARIO_ACCURACY_CRITICAL
INT8, INT4, ON_HOST = "kivi(bits=8)", "kivi(bits=4)", "host(recent=256)"
EXAMPLES = [
    Example("long: 4 bits for length alone", request_state(scenario=LONG), INT4, words=("2016 tokens >= 512",)),
    Example("long: short stays full", request_state(scenario=LONG, prompt_tokens=300), "full"),
    Example("long: pressure adds the host", request_state(scenario=LONG, pipeline=INT4), f"{INT4} | {ON_HOST}", 0.8),
    Example("long: between the thresholds nothing moves", request_state(scenario=LONG, pipeline=INT4), INT4, 0.7),
    Example(
        "long: comes back when pressure falls",
        request_state(scenario=LONG, pipeline=f"{INT4} | {ON_HOST}"),
        INT4,
        0.3,
        words=("less than 55%",),
    ),
    Example(
        "long: stays on the host in between",
        request_state(scenario=LONG, pipeline=f"{INT4} | {ON_HOST}"),
        f"{INT4} | {ON_HOST}",
        0.6,
    ),
    Example(
        "long: a tight bound takes 8 bits",
        request_state(scenario=LONG, objective=common_pb2.Objective(max_divergence=0.002)),
        INT8,
    ),
    Example("exact: full", request_state(scenario=EXACT), "full"),
    Example("exact: to the host under pressure", request_state(scenario=EXACT), ON_HOST, 0.8),
    Example("exact: back from the host", request_state(scenario=EXACT, pipeline=ON_HOST), "full", 0.2),
    Example(
        "exact: not back if that would fill it",
        request_state(scenario=EXACT, pipeline=ON_HOST, prompt_tokens=6000),
        ON_HOST,
        0.3,
    ),
    Example("exact: a lossy pipeline is left at once", request_state(scenario=EXACT, pipeline=INT4), "full"),
    Example(
        "bound 0: exact whatever the scenario",
        request_state(scenario=STREAM, objective=common_pb2.Objective(max_divergence=0.0)),
        "full",
    ),
    Example(
        "stream: a window when little looks beyond it",
        request_state(scenario=STREAM, prompt_tokens=300),
        "window(sinks=4, recent=128)",
        words=("far mass beyond 128 tokens 0.05 < 0.10", "device 10% full"),
    ),
    Example(
        "stream: a larger window where the smaller is not quiet",
        request_state(scenario=STREAM, prompt_tokens=600, far_mass=(0.5, 0.3, 0.15, 0.04, 0.02, 0.0)),
        "window(sinks=4, recent=256)",
    ),
    Example("stream: too short for a window", request_state(scenario=STREAM, prompt_tokens=100), "full"),
    Example(
        "stream: 4 bits when it looks far back",
        request_state(scenario=STREAM, prompt_tokens=600, far_mass=LOUD),
        INT4,
        words=("far mass beyond 512 tokens 0.40 >= 0.10",),
    ),
    Example(
        "stream: leaves the window when its edge gets loud",
        request_state(scenario=STREAM, prompt_tokens=600, far_mass=LOUD, pipeline="window(recent=256)"),
        INT4,
        words=("far mass beyond 128 tokens 0.50 > 0.35",),
    ),
    Example(
        "stream: a denser window under pressure",
        request_state(scenario=STREAM, prompt_tokens=900, pipeline="window(sinks=4, recent=512)"),
        "window(sinks=4, recent=512) | kivi(bits=4)",
        0.9,
    ),
    Example("stream: no signals, no eviction", request_state(scenario=STREAM, prompt_tokens=600, far_mass=()), "full"),
    Example("chat: 8 bits", request_state(scenario=CHAT, prompt_tokens=200), INT8),
    Example("chat: 4 bits under pressure", request_state(scenario=CHAT, pipeline=INT8), INT4, 0.8),
    Example("chat: too short", request_state(scenario=CHAT, prompt_tokens=40), "full"),
    Example(
        "throughput: heavy hitters when little looks far",
        request_state(scenario=Scenario.SCENARIO_HIGH_THROUGHPUT, pipeline=INT4),
        f"h2o(keep=0.5) | {INT4}",
        0.8,
    ),
    Example(
        "throughput: the host when much does",
        request_state(scenario=Scenario.SCENARIO_HIGH_THROUGHPUT, pipeline=INT4, far_mass=LOUD),
        f"{INT4} | {ON_HOST}",
        0.8,
    ),
    Example("edge: no shadow", request_state(scenario=Scenario.SCENARIO_EDGE), "kivi(bits=4, shadow=false)"),
    Example("mixed: 8 bits", request_state(scenario=Scenario.SCENARIO_MIXED, prompt_tokens=150), INT8),
    Example("unspecified is mixed", request_state(scenario=Scenario.SCENARIO_UNSPECIFIED, prompt_tokens=150), INT8),
    Example("mixed: int8 is what it is", request_state(scenario=Scenario.SCENARIO_MIXED, pipeline="int8"), "int8"),
    Example(
        "mixed: no weight on memory, no pressure, no switch",
        request_state(scenario=Scenario.SCENARIO_MIXED, objective=common_pb2.Objective(memory_weight=0.0)),
        "full",
    ),
    Example(
        "mixed: eviction ends when far mass rises",
        request_state(scenario=Scenario.SCENARIO_MIXED, pipeline=f"snapkv(keep=0.5) | {INT4}", far_mass=LOUD),
        INT8,
    ),
    Example("prefill-heavy: left alone", request_state(scenario=Scenario.SCENARIO_PREFILL_HEAVY), "full"),
    Example(
        "prefill-heavy: but not under pressure", request_state(scenario=Scenario.SCENARIO_PREFILL_HEAVY), INT8, 0.8
    ),
    Example(
        "waiting requests are pressure",
        request_state(scenario=EXACT),
        ON_HOST,
        0.5,
        waiting=1,
        words=("requests wait for memory: 1",),
    ),
    Example("a full host takes no shadow", request_state(scenario=LONG), "full", host=0.95),
    Example("a full host takes no blocks", request_state(scenario=EXACT), "full", 0.9, host=0.95),
    Example("few tokens left", request_state(scenario=LONG, generated_tokens=390), "full", words=("10 tokens left",)),
    Example(
        "dwell",
        request_state(scenario=LONG, last_switch=common_pb2.Switch(at_token=10)),
        "full",
        words=("switched 6 tokens ago < 32",),
    ),
    Example("unknown pipeline", request_state(pipeline="telepathy"), "telepathy", words=("unknown stage",)),
    Example("unknown scenario", request_state(scenario=77), "full", words=("left alone: scenario 77",)),
]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_examples(example: Example) -> None:
    decision = decide(example.state, device=example.device, host=example.host, waiting=example.waiting)
    assert decision.pipeline == example.wanted, decision.reason
    for words in example.words:
        assert words in decision.reason


def test_a_window_needs_a_horizon_near_its_size() -> None:
    view = worker_view(request_state(scenario=STREAM, prompt_tokens=600, far_mass=(0.2, 0.04, 0.0)))
    del view.hello.far_horizons_tokens[:]
    view.hello.far_horizons_tokens.extend((64, 256, 1024))
    assert RulePlanner().plan(view)[0].pipeline == "window(sinks=4, recent=256)"


def test_hardware_specific_prefers_a_fast_host() -> None:
    state = request_state(scenario=Scenario.SCENARIO_HARDWARE_SPECIFIC)
    view = worker_view(state)
    view.hello.tiers[0].bandwidth_bytes_per_s, view.hello.tiers[1].bandwidth_bytes_per_s = 20e9, 10e9
    assert RulePlanner().plan(view)[0].pipeline == ON_HOST
    view.hello.tiers[1].bandwidth_bytes_per_s = 1e9
    assert RulePlanner().plan(view)[0].pipeline == INT8


def test_pinned_prefilling_overridden_and_outstanding_requests_get_no_decision() -> None:
    view = worker_view(
        request_state("pinned", pinned=True),
        request_state("prefilling", prefilling=True),
        RequestView(request_state("overridden"), overridden=True),
        RequestView(request_state("outstanding"), outstanding=INT4),
        request_state("free"),
    )
    assert [decision.request_id for decision in RulePlanner().plan(view)] == ["free"]


def test_pressure_moves_the_largest_first_and_no_more_than_needed() -> None:
    view = worker_view(
        *(request_state(f"r{size}", scenario=EXACT, prompt_tokens=size) for size in (600, 3000, 1000)), device=0.76
    )
    moved = {one.request_id: one.pipeline for one in RulePlanner().plan(view)}
    assert moved == {"r600": "full", "r3000": ON_HOST, "r1000": "full"}


def test_outstanding_directives_count_as_done() -> None:
    """Otherwise each tick until the worker's answer would send one more request to the host."""
    view = worker_view(
        RequestView(request_state("sent", scenario=EXACT, prompt_tokens=3000), outstanding=ON_HOST),
        request_state("other", scenario=EXACT, prompt_tokens=3000),
        device=0.76,
    )
    assert RulePlanner().plan(view)[0].pipeline == "full"


def test_refused_pipelines_are_passed_over() -> None:
    view = worker_view(RequestView(request_state(scenario=CHAT), refused=frozenset({INT8})), device=0.8)
    assert RulePlanner().plan(view)[0].pipeline == INT4


# --- invariants -------------------------------------------------------------------------------------------------------


class SimulatedWorker:
    """Carries decisions out as a worker with exact estimates would: bytes by `estimate`, masses constant."""

    def __init__(self, states: list[policy_pb2.RequestState], others_bytes: int, host_share: float) -> None:
        self.states = states
        self.others_bytes = others_bytes
        self.host_share = host_share
        self.history = {state.request_id: [state.pipeline] for state in states}

    def device_bytes(self) -> int:
        view = worker_view(*self.states)
        prints = [
            estimate(view.catalog.key(state.pipeline), state.prompt_tokens + state.generated_tokens, view.layout)
            for state in self.states
        ]
        return self.others_bytes + sum(each.device_bytes for each in prints if each)

    def step(self, tokens: int) -> list[Decision]:
        device = self.device_bytes() / (512 * MIB)
        decisions = RulePlanner().plan(worker_view(*self.states, device=device, host=self.host_share))
        by_id = {decision.request_id: decision for decision in decisions}
        for state in self.states:
            decision = by_id.get(state.request_id)
            if decision and decision.pipeline != state.pipeline:
                state.last_switch.CopyFrom(
                    common_pb2.Switch(
                        at_token=state.generated_tokens, from_pipeline=state.pipeline, to_pipeline=decision.pipeline
                    )
                )
                state.pipeline = decision.pipeline
                self.history[state.request_id].append(decision.pipeline)
            state.generated_tokens += tokens
        return decisions


masses = st.lists(st.floats(0, 1), min_size=len(HORIZONS), max_size=len(HORIZONS)).map(
    lambda values: tuple(sorted(values, reverse=True))
)
states = st.builds(
    request_state,
    request_id=st.uuids().map(str),
    scenario=st.sampled_from(SCENARIOS),
    prompt_tokens=st.integers(1, 4000),
    generated_tokens=st.just(0),
    max_tokens=st.just(10_000),
    far_mass=masses,
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


def stage_names(pipeline: str) -> list[str]:
    return [name for name, _ in worker_view().catalog.key(pipeline)]


@settings(max_examples=150, deadline=None)
@given(workers)
def test_exact_requests_only_see_exact_stages(worker: SimulatedWorker) -> None:
    for _ in range(12):
        worker.step(16)
    for state in worker.states:
        bound = state.objective.max_divergence if state.objective.HasField("max_divergence") else 1.0
        if state.scenario == EXACT or bound < LIMITS.int8_loss:
            for pipeline in worker.history[state.request_id]:
                assert set(stage_names(pipeline)) <= {"full", "host"}


@settings(max_examples=150, deadline=None)
@given(workers)
def test_chats_lose_no_token(worker: SimulatedWorker) -> None:
    for _ in range(12):
        worker.step(16)
    for state in worker.states:
        if state.scenario in (CHAT, LONG):
            for pipeline in worker.history[state.request_id]:
                assert not set(stage_names(pipeline)) & set(EVICTING)


@settings(max_examples=150, deadline=None)
@given(workers)
def test_dwell_is_kept(worker: SimulatedWorker) -> None:
    for _ in range(20):
        before = {state.request_id: (state.pipeline, state.generated_tokens) for state in worker.states}
        last = {
            state.request_id: state.last_switch.at_token for state in worker.states if state.HasField("last_switch")
        }
        worker.step(8)
        for state in worker.states:
            pipeline, generated = before[state.request_id]
            if state.pipeline != pipeline and state.request_id in last:
                assert generated - last[state.request_id] >= LIMITS.dwell_tokens


@settings(max_examples=200, deadline=None)
@given(workers)
def test_constant_input_does_not_flap(worker: SimulatedWorker) -> None:
    """Same signals, growing contexts: a request may come back once others have made room, but leaves nothing twice."""
    for _ in range(40):
        worker.step(16)
    for history in worker.history.values():
        left = history[:-1]
        assert len(left) == len(set(left)), history


@settings(max_examples=150, deadline=None)
@given(workers, st.floats(0, 1.2), st.integers(0, 3))
def test_every_decision_is_valid_and_says_why(worker: SimulatedWorker, device: float, waiting: int) -> None:
    view = worker_view(*worker.states, device=device, waiting=waiting)
    decisions = RulePlanner().plan(view)
    assert sorted(one.request_id for one in decisions) == sorted(state.request_id for state in worker.states)
    for decision in decisions:
        view.catalog.check(decision.pipeline)
        assert decision.reason
    assert decisions == RulePlanner().plan(view)


def test_a_crowd_is_planned_at_once() -> None:
    view = worker_view(
        *(request_state(f"r{number}", scenario=EXACT, prompt_tokens=600) for number in range(256)),
        device=0.9,
    )
    assert len(RulePlanner().plan(view)) == 256


def test_far_horizons_of_the_examples_fall() -> None:
    assert sorted(QUIET, reverse=True) == list(QUIET)
    assert len(QUIET) == len(hello().far_horizons_tokens)
