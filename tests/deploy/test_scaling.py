"""What KEDA asks of the job store, asked of a real one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import redis

from kvpilot.bus import Append, Bus, keys
from tests.deploy.rendering import find, rendered
from tests.engines import MODEL
from tests.jobs_help import finished_event, make_card, make_job

pytestmark = pytest.mark.anyio

TARGET = 5
"""KEDA's default of pendingEntriesCount and streamLength."""
UNKNOWN_LAG = -1
"""What KEDA reads where Redis answers NULL; 0 before 2.18."""


@dataclass(frozen=True)
class Seen:
    """A trigger as KEDA's redis-streams scaler (2.17 to 2.20) takes it: its rule is in `redis_streams_scaler.go`.

    Attributes:
        measure: what is read of the stream: lag, length or pending.
        value: entries.
        replicas: how many the autoscaler asks for by this trigger alone.
        active: whether it starts a pool that is at 0.
    """

    measure: str
    value: int
    replicas: int
    active: bool


def _seen(client: redis.Redis, metadata: dict[str, str]) -> Seen:
    stream, group = metadata["stream"].replace(":mine", f":{MODEL}"), metadata.get("consumerGroup", "")
    lag_target = int(metadata.get("lagCount", 0))
    if not group:
        measure, target, value = "length", int(metadata.get("streamLength", TARGET)), client.xlen(stream)
    elif lag_target:
        measure, target, value = "lag", lag_target, _lag(client, stream, group)
    else:
        target = int(metadata.get("pendingEntriesCount", TARGET))
        measure, value = "pending", client.xpending(stream, group)["pending"]
    active = value > int(metadata.get("activationLagCount", 0))
    return Seen(measure, value, max(0, math.ceil(value / target)), active)


def _lag(client: redis.Redis, stream: str, group: str) -> int:
    if not client.exists(stream):
        return 0
    for each in client.xinfo_groups(stream):
        if each["name"] == group:
            return UNKNOWN_LAG if each["lag"] is None else each["lag"]
    return client.xlen(stream)


def _triggers() -> list[dict[str, str]]:
    """Those of the pool `chat`, which may be at 0 replicas."""
    scaled = find(rendered("full"), "ScaledObject", "kvpilot-worker-chat")["spec"]
    assert scaled["minReplicaCount"] == 0
    return [trigger["metadata"] for trigger in scaled["triggers"]]


def _asked(url: str) -> dict[str, int]:
    """What KEDA measures and its sum over all streams."""
    sums: dict[str, int] = {}
    with redis.Redis.from_url(url, decode_responses=True) as client:
        for metadata in _triggers():
            seen = _seen(client, metadata)
            sums[seen.measure] = sums.get(seen.measure, 0) + seen.value
    return sums


async def test_waiting_jobs_are_lag_and_all_that_have_not_ended_are_length(redis_url: str, bus: Bus) -> None:
    assert _asked(redis_url) == {"lag": 0, "length": 0}, "no stream is there yet"
    await bus.heartbeat(make_card("worker-1"), [])
    jobs = [make_job() for _ in range(3)]
    for job in jobs:
        await bus.submit(job, max_queued=10)
    assert _asked(redis_url) == {"lag": 3, "length": 3}
    (claim,) = await bus.claim("worker-1", MODEL, 1)
    assert _asked(redis_url) == {"lag": 2, "length": 3}
    await bus.append([Append(claim, [finished_event()])])
    assert _asked(redis_url) == {"lag": 2, "length": 2}


async def test_replicas_are_kept_while_all_jobs_run(redis_url: str, bus: Bus) -> None:
    await bus.heartbeat(make_card("worker-1"), [])
    for _ in range(25):
        await bus.submit(make_job(), max_queued=100)
    await bus.claim("worker-1", MODEL, 25)
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        seen = [_seen(client, metadata) for metadata in _triggers()]
    assert {each.measure for each in seen if each.active} == {"length"}
    assert max(each.replicas for each in seen) == 2, "24 jobs a replica (workerDefaults.keda.jobs)"


async def test_a_pool_at_zero_starts_where_the_lag_cannot_be_told(redis_url: str, bus: Bus) -> None:
    jobs = [make_job() for _ in range(3)]
    for job in jobs:
        await bus.submit(job, max_queued=10)
    await bus.cancel(jobs[1].job_id)
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        (group,) = client.xinfo_groups(keys.queue(MODEL))
        assert group["lag"] is None
        seen = [_seen(client, metadata) for metadata in _triggers()]
    assert {(each.measure, each.value, each.replicas) for each in seen if each.active} == {("length", 2, 1)}


def test_every_queue_is_looked_at_by_both_measures() -> None:
    looked_at = {
        measure: {metadata["stream"] for metadata in _triggers() if measure in metadata}
        for measure in ("lagCount", "streamLength")
    }
    queues = {keys.queue("mine", priority) for priority in keys.Priority}
    assert looked_at == {"lagCount": queues, "streamLength": queues}
