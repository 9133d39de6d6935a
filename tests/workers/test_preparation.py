"""Switches that are prepared over several decode steps: the same result, nothing seen before, nothing left behind."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import pytest
import torch

from kernels.layout import BLOCK_TOKENS, Format
from kvpilot.v1 import policy_pb2
from tests.tiny import Drive, prompt, reference, tiny_engine, tiny_model
from tests.workers.test_switch import IDS, check_tables, decoding, logits_now
from workers.cache.arena import TierFullError
from workers.cache.sequence_cache import Occasion
from workers.errors import (
    DEADLINE_EXCEEDED,
    FAILED_PRECONDITION,
    INVALID_ARGUMENT,
    NOT_FOUND,
    RESOURCE_EXHAUSTED,
    ProblemError,
)
from workers.stages.registry import build

SLICED = {"switch_step_share": 0, "switch_least_blocks": 8}
"""Every slice has 8 blocks, of the 36 that the requests here have in full: nothing is done at once."""
PREPARED = (
    ("full", "int8"),
    ("full", "kivi(bits=4)"),
    ("full", "kivi(bits=4, shadow=false)"),
    ("full", "host(recent=64)"),
    ("full", "int8 | host(recent=64)"),
    ("full", "snapkv(keep=0.5) | kivi(bits=4)"),
    ("int8", "full"),
    ("kivi(bits=4)", "full"),
    ("kivi(bits=4)", "int8"),
    ("kivi(bits=4)", "kivi(bits=8, shadow=false)"),
    ("host(recent=64)", "full"),
    ("int8 | host(recent=64)", "full"),
)


def order(drive: Drive, pipeline: str, epoch: int = 1, name: str = "job", **directive) -> Future[policy_pb2.Ack]:
    """A directive for a request, whose preparation has begun if it needs one."""
    return drive.order(name, pipeline, epoch, **directive)


def refusal(answer: Future[policy_pb2.Ack]) -> int:
    error = answer.exception(timeout=0)
    assert isinstance(error, ProblemError)
    return error.problem.code


def snapshot(drive: Drive, name: str = "job") -> dict[str, object]:
    """All that a request's cache is made of but for where in memory it lies."""
    cache, seq = drive.engine.cache, drive.engine._live[name].cache
    tables, use = cache.tables, cache.use(seq)
    length = tables.length[seq.slot]
    tokens = np.arange(tables.position.shape[-1]) < length[..., None]
    blocks = np.arange(tables.format.shape[-1]) < -(-length // BLOCK_TOKENS)[..., None]
    context = cache.context(seq)
    return {
        "length": length.tolist(),
        **{key: getattr(tables, key)[seq.slot][tokens].tolist() for key in ("position", "mass", "votes")},
        **{key: getattr(tables, key)[seq.slot][blocks].tolist() for key in ("format", "tier")},
        "bytes": (use.device_bytes, use.host_bytes, use.shadow_bytes),
        "used": (cache.device.used_bytes, cache.host.used_bytes),
        "kept": [
            [(k[head, :kept].tolist(), v[head, :kept].tolist()) for head, kept in enumerate(length[layer])]
            for layer, (k, v) in enumerate(map(context.read, range(len(length))))
        ],
    }


def memory(drive: Drive) -> tuple[object, ...]:
    cache = drive.engine.cache
    return cache.device.used_bytes, cache.host.used_bytes, cache.tables.address.copy().tolist()


@pytest.mark.parametrize(("first", "second"), PREPARED)
def test_a_prepared_switch_gives_what_one_made_at_once_gives(first: str, second: str) -> None:
    drive = decoding(first, **SLICED)
    answer = order(drive, second)
    assert not answer.done()
    drive.until(answer.done)
    ack = answer.result(timeout=0)
    assert ack.applied.at_token > 12
    assert ack.applied.stall_ms > 0
    assert (ack.epoch, drive.engine._live["job"].pipeline.text) == (1, second)
    at_once = decoding(first, tokens=ack.applied.at_token)
    assert order(at_once, second).done()
    at_once.engine.step()  # the step that committed the other also decoded
    assert snapshot(drive) == snapshot(at_once)
    assert torch.equal(logits_now(drive, "job"), logits_now(at_once, "job"))
    check_tables(drive)
    assert drive.finish()["job"].token_ids == at_once.finish()["job"].token_ids


@pytest.mark.parametrize("pipeline", ["int8", "kivi(bits=4)", "host(recent=64)"])
def test_there_and_back_restores_the_logits_bit_for_bit(pipeline: str) -> None:
    drive, never = decoding(**SLICED), decoding()
    for epoch, wanted in enumerate((pipeline, "full"), start=1):
        answer = order(drive, wanted, epoch)
        drive.until(answer.done)
        assert answer.result(timeout=0).applied.to_pipeline == wanted
    seq = drive.engine._live["job"]
    never.until(lambda: never.generated("job") == seq.generated)
    if pipeline.startswith("host"):  # the tokens of the others were decoded from rounded blocks in between
        assert snapshot(drive)["kept"] == snapshot(never)["kept"]
        assert torch.equal(logits_now(drive, "job"), logits_now(never, "job"))
    assert torch.equal(prompt_keys(drive), prompt_keys(never))


def prompt_keys(drive: Drive) -> torch.Tensor:
    """[layers, kv_heads, prompt, head_dim] keys of the prompt's tokens in a full cache."""
    context = drive.engine.cache.context(drive.engine._live["job"].cache)
    return torch.stack([context.read(layer)[0][:, : len(IDS)] for layer in range(2)])


def test_nothing_is_seen_of_it_before_the_commit() -> None:
    drive = decoding(**SLICED)
    expected = reference(tiny_model(attention="sdpa"), IDS, 48)
    answer = order(drive, "kivi(bits=4)")
    seq = drive.engine._live["job"]
    while not answer.done():
        before = (seq.pipeline.text, seq.epoch, len(seq.switches))
        assert before == ("full", 0, 0)
        assert not drive.engine.cache.tables.format[seq.cache.slot].any()
        drive.engine.step()
    at_token = answer.result(timeout=0).applied.at_token
    assert drive.outcomes["job"].token_ids[:at_token] == expected[:at_token]
    [switch] = drive.outcomes["job"].switches
    assert (switch.at_token, switch.to_pipeline) == (at_token, "kivi(bits=4)")


def test_bytes_built_ahead_count() -> None:
    drive = decoding(**SLICED)
    cache, seq = drive.engine.cache, drive.engine._live["job"].cache
    before = cache.use(seq)
    cache.begin(seq, build("int8 | host(recent=64)", drive.engine.shape))
    left = cache.left_to_prepare(seq)
    assert cache.use(seq) == before
    while cache.prepare(seq, lambda tier, fmt: 8):
        pass
    use, sizes = cache.use(seq), drive.engine.shape.block_bytes
    on_device, on_host = (sum(n for (tier, fmt), n in left.items() if fmt and tier == which) for which in range(2))
    assert use.device_bytes == before.device_bytes + on_device * sizes(Format.INT8)
    assert use.host_bytes == on_host * sizes(Format.INT8) > 0
    assert use.shadow_bytes == 9 * 4 * sizes(Format.RAW)
    assert use.peak_device_bytes >= use.device_bytes
    assert not cache.left_to_prepare(seq)


@pytest.mark.parametrize(("first", "second"), PREPARED)
def test_abandoned_at_any_stage_it_leaves_no_byte(first: str, second: str) -> None:
    drive = decoding(first)
    cache, seq = drive.engine.cache, drive.engine._live["job"].cache
    before, snap, logits = memory(drive), snapshot(drive), logits_now(drive, "job")
    stages, whole = 0, False
    while not whole:
        cache.begin(seq, build(second, drive.engine.shape))
        slices = [cache.prepare(seq, lambda tier, fmt: 8) for _ in range(stages)]
        whole = None in slices
        cache.abandon(seq)
        assert memory(drive) == before
        assert snapshot(drive) == snap
        stages += 1
    assert stages > 2
    assert torch.equal(logits_now(drive, "job"), logits)


@pytest.mark.parametrize("other", ["window(recent=64)", "full", "int8"])
def test_another_switch_takes_nothing_from_a_preparation(other: str) -> None:
    drive, plain = decoding(), decoding()
    cache, seq = drive.engine.cache, drive.engine._live["job"].cache
    cache.begin(seq, build("kivi(bits=4)", drive.engine.shape))
    for _ in range(7):
        cache.prepare(seq, lambda tier, fmt: 8)
    for each in (drive, plain):
        each.direct("job", other)
    assert seq.preparation is None
    assert snapshot(drive) == snapshot(plain)


@pytest.mark.parametrize("occasion", [Occasion.SETTLE, Occasion.PROMPT])
def test_settling_ends_a_preparation(occasion: Occasion) -> None:
    drive = decoding()
    cache, seq = drive.engine.cache, drive.engine._live["job"].cache
    before, pipeline = memory(drive), build("int8", drive.engine.shape)
    cache.begin(seq, pipeline)
    cache.prepare(seq, lambda tier, fmt: 8)
    cache.apply(seq, build("full", drive.engine.shape), occasion)
    assert seq.preparation is None
    assert memory(drive) == before


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_a_request_that_is_cancelled_takes_its_preparation_along(steps: int) -> None:
    drive = decoding(**SLICED)
    answer = order(drive, "int8")
    for _ in range(steps):
        drive.engine.step()
    drive.engine.cancel("job")
    drive.engine.step()
    assert refusal(answer) == NOT_FOUND
    check_all_is_free(drive)


def check_all_is_free(drive: Drive) -> None:
    cache = drive.engine.cache
    assert cache.device.used_bytes == cache.prefixes.unused_bytes()
    assert cache.host.used_bytes == 0


def test_a_request_that_finishes_takes_its_preparation_along() -> None:
    drive = decoding(tokens=44, **SLICED)
    answer = order(drive, "int8")
    drive.finish()
    assert refusal(answer) == NOT_FOUND
    check_all_is_free(drive)
    assert drive.outcomes["job"].finished.pipeline == "full"


def test_a_preempted_request_begins_again_with_the_new_pipeline() -> None:
    drive = decoding(**SLICED)
    answer = order(drive, "host(recent=64)")
    for _ in range(3):
        drive.engine.step()
    drive.engine._scheduler.preempt(drive.engine._live["job"])
    check_all_is_free(drive)
    drive.engine.step()
    assert answer.result(timeout=0).applied.to_pipeline == "host(recent=64)"
    outcome = drive.finish()["job"]
    assert outcome.token_ids == reference(tiny_model(attention="sdpa"), IDS, 48)
    assert outcome.finished.pipeline == "host(recent=64)"


def test_a_newer_directive_replaces_an_older_one() -> None:
    drive = decoding(**SLICED)
    older = order(drive, "kivi(bits=4)", epoch=3)
    for _ in range(7):
        drive.engine.step()
    newer = order(drive, "int8", epoch=4)
    assert refusal(older) == FAILED_PRECONDITION
    assert "superseded by epoch 4" in str(older.exception())
    drive.until(newer.done)
    ack = newer.result(timeout=0)
    assert (ack.epoch, ack.applied.from_pipeline, ack.applied.to_pipeline) == (4, "full", "int8")
    assert ack.applied.before.shadow_bytes == 0
    at_once = decoding(tokens=ack.applied.at_token)
    at_once.direct("job", "int8")
    at_once.engine.step()
    assert snapshot(drive) == snapshot(at_once)


def test_back_to_the_pipeline_in_force_ends_a_preparation_at_once() -> None:
    drive = decoding(**SLICED)
    before = memory(drive)[:2]
    older = order(drive, "kivi(bits=4)", epoch=1)
    drive.engine.step()
    newer = order(drive, "full", epoch=2)
    assert refusal(older) == FAILED_PRECONDITION
    assert newer.result(timeout=0).applied.to_pipeline == "full"
    assert memory(drive)[:2] == before


@pytest.mark.parametrize(
    ("directive", "code"),
    [
        ({"pipeline": "full", "epoch": 3}, FAILED_PRECONDITION),
        ({"pipeline": "squeeze", "epoch": 4}, INVALID_ARGUMENT),
        ({"pipeline": "full", "epoch": 4, "deadline_token": 2}, DEADLINE_EXCEEDED),
    ],
)
def test_a_bad_directive_does_not_disturb_a_preparation(directive: dict, code: int) -> None:
    drive = decoding(**SLICED)
    answer = order(drive, "int8", epoch=3)
    drive.engine.step()
    assert refusal(order(drive, **directive)) == code
    drive.until(answer.done)
    assert answer.result(timeout=0).epoch == 3


def test_a_deadline_that_passes_meanwhile_refuses_it() -> None:
    drive = decoding(tokens=10, **SLICED)
    before = memory(drive)[:2]
    answer = order(drive, "int8", deadline_token=14)
    drive.until(answer.done)
    assert refusal(answer) == DEADLINE_EXCEEDED
    assert drive.generated("job") == 16  # the step that came too late decoded as well
    assert drive.engine._live["job"].epoch == 0
    assert memory(drive)[:2] == before
    in_time = order(drive, "int8", deadline_token=40)
    drive.until(in_time.done)
    assert in_time.result(timeout=0).applied.at_token <= 40


def test_no_room_for_an_exact_copy_is_refused_and_rolled_back() -> None:
    drive = decoding(host_budget_bytes=64 << 10, **SLICED)
    before, snap = memory(drive), snapshot(drive)
    answer = order(drive, "kivi(bits=4)")
    while not answer.done():
        drive.engine._switching.advance()
    assert refusal(answer) == RESOURCE_EXHAUSTED
    assert memory(drive) == before
    assert snapshot(drive) == snap


def built_ahead(drive: Drive, answer: Future[policy_pb2.Ack]) -> int:
    """How many blocks a switch had when it was committed, without a step in between."""
    built = 0
    while not answer.done():
        preparation = drive.engine._live["job"].cache.preparation
        built = preparation.built
        drive.engine._switching.advance()
    return max(built, preparation.built)


def test_without_room_beside_the_old_blocks_it_is_made_at_once() -> None:
    drive = decoding(device_budget_bytes=12 * (16 << 10), **SLICED)
    cache = drive.engine.cache
    assert cache.device.free_bytes < 3 * cache.device.page_bytes  # that is what int8 blocks take
    answer = order(drive, "int8")
    assert 0 < built_ahead(drive, answer) < 32
    assert answer.result(timeout=0).applied.to_pipeline == "int8"
    at_once = decoding()
    at_once.direct("job", "int8")
    assert snapshot(drive)["kept"] == snapshot(at_once)["kept"]


def test_prefixes_that_nobody_uses_make_room_for_it() -> None:
    drive = Drive(tiny_engine(device_budget_bytes=21 * (16 << 10), **SLICED))
    drive.submit("earlier", prompt(301, 9), 4)
    drive.finish()
    drive.submit("job", IDS, 48)
    drive.until(lambda: drive.generated("job") >= 10)
    assert len(drive.engine.cache.prefixes) == 18
    assert drive.engine.cache.device.free_bytes < 3 * drive.engine.cache.device.page_bytes
    answer = order(drive, "int8")
    assert built_ahead(drive, answer) == 32
    assert answer.result(timeout=0).applied.to_pipeline == "int8"


def test_who_needs_its_memory_has_it_ended_at_once() -> None:
    drive = decoding(**SLICED)
    answer = order(drive, "int8")
    for _ in range(7):
        drive.engine.step()
    assert not answer.done()
    assert drive.engine._memory._relieve(1)
    assert answer.result(timeout=0).applied.to_pipeline == "int8"
    check_tables(drive)


def test_a_published_prompt_stays_as_it_is() -> None:
    """One of two requests that share blocks is prepared and switched; the other's are never touched."""
    drive = Drive(tiny_engine(**SLICED))
    for name in ("job", "other"):
        drive.submit(name, IDS, 48)
        drive.until(lambda name=name: drive.generated(name) >= 3)
    assert drive.engine._live["other"].reused_prompt_tokens == 288
    rows = len(drive.engine.cache.prefixes)
    answer = order(drive, "int8")
    drive.until(answer.done)
    order(drive, "full", epoch=2)
    drive.engine.step()
    drive.engine.cancel("job")
    assert drive.finish()["other"].token_ids == reference(tiny_model(attention="sdpa"), IDS, 48)
    assert len(drive.engine.cache.prefixes) >= rows
    check_all_is_free(drive)


def test_one_is_prepared_at_a_time() -> None:
    drive = Drive(tiny_engine(**SLICED))
    for name in ("first", "second"):
        drive.submit(name, prompt(301, len(name)), 100)
    drive.until(lambda: drive.generated("second") >= 3)
    answers = [order(drive, "int8", name=name) for name in ("first", "second")]
    seen: list[tuple[int, int]] = []
    while not all(answer.done() for answer in answers):
        drive.engine.step()
        preparations = [drive.engine._live[name].cache.preparation for name in ("first", "second")]
        seen.append(tuple(one.built if one else 0 for one in preparations))
        check_tables(drive)
    assert not any(first and second for first, second in seen)
    assert any(first for first, _ in seen)
    first, second = (answer.result(timeout=0).applied.at_token for answer in answers)
    assert first < second


def test_a_request_that_waits_for_its_turn_settles_as_usual() -> None:
    drive = Drive(tiny_engine(**SLICED))
    for name in ("first", "second"):
        drive.submit(name, prompt(301, len(name)), 100, pipeline="int8" if name == "second" else "full")
    drive.until(lambda: drive.generated("second") >= 15)
    for name in ("first", "second"):
        drive.engine._live[name].pinned = None
    order(drive, "kivi(bits=4)", name="first")
    waiting = order(drive, "full", name="second")
    tables, slot = drive.engine.cache.tables, drive.engine._live["second"].cache.slot
    coded = int((tables.format[slot] == Format.INT8).sum())
    drive.until(lambda: drive.engine._live["second"].cache.seen == 320)
    assert not waiting.done()
    assert int((tables.format[slot, ..., :10] == Format.INT8).sum()) == coded + 4
    drive.until(waiting.done)
    assert not tables.format[slot, ..., :10].any()


def test_a_failure_while_preparing_is_answered_and_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    drive = decoding(**SLICED)
    answer = order(drive, "int8")
    for _ in range(7):
        drive.engine.step()

    def fail(*arguments: object) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(drive.engine.cache.backend, "transcode", fail)
    drive.engine.step()
    assert isinstance(answer.exception(timeout=0), RuntimeError)
    assert drive.engine._live["job"].cache.preparation is None
    assert (drive.engine.cache.device.used_bytes, drive.engine.cache.host.used_bytes) == (10 * (16 << 10), 0)


def test_a_cache_that_is_being_prepared_is_not_forked() -> None:
    drive = decoding()
    cache, seq = drive.engine.cache, drive.engine._live["job"].cache
    cache.begin(seq, build("host(recent=64)", drive.engine.shape))
    with pytest.raises(ValueError, match="prepared"):
        cache.fork(seq)
    cache.abandon(seq)
    cache.close(cache.fork(seq))


def test_a_lack_of_room_in_a_slice_leaves_what_was_built() -> None:
    drive = decoding(host_budget_bytes=64 << 10)
    cache, seq = drive.engine.cache, drive.engine._live["job"].cache
    cache.begin(seq, build("host(recent=64)", drive.engine.shape))
    for _ in range(2):
        cache.prepare(seq, lambda tier, fmt: 8)
    with pytest.raises(TierFullError):
        cache.prepare(seq, lambda tier, fmt: 8)
    assert seq.preparation.built == 16
    cache.abandon(seq)
    assert cache.host.used_bytes == 0


def test_a_directive_whose_stream_is_lost_before_it_is_begun_is_left_alone() -> None:
    drive = decoding()
    answer = drive.engine.direct(policy_pb2.Directive(nonce="n", epoch=1, request_id="job", pipeline="int8"))
    assert answer.cancel()
    drive.engine.step()
    assert drive.engine._live["job"].epoch == 0
    begun = order(drive, "int8")
    assert not begun.cancel()
