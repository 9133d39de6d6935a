"""The engine against transformers' generate, on tiny random models."""

from __future__ import annotations

import pytest
import torch

from kvpilot.v1 import common_pb2, generation_pb2
from models.features import SCHEMA_HASH
from tests.tiny import Drive, prompt, reference, run, tiny_engine, tiny_loaded, tiny_model
from workers.errors import ProblemError

PROMPTS = {"short": prompt(5, 1), "block": prompt(64, 2), "long": prompt(301, 3)}


@pytest.fixture(scope="module")
def expected() -> dict[str, list[int]]:
    model = tiny_model(attention="sdpa")
    return {name: reference(model, ids, 40) for name, ids in PROMPTS.items()}


@pytest.mark.parametrize("step_tokens", [7, 32, 100, 1000])
def test_greedy_equals_generate_whatever_the_chunk_size_and_batch(step_tokens: int, expected) -> None:
    outcomes = run(tiny_engine(step_tokens=step_tokens, max_running=4), PROMPTS, max_tokens=40)
    assert {name: outcome.token_ids for name, outcome in outcomes.items()} == expected


def test_tokens_are_out_before_the_step_computes_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(step_tokens=32, max_running=4)
    drive = Drive(engine)
    drive.submit("talking", PROMPTS["short"], max_tokens=40)
    drive.until(lambda: drive.generated("talking") >= 2)
    drive.submit("reading", PROMPTS["long"], max_tokens=2)
    prefill, seen = engine._runner.prefill, []

    def look(*arguments: object) -> torch.Tensor:
        seen.append(drive.generated("talking"))
        return prefill(*arguments)

    monkeypatch.setattr(engine._runner, "prefill", look)
    before = drive.generated("talking")
    drive.until(lambda: len(seen) == 3)
    assert seen == [before + 1, before + 2, before + 3]
    outcomes = drive.finish()
    assert [event.HasField("finished") for event in outcomes["talking"].events].index(True) + 1 == len(
        outcomes["talking"].events
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_backends_agree(backend: str, expected) -> None:
    outcomes = run(tiny_engine(kernel_backend=backend), PROMPTS, max_tokens=40)
    assert {name: outcome.token_ids for name, outcome in outcomes.items()} == expected


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "mistral", "phi3", "gemma", "gpt_neox", "granite", "olmo2"])
def test_serves_architectures_that_use_the_attention_interface(model_type: str) -> None:
    changes = {"head_dim": 16} if model_type in ("qwen3", "mistral", "gemma") else {}
    if model_type == "gpt_neox":
        changes["num_key_value_heads"] = 4  # it has no grouped heads
    if model_type == "mistral":
        changes["sliding_window"] = None
    ids = prompt(70, 4)
    want = reference(tiny_model(model_type, attention="sdpa", **changes), ids, 12)
    got = run(tiny_engine(tiny_loaded(model_type, **changes)), {"job": ids}, max_tokens=12)
    assert got["job"].token_ids == want


def test_a_model_with_sliding_windows_is_refused() -> None:
    from workers.engine.attention import check_servable

    with pytest.raises(ValueError, match="sliding"):
        check_servable(tiny_model("mistral", sliding_window=64).config)
    with pytest.raises(ValueError, match="sliding_attention"):
        check_servable(tiny_model("gemma3_text", head_dim=16).config)


@pytest.fixture(scope="module")
def crowd() -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Six jobs whose caches, about 180 KiB each, do not fit 640 KiB together; and what transformers answers."""
    model, jobs = tiny_model(attention="sdpa"), {f"job{n}": prompt(301, 10 + n) for n in range(6)}
    return jobs, {name: reference(model, ids, 40) for name, ids in jobs.items()}


def test_preemption_changes_no_token(crowd) -> None:
    jobs, expected = crowd
    outcomes = run(tiny_engine(device_budget_bytes=640 << 10, host_budget_bytes=0), jobs, max_tokens=40)
    assert sum(outcome.finished.usage.preemptions for outcome in outcomes.values()) > 0
    assert {name: outcome.token_ids for name, outcome in outcomes.items()} == expected


def test_pressure_moves_blocks_to_the_host_before_it_preempts(crowd) -> None:
    jobs, expected = crowd
    engine = tiny_engine(device_budget_bytes=640 << 10, host_budget_bytes=16 << 20)
    outcomes = run(engine, jobs, max_tokens=40, pipeline="full")
    assert {name: outcome.token_ids for name, outcome in outcomes.items()} == expected
    assert all(outcome.finished.usage.preemptions == 0 for outcome in outcomes.values())
    moved = [switch for outcome in outcomes.values() for switch in outcome.switches]
    assert {switch.ordered_by for switch in moved} == {common_pb2.ORDERER_WORKER}
    assert any("host" in switch.to_pipeline for switch in moved)


def test_without_a_controller_pressure_compresses_what_may_be_lossy(crowd) -> None:
    jobs, _ = crowd
    engine = tiny_engine(device_budget_bytes=640 << 10, host_budget_bytes=16 << 20)
    outcomes = run(engine, jobs, max_tokens=40)
    switches = [switch for outcome in outcomes.values() for switch in outcome.switches]
    assert any("kivi" in switch.to_pipeline for switch in switches)
    engine.steered(True)
    outcomes = run(engine, {f"{name}-2": ids for name, ids in jobs.items()}, max_tokens=40)
    switches = [switch for outcome in outcomes.values() for switch in outcome.switches]
    assert not any("kivi" in switch.to_pipeline for switch in switches)


@pytest.mark.parametrize(("prompt_tokens", "max_tokens"), [(100, 1600), (1400, 300)])
def test_what_is_admitted_fits_whatever_tier_is_the_smaller(prompt_tokens: int, max_tokens: int) -> None:
    """A host tier with less room than the device: it takes what it can, and the two together hold the request."""
    jobs = {"job": prompt(prompt_tokens, 21)}
    engine = tiny_engine(device_budget_bytes=512 << 10, host_budget_bytes=384 << 10)
    outcome = run(engine, jobs, max_tokens, pipeline="full")["job"]
    assert outcome.finished.reason == generation_pb2.FINISH_REASON_LENGTH
    assert outcome.token_ids == run(tiny_engine(), jobs, max_tokens, pipeline="full")["job"].token_ids
    assert outcome.finished.cache.host_bytes > 0


def test_hello_names_the_feature_schema() -> None:
    assert tiny_engine().hello().feature_schema_hash == SCHEMA_HASH


def test_one_request_can_have_all_that_capacity_says() -> None:
    engine = tiny_engine(device_budget_bytes=300 << 10, host_budget_bytes=200 << 10)
    model = engine.hello().model
    most = model.capacity_bytes // model.raw_bytes_per_token
    outcome = run(engine, {"job": prompt(100, 22)}, most - 100, pipeline="full")["job"]
    assert len(outcome.token_ids) == most - 100


@pytest.mark.parametrize("pipeline", ["kivi(bits=4)", "window(sinks=4, recent=512)", "snapkv(keep=0.9) | int8"])
def test_where_no_tier_has_room_for_an_exact_copy_it_is_given_up(pipeline: str) -> None:
    """A lossy request ends well: its client is told that the loss has become permanent."""
    engine = tiny_engine(device_budget_bytes=704 << 10, host_budget_bytes=256 << 10)
    drive = Drive(engine)
    drive.submit("job", prompt(100, 23), 1700, pipeline=pipeline)
    outcome = drive.finish()["job"]
    assert outcome.finished.reason == generation_pb2.FINISH_REASON_LENGTH, outcome.finished.problem.message
    [given_up] = [switch for switch in outcome.switches if "exact copy is given up" in switch.reason]
    assert given_up.ordered_by == common_pb2.ORDERER_WORKER
    assert "shadow=false" in given_up.to_pipeline
    assert given_up.after.shadow_bytes == 0 < given_up.before.shadow_bytes
    last = [state for report in drive.reports for state in report.requests][-1]
    assert last.loss_class == common_pb2.LOSS_CLASS_PERMANENT


def test_nobody_is_preempted_for_anothers_exact_copy() -> None:
    engine = tiny_engine(device_budget_bytes=640 << 10, host_budget_bytes=320 << 10)
    drive = Drive(engine)
    drive.submit("lossy", prompt(700, 24), 600, pipeline="kivi(bits=4)")
    drive.until(lambda: drive.generated("lossy") >= 100)
    drive.submit("exact", prompt(301, 25), 500, pipeline="full")
    outcomes = drive.finish()
    assert all(outcome.finished.usage.preemptions == 0 for outcome in outcomes.values())
    alone = run(tiny_engine(), {"exact": prompt(301, 25)}, 500, pipeline="full")
    assert outcomes["exact"].token_ids == alone["exact"].token_ids


def test_a_prefix_is_computed_once(expected) -> None:
    engine = tiny_engine()
    first = run(engine, {"first": PROMPTS["long"]}, max_tokens=40)["first"]
    second = run(engine, {"second": PROMPTS["long"]}, max_tokens=40)["second"]
    assert first.finished.usage.reused_prompt_tokens == 0
    assert second.finished.usage.reused_prompt_tokens == 288
    assert first.token_ids == second.token_ids == expected["long"]
    follow_up = PROMPTS["long"] + first.token_ids + prompt(9, 5)
    third = run(engine, {"third": follow_up}, max_tokens=4)["third"]
    assert third.finished.usage.reused_prompt_tokens == 320  # the answer's rows too
    assert third.token_ids == reference(tiny_model(attention="sdpa"), follow_up, 4)


def test_nothing_is_left_behind() -> None:
    engine = tiny_engine()
    run(engine, PROMPTS, max_tokens=40, pipeline="h2o(keep=0.5) | kivi(bits=4) | host(recent=64)")
    engine.cache.prefixes.drop(1 << 40)
    assert engine.cache.device.used_bytes == 0
    assert engine.cache.host.used_bytes == 0


def test_sampling_is_a_function_of_the_seed_alone() -> None:
    sampling = {"temperature": 1.0, "top_p": 0.9, "seed": 11}
    alone = run(tiny_engine(), {"job": PROMPTS["block"]}, sampling=sampling)["job"].token_ids
    crowd = run(tiny_engine(step_tokens=40), {"job": PROMPTS["block"], **PROMPTS}, sampling=sampling)["job"].token_ids
    other = run(tiny_engine(), {"job": PROMPTS["block"]}, sampling=sampling | {"seed": 12})["job"].token_ids
    assert alone == crowd != other


def test_a_job_taken_over_goes_on_where_it_was(expected) -> None:
    drive = Drive(tiny_engine())
    drive.submit("job", PROMPTS["block"], 40, emitted=expected["block"][:13])
    outcome = drive.finish()["job"]
    assert expected["block"][:13] + outcome.token_ids == expected["block"]
    assert next(event.tokens for event in outcome.events if event.HasField("tokens")).first_index == 13
    assert outcome.finished.usage.generated_tokens == 40


def test_log_probabilities_are_those_of_the_model() -> None:
    outcome = run(tiny_engine(), {"job": PROMPTS["block"]}, max_tokens=3, top_logprobs=5)["job"]
    model = tiny_model(attention="sdpa")
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPTS["block"] + outcome.token_ids])).logits[0, -4:-1]
    want = torch.log_softmax(logits, dim=-1)
    for row, token in enumerate(outcome.tokens):
        assert token.logprob == pytest.approx(float(want[row, token.id]), abs=1e-4)
        values, ids = want[row].topk(5)
        assert [top.id for top in token.top] == ids.tolist()
        assert [top.logprob for top in token.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_stop_strings_end_the_text_before_them() -> None:
    free = run(tiny_engine(), {"job": PROMPTS["block"]}, max_tokens=30)["job"]
    stop = free.text[10:13]
    held = run(tiny_engine(), {"job": PROMPTS["block"]}, max_tokens=30, sampling={"stop": [stop]})["job"]
    assert held.finished.reason == generation_pb2.FINISH_REASON_STOP_STRING
    assert held.text == free.text[: free.text.index(stop)]


def test_the_end_token_stops_unless_it_is_to_be_ignored() -> None:
    free = run(tiny_engine(), {"job": PROMPTS["block"]}, max_tokens=30)["job"].token_ids
    drive = Drive(tiny_engine())
    drive.submit("job", PROMPTS["block"], 30, sampling={"stop_token_ids": [free[9]]})
    outcome = drive.finish()["job"]
    assert outcome.finished.reason == generation_pb2.FINISH_REASON_STOP_TOKEN
    assert outcome.token_ids == free[: free.index(free[9]) + 1]


def test_cancel_keeps_what_is_there() -> None:
    drive = Drive(tiny_engine())
    drive.submit("job", PROMPTS["block"], 1000)
    drive.until(lambda: drive.generated("job") == 5)
    drive.engine.cancel("job")
    outcome = drive.finish()["job"]
    assert outcome.finished.reason == generation_pb2.FINISH_REASON_CANCELLED
    assert outcome.finished.usage.generated_tokens == 5


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        ({"token_ids": prompt(2048)}, "token_ids"),
        ({"token_ids": [1, 999]}, "token_ids.ids"),
        ({"token_ids": [1], "pipeline": "squeeze"}, "pipeline"),
        ({"token_ids": [1], "pipeline": "window(recent=-1)"}, "pipeline"),
        ({"token_ids": [1], "max_tokens": 5000}, "sampling.max_tokens"),
    ],
)
def test_bad_requests_name_the_field(request_: dict, field: str) -> None:
    drive = Drive(tiny_engine())
    with pytest.raises(ProblemError) as refused:
        drive.submit("job", **request_)
    assert refused.value.problem.code == 3
    assert [violation.field for violation in refused.value.problem.violations] == [field]


def test_a_job_that_can_never_fit_is_refused() -> None:
    drive = Drive(tiny_engine(device_budget_bytes=1 << 19, host_budget_bytes=0))
    with pytest.raises(ProblemError) as refused:
        drive.submit("job", prompt(1500), 200)
    assert refused.value.problem.code == 8
