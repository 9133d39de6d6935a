"""What is counted of lower tiers: bytes as the tables hold them, a worker's as its requests', reports as both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from kernels.layout import BLOCK_TOKENS, Format, Tier
from kvpilot.v1 import policy_pb2
from tests.tiny import Drive, prompt, tiny_engine
from workers.cache.recalls import Asked, Recalls
from workers.engine.engine import Engine

pytestmark = pytest.mark.usefixtures("one_torch_thread")
IDS = prompt(301, 3)
ALL, AWAY = len(IDS) // BLOCK_TOKENS, (len(IDS) - 64) // BLOCK_TOKENS
"""Rows of blocks that are whole at the end of the prompt, and those of them that ``recent=64`` moves away."""


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    made = tiny_engine(disk_folder=tmp_path, disk_budget_bytes=64 << 20, report_interval_tokens=4, step_tokens=1000)
    yield made
    made.stop(1.0)


def decoding(engine: Engine, pipeline: str) -> Drive:
    drive = Drive(engine)
    drive.submit("job", IDS, 48, pipeline=pipeline)
    drive.until(lambda: drive.generated("job") >= 1)
    drive.engine._live["job"].pinned = None
    return drive


def moved(drive: Drive) -> Counter[tuple[Tier, Tier]]:
    return drive.engine._live["job"].cache.recalls.moved_bytes


@pytest.mark.parametrize(
    ("pipeline", "built"),
    [
        ("full", ()),
        ("host(recent=64)", (("device", "host", "raw", ALL), ("host", "device", "raw", ALL - AWAY))),
        ("disk(recent=64)", (("device", "disk", "raw", AWAY),)),
        (
            "int8 | host(recent=64)",
            (
                ("device", "host", "raw", ALL),
                ("host", "host", "int8", AWAY),
                ("host", "device", "int8", 1),
                ("host", "device", "raw", 1),
            ),
        ),
        (
            "kivi(bits=4) | disk(recent=64)",
            (
                ("device", "host", "raw", ALL),
                ("host", "disk", "int4", AWAY),
                ("host", "device", "int4", 1),
                ("host", "device", "raw", 1),
            ),
        ),
    ],
)
def test_bytes_are_counted_where_they_go(engine: Engine, pipeline: str, built: tuple) -> None:
    """Whole rows of a prompt go to the host, but for those that will lie on disk as they are. At its end the last two
    come back, of which one is old enough for a codec, and what a codec stores is built from the host's."""
    drive = decoding(engine, pipeline)
    expected = Counter[tuple[Tier, Tier]]()
    for origin, target, fmt, rows in built:
        row_bytes = engine.shape.layers * engine.shape.kv_heads * engine.shape.block_bytes(Format[fmt.upper()])
        expected[Tier[origin.upper()], Tier[target.upper()]] += rows * row_bytes
    assert moved(drive) == expected
    assert drive.engine.cache.use(engine._live["job"].cache).disk_bytes == sum(
        nbytes for (_, target), nbytes in expected.items() if target is Tier.DISK
    )


def test_what_comes_back_from_disk_comes_through_the_host(engine: Engine) -> None:
    drive = decoding(engine, "disk(recent=64)")
    before = moved(drive).copy()
    nbytes = engine.cache.use(engine._live["job"].cache).disk_bytes
    drive.direct("job", "full")
    assert moved(drive) - before == Counter({(Tier.DISK, Tier.HOST): nbytes, (Tier.HOST, Tier.DEVICE): nbytes})


def test_a_refused_switch_moves_nothing(tmp_path: Path) -> None:
    engine = tiny_engine(disk_folder=tmp_path, disk_budget_bytes=64 << 10)
    drive = decoding(engine, "full")
    with pytest.raises(Exception, match="disk tier"):
        drive.direct("job", "disk(recent=64)")
    assert not moved(drive)
    engine.stop(1.0)


def test_a_worker_s_counts_are_those_of_its_requests(engine: Engine) -> None:
    """Also of those that are over, and of forks."""
    drive = Drive(engine)
    pipelines = {
        "pool": "arkvale(recent=64, share=0.4)",
        "disk": "disk(recent=64)",
        "both": "kivi(bits=4) | disk(recent=32)",
        "none": "full",
    }
    for name, pipeline in pipelines.items():
        drive.submit(name, prompt(200 + 20 * len(name), len(name)), 24, pipeline=pipeline)
    drive.until(lambda: all(drive.generated(name) >= 8 for name in pipelines))
    own = {name: engine._live[name].cache.recalls for name in pipelines}
    fork = engine.cache.fork(engine._live["disk"].cache)
    own["fork"] = fork.recalls
    assert own["fork"] == Recalls()
    engine.cache.context(fork).read(0)
    engine.cache.close(fork)
    drive.finish()
    whole = engine.cache.recalls
    for tier in (Tier.HOST, Tier.DISK):
        parts = [vars(recalls.asked[tier]) for recalls in own.values()]
        assert vars(whole.asked[tier]) == {found: sum(part[found] for part in parts) for found in vars(Asked())}
    assert whole.moved_bytes == sum((recalls.moved_bytes for recalls in own.values()), Counter())
    assert whole.read_blocks == own["pool"].read_blocks > 0 < own["pool"].skipped_blocks == whole.skipped_blocks
    assert own["pool"].asked[Tier.HOST].blocks > 0 == own["pool"].asked[Tier.DISK].blocks
    assert own["disk"].asked[Tier.DISK].blocks > 0 == own["disk"].asked[Tier.HOST].blocks
    assert own["fork"].moved_bytes[Tier.DISK, Tier.HOST] > 0 == own["fork"].asked[Tier.DISK].blocks
    assert own["none"] == Recalls()


def counted(recalls: policy_pb2.Recalls) -> dict[tuple[str, ...], int]:
    """All numbers of a message by name."""
    found = {("read",): recalls.read_blocks, ("skipped",): recalls.skipped_blocks}
    found |= {(pair.from_tier, pair.to_tier): pair.bytes for pair in recalls.moved}
    for tier in recalls.tiers:
        for name in ("there", "ahead", "waited", "in_place"):
            found[tier.name, name] = getattr(tier, f"{name}_blocks")
    return found


def test_reports_tell_of_them_and_they_only_rise(engine: Engine) -> None:
    drive, states = Drive(engine), []
    for name, pipeline in (("pool", "arkvale(recent=64, share=0.4)"), ("disk", "disk(recent=64)")):
        drive.submit(name, IDS, 24, pipeline=pipeline)
    live = {}
    while not live or engine._live:
        engine.step()
        live |= {name: seq.cache.recalls for name, seq in engine._live.items() if seq.cache}
        if drive.reports and drive.reports[-1] not in states:
            states.append(drive.reports[-1])
    assert len(states) >= 5
    workers = [counted(report.worker.recalls) for report in states]
    requests = {name: [counted(s.recalls) for r in states for s in r.requests if s.request_id == name] for name in live}
    for series in (workers, *requests.values()):
        for earlier, later in pairwise(series):
            assert all(later[name] >= count for name, count in earlier.items())
    assert workers[-1] == counted(engine.cache.recalls.to_proto())
    assert requests["pool"][-1].keys() >= {("host", "there"), ("host", "device"), ("device", "host")}
    assert requests["disk"][-1].keys() >= {("disk", "there"), ("disk", "host"), ("device", "disk")}
    for name, recalls in live.items():
        final = counted(recalls.to_proto())
        assert all(final[key] >= count for key, count in requests[name][-1].items())


def test_a_rate_of_nothing_is_one_and_a_log_has_every_number() -> None:
    recalls = Recalls()
    assert recalls.asked[Tier.DISK].hit_rate == 1.0
    assert recalls.summary() == {}
    assert recalls.to_proto() == policy_pb2.Recalls()
    recalls.note_asked(Tier.DISK, there=1, ahead=2, waited=4)
    recalls.note_asked(Tier.DISK, in_place=1)
    recalls.note_moved(Tier.DISK, Tier.HOST, 4096)
    assert recalls.asked[Tier.DISK].hit_rate == 3 / 8
    assert recalls.summary() == {
        "disk_to_host_bytes": 4096,
        "disk_there_blocks": 1,
        "disk_ahead_blocks": 2,
        "disk_waited_blocks": 4,
        "disk_in_place_blocks": 1,
        "disk_hit_rate": 0.375,
    }
