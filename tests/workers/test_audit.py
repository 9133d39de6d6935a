"""Audits against transformers with a full cache, and that they leave no trace."""

from __future__ import annotations

import copy
import itertools
import zlib

import pytest
import torch

from kernels.layout import BLOCK_TOKENS
from kvpilot.v1 import common_pb2, generation_pb2, policy_pb2
from tests.tiny import VOCABULARY, Drive, Outcome, prompt, tiny_engine, tiny_model
from workers.stages.registry import build

pytestmark = pytest.mark.usefixtures("one_torch_thread")

IDS = prompt(301, 3)
TOKENS = 80
LOSSY = (
    "kivi(bits=4)",
    "window(sinks=4, recent=64)",
    "h2o(keep=0.5)",
    "snapkv(keep=0.4) | kivi(bits=4)",
    "h2o(keep=0.5) | int8 | host(recent=64)",
    "quest(share=0.3, dense=0)",
)
ALWAYS = {"audit_every_tokens": 1, "audit_tokens": 1, "audit_budget": 1e6}


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_model(attention="sdpa")


def audits_of(drive: Drive, name: str = "job") -> list[policy_pb2.Audit]:
    return [
        audit
        for report in drive.reports
        for state in report.requests
        if state.request_id == name
        for audit in state.audits
    ]


def log_probabilities(token: generation_pb2.Token) -> torch.Tensor:
    """A token's whole distribution as its client was told it, float64 [vocabulary]."""
    values = torch.empty(VOCABULARY, dtype=torch.float64)
    for one in token.top:
        values[one.id] = one.logprob
    return values


@torch.inference_mode()
def exact_log_probabilities(model: torch.nn.Module, outcome: Outcome, at_token: int) -> torch.Tensor:
    """What transformers expects there after the same tokens with a full cache, float64 [vocabulary]."""
    text = torch.tensor([[*IDS, *outcome.token_ids[:at_token]]])
    return torch.log_softmax(model(input_ids=text).logits[0, -1].double(), dim=-1)


@pytest.mark.parametrize("pipeline", LOSSY)
@pytest.mark.parametrize("at", [2, 19, 20])  # 301 + 19: a whole number of blocks
def test_the_audit_after_a_switch_is_the_divergence_from_a_full_cache(
    pipeline: str, at: int, model: torch.nn.Module
) -> None:
    """Everything before the switch was computed exactly, so transformers' full cache is the reference."""
    drive = Drive(tiny_engine(**ALWAYS))
    drive.submit("job", IDS, TOKENS, top_logprobs=VOCABULARY)
    drive.until(lambda: drive.generated("job") == at)
    assert drive.engine._reporter.audits == 0  # the full cache has nothing to audit
    drive.direct("job", pipeline)
    outcome = drive.finish()["job"]
    first = audits_of(drive)[0]
    assert first.at_token == at
    assert first.pipeline == build(pipeline, drive.engine.shape).text
    exact, delivered = exact_log_probabilities(model, outcome, at), log_probabilities(outcome.tokens[at])
    assert first.divergence == pytest.approx(float((exact.exp() * (exact - delivered)).sum()), rel=1e-3, abs=1e-6)
    assert first.divergence > 1e-4
    assert bool(first.top1_agreement) == (exact.argmax() == delivered.argmax())
    assert first.cost_ms > 0


@pytest.mark.parametrize("pipeline", LOSSY)
def test_an_audit_of_a_run_is_the_mean_over_its_steps(pipeline: str, model: torch.nn.Module) -> None:
    """32 steps right after a switch, across the eviction of a block: transformers' full cache is the reference."""
    drive = Drive(tiny_engine(audit_every_tokens=32, audit_tokens=32, audit_budget=1e6))
    drive.submit("job", IDS, 80, top_logprobs=VOCABULARY)
    at = -zlib.crc32(b"job") % 32
    drive.until(lambda: drive.generated("job") == at)
    drive.direct("job", pipeline)
    outcome = drive.finish()["job"]
    first = audits_of(drive)[0]
    assert (first.at_token, first.tokens) == (at, 32)
    steps = range(at, at + 32)
    exact = torch.stack([exact_log_probabilities(model, outcome, step) for step in steps])
    delivered = torch.stack([log_probabilities(outcome.tokens[step]) for step in steps])
    expected = (exact.exp() * (exact - delivered)).sum(dim=-1)
    assert first.divergence == pytest.approx(float(expected.mean()), rel=1e-3)
    assert first.divergence_max == pytest.approx(float(expected.max()), rel=1e-3)
    agree = (exact.argmax(dim=-1) == delivered.argmax(dim=-1)).float().mean()
    assert first.top1_agreement == pytest.approx(float(agree))


def test_a_switch_ends_an_audit_without_a_result() -> None:
    drive = Drive(tiny_engine(audit_every_tokens=32, audit_tokens=32, audit_budget=1e6))
    at = -zlib.crc32(b"job") % 32
    drive.submit("job", IDS, 64, pipeline="full")
    drive.until(lambda: drive.generated("job") == at)
    orders = {"ordered_by": common_pb2.ORDERER_OPERATOR}
    drive.direct("job", "kivi(bits=4)", epoch=1, **orders)
    drive.until(lambda: drive.generated("job") == at + 10)
    drive.direct("job", "int8", epoch=2, **orders)
    drive.until(lambda: drive.generated("job") == at + 32)
    assert drive.engine._reporter.audits == 0
    assert drive.engine._reporter.audits_skipped == 1


@pytest.mark.parametrize("pipeline", ["window(sinks=4, recent=2048)", "h2o(keep=1.0)"])
def test_what_loses_nothing_diverges_by_nothing(pipeline: str) -> None:
    drive = Drive(tiny_engine(**ALWAYS))
    drive.submit("job", IDS, TOKENS, pipeline=pipeline)
    drive.finish()
    audits = audits_of(drive)
    assert len(audits) > TOKENS / 2
    assert all(audit.divergence < 1e-6 and audit.top1_agreement == 1 for audit in audits)


def state_of(drive: Drive) -> dict[str, object]:
    """All that a request's cache is, in both tiers' bytes and beside them."""
    cache = drive.engine.cache
    [seq] = drive.engine._live.values()
    assert seq.cache is not None
    tables = {name: copy.copy(values[seq.cache.slot]).tolist() for name, values in vars(cache.tables).items()}
    shadow = seq.cache.shadow
    return {
        "tables": tables,
        "device": cache.device.data.clone().tolist(),
        "host": cache.host.data.clone().tolist(),
        "use": cache.use(seq.cache),
        "shadow": None if shadow is None else (shadow.rows, shadow.address.tolist(), shadow.mass is None),
        "seen": (seq.cache.seen, seq.cache.reserved, seq.cache.evicted, seq.cache.lost),
    }


@pytest.mark.parametrize("pipeline", LOSSY)
def test_audits_leave_no_trace(pipeline: str) -> None:
    small = {"device_budget_bytes": 1 << 20, "host_budget_bytes": 1 << 20}
    drives = [Drive(tiny_engine(**small, **audits)) for audits in (ALWAYS, {"audit_every_tokens": 0})]
    for drive in drives:
        for arena in (drive.engine.cache.device, drive.engine.cache.host):
            arena.data.zero_()  # what was never written is equal, too
        drive.submit("job", IDS, TOKENS, pipeline=pipeline, top_logprobs=5, sampling={"temperature": 1.0, "seed": 5})
    for tokens in (1, 40, TOKENS - 1):
        states = []
        for drive in drives:
            drive.until(lambda drive=drive, tokens=tokens: drive.generated("job") >= tokens)
            states.append(state_of(drive))
        assert states[0] == states[1]
    with_audits, without = (drive.finish()["job"].tokens for drive in drives)
    assert with_audits == without
    assert len(audits_of(drives[0])) > TOKENS / 2
    assert audits_of(drives[1]) == []


@pytest.mark.parametrize(
    "pipeline", ["full", "host(recent=64)", "kivi(bits=4, shadow=false)", "window(recent=64, shadow=false)"]
)
def test_exact_and_permanent_pipelines_are_not_audited(pipeline: str) -> None:
    drive = Drive(tiny_engine(**ALWAYS))
    drive.submit("job", IDS, TOKENS, pipeline=pipeline)
    drive.finish()
    assert audits_of(drive) == []
    assert drive.engine._reporter.audits_skipped == 0


def test_what_was_lost_for_good_is_not_audited() -> None:
    drive = Drive(tiny_engine(**ALWAYS))
    drive.submit("job", IDS, TOKENS)
    drive.until(lambda: drive.generated("job") == 5)
    drive.direct("job", "window(recent=64, shadow=false)", epoch=1)
    drive.direct("job", "kivi(bits=4)", epoch=2)
    drive.finish()
    assert audits_of(drive) == []


def test_requests_are_audited_in_turn_and_the_worker_counts() -> None:
    drive = Drive(tiny_engine(audit_every_tokens=16, audit_tokens=1, audit_budget=1e6, report_interval_tokens=4))
    names = [f"job{n}" for n in range(6)]
    for name in names:
        drive.submit(name, IDS, TOKENS, pipeline="kivi(bits=4)")
    drive.finish()
    places = {name: [audit.at_token for audit in audits_of(drive, name)] for name in names}
    for at in places.values():
        assert at == list(range(at[0], at[0] + 16 * len(at), 16))
        assert at[0] <= 16
        assert len(at) >= TOKENS // 16 - 1
    assert len({at[0] for at in places.values()}) > 1
    state = drive.reports[-1].worker
    assert state.audits >= sum(map(len, places.values()))
    assert state.audits_skipped == 0
    assert state.audit_ms >= sum(audit.cost_ms for name in names for audit in audits_of(drive, name))


@pytest.mark.parametrize(("budget", "audits"), [(0.0, 0), (0.05, 10), (0.5, 100)])
def test_the_budget_is_kept(budget: float, audits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by 1/1024 s whenever somebody looks, exactly: so long take decode steps and audits."""
    clock = itertools.count()
    monkeypatch.setattr("workers.engine.audit.time.monotonic", lambda: next(clock) / 1024)
    drive = Drive(tiny_engine(audit_every_tokens=1, audit_tokens=1, audit_budget=budget))
    auditor, decoded = drive.engine._auditor, drive.engine._auditor.decoded
    monkeypatch.setattr(auditor, "decoded", lambda sequences, logits, _: decoded(sequences, logits, 1e3 / 1024))
    drive.submit("job", IDS, 201, pipeline="kivi(bits=4)")
    drive.finish()
    reporter = drive.engine._reporter
    assert reporter.audits == audits
    assert reporter.audits + reporter.audits_skipped == 200  # the first token comes from the prompt's pass


@pytest.mark.parametrize("pipeline", LOSSY)
def test_the_exact_context_is_what_was_computed(pipeline: str) -> None:
    """Bit by bit, at every step of two blocks: the prompt's is a full cache's, a generated token's what it was when it
    came, raw and on the device."""
    lossy, full = Drive(tiny_engine()), Drive(tiny_engine())
    for drive, one in ((lossy, pipeline), (full, "full")):
        drive.submit("job", IDS, TOKENS, pipeline=one)
        drive.until(lambda drive=drive: drive.generated("job") >= 1)
    prompt_context = full.engine.cache.context(full.engine._live["job"].cache)
    want = [prompt_context.read(layer) for layer in range(full.engine.shape.layers)]
    cache, seq = lossy.engine.cache, lossy.engine._live["job"].cache
    for _ in range(2 * BLOCK_TOKENS):
        context = cache.exact_context(seq, seq.seen)
        got = [context.read(layer) for layer in range(len(want))]
        for now, before in zip(got, want, strict=True):
            for part in (0, 1):
                assert now[part].shape[1] == context.tokens == seq.seen
                assert torch.equal(now[part][:, : before[part].shape[1]], before[part])
        assert torch.equal(cache.exact_context(seq, 5).read(1)[0], got[1][0][:, :5])
        want = got
        lossy.engine.step()
