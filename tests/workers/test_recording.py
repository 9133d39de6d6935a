"""A worker's metrics and spans, made of events and reports whose times are known."""

from __future__ import annotations

from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import generate_latest

from kvpilot.bus import Claim
from kvpilot.exposition import Instruments
from kvpilot.metrics import Part
from kvpilot.result import Result
from kvpilot.v1 import common_pb2, generation_pb2, job_pb2, policy_pb2
from tests.engines import MODEL, model
from tests.jobs_help import finished_event, make_job, tokens_event
from tests.scraping import Page
from workers.recording import Recorder
from workers.tracing import JobTracer

T0 = 1_800_000_000.0
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture
def instruments() -> Instruments:
    return Instruments(Part.WORKER, Part.PROCESS)


@pytest.fixture
def recorder(instruments: Instruments) -> Recorder:
    hello = policy_pb2.Hello(worker="w1", model=model())
    hello.tiers.add(name="device", budget_bytes=1000)
    return Recorder(instruments, hello, audit_budget=0.01)


def page(instruments: Instruments) -> Page:
    return Page(generate_latest(instruments.registry).decode())


def claim_of(job: job_pb2.Job, epoch: int = 1, attempts: int = 1) -> Claim:
    job.create_time.FromNanoseconds(int(T0 * 1e9))
    return Claim(job, "w1", epoch, attempts, False, Result(job.job_id, 7), 1)


def started(prompt_tokens: int = 5) -> generation_pb2.GenerationEvent:
    return generation_pb2.GenerationEvent(started=generation_pb2.Started(worker="w1", prompt_tokens=prompt_tokens))


def switched(**fields: Any) -> generation_pb2.GenerationEvent:
    switch = common_pb2.Switch(from_pipeline="full", to_pipeline="kivi(bits=4)", **fields)
    return generation_pb2.GenerationEvent(switch=switch)


def test_latencies_are_those_of_the_events(instruments: Instruments, recorder: Recorder) -> None:
    job = make_job()
    recorder.claimed(claim_of(job))
    for at_s, event in (
        (1.0, started()),
        (3.0, tokens_event(0, 1)),
        (3.5, tokens_event(1, 2)),
        (5.5, tokens_event(2, 3)),
        (6.0, finished_event()),
    ):
        recorder.happened(T0 + at_s, [(job.job_id, event)])
    seen = page(instruments)
    sums = {
        "request_queue": (1, 1.0),
        "time_to_first_token": (1, 3.0),
        "request_prefill": (1, 2.0),
        "inter_token": (2, 2.5),
        "request_decode": (1, 2.5),
        "request_duration": (1, 6.0),
    }
    for name, (count, total_s) in sums.items():
        assert seen.value(f"kvpilot_{name}_seconds_count", model=MODEL) == count
        assert seen.value(f"kvpilot_{name}_seconds_sum", model=MODEL) == pytest.approx(total_s)
    assert seen.value("kvpilot_inter_token_seconds_bucket", le="0.5") == 1
    assert seen.value("kvpilot_generated_tokens_total") == 3
    assert seen.value("kvpilot_prompt_tokens_total") == 5
    assert seen.value("kvpilot_requests_total", outcome="length") == 1
    assert seen.value("kvpilot_jobs_held") == 0


@pytest.mark.parametrize(("epoch", "attempts"), [(2, 2), (3, 1)], ids=["lost", "handed back"])
def test_a_job_taken_over_says_nothing_of_queue_and_first_token(
    instruments: Instruments, recorder: Recorder, epoch: int, attempts: int
) -> None:
    job = make_job()
    recorder.claimed(claim_of(job, epoch, attempts))
    recorder.happened(T0 + 60, [(job.job_id, started())])
    recorder.happened(T0 + 61, [(job.job_id, tokens_event(40, 1))])
    assert page(instruments).value("kvpilot_jobs_held") == 1
    recorder.let_go(job.job_id, "lease lost")
    recorder.happened(T0 + 62, [(job.job_id, tokens_event(41, 2))])
    seen = page(instruments)
    assert seen.value("kvpilot_jobs_claimed_total", kind="again") == 1
    assert seen.value("kvpilot_time_to_first_token_seconds_count") == 0
    assert seen.value("kvpilot_request_queue_seconds_count") == 0
    assert seen.value("kvpilot_generated_tokens_total") == 1
    assert seen.value("kvpilot_requests_total") == seen.value("kvpilot_jobs_held") == 0


def test_switches_are_counted_by_orderer_reason_and_outcome(instruments: Instruments, recorder: Recorder) -> None:
    job = make_job()
    recorder.claimed(claim_of(job))
    before, after = common_pb2.CacheBytes(device_bytes=1000), common_pb2.CacheBytes(device_bytes=300)
    down = switched(
        ordered_by=common_pb2.ORDERER_WORKER,
        cause=common_pb2.CAUSE_PRESSURE,
        stall_ms=4.0,
        before=before,
        after=after,
    )
    up = switched(ordered_by=common_pb2.ORDERER_CONTROLLER, stall_ms=2.0, before=after, after=before)
    recorder.happened(T0 + 1, [(job.job_id, down), (job.job_id, up)])
    directive = policy_pb2.Directive(ordered_by=common_pb2.ORDERER_CONTROLLER, cause=common_pb2.CAUSE_QUALITY)
    recorder.answered(directive, policy_pb2.SteerRequest(nack=policy_pb2.Nack()))
    recorder.answered(directive, policy_pb2.SteerRequest(ack=policy_pb2.Ack()))  # its switch comes as an event
    seen = page(instruments)
    counted = {
        (one.labels["ordered_by"], one.labels["reason"], one.labels["outcome"]): one.value
        for one in seen.named("kvpilot_switches_total")
    }
    assert counted == {
        ("worker", "pressure", "applied"): 1,
        ("controller", "other", "applied"): 1,
        ("controller", "quality", "refused"): 1,
    }
    assert seen.value("kvpilot_switch_stall_seconds_sum") == pytest.approx(0.006)
    assert seen.value("kvpilot_switch_device_bytes_total", direction="freed") == 700
    assert seen.value("kvpilot_switch_device_bytes_total", direction="took") == 700


def test_a_report_is_what_the_page_says(instruments: Instruments, recorder: Recorder) -> None:
    assert page(instruments).value("kvpilot_tier_budget_bytes", tier="device") == 1000  # before the first report
    state = policy_pb2.WorkerState(running=2, waiting=1, preemptions=3, audit_ms=1500, audits=4, lent_layers=2)
    state.tiers.add(name="device", used_bytes=400, budget_bytes=1200)
    state.formats.add(tier="device", format="int4", bytes=128)
    state.recalls.tiers.add(name="host", there_blocks=5, waited_blocks=2)
    state.recalls.moved.add(from_tier="host", to_tier="device", bytes=77)
    state.disk.damaged_blocks = 1
    state.disk.read_ms = 250
    cache = common_pb2.CacheBytes(device_bytes=300, shadow_bytes=50, full_cache_bytes=900)
    kivi = policy_pb2.RequestState(
        request_id="a", pipeline="kivi(bits=4)", loss_class=common_pb2.LOSS_CLASS_PERMANENT, cache=cache
    )
    kivi.audits.add(pipeline="kivi(bits=4)", divergence=0.015)
    full = policy_pb2.RequestState(request_id="b", pipeline="full", loss_class=common_pb2.LOSS_CLASS_EXACT)
    odd = policy_pb2.RequestState(request_id="c", pipeline="nobody(knows=1)")
    recorder.reported(policy_pb2.Report(worker=state, requests=[kivi, full, odd]))
    seen = page(instruments)
    for name, value in {
        "requests_running": 2,
        "requests_waiting": 1,
        "preemptions_total": 3,
        "audits_total": 4,
        "audit_seconds_total": 1.5,
        "lent_layers": 2,
        "disk_damaged_blocks_total": 1,
        "disk_read_seconds_total": 0.25,
        "shadow_bytes": 50,
        "full_cache_bytes": 900,
    }.items():
        assert seen.value(f"kvpilot_{name}", model=MODEL) == value
    assert seen.value("kvpilot_tier_used_bytes", tier="device") == 400
    assert seen.value("kvpilot_cache_bytes", tier="device", format="int4") == 128
    assert seen.value("kvpilot_recall_blocks_total", tier="host", found="there") == 5
    assert seen.value("kvpilot_recall_blocks_total", tier="host", found="waited") == 2
    assert seen.value("kvpilot_moved_bytes_total", from_tier="host", to_tier="device") == 77
    assert seen.value("kvpilot_requests_by_pipeline", family="quantise", loss_class="permanent") == 1
    assert seen.value("kvpilot_requests_by_pipeline", family="exact", loss_class="exact") == 1
    assert seen.value("kvpilot_requests_by_pipeline", family="other") == 1
    assert seen.value("kvpilot_measured_divergence_nats_bucket", family="quantise", le="0.01") == 0
    assert seen.value("kvpilot_measured_divergence_nats_bucket", family="quantise", le="0.02") == 1
    recorder.reported(policy_pb2.Report(worker=state, ended_request_ids=["a", "b", "c"]))
    seen = page(instruments)
    assert seen.value("kvpilot_requests_by_pipeline") == seen.value("kvpilot_shadow_bytes") == 0
    assert len(seen.named("kvpilot_requests_by_pipeline")) == 3  # they go on as 0


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("workers.tracing.tracer", lambda: provider.get_tracer("kvpilot"))
    return exporter


def test_spans_have_the_events_times_and_the_jobs_trace(spans: InMemorySpanExporter) -> None:
    job, tracer = make_job(), JobTracer("w1")
    job.traceparent = f"00-{TRACE_ID}-b7ad6b7169203331-01"
    tracer.claimed(claim_of(job))
    tracer.happened(T0 + 1, [(job.job_id, started())])
    tracer.happened(T0 + 3, [(job.job_id, tokens_event(0, 1))])
    tracer.happened(T0 + 4, [(job.job_id, switched(cause=common_pb2.CAUSE_PRESSURE))])
    report = policy_pb2.Report(preempted_request_ids=[job.job_id, "another"])
    report.time.FromNanoseconds(int((T0 + 5) * 1e9))
    tracer.reported(report)
    tracer.happened(T0 + 6, [(job.job_id, finished_event(generation_pb2.FINISH_REASON_FAILED))])
    made = {span.name: span for span in spans.get_finished_spans()}
    times = {name: (span.start_time / 1e9 - T0, span.end_time / 1e9 - T0) for name, span in made.items()}
    assert times == {"queue": (0, 1), "prefill": (1, 3), "decode": (3, 6), "worker": (0, 6)}
    assert {f"{span.context.trace_id:032x}" for span in made.values()} == {TRACE_ID}
    assert f"{made['worker'].parent.span_id:016x}" == "b7ad6b7169203331"
    assert {made[name].parent.span_id for name in ("queue", "prefill", "decode")} == {made["worker"].context.span_id}
    assert [(event.name, event.timestamp / 1e9 - T0) for event in made["decode"].events] == [
        ("switch", 4),
        ("preempted", 5),
    ]
    assert made["decode"].events[0].attributes["kvpilot.cause"] == "pressure"
    assert not made["worker"].status.is_ok
    assert made["worker"].attributes["gen_ai.response.finish_reasons"] == ("failed",)


def test_a_job_let_go_ends_its_spans(spans: InMemorySpanExporter) -> None:
    job, tracer = make_job(), JobTracer("w1")
    tracer.claimed(claim_of(job))
    tracer.let_go(job.job_id, "lease lost")
    made = {span.name: span for span in spans.get_finished_spans()}
    assert set(made) == {"queue", "worker"}
    assert made["worker"].events[0].attributes["kvpilot.reason"] == "lease lost"
    assert made["worker"].parent is None  # no trace came with it: one begins here
