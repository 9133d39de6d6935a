"""Attention beside the host's memory: the same up to rounding, and nothing of it stays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.layout import Tier
from kvpilot.v1 import common_pb2, generation_pb2, job_pb2
from tests.tiny import Drive, run, tiny_engine
from tests.workers.test_switch import IDS, check_tables, decoding, logits_now
from workers.errors import FAILED_PRECONDITION, ProblemError

NEAR = "neardata(recent=64)"
PAIRS = (
    (NEAR, "full"),
    (f"kivi(bits=4) | {NEAR}", "kivi(bits=4)"),
    (f"snapkv(keep=0.5) | int8 | {NEAR}", "snapkv(keep=0.5) | int8"),
)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("near", "plain"), PAIRS)
def test_logits_are_the_same_up_to_rounding(near: str, plain: str, backend: str) -> None:
    drive = decoding("", kernel_backend=backend)
    drive.direct("job", plain, epoch=1)
    expected = logits_now(drive, "job")
    drive.direct("job", near, epoch=2)
    got = logits_now(drive, "job")
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(got, torch.zeros_like(got))


def test_the_host_s_part_is_the_near_backend_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its part the logits are others: the device's kernels do not read the host."""
    drive = decoding()
    drive.direct("job", NEAR)
    cache, expected = drive.engine.cache, logits_now(drive, "job")
    attend, asked = cache.near.attend, []

    def nothing(plan, layer, q, scaling):
        found = attend(plan, layer, q, scaling)
        asked.append(layer)
        found.output.zero_(), found.lse.fill_(-torch.inf)
        return found

    monkeypatch.setattr(cache.near, "attend", nothing)
    assert (logits_now(drive, "job") - expected).abs().max() > 0.01
    assert asked == list(range(cache.shape.layers))


def test_tables_are_as_before_after_a_step() -> None:
    drive = decoding(NEAR)
    seq = drive.engine._live["job"].cache
    tier = drive.engine.cache.tables.tier[seq.slot].copy()
    assert (tier == Tier.HOST).any()
    drive.engine.step()
    assert np.array_equal(drive.engine.cache.tables.tier[seq.slot], tier)
    check_tables(drive)


def test_a_switch_back_restores_the_logits_bit_for_bit() -> None:
    drive = decoding()
    before = logits_now(drive, "job")
    drive.direct("job", NEAR, epoch=1)
    ack = drive.direct("job", "full", epoch=2)
    assert torch.equal(logits_now(drive, "job"), before)
    assert ack.applied.after.host_bytes == ack.applied.after.shadow_bytes == 0
    assert not drive.engine._live["job"].cache.readers


def test_no_copy_is_kept_and_nothing_is_lost() -> None:
    drive = decoding(NEAR, tokens=40)
    seq = drive.engine._live["job"].cache
    use = drive.engine.cache.use(seq)
    assert use.shadow_bytes == 0
    assert use.host_bytes > use.device_bytes
    assert not seq.lost


def test_what_it_computed_is_not_published() -> None:
    drive = decoding(NEAR, tokens=40)
    seq = drive.engine._live["job"].cache
    assert seq.exact_tokens == len(IDS)


def test_greedy_tokens_are_full_s() -> None:
    expected = run(tiny_engine(), {"job": IDS}, 48)["job"].token_ids
    assert run(tiny_engine(), {"job": IDS}, 48, pipeline=NEAR)["job"].token_ids == expected


def test_an_exact_request_is_not_moved_there() -> None:
    drive = Drive(tiny_engine())
    request = generation_pb2.GenerateRequest(
        token_ids=generation_pb2.TokenIds(ids=IDS), scenario=common_pb2.SCENARIO_ACCURACY_CRITICAL
    )
    drive.engine.submit(job_pb2.Job(job_id="job", request=request))
    drive.until(lambda: drive.generated("job") >= 3)
    with pytest.raises(ProblemError) as refused:
        drive.direct("job", NEAR)
    assert refused.value.problem.code == FAILED_PRECONDITION
    drive.direct("job", "host(recent=64)", epoch=2)
