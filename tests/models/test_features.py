"""The feature rows against a plain reference, one request, one candidate and one column at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpilot.catalog import StageCatalog
from kvpilot.pipeline import PipelineError, StageSpec, format_pipeline, parse_pipeline
from kvpilot.v1 import common_pb2, generation_pb2, policy_pb2
from kvpilot.v1.common_pb2 import LossClass, Scenario
from models import features
from models.candidates import CANDIDATES
from models.features import (
    AUDIT_FLOOR,
    FEATURES,
    HORIZONS_TOKENS,
    NAMES,
    REQUEST_FEATURES,
    SCHEMA_HASH,
    SIGNAL_FEATURES,
    Family,
    Feature,
    FeatureBuilder,
    family_of,
    seen_tokens,
)
from models.footprint import CacheLayout
from tests.controller.scripted import QUIET, hello, request_state, stages

STRANGERS = [
    generation_pb2.StageInfo(name="telepathy", kind="evict", loss_class=LossClass.LOSS_CLASS_RECOVERABLE),
    generation_pb2.StageInfo(name="foresight", kind="oracle", loss_class=LossClass.LOSS_CLASS_EXACT),
]
"""Stages of other packages; the second is of a kind that is not known here either."""
CATALOG = StageCatalog([*stages(), *STRANGERS])
LAYOUT = CacheLayout(layers=5, kv_heads=3, head_dim=80, raw_dtype_bytes=2)
UNKNOWN = ("telepathy", "foresight", "telepathy | kivi(bits=4)", "kivi(bits=4, shadow=false) | foresight")
PIPELINES = (
    *CANDIDATES,
    "kivi(bits=2, shadow=false)",
    "window(sinks=0, recent=100, shadow=false)",
    "window(sinks=100, recent=32)",
    "snapkv(keep=0.3, shadow=false) | kivi(bits=4)",
    "h2o(keep=0.05) | int8 | host(recent=64)",
    "h2o(keep=1)",
    "qhitter(keep=0.4, shadow=false)",
    "merge(keep=0.02)",
    "knorm(keep=0.61) | fp8",
    "nacl(keep=0.2) | turboquant(bits=3, shadow=false) | host(recent=64)",
    "tova(size=96)",
    *UNKNOWN,
)
STATE_FEATURES = len(REQUEST_FEATURES) + len(SIGNAL_FEATURES)
HORIZONS = list(HORIZONS_TOKENS)


def builder(horizons: Sequence[int] = HORIZONS_TOKENS) -> FeatureBuilder:
    return FeatureBuilder(CATALOG, LAYOUT, horizons)


def named(row: np.ndarray) -> dict[str, float]:
    return dict(zip(NAMES, row.tolist(), strict=True))


# --- the schema ------------------------------------------------------------------------------------------------------


def test_names_are_unique_and_ranges_are_ranges() -> None:
    assert len(set(NAMES)) == len(NAMES) == len(FEATURES)
    for feature in FEATURES:
        assert math.isfinite(feature.low), feature.name
        assert feature.low < feature.high, feature.name
        assert feature.unit, feature.name
        assert feature.meaning, feature.name


@pytest.mark.parametrize("place", [0, len(FEATURES) // 2, len(FEATURES) - 1])
@pytest.mark.parametrize("change", [{"name": "another"}, {"unit": "miles"}, {"low": -21.0}, {"high": 5e9}])
def test_a_changed_feature_is_another_schema(
    monkeypatch: pytest.MonkeyPatch, place: int, change: dict[str, object]
) -> None:
    columns: list[Feature] = list(FEATURES)
    columns[place] = replace(columns[place], **change)
    monkeypatch.setattr(features, "FEATURES", tuple(columns))
    assert features._hash() != SCHEMA_HASH


def test_so_is_another_order_one_more_or_less_and_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {SCHEMA_HASH}
    for columns in (FEATURES[::-1], FEATURES[1:], (*FEATURES, replace(FEATURES[0], name="more"))):
        monkeypatch.setattr(features, "FEATURES", columns)
        found.add(features._hash())
    monkeypatch.setattr(features, "FEATURES", FEATURES)
    monkeypatch.setattr(features, "SCHEMA_VERSION", features.SCHEMA_VERSION + 1)
    found.add(features._hash())
    assert len(found) == 5


def test_nothing_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "FEATURES", tuple(replace(feature) for feature in FEATURES))
    monkeypatch.setattr(features, "AUDIT_FLOOR", 1.0)
    monkeypatch.setattr(features, "NAMES", ())
    assert features._hash() == SCHEMA_HASH


# --- the reference ---------------------------------------------------------------------------------------------------

SHARES = ("h2o", "merge", "qhitter", "snapkv", "kvzip", "nacl", "hashevict", "keydiff", "knorm", "scissorhands")
SHARES += ("expected_attention",)
SIZES = ("morphkv", "tova")  # they keep so many
CODE_BITS = {"kivi": 4, "turboquant": 4, "int8": 8, "fp8": 8}
DEFAULTS: dict[str, dict[str, float]] = {
    "window": {"sinks": 4, "recent": 512},
    **{name: {"keep": 0.5} for name in SHARES},
    **{name: {"size": 512} for name in SIZES},
    **{name: {"bits": bits} for name, bits in CODE_BITS.items()},
    "host": {"recent": 256},
    "full": {},
}
GROUPS = {"window": "window"} | dict.fromkeys([*SHARES, *SIZES], "scored") | dict.fromkeys(CODE_BITS, "quantise")


def expected_state(state: policy_pb2.RequestState, horizons: Sequence[int]) -> dict[str, float]:
    """The request's part, column by column."""
    seen = state.prompt_tokens + state.generated_tokens
    signals, prompt = state.signals, state.prompt
    nan = math.nan
    row: dict[str, float] = {"log2_seen": math.log(seen, 2), "generated_share": state.generated_tokens / seen}
    row["turns"] = prompt.turns if state.HasField("prompt") else nan
    row["prompt_distinct_share"] = prompt.distinct_share if state.HasField("prompt") else nan
    row["prompt_repeated_share"] = prompt.repeated_share if state.HasField("prompt") else nan
    row["prompt_unigram_entropy"] = prompt.unigram_entropy if state.HasField("prompt") else nan
    sent_with = state.scenario or Scenario.SCENARIO_MIXED
    for name, number in Scenario.items():
        if number:
            row[name.lower()] = float(sent_with == number)
    for horizon in HORIZONS:
        for name, values in (
            ("far_mass", signals.far_mass),
            ("far_mass_max", signals.far_mass_max),
            ("far_mass_last", signals.far_mass_last),
            ("far_mass_layer", signals.far_mass_worst_layer),
            ("far_votes", signals.far_votes),
            ("far_votes_max", signals.far_votes_max),
            ("repeat_beyond", signals.repeat_beyond),
        ):
            of_horizon = dict(zip(horizons, values, strict=False))
            row[f"{name}_{horizon}"] = of_horizon.get(horizon, nan)
        for name, values in (
            ("far_mass_depth", signals.far_mass_by_depth),
            ("far_votes_depth", signals.far_votes_by_depth),
        ):
            for quarter in range(4):
                of_quarter = list(values)[quarter * len(horizons) : (quarter + 1) * len(horizons)]
                row[f"{name}{quarter}_{horizon}"] = dict(zip(horizons, of_quarter, strict=False)).get(horizon, nan)
    for place, percent in enumerate((12, 25, 50, 75)):
        for name in ("dropped_votes", "dropped_votes_max", "missed_votes", "missed_votes_max"):
            shares = getattr(signals, name)
            row[f"{name}_{percent}"] = shares[place] if shares else nan
        for quarter in range(4):
            shares = signals.missed_votes_by_depth
            row[f"missed_votes_depth{quarter}_{percent}"] = shares[4 * quarter + place] if shares else nan
    for name in (
        "sink_mass",
        "attention_entropy",
        "next_token_entropy",
        "next_token_entropy_max",
        "top1_probability",
        "surprise",
    ):
        row[name] = getattr(signals, name) if signals.steps > 0 else nan
    told = len(signals.repeat_beyond) > 0
    row["repeat_rate"] = signals.repeat_rate if told else nan
    row["copied_tokens"] = signals.copied_tokens if told else nan
    row["log2_copied_from"] = nan
    if told:
        row["log2_copied_from"] = math.log(signals.copied_from_tokens, 2) if signals.copied_from_tokens else 0.0
    row["current_kept_share"] = state.kept_tokens / seen if state.kept_tokens > 0 else nan
    row["current_bits"] = 16.0
    for spec in parse_pipeline(state.pipeline):
        if spec.name not in DEFAULTS:
            row["current_bits"] = nan
            break
        row["current_bits"] = float((DEFAULTS[spec.name] | dict(spec.parameters)).get("bits", row["current_bits"]))
    row["current_bytes_share"] = nan
    if state.cache.full_cache_bytes:
        row["current_bytes_share"] = state.cache.device_bytes / state.cache.full_cache_bytes
    row["audited_log_divergence"] = nan
    if in_force := [audit for audit in state.audits if audit.pipeline == state.pipeline]:
        row["audited_log_divergence"] = float(np.mean([np.log(max(one.divergence, 1e-6)) for one in in_force]))
    return row


def block_bytes(bits: float, codec: str = "") -> int:
    """Of one block of one head."""
    if bits == 16:
        payload = sum(LAYOUT.raw_dtype_bytes for _ in ("key", "value") for _ in range(32 * LAYOUT.head_dim))
    elif codec == "turboquant":
        payload = sum(math.ceil(LAYOUT.head_dim * bits / 8) + 2 for _ in ("key", "value") for _ in range(32))
    else:
        each = 2 if codec == "fp8" else 2 * 2  # a scale of two bytes, and mostly a zero
        payload = 2 * 32 * LAYOUT.head_dim * int(bits) // 8
        payload += LAYOUT.head_dim * each  # for each key channel ...
        payload += 32 * math.ceil(LAYOUT.head_dim / 32) * each  # ... and for each 32 channels of each token's value
    return math.ceil(payload / 256) * 256


def expected_candidate(pipeline: str, seen: int, state: dict[str, float]) -> dict[str, float]:
    """The candidate's part, block by block."""
    specs = parse_pipeline(pipeline)
    given = {spec.name: DEFAULTS.get(spec.name, {}) | dict(spec.parameters) for spec in specs}
    lossy = [name for name in given if name in GROUPS]
    row: dict[str, float] = {
        "recoverable": float(bool(lossy) and all(given[name].get("shadow", True) for name in lossy))
    }
    groups = "+".join(GROUPS[name] for name in lossy) or "exact"
    if not given.keys() <= DEFAULTS.keys():
        groups = "other"
    for family in Family:
        row[f"family_{family.value.replace('+', '_')}"] = float(family.value == groups)
    for name in NAMES[STATE_FEATURES:]:
        if name.startswith("has_"):
            row[name] = float(name.removeprefix("has_") in given)
    if groups == "other":
        return {name: row.get(name, math.nan) for name in NAMES[STATE_FEATURES:]}

    kept = recent = seen
    if "window" in given:
        kept = min(seen, given["window"]["sinks"] + given["window"]["recent"] + 32)
        recent = min(seen, given["window"]["recent"])
    for name, stage in given.items():
        if "keep" in stage:
            kept = min(seen, max(96 if name == "snapkv" else 64, math.ceil(stage["keep"] * seen)))
        elif "size" in stage:
            kept = min(seen, stage["size"])
        if ("keep" in stage or "size" in stage) and kept < seen:
            recent = kept / 2 if name in ("h2o", "qhitter", "merge") else 64 if name == "snapkv" else 32
    codec = next((name for name in given if name in CODE_BITS), "")
    bits = given[codec].get("bits", CODE_BITS[codec]) if codec else 16
    on_device = given["host"]["recent"] if "host" in given else kept
    coded_tokens = host_tokens = device_bytes = 0
    for end in range(32, kept + 32, 32):  # a block ends before this token
        coded = bits < 16 and end <= kept - 32
        host = end <= kept - on_device
        coded_tokens += 32 * coded
        host_tokens += 32 * host
        device_bytes += 0 if host else block_bytes(bits if coded else 16, codec)
    row |= {
        "kept_share": kept / seen,
        "log2_kept": math.log(kept, 2),
        "log2_dropped": math.log(seen - kept + 1, 2),
        "log2_recent": math.log(recent, 2),
        "bits": bits,
        "coded_share": coded_tokens / kept,
        "host_share": host_tokens / kept,
        "bytes_share": device_bytes / (math.ceil(seen / 32) * block_bytes(16)),
    }
    grid = [math.log(horizon, 2) for horizon in HORIZONS]
    for name, signal in (
        ("mass_beyond", "far_mass"),
        ("mass_beyond_max", "far_mass_max"),
        ("mass_beyond_last", "far_mass_last"),
        ("votes_beyond", "far_votes"),
        ("votes_beyond_max", "far_votes_max"),
        ("repeat_beyond", "repeat_beyond"),
    ):
        values = [state[f"{signal}_{horizon}"] for horizon in HORIZONS]
        row[name] = float(np.interp(math.log(recent, 2), grid, values)) if kept < seen else 0.0
    deep = [(state[f"far_mass_depth2_{horizon}"] + state[f"far_mass_depth3_{horizon}"]) / 2 for horizon in HORIZONS]
    row["mass_beyond_deep"] = float(np.interp(math.log(recent, 2), grid, deep)) if kept < seen else 0.0
    shares, percents = [1 / 8, 1 / 4, 1 / 2, 3 / 4, 1], (12, 25, 50, 75)
    for name, signal in (
        ("votes_dropped", "dropped_votes"),
        ("votes_dropped_max", "dropped_votes_max"),
        ("votes_missed", "missed_votes"),
        ("votes_missed_max", "missed_votes_max"),
    ):
        values = [state[f"{signal}_{percent}"] for percent in percents]
        row[name] = float(np.interp(kept / seen, shares, [*values, 0.0])) if kept < seen else 0.0
    deep = [(state[f"missed_votes_depth2_{part}"] + state[f"missed_votes_depth3_{part}"]) / 2 for part in percents]
    row["votes_missed_deep"] = float(np.interp(kept / seen, shares, [*deep, 0.0])) if kept < seen else 0.0
    row["copied_beyond"] = 0.0
    if kept < seen:
        from_beyond = state["log2_copied_from"] > math.log(recent, 2)
        row["copied_beyond"] = state["copied_tokens"] if from_beyond or math.isnan(state["copied_tokens"]) else 0.0
    return row


# --- random requests -------------------------------------------------------------------------------------------------

SHARE = st.floats(0, 1)
ANY_HORIZONS = st.permutations([*HORIZONS, 16, 100, 2048]).flatmap(
    lambda found: st.integers(0, len(found)).map(lambda count: tuple(found[:count]))
)
"""As a worker may have them: in any order, some missing, some that nobody asked for."""
SOME_HORIZONS = st.one_of(st.just(HORIZONS_TOKENS), ANY_HORIZONS)


@st.composite
def requests(draw: st.DrawFn, horizons: Sequence[int] = HORIZONS_TOKENS) -> policy_pb2.RequestState:
    """A request as a worker of these horizons may report it, with signals of any kind missing."""

    def shares(count: int) -> list[float]:
        return draw(st.lists(SHARE, min_size=count, max_size=count)) if draw(st.booleans()) else []

    prompt_tokens = draw(st.one_of(st.integers(1, 200), st.integers(1, 9000)))
    generated_tokens = draw(st.integers(0, 3000))
    seen = prompt_tokens + generated_tokens
    pipeline = draw(st.sampled_from(PIPELINES))
    audits = draw(st.lists(st.tuples(st.sampled_from([pipeline, "int8"]), st.sampled_from([0.0, 1e-7, 0.02, 30.0]))))
    state = policy_pb2.RequestState(
        request_id="job-1",
        scenario=draw(st.sampled_from(Scenario.values())),
        pipeline=pipeline,
        prompt_tokens=prompt_tokens,
        generated_tokens=generated_tokens,
        max_tokens=4000,
        kept_tokens=draw(st.one_of(st.just(0.0), st.floats(1, seen))),
        audits=[policy_pb2.Audit(pipeline=audited, divergence=lost) for audited, lost in audits],
    )
    if draw(st.booleans()):
        full = draw(st.integers(1, 1 << 40))
        state.cache.CopyFrom(
            common_pb2.CacheBytes(device_bytes=draw(st.integers(0, full)), full_cache_bytes=full),
        )
    if draw(st.booleans()):
        state.prompt.distinct_share = draw(SHARE)
        state.prompt.repeated_share = draw(SHARE)
        state.prompt.unigram_entropy = draw(st.floats(0, 12))
        state.prompt.turns = draw(st.integers(1, 9))
    if draw(st.booleans()):
        state.signals.CopyFrom(
            policy_pb2.Signals(
                steps=draw(st.integers(0, 16)),
                far_mass=shares(len(horizons)),
                far_mass_max=shares(len(horizons)),
                far_mass_last=shares(len(horizons)),
                far_mass_worst_layer=shares(len(horizons)),
                far_mass_by_depth=shares(4 * len(horizons)),
                dropped_votes=shares(4),
                dropped_votes_max=shares(4),
                missed_votes=shares(4),
                missed_votes_max=shares(4),
                missed_votes_by_depth=shares(4 * 4),
                far_votes=shares(len(horizons)),
                far_votes_max=shares(len(horizons)),
                far_votes_by_depth=shares(4 * len(horizons)),
                sink_mass=draw(SHARE),
                attention_entropy=draw(SHARE),
                next_token_entropy=draw(st.floats(0, 10)),
                next_token_entropy_max=draw(st.floats(0, 10)),
                top1_probability=draw(SHARE),
                surprise=draw(st.floats(0, 30)),
            )
        )
        if beyond := shares(len(horizons)):
            state.signals.repeat_beyond.extend(beyond)
            state.signals.repeat_rate = draw(SHARE)
            state.signals.copied_tokens = draw(st.integers(0, 32))
            state.signals.copied_from_tokens = draw(st.integers(1, seen)) if state.signals.copied_tokens else 0
    return state


@settings(max_examples=100)
@given(SOME_HORIZONS.flatmap(lambda horizons: st.tuples(st.just(horizons), requests(horizons))))
def test_rows_are_those_of_the_reference(case: tuple[Sequence[int], policy_pb2.RequestState]) -> None:
    horizons, state = case
    rows = builder(horizons).rows(state, PIPELINES)
    assert rows.shape == (len(PIPELINES), len(FEATURES))
    of_request = expected_state(state, horizons)
    assert of_request.keys() == set(NAMES[:STATE_FEATURES])
    for pipeline, row in zip(PIPELINES, rows, strict=True):
        expected = of_request | expected_candidate(pipeline, seen_tokens(state), of_request)
        np.testing.assert_allclose(row, [expected[name] for name in NAMES], rtol=1e-9, atol=1e-12, err_msg=pipeline)


@settings(max_examples=60)
@given(requests())
def test_values_lie_within_their_declared_ranges(state: policy_pb2.RequestState) -> None:
    for row in builder().rows(state, PIPELINES):
        for feature, value in zip(FEATURES, row.tolist(), strict=True):
            assert math.isnan(value) or feature.low <= value <= feature.high, feature.name


@settings(max_examples=40)
@given(st.lists(requests(), min_size=1, max_size=5))
def test_a_batch_is_what_its_requests_are_one_by_one(states: list[policy_pb2.RequestState]) -> None:
    one = builder()
    matrix = one.matrix(
        np.array([one.state_row(state) for state in states]),
        np.array([seen_tokens(state) for state in states]),
        PIPELINES,
    )
    assert matrix.shape == (len(states), len(PIPELINES), len(FEATURES))
    for rows, state in zip(matrix, states, strict=True):
        np.testing.assert_array_equal(rows, one.rows(state, PIPELINES))
        for row, pipeline in zip(rows, PIPELINES, strict=True):
            np.testing.assert_array_equal(row, one.rows(state, [pipeline])[0])


# --- examples --------------------------------------------------------------------------------------------------------


def test_what_is_not_known_is_nan() -> None:
    row = builder().state_row(policy_pb2.RequestState(pipeline="full", prompt_tokens=100))
    known = {
        feature.name for feature, value in zip(REQUEST_FEATURES + SIGNAL_FEATURES, row, strict=True) if value == value
    }
    scenarios = {feature.name for feature in REQUEST_FEATURES if feature.name.startswith("scenario_")}
    assert known == {"log2_seen", "generated_share", "current_bits"} | scenarios


def test_what_depends_on_what_is_not_known_is_nan_too_and_nothing_is_where_nothing_is_dropped() -> None:
    state = policy_pb2.RequestState(pipeline="full", prompt_tokens=1000)
    beyond = NAMES[NAMES.index("mass_beyond") :]
    assert len(beyond) == 13
    dropping, keeping, unknown = (
        named(row) for row in builder().rows(state, ["window(sinks=4, recent=512)", "int8", "telepathy"])
    )
    for name in beyond:
        assert math.isnan(dropping[name]), name
        assert keeping[name] == 0.0, name
        assert math.isnan(unknown[name]), name


def test_a_stage_that_is_not_known_here_leaves_only_its_family() -> None:
    told = builder().describe("telepathy", np.array([100, 200]))
    assert told.family is Family.OTHER
    assert not told.recoverable
    assert math.isnan(told.bits)
    for values in (told.kept_tokens, told.recent_tokens, told.coded_share, told.host_share, told.device_bytes):
        assert np.isnan(values).all()
        assert values.shape == (2,)


def test_horizons_are_found_wherever_a_worker_has_them() -> None:
    state = policy_pb2.RequestState(pipeline="full", prompt_tokens=1000)
    state.signals.CopyFrom(policy_pb2.Signals(steps=1, far_mass=[0.1, 0.2, 0.3]))
    row = named(builder((512, 100, 32)).rows(state, ["window(sinks=4, recent=512)"])[0])
    assert (row["far_mass_512"], row["far_mass_32"]) == (0.1, 0.3)
    for horizon in (64, 128, 256, 1024):
        assert math.isnan(row[f"far_mass_{horizon}"])
    assert row["mass_beyond"] == 0.1  # known at the very horizon, whatever is missing beside it


def test_interpolation_is_by_the_logarithm_of_the_horizon() -> None:
    state = request_state(prompt_tokens=2000, far_mass=QUIET)
    row = named(builder().rows(state, ["window(sinks=4, recent=362)"])[0])  # half an octave above 256
    assert row["mass_beyond"] == pytest.approx((QUIET[3] + QUIET[4]) / 2, rel=1e-3)


def test_a_copy_counts_where_its_source_would_be_dropped() -> None:
    state = policy_pb2.RequestState(pipeline="full", prompt_tokens=4000)
    state.signals.CopyFrom(policy_pb2.Signals(repeat_beyond=[1.0] * 6, copied_tokens=9, copied_from_tokens=600))
    recents = ["window(sinks=4, recent=512)", "window(sinks=4, recent=600)", "window(sinks=4, recent=1024)", "full"]
    rows = builder().rows(state, recents)
    assert rows[:, NAMES.index("copied_beyond")].tolist() == [9.0, 0.0, 0.0, 0.0]


def test_audits_of_the_pipeline_in_force_are_averaged_as_logarithms_above_their_floor() -> None:
    state = request_state(pipeline="int8")
    state.audits.extend(policy_pb2.Audit(pipeline="int8", divergence=lost) for lost in (0.0, 0.01))
    state.audits.add(pipeline="kivi(bits=4)", divergence=2.0)  # of before a switch
    row = named(builder().rows(state, ["full"])[0])
    assert row["audited_log_divergence"] == pytest.approx((math.log(AUDIT_FLOOR) + math.log(0.01)) / 2)
    state.pipeline = "full"
    assert math.isnan(named(builder().rows(state, ["full"])[0])["audited_log_divergence"])


def test_far_mass_and_missed_votes_of_each_quarter_find_their_columns() -> None:
    state = policy_pb2.RequestState(pipeline="full", prompt_tokens=2000)
    signals = policy_pb2.Signals(
        steps=4,
        far_mass_by_depth=[(10 * quarter + place) / 100 for quarter in range(4) for place in range(6)],
        missed_votes_by_depth=[(10 * quarter + place) / 50 for quarter in range(4) for place in range(4)],
    )
    state.signals.CopyFrom(signals)
    pipelines = ["window(sinks=4, recent=256)", "h2o(keep=0.25)"]
    window, h2o = (named(row) for row in builder().rows(state, pipelines))
    for quarter in range(4):
        for place, horizon in enumerate(HORIZONS):
            assert window[f"far_mass_depth{quarter}_{horizon}"] == (10 * quarter + place) / 100
        for place, percent in enumerate((12, 25, 50, 75)):
            assert window[f"missed_votes_depth{quarter}_{percent}"] == (10 * quarter + place) / 50
    assert window["mass_beyond_deep"] == pytest.approx((0.23 + 0.33) / 2)  # 256 is the fourth horizon
    assert h2o["votes_missed_deep"] == pytest.approx((0.42 + 0.62) / 2)  # 1/4 is the second share
    for name in ("mass_beyond", "votes_missed", "votes_missed_max"):
        assert math.isnan(window[name]), name
        assert math.isnan(h2o[name]), name


@pytest.mark.parametrize(
    ("keep", "missed"),
    [
        (0.1, 0.8),  # below the least share that is measured, what is missed there
        (0.125, 0.8),
        (0.25, 0.6),
        (0.375, 0.5),
        (0.5, 0.4),
        (0.625, 0.3),
        (0.75, 0.2),
        (0.875, 0.1),  # who keeps everything misses nothing
        (1.0, 0.0),
    ],
)
def test_missed_votes_are_interpolated_between_shares(keep: float, missed: float) -> None:
    state = policy_pb2.RequestState(pipeline="full", prompt_tokens=4000)
    measured = [0.8, 0.6, 0.4, 0.2]
    state.signals.CopyFrom(
        policy_pb2.Signals(
            steps=4,
            missed_votes=measured,
            missed_votes_max=[value + 0.1 for value in measured],
            missed_votes_by_depth=[0.0] * 8
            + [value - 0.1 for value in measured]
            + [value + 0.05 for value in measured],
        )
    )
    row = named(builder().rows(state, [f"h2o(keep={keep})"])[0])
    at_the_end = 0.0 if keep == 1 else min(1.0, (1 - keep) / 0.25)  # all of them fall to 0 behind 3/4
    assert row["votes_missed"] == pytest.approx(missed)
    assert row["votes_missed_max"] == pytest.approx(missed + 0.1 * at_the_end)
    assert row["votes_missed_deep"] == pytest.approx(missed - 0.025 * at_the_end)


def test_a_request_without_tokens_has_rows_too() -> None:
    row = named(builder().rows(policy_pb2.RequestState(pipeline="full"), ["full"])[0])
    assert (row["log2_seen"], row["kept_share"], row["log2_dropped"], row["bytes_share"]) == (0.0, 1.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("evictor", "codec", "placer"),
    list(
        itertools.product(
            ("", "window", "h2o", "snapkv", "nacl", "tova(size=128)"),
            ("", "kivi(bits=2)", "kivi(bits=4, shadow=false)", "int8", "turboquant(bits=3)"),
            ("", "host"),
        )
    ),
)
def test_families_of_all_that_is_built_in(evictor: str, codec: str, placer: str) -> None:
    pipeline = " | ".join(filter(None, (evictor, codec, placer))) or "full"
    expected = {
        (False, False, False): Family.EXACT,
        (False, False, True): Family.QUANTISE,
        (True, False, False): Family.WINDOW,
        (False, True, False): Family.SCORED,
        (True, False, True): Family.WINDOW_QUANTISE,
        (False, True, True): Family.SCORED_QUANTISE,
    }[evictor == "window", evictor not in ("", "window"), bool(codec)]
    assert family_of(CATALOG.key(pipeline)) is expected
    assert builder().describe(pipeline, np.array([1000])).family is expected


@pytest.mark.parametrize("pipeline", UNKNOWN)
def test_a_stranger_makes_it_another_family(pipeline: str) -> None:
    assert family_of(CATALOG.key(pipeline)) is Family.OTHER


def test_spelling_makes_no_difference() -> None:
    def spelled(pipeline: str) -> str:
        """With every default, the parameters in another order."""
        return format_pipeline(tuple(StageSpec(name, given[::-1]) for name, given in CATALOG.key(pipeline)))

    others = [spelled(pipeline) for pipeline in CANDIDATES]
    assert sum(one != other for one, other in zip(CANDIDATES, others, strict=True)) > 10
    state = request_state(prompt_tokens=3000)
    np.testing.assert_array_equal(builder().rows(state, CANDIDATES), builder().rows(state, others))
    np.testing.assert_array_equal(
        *(builder().state_row(request_state(pipeline=text)) for text in ("kivi", "kivi(shadow=true, bits=4)"))
    )


def test_a_builder_is_made_of_what_a_worker_says_of_itself() -> None:
    said = hello()
    state = request_state()
    by_hand = FeatureBuilder(StageCatalog(stages()), CacheLayout.of(30, 3, 64, "float32"), said.far_horizons_tokens)
    np.testing.assert_array_equal(FeatureBuilder.of(said).rows(state, CANDIDATES), by_hand.rows(state, CANDIDATES))
    np.testing.assert_array_equal(
        FeatureBuilder.of(said, CATALOG).rows(state, ["telepathy"])[0, :STATE_FEATURES], by_hand.state_row(state)
    )
    said.raw_dtype = "int3"
    with pytest.raises(ValueError, match="raw_dtype 'int3'"):
        FeatureBuilder.of(said)


def test_what_cannot_be_read_is_refused() -> None:
    one = builder()
    for pipeline in ("clairvoyance", "window(depth=3)", "full |"):
        with pytest.raises(PipelineError):
            one.rows(request_state(), ["full", pipeline])
        with pytest.raises(PipelineError):
            one.describe(pipeline, np.array([100]))
        with pytest.raises(PipelineError):
            one.state_row(request_state(pipeline=pipeline))
    with pytest.raises(ValueError, match="scenario 99: expected one of SCENARIO_LONG_CONTEXT"):
        one.state_row(request_state(scenario=99))
