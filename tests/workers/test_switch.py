"""Switching pipelines in mid-generation: exactness, reversibility, bytes, neighbours."""

from __future__ import annotations

import itertools

import pytest
import torch

from kernels.layout import Tier
from kvpilot.v1 import common_pb2
from tests.tiny import Drive, Outcome, prompt, reference, run, tiny_engine, tiny_model
from workers.errors import ProblemError

IDS = prompt(301, 3)
LOSSY = ("window(recent=64)", "h2o(keep=0.5)", "snapkv(keep=0.5)", "kivi(bits=4)", "int8", "quest(share=0.3, dense=0)")
COMBINED = (
    "snapkv(keep=0.4) | kivi(bits=4)",
    "h2o(keep=0.5) | int8 | host(recent=64)",
    "kivi(bits=8) | host(recent=32)",
    "snapkv(keep=0.6) | quest(share=0.4, dense=0)",
)
PIPELINES = ("full", "host(recent=64)", *LOSSY, *COMBINED)


@pytest.fixture(scope="module")
def expected() -> list[int]:
    return reference(tiny_model(attention="sdpa"), IDS, 48)


def logits_now(drive: Drive, name: str) -> torch.Tensor:
    """Logits of the next token of a request between two steps, leaving the request as it was."""
    engine = drive.engine
    seq = engine._live[name]
    cache = seq.cache
    seen, length = cache.seen, engine.cache.tables.length[cache.slot].copy()
    mass, votes = engine.cache.tables.mass[cache.slot].copy(), engine.cache.tables.votes[cache.slot].copy()
    engine.cache.reserve(cache, 1)
    logits, _ = engine._runner.decode([cache], [seq.token_ids[-1]])
    cache.seen, engine.cache.tables.length[cache.slot] = seen, length
    engine.cache.tables.mass[cache.slot], engine.cache.tables.votes[cache.slot] = mass, votes
    return logits


def decoding(pipeline: str = "", tokens: int = 10, **settings: object) -> Drive:
    drive = Drive(tiny_engine(**settings))
    drive.submit("job", IDS, 48, pipeline=pipeline)
    drive.until(lambda: drive.generated("job") >= tokens)
    drive.engine._live["job"].pinned = None
    return drive


@pytest.mark.parametrize("pipeline", PIPELINES[1:])
def test_a_switch_and_back_restores_the_logits_bit_for_bit(pipeline: str) -> None:
    drive = decoding()
    before = logits_now(drive, "job")
    drive.direct("job", pipeline, epoch=1)
    between = logits_now(drive, "job")
    ack = drive.direct("job", "full", epoch=2)
    assert torch.equal(logits_now(drive, "job"), before)
    assert torch.equal(between, before) == pipeline.startswith("host")
    assert ack.applied.after.device_bytes == ack.applied.after.full_cache_bytes
    assert ack.applied.after.shadow_bytes == ack.applied.after.host_bytes == 0


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(PIPELINES, 2)))
def test_every_pipeline_switches_to_every_other_and_home(first: str, second: str) -> None:
    drive = decoding(tokens=3)
    before = logits_now(drive, "job")
    for epoch, pipeline in enumerate((first, second, "full"), start=1):
        drive.direct("job", pipeline, epoch=epoch)
        check_tables(drive)
    assert torch.equal(logits_now(drive, "job"), before)
    outcome = drive.finish()["job"]
    assert len(outcome.token_ids) == 48


def check_tables(drive: Drive) -> None:
    """Positions rise, the last token is there, bytes reported are bytes allocated, budgets hold."""
    engine = drive.engine
    for seq in engine._live.values():
        tables, slot = engine.cache.tables, seq.cache.slot
        for layer, head in itertools.product(range(engine.shape.layers), range(engine.shape.kv_heads)):
            positions = tables.position[slot, layer, head, : tables.length[slot, layer, head]]
            assert (positions[1:] > positions[:-1]).all()
            assert positions[-1] == seq.cache.seen - 1
            assert (positions[-32:] == range(seq.cache.seen - 32, seq.cache.seen)).all()
        use = engine.cache.use(seq.cache)
        assert use.device_bytes <= engine.cache.device.used_bytes + tables.address[slot].size * 400
        assert use.host_bytes + use.shadow_bytes <= engine.cache.host.used_bytes
        assert use.peak_device_bytes >= use.device_bytes


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_output_does_not_depend_on_the_chunk_size(pipeline: str) -> None:
    chunks = [run(tiny_engine(step_tokens=n), {"job": IDS}, 48, pipeline=pipeline)["job"] for n in (45, 96, 1000)]
    assert chunks[0].token_ids == chunks[1].token_ids == chunks[2].token_ids


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_output_does_not_depend_on_the_neighbours_pipelines(pipeline: str) -> None:
    def among(neighbour: str) -> Outcome:
        drive = Drive(tiny_engine())
        drive.submit("job", IDS, 48, pipeline=pipeline, top_logprobs=3)
        for n in range(3):
            drive.submit(f"n{n}", prompt(200 + n, n), 48, pipeline=neighbour)
        return drive.finish()["job"]

    mine, theirs = among("full"), among("window(recent=64) | kivi(bits=4)")
    assert mine.tokens == theirs.tokens  # ids and log-probabilities, to the bit


def test_a_trip_to_the_host_and_back_changes_no_token(expected: list[int]) -> None:
    drive = decoding()
    drive.direct("job", "host(recent=32)", epoch=1)
    drive.until(lambda: drive.generated("job") >= 20)
    use = drive.engine.cache.use(drive.engine._live["job"].cache)
    assert use.host_bytes > use.device_bytes
    drive.direct("job", "full", epoch=2)
    assert drive.finish()["job"].token_ids == expected


def test_window_keeps_sinks_and_recent_tokens() -> None:
    drive = decoding("window(sinks=4, recent=64)", tokens=2)
    seq = drive.engine._live["job"]
    tables, slot = drive.engine.cache.tables, seq.cache.slot
    kept = tables.position[slot, 1, 1, : tables.length[slot, 1, 1]].tolist()
    assert kept == [0, 1, 2, 3, *range(301 - 64, 302)]
    drive.until(lambda: drive.generated("job") >= 45)
    kept = tables.position[slot, 1, 1, : tables.length[slot, 1, 1]].tolist()
    assert kept[:5] == [0, 1, 2, 3, 320 - 64]


def test_h2o_keeps_what_a_plain_reference_keeps() -> None:
    drive = decoding("h2o(keep=0.5)", tokens=1)
    model = tiny_model(attention="eager")
    with torch.inference_mode():
        attentions = model(torch.tensor([IDS]), output_attentions=True).attentions
    seq = drive.engine._live["job"]
    tables, slot = drive.engine.cache.tables, seq.cache.slot
    budget, recent = 151, 75  # ceil(301 / 2), half of it
    for layer, head in itertools.product(range(2), range(2)):
        score = attentions[layer][0, 2 * head : 2 * head + 2].sum(dim=(0, 1))
        score[301 - recent :] = torch.inf
        want = sorted(score.topk(budget).indices.tolist())
        assert tables.position[slot, layer, head, : tables.length[slot, layer, head]].tolist() == want


def test_snapkv_keeps_what_a_plain_reference_keeps() -> None:
    drive = decoding("snapkv(keep=0.5)", tokens=1)
    model = tiny_model(attention="eager")
    with torch.inference_mode():
        attentions = model(torch.tensor([IDS]), output_attentions=True).attentions
    seq = drive.engine._live["job"]
    tables, slot = drive.engine.cache.tables, seq.cache.slot
    for layer, head in itertools.product(range(2), range(2)):
        votes = attentions[layer][0, 2 * head : 2 * head + 2, -64:].sum(dim=(0, 1)).tolist()
        pooled = [sum(votes[max(0, t - 2) : t + 3]) / len(votes[max(0, t - 2) : t + 3]) for t in range(301)]
        order = sorted(range(301 - 64), key=lambda t: pooled[t], reverse=True)
        want = sorted([*order[: 151 - 64], *range(301 - 64, 301)])
        got = tables.position[slot, layer, head, : tables.length[slot, layer, head]].tolist()
        assert len(set(got) ^ set(want)) <= 2  # votes are kept in half precision: a tie may fall either way


def test_bytes_of_int4_and_of_the_peak() -> None:
    engine = tiny_engine(max_context_tokens=4096)
    outcome = run(engine, {"job": prompt(1200)}, 40, pipeline="kivi(bits=4)")["job"]
    cache = outcome.finished.cache
    full = run(engine, {"job": prompt(1200, 1)}, 40, pipeline="full")["job"].finished.cache
    assert full.peak_device_bytes == full.full_cache_bytes == cache.full_cache_bytes
    assert cache.peak_device_bytes < full.peak_device_bytes
    assert cache.shadow_bytes > 0
    permanent = run(engine, {"job": prompt(1200, 2)}, 40, pipeline="kivi(bits=4, shadow=false)")["job"].finished.cache
    assert permanent.shadow_bytes == 0


def test_a_stale_epoch_changes_nothing() -> None:
    drive = decoding()
    drive.direct("job", "int8", epoch=3)
    with pytest.raises(ProblemError, match="stale"):
        drive.direct("job", "full", epoch=3)
    assert drive.engine._live["job"].pipeline.text == "int8"


@pytest.mark.parametrize(
    ("directive", "code"),
    [
        ({"name": "ghost", "pipeline": "full"}, 5),
        ({"name": "job", "pipeline": "squeeze"}, 3),
        ({"name": "job", "pipeline": "kivi(bits=3)"}, 3),
        ({"name": "job", "pipeline": "full", "deadline_token": 2}, 4),
    ],
)
def test_bad_directives_are_refused_and_change_nothing(directive: dict, code: int) -> None:
    drive = decoding()
    with pytest.raises(ProblemError) as refused:
        drive.direct(**directive)
    assert refused.value.problem.code == code
    seq = drive.engine._live["job"]
    assert (seq.pipeline.text, seq.epoch, seq.switches) == ("full", 0, [])


def test_a_pinned_request_obeys_the_operator_only() -> None:
    drive = Drive(tiny_engine())
    drive.submit("job", IDS, 48, pipeline="int8")
    drive.until(lambda: drive.generated("job") >= 3)
    with pytest.raises(ProblemError, match="pinned"):
        drive.direct("job", "full", epoch=1)
    drive.direct("job", "full", epoch=1, ordered_by=common_pb2.ORDERER_OPERATOR)
    assert drive.engine._live["job"].pipeline.text == "full"


def test_an_exact_request_refuses_lossy_pipelines() -> None:
    drive = Drive(tiny_engine())
    drive.submit("job", IDS, 48, scenario=common_pb2.SCENARIO_ACCURACY_CRITICAL)
    drive.until(lambda: drive.generated("job") >= 3)
    with pytest.raises(ProblemError, match="exact only"):
        drive.direct("job", "kivi(bits=8)", epoch=1)
    drive.direct("job", "host(recent=32)", epoch=1)


def test_a_switch_without_room_is_refused_and_rolled_back() -> None:
    drive = decoding(host_budget_bytes=64 << 10)
    before, tables = logits_now(drive, "job"), drive.engine.cache.tables
    addresses = tables.address.copy()
    with pytest.raises(ProblemError) as refused:
        drive.direct("job", "kivi(bits=4)", epoch=1)  # its shadow does not fit the host tier
    assert refused.value.problem.code == 8
    assert (tables.address == addresses).all()
    assert drive.engine.cache.host.used_bytes == 0
    assert torch.equal(logits_now(drive, "job"), before)
    drive.direct("job", "kivi(bits=4, shadow=false)", epoch=1)
    assert drive.engine.cache.tables.tier[0].max() == Tier.DEVICE


def test_what_is_lost_for_good_is_said() -> None:
    drive = decoding()
    drive.direct("job", "window(recent=64, shadow=false)", epoch=1)
    drive.direct("job", "full", epoch=2)
    drive.until(lambda: drive.generated("job") >= 40)
    states = [state for report in drive.reports for state in report.requests]
    assert states[-1].loss_class == common_pb2.LOSS_CLASS_PERMANENT
