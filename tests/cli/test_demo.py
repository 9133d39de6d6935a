"""The demo's jobs, what it asks of them, and how it judges and shows what they did."""

from __future__ import annotations

import io
import json

from rich.console import Console

from cli.demo import judge
from cli.demo_jobs import FACT, FACT_ANSWER, demo_jobs, long_document
from cli.demo_run import Run
from cli.demo_view import Board, summary
from kvpilot.result import Result
from kvpilot.v1 import common_pb2, generation_pb2

Event = generation_pb2.GenerationEvent
MIB = 1 << 20


def events(text: str, tokens: int, at_token: int, orderer: common_pb2.Orderer) -> list[Event]:
    """A job's whole life, with one switch."""
    switch = common_pb2.Switch(
        at_token=at_token, from_pipeline="full", to_pipeline="kivi(bits=4)", reason="device 80% full"
    )
    switch.ordered_by = orderer
    switch.before.device_bytes, switch.after.device_bytes = 12 * MIB, 3 * MIB
    finished = generation_pb2.Finished(reason=generation_pb2.FINISH_REASON_STOP_TOKEN, switches=[switch])
    finished.cache.peak_device_bytes, finished.cache.full_cache_bytes = 6 * MIB, 12 * MIB
    finished.usage.generated_tokens, finished.timings.decode_ms = tokens, 1000.0
    told = [
        Event(accepted=generation_pb2.Accepted(job_id="job-1")),
        Event(started=generation_pb2.Started(worker="worker-0", pipeline="full", prompt_tokens=2100)),
        Event(tokens=generation_pb2.Tokens(tokens=[generation_pb2.Token(id=7)] * tokens, text=text)),
        Event(switch=switch),
        Event(finished=finished),
    ]
    for offset, event in enumerate(told):
        event.offset = offset
    return told


def run_of(text: str, answer: str | None = FACT_ANSWER, at_token: int = 16, by: str = "CONTROLLER") -> Run:
    orderer = common_pb2.Orderer.Value(f"ORDERER_{by}")
    return Run("document", answer, Result.of(events(text, 51, at_token, orderer)))


def test_document_holds_its_fact_once_in_the_middle() -> None:
    document = long_document()
    assert document.count(FACT_ANSWER) == 1
    assert 0.3 < document.index(FACT) / len(document) < 0.7
    assert len(document) > 10_000


def test_jobs_are_those_promised() -> None:
    jobs = {job.name: job for job in demo_jobs()}
    assert set(jobs) == {"document", "chat", "stream", "code"}
    assert len(jobs["chat"].orders) == 3
    assert len({order.session_id for order in jobs["chat"].orders}) == 1
    assert jobs["document"].answer == FACT_ANSWER
    assert (jobs["stream"].orders[0].max_tokens or 0) >= 300


def test_a_good_run() -> None:
    run = run_of(f"It is {FACT_ANSWER}.")
    assert run.fact_found is True
    assert run.steered_midway
    assert judge([run]) == []
    document = json.loads(json.dumps(run.document()))
    assert document["name"] == "document"
    assert document["tokens"] == 51
    assert document["tokens_per_s"] == 50.0
    assert (document["peak_device_bytes"], document["full_cache_bytes"]) == (6 * MIB, 12 * MIB)
    assert document["fact_found"] is True
    assert document["switches"] == [
        {
            "at_token": 16,
            "from": "full",
            "to": "kivi(bits=4)",
            "reason": "device 80% full",
            "ordered_by": "controller",
            "stall_ms": 0.0,
        }
    ]


def test_what_makes_the_demo_fail() -> None:
    assert judge([run_of("It is 1234.")]) == [f"document: {FACT_ANSWER!r} is not in its text"]
    nothing_switched = "the controller switched no request in the middle of its generation"
    assert judge([run_of("", answer=None, at_token=0)]) == [nothing_switched]
    assert judge([run_of("", answer=None, at_token=51)]) == [nothing_switched]
    assert judge([run_of("", answer=None, by="WORKER")]) == [nothing_switched]
    assert "code: did not finish" in judge([Run("code")])


def test_board_and_summary_tell_what_happened() -> None:
    console = Console(file=io.StringIO(), width=200)
    run = run_of(f"It is {FACT_ANSWER}.")
    with Board(console, [run]) as board:
        for event in events("", 51, 16, common_pb2.ORDERER_CONTROLLER):
            board.note(run, event)
    console.print(summary([run]))
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    for part in (
        "started with 2100 prompt tokens, full",
        "switched at token 16 by the controller: full → kivi(bits=4), device 12.0 MiB → 3.0 MiB",
        "finished after 51 tokens; peak 6.0 MiB on the device, 50% of the full cache",
        "found",
        "@16 by the controller: full → kivi(bits=4)",
        "device 80% full",
    ):
        assert part in said, part
