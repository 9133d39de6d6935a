"""What KEDA asks of the job store, asked of a real one."""

from __future__ import annotations

import pytest
import redis

from kvpilot.bus import Append, Bus, keys
from tests.deploy.rendering import find, rendered
from tests.engines import MODEL
from tests.jobs_help import finished_event, make_card, make_job

pytestmark = pytest.mark.anyio


def _streams() -> dict[str, str]:
    """The streams of the pool `chat`, as they are called for the tests' model, by what is asked of them."""
    triggers = find(rendered("full"), "ScaledObject", "kvpilot-worker-chat")["spec"]["triggers"]
    asked = [trigger["metadata"] for trigger in triggers]
    assert all(("lagCount" in each) != ("streamLength" in each) for each in asked)
    return {each["stream"].replace(":mine", f":{MODEL}"): each["consumerGroup"] for each in asked}


def _asked(url: str) -> tuple[int, int]:
    """Lag and length of all of them, as KEDA's scaler takes them: 0 for a stream that is not there."""
    lag = length = 0
    with redis.Redis.from_url(url, decode_responses=True) as client:
        for stream, group in _streams().items():
            length += client.xlen(stream)
            if client.exists(stream):
                lag += sum(each["lag"] for each in client.xinfo_groups(stream) if each["name"] == group)
    return lag, length


async def test_waiting_jobs_are_lag_and_all_that_have_not_ended_are_length(redis_url: str, bus: Bus) -> None:
    assert _asked(redis_url) == (0, 0), "no stream is there yet"
    await bus.heartbeat(make_card("worker-1"), [])
    jobs = [make_job() for _ in range(3)]
    for job in jobs:
        await bus.submit(job, max_queued=10)
    assert _asked(redis_url) == (3, 3)
    (claim,) = await bus.claim("worker-1", MODEL, 1)
    assert _asked(redis_url) == (2, 3)
    await bus.append([Append(claim, [finished_event()])])
    assert _asked(redis_url) == (2, 2)


def test_every_queue_is_looked_at() -> None:
    priorities = getattr(keys, "Priority", None)
    queues = {keys.queue(MODEL, each) for each in priorities} if priorities else {keys.queue(MODEL)}
    assert queues <= set(_streams())
