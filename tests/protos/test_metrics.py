"""The metrics' definitions, their instruments and their page."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from controller.settings import ControllerSettings
from kvpilot import metrics
from kvpilot.exposition import Instruments
from kvpilot.metrics import METRICS, Kind, Metric, Part
from kvpilot.process import Ready, read_ready_file, write_ready_file
from tests.scraping import scrape

ROOT = Path(__file__).resolve().parents[2]
UNITS = ("seconds", "bytes", "nats", "tokens", "blocks", "entries", "turns", "pieces", "layers")
PER_REQUEST = {"request", "request_id", "job", "session", "session_id", "pipeline", "tenant", "reason_text"}


def test_names_follow_prometheus() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names) > 70
    for metric in METRICS:
        assert re.fullmatch(r"kvpilot(_[a-z]+)+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER)
        assert (metric.kind is Kind.HISTOGRAM) == bool(metric.buckets)
        assert metric.buckets == tuple(sorted(set(metric.buckets)))
        if metric.kind is Kind.HISTOGRAM:
            assert metric.name.endswith(UNITS)
        assert not re.search(r"_(ms|mib|kib|percent)(_|$)", metric.name), "not a base unit"
        assert metric.help.endswith(".")


def test_labels_cannot_grow_with_traffic() -> None:
    assert not {label for metric in METRICS for label in metric.labels} & PER_REQUEST


def test_the_page_in_docs_is_fresh() -> None:
    checked = subprocess.run([sys.executable, "docs/generate_metrics.py", "--check"], cwd=ROOT, capture_output=True)
    assert checked.returncode == 0, checked.stderr.decode()


def test_a_part_has_its_own_metrics_alone() -> None:
    instruments = Instruments(Part.WORKER)
    with pytest.raises(ValueError, match=r"kvpilot_plan_seconds is of part"):
        instruments.histogram(metrics.PLAN_TIME)
    with pytest.raises(ValueError, match="is a counter, no gauge"):
        instruments.gauge(metrics.GENERATED_TOKENS)
    with pytest.raises(ValueError, match="gauge or counter"):
        instruments.show(metrics.INTER_TOKEN, list)
    assert instruments.counter(metrics.GENERATED_TOKENS) is instruments.counter(metrics.GENERATED_TOKENS)
    assert metrics.GENERATED_TOKENS.name not in instruments.unused
    assert metrics.REQUESTS_RUNNING.name in instruments.unused


def test_a_metric_is_made_in_one_place() -> None:
    instruments = Instruments(Part.WORKER)
    instruments.show(metrics.REQUESTS_RUNNING, list)
    instruments.gauge(metrics.WORKER_INFO)
    for metric in (metrics.REQUESTS_RUNNING, metrics.WORKER_INFO):
        with pytest.raises(ValueError, match="not made yet"):
            instruments.show(metric, list)
    with pytest.raises(ValueError, match="kvpilot_requests_running is made at each scrape"):
        instruments.gauge(metrics.REQUESTS_RUNNING)


@pytest.mark.anyio
async def test_the_page_shows_what_was_recorded_and_survives_a_look_that_fails() -> None:
    instruments = Instruments(Part.WORKER)
    instruments.counter(metrics.GENERATED_TOKENS).labels("m").inc(3)
    instruments.histogram(metrics.INTER_TOKEN).labels("m").observe(0.03)
    running = [1, 2]
    instruments.show(metrics.REQUESTS_RUNNING, lambda: [(("m",), len(running))])

    def fails() -> list[tuple[tuple[str, ...], float]]:
        raise RuntimeError("nobody foresaw this")

    instruments.show(metrics.JOBS_HELD, fails)
    async with instruments.serving("127.0.0.1:0") as address:
        page = await scrape(address)
        assert page.value("kvpilot_generated_tokens_total", model="m") == 3
        assert page.value("kvpilot_inter_token_seconds_bucket", le="0.025") == 0
        assert page.value("kvpilot_inter_token_seconds_bucket", le="0.05") == 1
        assert page.value("kvpilot_requests_running") == 2
        assert "kvpilot_jobs_held" not in page.families
        assert page.value("process_resident_memory_bytes") > 1e6
        running.pop()
        assert (await scrape(address)).value("kvpilot_requests_running") == 1
    with pytest.raises(OSError, match="refused"):
        await scrape(address)


@pytest.mark.anyio
async def test_a_taken_address_is_an_error_that_names_the_setting() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(OSError, match=f"metrics_listen '{address}'"):
            async with Instruments(Part.PROCESS).serving(address):
                pass


@pytest.mark.anyio
async def test_nothing_is_served_where_no_address_is_given() -> None:
    async with Instruments(Part.PROCESS).serving("") as address:
        assert address == ""


def test_a_bad_address_is_refused_by_the_settings() -> None:
    with pytest.raises(ValidationError, match=r"metrics_listen\n.*'9464': expected host:port"):
        ControllerSettings.load(metrics_listen="9464")
    assert ControllerSettings.load().metrics_listen == ""


def test_ready_files_tell_both_addresses(tmp_path: Path) -> None:
    assert read_ready_file(tmp_path / "ready") is None
    for ready in (Ready("127.0.0.1:1"), Ready("127.0.0.1:1", "127.0.0.1:2")):
        write_ready_file(tmp_path / "ready", ready)
        assert read_ready_file(tmp_path / "ready") == ready
    assert (tmp_path / "ready").read_text().splitlines()[0] == "127.0.0.1:1"


def test_metrics_are_values() -> None:
    assert hash(metrics.SWITCHES) != hash(metrics.AUDITS)
    assert Metric("kvpilot_switch_bytes_total", Kind.COUNTER, "x.").unit == "bytes"
