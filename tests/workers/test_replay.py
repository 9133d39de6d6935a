"""Replays: what they measure is what a request would have lost, and they change nothing for others."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from kernels.layout import Tier
from kvpilot.v1 import generation_pb2, job_pb2
from models.features import NAMES, SCHEMA_HASH
from tests.tiny import Drive, Outcome, prompt, run, tiny_engine, tiny_model
from tests.workers.backtest import Look
from workers.cache.sequence_cache import Occasion
from workers.engine.scoring import divergences
from workers.errors import ProblemError
from workers.signals import prompt_statistics
from workers.stages.registry import build

TEXT = prompt(600, 31)
PIPELINES = [
    "full",
    "host(recent=64)",
    "int8",
    "kivi(bits=4)",
    "window(sinks=4, recent=64)",
    "h2o(keep=0.25)",
    "snapkv(keep=0.25, shadow=false) | kivi(bits=4, shadow=false) | host(recent=64)",
]


def submit(drive: Drive, name: str, token_ids: list[int] = TEXT, measured: int = 0, **replay) -> None:
    asked = {"at_tokens": [128, 301, 500], "pipelines": PIPELINES, "horizon_tokens": 32} | replay
    request = generation_pb2.GenerateRequest(
        token_ids=generation_pb2.TokenIds(ids=token_ids), replay=generation_pb2.Replay(**asked)
    )
    drive.engine.submit(job_pb2.Job(job_id=name, request=request), measured=measured)


def replayed(outcome: Outcome) -> list[generation_pb2.Replayed]:
    return [event.replayed for event in outcome.events if event.HasField("replayed")]


@pytest.fixture(scope="module")
def measured() -> list[generation_pb2.Replayed]:
    drive = Drive(tiny_engine())
    submit(drive, "job", measured_under=["full", "window(sinks=4, recent=64)", "kivi(bits=4)"])
    outcome = drive.finish()["job"]
    assert outcome.finished.reason == generation_pb2.FINISH_REASON_MEASURED
    return replayed(outcome)


def test_every_place_and_pipeline_is_there_in_order(measured) -> None:
    assert [place.at_token for place in measured] == [128, 301, 500]
    assert [place.measured_under for place in measured] == ["full", "window(sinks=4, recent=64)", "kivi(bits=4)"]
    assert {place.feature_schema_hash for place in measured} == {SCHEMA_HASH}
    for place in measured:
        assert [entry.pipeline for entry in place.pipelines] == PIPELINES
        assert all(len(entry.features) == len(NAMES) for entry in place.pipelines)


def test_a_prompts_end_is_known_to_the_features() -> None:
    """Just before an answer nothing is generated yet; well before, and in any other text, something is."""
    drive = Drive(tiny_engine())
    submit(drive, "answered", at_tokens=[128, 300, 340], pipelines=["full"], prompt_tokens=300)
    submit(drive, "cut", at_tokens=[128, 280], pipelines=["full"], prompt_tokens=300)  # a short answer: in its horizon
    submit(drive, "text", at_tokens=[128, 300], pipelines=["full"])
    found = drive.finish()
    share, distinct = NAMES.index("generated_share"), NAMES.index("prompt_distinct_share")
    rows = {name: [place.pipelines[0].features for place in replayed(found[name])] for name in found}
    assert [row[share] for row in rows["answered"]] == pytest.approx([16 / 128, 0, 40 / 340])
    assert [row[share] for row in rows["cut"]] == [16 / 128, 0]
    assert [row[share] for row in rows["text"]] == pytest.approx([16 / 128, (300 - 112) / 300])
    expected = [prompt_statistics(TEXT[:tokens]).distinct_share for tokens in (112, 300, 300)]
    assert [row[distinct] for row in rows["answered"]] == pytest.approx(expected)


@pytest.mark.parametrize(("said", "told"), [({}, 1.0), ({"turns": 4}, 4.0)])
def test_the_turns_of_a_conversation_are_among_the_features(said: dict[str, int], told: float) -> None:
    drive = Drive(tiny_engine())
    submit(drive, "job", at_tokens=[128], pipelines=["full"], **said)
    (place,) = replayed(drive.finish()["job"])
    assert place.pipelines[0].features[NAMES.index("turns")] == told


def test_exact_pipelines_lose_nothing_and_lossy_ones_something(measured) -> None:
    for place in measured:
        losses = {entry.pipeline: entry.divergence for entry in place.pipelines}
        assert losses["full"] == losses["host(recent=64)"] == 0
        assert 0 < losses["int8"] < losses["kivi(bits=4)"]
        assert all(loss > 0 for pipeline, loss in losses.items() if pipeline not in ("full", "host(recent=64)"))
        for entry in place.pipelines:
            assert entry.divergence <= entry.divergence_max
            assert 0 <= entry.top1_agreement <= 1
            assert entry.full_loss == place.pipelines[0].loss > 0


def test_a_divergence_is_that_of_the_models_own_distributions(measured) -> None:
    """The window's, computed another way: transformers' own attention under a mask that hides what was evicted."""
    model = tiny_model(attention="eager")
    for place in measured:
        entry = next(entry for entry in place.pipelines if entry.pipeline.startswith("window"))
        at, tokens = place.at_token, torch.tensor([TEXT[: place.at_token + 32]])
        causal = torch.ones(at + 32, at + 32, dtype=torch.bool).tril()
        hidden = causal.clone()
        hidden[at:, 4 : at - 64] = False
        found = []
        for seen in (causal, hidden):
            mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[None, None]
            with torch.inference_mode():
                logits = model(tokens, attention_mask=mask).logits[0, at:]
            found.append(torch.log_softmax(logits.double(), dim=-1))
        exact, lossy = found
        expected = (exact.exp() * (exact - lossy)).sum(-1)
        assert entry.divergence == pytest.approx(float(expected.mean()), rel=1e-3)
        assert entry.divergence_max == pytest.approx(float(expected.max()), rel=1e-3)
        following = tokens[0, at + 1 :, None]
        assert entry.loss == pytest.approx(float(-lossy[:-1].gather(1, following).mean()), rel=1e-4)
        assert entry.full_loss == pytest.approx(float(-exact[:-1].gather(1, following).mean()), rel=1e-4)


@pytest.mark.parametrize(
    "pipeline",
    [
        "kivi(bits=4)",
        "h2o(keep=0.25)",
        "snapkv(keep=0.5) | int8 | host(recent=64)",
        "snapkv(keep=0.43, budgets=ada)",  # heads of other lengths, whose last blocks hold what nobody wrote
        "h2o(keep=0.37, budgets=pyramid) | kivi(bits=4)",
        "fastgen | turboquant",
    ],
)
def test_scoring_equals_decoding_token_by_token(pipeline: str) -> None:
    engine = tiny_engine()
    cache, runner = engine.cache, engine._runner
    base = cache.open(400)
    cache.reserve(base, 320)
    runner.prefill(base, TEXT[:320], 320, all_queries=True)
    fork = cache.fork(base)
    cache.apply(fork, build(pipeline, engine.shape), Occasion.SWITCH)
    for start in (320, 340):  # behind what the switch built, and behind what was generated since
        ids = TEXT[start : start + 20]
        scored = runner.score(cache.context(fork), fork.seen, ids)
        decoded = []
        for token in ids:
            cache.reserve(fork, 1)
            decoded.append(runner.decode([fork], [token])[0][0])
        assert torch.allclose(scored, torch.stack(decoded), atol=2e-4, rtol=1e-4)


def test_bytes_are_those_after_the_switch(measured) -> None:
    for place in measured:
        cache = {entry.pipeline: entry.cache for entry in place.pipelines}
        full = cache["full"].device_bytes
        assert all(entry.cache.full_cache_bytes == cache["full"].full_cache_bytes for entry in place.pipelines)
        assert cache["kivi(bits=4)"].device_bytes < cache["int8"].device_bytes < full
        assert cache["host(recent=64)"].device_bytes < full
        assert cache["kivi(bits=4)"].shadow_bytes > 0
        assert cache[PIPELINES[-1]].shadow_bytes == 0 < cache[PIPELINES[-1]].host_bytes


def test_the_signals_are_those_of_a_request_at_that_place() -> None:
    """A request that generates what the text says is reported with the same features."""
    engine = tiny_engine(report_interval_tokens=16)
    drive = Drive(engine)
    drive.submit("request", TEXT[:300], 100, pipeline="full")
    answer = drive.finish()["request"].token_ids
    state = next(
        state
        for report in drive.reports
        for state in report.requests
        if state.generated_tokens >= 16 and state.signals.steps
    )
    at = 300 + state.generated_tokens
    text = TEXT[:300] + answer
    submit(drive, "replay", text, at_tokens=[at - 1], pipelines=["window(sinks=4, recent=64)"])
    place = replayed(drive.finish()["replay"])[0]
    seen = dict(zip(NAMES, place.pipelines[0].features, strict=True))
    row = dict(zip(NAMES, engine._replayer._features.rows(state, ["window(sinks=4, recent=64)"])[0], strict=True))
    for name in (
        "sink_mass",
        "attention_entropy",
        "far_mass_64",
        "mass_beyond",
        "far_mass_depth1_64",
        "missed_votes_25",
    ):
        assert seen[name] == pytest.approx(row[name], abs=0.05)
    assert seen["log2_seen"] == pytest.approx(math.log2(at - 1))
    assert not any(math.isnan(seen[name]) for name in NAMES if name != "audited_log_divergence")


# -- what the signals are measured from --------------------------------------------------------------------------------

PLACES = list(range(100, 560, 16))
"""Half of them with a block's end among the steps of the signals."""
APART = [112, 200, 312, 420, 500]
"""Some, too, and at least an observation window of votes between one and the signals of the next."""


def columns(place: generation_pb2.Replayed) -> dict[str, float]:
    return dict(zip(NAMES, place.pipelines[0].features, strict=True))


def watched(pipeline: str, places: list[int] = PLACES, **settings) -> list[dict[str, float]]:
    """The features at each of the places, measured under a pipeline."""
    drive = Drive(tiny_engine(**settings))
    submit(drive, "job", at_tokens=places, pipelines=["full"], measured_under=[pipeline] * len(places))
    return [columns(place) for place in replayed(drive.finish()["job"])]


@dataclass
class Watched:
    """A place's signal steps, decoded by hand, each cache for itself."""

    before: Look
    after: Look
    divergence: float
    """Mean over the steps, from transformers' distributions."""


def watch(at: int, pipeline: str) -> Watched:
    engine = tiny_engine()
    cache, runner = engine.cache, engine._runner
    built = build(pipeline, engine.shape)
    seq = cache.open(600)
    cache.reserve(seq, at - 16)
    runner.prefill(seq, TEXT[: at - 16], at - 16, all_queries=True)
    cache.apply(seq, built, Occasion.SWITCH)
    before, decoded = Look.at(cache.tables, seq.slot, seq.seen), []
    for token in TEXT[at - 16 : at]:
        cache.reserve(seq, 1)
        decoded.append(runner.decode([seq], [token])[0][0])
        if seq.seen % 32 == 0:
            cache.apply(seq, built, Occasion.SETTLE)
    with torch.inference_mode():
        exact = tiny_model(attention="sdpa")(torch.tensor([TEXT[:at]])).logits[0, at - 16 :]
    exact, lossy = (torch.log_softmax(rows.double(), dim=-1) for rows in (exact, torch.stack(decoded)))
    divergence = float((exact.exp() * (exact - lossy)).sum(-1).mean())
    return Watched(before, Look.at(cache.tables, seq.slot, seq.seen), divergence)


@pytest.mark.parametrize("pipeline", ["kivi(bits=4)", "window(sinks=4, recent=64)"])
def test_about_half_of_the_places_under_a_lossy_pipeline_have_an_audit(pipeline: str) -> None:
    """The mean divergence of the steps before them: that of the pipeline's path from the full cache's."""
    found = [columns["audited_log_divergence"] for columns in watched(pipeline)]
    audited = {at: value for at, value in zip(PLACES, found, strict=True) if not math.isnan(value)}
    assert 0.25 < len(audited) / len(PLACES) < 0.75
    for at, value in list(audited.items())[::4]:
        assert value == pytest.approx(math.log(watch(at, pipeline).divergence), abs=5e-3)


def test_the_same_places_have_the_same_audits_again() -> None:
    """Whatever the worker, the pipeline and the places before."""
    first = watched("kivi(bits=4)")
    audits = [columns["audited_log_divergence"] for columns in first]
    again = [columns["audited_log_divergence"] for columns in watched("kivi(bits=4)", step_tokens=64)]
    assert again == pytest.approx(audits, rel=1e-3, nan_ok=True)
    other = [columns["audited_log_divergence"] for columns in watched("int8")]
    assert [math.isnan(value) for value in other] == [math.isnan(value) for value in audits]
    last = [columns["audited_log_divergence"] for columns in watched("kivi(bits=4)", PLACES[-3:])]
    assert last == pytest.approx(audits[-3:], rel=1e-3, nan_ok=True)


@pytest.mark.parametrize("pipeline", ["full", "host(recent=64)", "kivi(bits=4, shadow=false)"])
def test_exact_and_permanent_pipelines_have_no_audits_here_either(pipeline: str) -> None:
    assert all(math.isnan(columns["audited_log_divergence"]) for columns in watched(pipeline))


@pytest.mark.parametrize("pipeline", ["full", "kivi(bits=4)", "window(sinks=4, recent=64)"])
def test_missed_votes_are_those_of_the_steps_before_the_place(pipeline: str) -> None:
    """Selected as the text is there; over an eviction, which a window makes at each whole block, there are none."""
    found = dict(zip(APART, watched(pipeline, APART), strict=True))
    told = [at for at, columns in found.items() if not math.isnan(columns["missed_votes_50"])]
    assert told == [at for at in APART if pipeline[:6] != "window" or (at - 16) // 32 == at // 32]
    for at in told:
        by_hand = watch(at, pipeline)
        missed = by_hand.before.missed(by_hand.after)
        every = np.array(list(missed.values()))
        for place, percent in enumerate((12, 25, 50, 75)):
            assert found[at][f"missed_votes_{percent}"] == pytest.approx(every[:, place].mean(), abs=1e-4)
            assert found[at][f"missed_votes_max_{percent}"] == pytest.approx(every[:, place].max(), abs=1e-4)
            for layer in (0, 1):
                of_layer = np.mean([missed[layer, head][place] for head in (0, 1)])
                assert found[at][f"missed_votes_depth{layer}_{percent}"] == pytest.approx(of_layer, abs=1e-4)


# -- beside requests ---------------------------------------------------------------------------------------------------


def test_nothing_is_left_behind(measured) -> None:
    engine = tiny_engine()
    drive = Drive(engine)
    submit(drive, "job", measured_under=["int8", "h2o", "full"])
    drive.finish()
    engine.cache.prefixes.drop(1 << 40)
    assert (engine.cache.device.used_bytes, engine.cache.host.used_bytes) == (0, 0)
    assert engine.free_slots() == 8
    assert len(engine.cache._free_slots) == 13


def test_requests_go_first_and_get_the_memory() -> None:
    alone = run(tiny_engine(), {"request": prompt(500, 32)}, 40, pipeline="full")["request"]
    engine = tiny_engine(device_budget_bytes=600 << 10, host_budget_bytes=4 << 20)
    drive = Drive(engine)
    submit(drive, "replay")
    drive.until(lambda: bool(replayed(drive.outcomes.get("replay", Outcome()))))
    assert engine._replayer._open
    drive.submit("request", prompt(500, 32), 40, pipeline="full")
    drive.until(lambda: drive.generated("request") == 40)
    assert drive.outcomes["request"].token_ids == alone.token_ids
    assert len(replayed(drive.outcomes["replay"])) == 1  # it waited, then started over behind what was delivered
    outcome = drive.finish()["replay"]
    assert [place.at_token for place in replayed(outcome)] == [128, 301, 500]


def test_a_second_worker_leaves_out_what_was_delivered(measured) -> None:
    drive = Drive(tiny_engine())
    submit(drive, "job", measured=2, measured_under=["full", "window(sinks=4, recent=64)", "kivi(bits=4)"])
    (place,) = replayed(drive.finish()["job"])
    assert place.at_token == 500
    for again, before in zip(place.pipelines, measured[2].pipelines, strict=True):
        assert again.divergence == pytest.approx(before.divergence, rel=1e-3)


def test_cancel_ends_it() -> None:
    drive = Drive(tiny_engine())
    submit(drive, "job")
    submit(drive, "other")
    drive.until(lambda: bool(replayed(drive.outcomes.get("job", Outcome()))))
    for name in ("other", "job"):
        drive.engine.cancel(name)
    outcomes = drive.finish()
    assert {outcomes[name].finished.reason for name in ("job", "other")} == {generation_pb2.FINISH_REASON_CANCELLED}
    assert drive.engine.cache.host.used_bytes == 0


def test_one_that_does_not_fit_fails_alone() -> None:
    engine = tiny_engine(device_budget_bytes=256 << 10, host_budget_bytes=256 << 10)
    drive = Drive(engine)
    submit(drive, "job")
    drive.submit("request", prompt(50, 33), 10)
    outcomes = drive.finish()
    assert outcomes["job"].finished.reason == generation_pb2.FINISH_REASON_FAILED
    assert outcomes["job"].finished.problem.code == 8
    assert len(outcomes["request"].token_ids) == 10


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"at_tokens": [128, 590]}, "replay.at_tokens"),
        ({"pipelines": ["full", "window(recent=1)"]}, "replay.pipelines[1]"),
        ({"at_tokens": [128], "measured_under": ["squeeze"]}, "replay.measured_under[0]"),
    ],
)
def test_bad_replays_name_the_field(asked: dict, field: str) -> None:
    with pytest.raises(ProblemError) as refused:
        submit(Drive(tiny_engine()), "job", **asked)
    assert [violation.field for violation in refused.value.problem.violations] == [field]


def test_a_fork_goes_its_own_way() -> None:
    engine = tiny_engine()
    cache, runner = engine.cache, engine._runner
    base = cache.open(400)
    cache.reserve(base, 301)
    runner.prefill(base, TEXT[:301], 301, all_queries=False)
    before = runner.score(cache.context(base), base.seen, TEXT[301:320])
    used = cache.device.used_bytes
    forks = [cache.fork(base), cache.fork(base)]
    row_bytes = cache.worst_bytes(1)
    assert cache.device.used_bytes == used + 2 * row_bytes  # only the tails
    cache.apply(forks[0], build("h2o(keep=0.25) | kivi(bits=4)", engine.shape), Occasion.SWITCH)
    for fork in forks:
        cache.reserve(fork, 1)
        runner.decode([fork], [7])
    cache.reserve(base, 1)  # the original may grow
    assert torch.equal(runner.score(cache.context(base), base.seen, TEXT[301:320]), before)
    for fork in forks:
        cache.close(fork)
    assert torch.equal(runner.score(cache.context(base), base.seen, TEXT[301:320]), before)
    assert cache.host.used_bytes == 0
    cache.apply(base, build("kivi(bits=4)", engine.shape), Occasion.SWITCH)  # it owns its blocks again
    assert cache.device.used_bytes < used
    cache.close(base)
    assert cache.device.used_bytes == 0


def test_a_cache_with_a_shadow_is_not_forked() -> None:
    engine = tiny_engine()
    seq = engine.cache.open(200)
    engine.cache.reserve(seq, 128)
    engine._runner.prefill(seq, TEXT[:128], 128, all_queries=False)
    engine.cache.apply(seq, build("kivi(bits=4)", engine.shape), Occasion.SWITCH)
    with pytest.raises(ValueError, match="shadow"):
        engine.cache.fork(seq)


def test_divergences_of_impossible_tokens() -> None:
    certain = torch.log(torch.tensor([[1.0, 0.0]]))
    fair = torch.log(torch.tensor([[0.5, 0.5]]))
    assert divergences(certain, fair).tolist() == pytest.approx([np.log(2)])
    assert divergences(fair, certain).tolist() == [math.inf]
    assert divergences(certain, certain).tolist() == [0.0]


def test_blocks_of_a_fork_are_where_its_pipeline_wants_them() -> None:
    engine = tiny_engine()
    cache = engine.cache
    base = cache.open(400)
    cache.reserve(base, 256)
    engine._runner.prefill(base, TEXT[:256], 256, all_queries=False)
    fork = cache.fork(base)
    cache.apply(fork, build("host(recent=64)", engine.shape), Occasion.SWITCH)
    assert (cache.tables.tier[fork.slot, :, :, :6] == Tier.HOST).all()
    assert (cache.tables.tier[base.slot] == Tier.DEVICE).all()
