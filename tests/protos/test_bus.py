"""The job store on a real Redis server, without and with an append-only file."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from kvpilot.bus import (
    Append,
    AppendStatus,
    Bus,
    BusError,
    BusSettings,
    BusUnavailableError,
    Claim,
    IdempotencyConflictError,
    JobNotFoundError,
    OffsetOutOfRangeError,
    Orders,
    QueueFullError,
    keys,
    scripts,
    watch,
)
from kvpilot.bus.connection import STORE_COUNTS, read_streams, translated_errors
from kvpilot.bus.front import digest_of, new_job_id
from kvpilot.v1 import generation_pb2, job_pb2
from kvpilot.v1.operator_pb2 import LOG_LEVEL_DEBUG, LogLevelOrder, Mode
from tests.conftest import RedisProcess, free_port
from tests.engines import MODEL
from tests.jobs_help import (
    FAST_BUS,
    TIMEOUT_S,
    blocked_reads,
    connected,
    finished_event,
    make_card,
    make_job,
    next_claims,
    read_all,
    result_of,
    tokens_event,
    until,
)

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["memory", "append-only file"])
def store(request: pytest.FixtureRequest, tmp_path: Path, redis_url: str) -> str:
    """URL of an empty job store of each kind."""
    if request.param == "memory":
        return redis_url
    durable: RedisProcess = request.getfixturevalue("durable_redis")
    return durable.url


@pytest.fixture
async def bus(store: str) -> AsyncIterator[Bus]:
    async with connected(store) as bus:
        yield bus


async def claim_one(bus: Bus, worker: str) -> Claim:
    (claim,) = await next_claims(bus, worker, 1)
    return claim


async def status(bus: Bus, claim: Claim, *events: generation_pb2.GenerationEvent) -> AppendStatus:
    (answer,) = await bus.append([Append(claim, events)])
    return answer.status


# ---- submitting


async def test_a_job_is_stored_queued_and_claimed(bus: Bus) -> None:
    job = make_job()
    assert await bus.submit(job) == (job.job_id, True)
    record = await bus.record(job.job_id)
    assert (record.job, record.state, record.next_offset) == (job, generation_pb2.JOB_STATE_QUEUED, 1)
    assert record.create_time.timestamp() == pytest.approx(job.create_time.ToMilliseconds() / 1000)
    claim = await claim_one(bus, "w1")
    assert (claim.job, claim.epoch, claim.attempts, claim.cancelled, claim.next_offset) == (job, 1, 1, False, 1)
    record = await bus.record(job.job_id)
    assert (record.state, record.worker) == (generation_pb2.JOB_STATE_RUNNING, "w1")
    assert await bus.claim("w2", MODEL, 8) == []


async def test_submitting_again_after_a_lost_answer_is_the_same_job(bus: Bus) -> None:
    job = make_job()
    assert await bus.submit(job) == await bus.submit(job)
    assert len(await bus.claim("w1", MODEL, 8)) == 1


async def test_jobs_are_claimed_in_order_and_by_model(bus: Bus) -> None:
    jobs = [make_job(f"p{number}") for number in range(5)]
    for job in (*jobs, make_job(model_name="other")):
        await bus.submit(job)
    claims = [*await bus.claim("w1", MODEL, 2), *await bus.claim("w2", MODEL, 8)]
    assert [claim.job.job_id for claim in claims] == [job.job_id for job in jobs]


async def test_a_waiting_claim_wakes_up_for_a_job(bus: Bus) -> None:
    claiming = asyncio.create_task(bus.claim("w1", MODEL, 1, block_ms=int(TIMEOUT_S * 1000)))
    await asyncio.sleep(0)
    job = make_job()
    await bus.submit(job)
    async with asyncio.timeout(TIMEOUT_S / 2):
        (claim,) = await claiming
    assert claim.job == job


async def test_an_idempotency_key_names_one_job(bus: Bus) -> None:
    first, second = make_job("a"), make_job("a")
    assert await bus.submit(first, idempotency_key="k", request_digest="d") == (first.job_id, True)
    assert await bus.submit(second, idempotency_key="k", request_digest="d") == (first.job_id, False)
    with pytest.raises(IdempotencyConflictError) as caught:
        await bus.submit(second, idempotency_key="k", request_digest="other")
    assert caught.value.job_id == first.job_id
    with pytest.raises(JobNotFoundError):
        await bus.record(second.job_id)
    assert len(await bus.claim("w1", MODEL, 8)) == 1


def test_the_digest_leaves_the_key_out_and_takes_the_rest_in() -> None:
    request = make_job("a").request
    keyed = generation_pb2.GenerateRequest()
    keyed.CopyFrom(request)
    keyed.idempotency_key = "k"
    assert digest_of(request) == digest_of(keyed)
    keyed.sampling.seed += 1
    assert digest_of(request) != digest_of(keyed)


async def test_many_submitters_never_overfill_the_queue(bus: Bus) -> None:
    async def submit() -> bool:
        try:
            await bus.submit(make_job(), max_queued=10)
        except QueueFullError:
            return False
        return True

    assert sum(await asyncio.gather(*(submit() for _ in range(40)))) == 10
    await bus.claim("w1", MODEL, 4)  # claimed jobs do not wait
    assert sum(await asyncio.gather(*(submit() for _ in range(40)))) == 4


async def test_jobs_and_keys_expire_and_running_jobs_do_not(store: str, bus: Bus) -> None:
    finished, running = make_job(), make_job()
    await bus.submit(finished, idempotency_key="k", request_digest="d")
    await bus.submit(running)
    claim, other = await bus.claim("w1", MODEL, 2)
    await status(bus, claim, finished_event())
    await status(bus, other, tokens_event(0, 1))
    with redis.Redis.from_url(store) as client:
        assert 86_000 < client.ttl(keys.job(finished.job_id)) <= 86_400
        assert 86_000 < client.ttl(keys.events(finished.job_id)) <= 86_400
        assert 86_000 < client.ttl(keys.idempotency("k")) <= 86_400
        assert client.ttl(keys.job(running.job_id)) == client.ttl(keys.events(running.job_id)) == -1
        assert client.xlen(keys.queue(MODEL)) == 1  # a finished job leaves nothing in the queue


# ---- events


async def test_events_are_read_back_and_live(bus: Bus) -> None:
    job = make_job()
    await bus.submit(job)
    claim = await claim_one(bus, "w1")
    readers = [asyncio.create_task(read_all(bus, job.job_id, offset)) for offset in (0, 0, 2, 3)]
    await status(bus, claim, tokens_event(0, 5), tokens_event(1, 6, 7))
    await status(bus, claim, tokens_event(3, 8))
    await status(bus, claim, finished_event())
    everything = await read_all(bus, job.job_id)
    assert [event.offset for event in everything] == [0, 1, 2, 3, 4]
    assert [await reader for reader in readers] == [everything, everything, everything[2:], everything[3:]]
    assert (await result_of(bus, job.job_id)).token_ids == [5, 6, 7, 8]


async def test_a_reader_that_falls_behind_loses_nothing(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MAX_WAITING_ENTRIES", 4)
    job = make_job()
    await bus.submit(job)
    claim = await claim_one(bus, "w1")
    stream = bus.events(job.job_id)
    assert (await anext(stream)).HasField("accepted")
    reading = asyncio.create_task(anext(stream))  # now it waits for live events
    await until(lambda: bool(bus._watcher._watches))
    for number in range(300):
        await bus.append([Append(claim, [tokens_event(number, number)])])
    await status(bus, claim, finished_event())
    rest = [await reading] + [event async for event in stream]
    assert [event.offset for event in rest] == list(range(1, 302))


@pytest.mark.parametrize("shared", [True, False], ids=["same job", "another job"])
async def test_a_reader_that_stops_costs_no_reads(bus: Bus, monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    monkeypatch.setattr(watch, "MAX_WAITING_ENTRIES", 4)
    answered: list[list[str]] = []  # of each read that did not end empty: which streams had entries
    read = bus._client.xread

    async def noted(*arguments: Any, **options: Any) -> Any:
        reply = await read(*arguments, **options)
        if streams := [name for name, _ in read_streams(reply)]:
            answered.append(streams)
        return reply

    monkeypatch.setattr(bus._client, "xread", noted)
    stalled, other = make_job(), make_job()
    for job in (stalled, other):
        await bus.submit(job)
    claims = await bus.claim("w1", MODEL, 2)
    followed = stalled if shared else other
    async with bus._watcher.watch(stalled.job_id, 1) as left, bus._watcher.watch(followed.job_id, 1) as taken:
        for number in range(watch.MAX_WAITING_ENTRIES + 1):
            await status(bus, claims[0], tokens_event(number, 1))
            if shared:
                assert len(await taken.take(TIMEOUT_S)) == 1
        await until(lambda: left.overflowed)
        answered.clear()
        for number in range(20):
            await status(bus, claims[0 if shared else 1], tokens_event(number, 1))
            assert len(await taken.take(TIMEOUT_S)) == 1
    assert answered == [[keys.events(followed.job_id)]] * 20


async def test_one_connection_follows_many_jobs(bus: Bus, store: str) -> None:
    jobs = [make_job(f"p{number}") for number in range(100)]
    for job in jobs:
        await bus.submit(job)
    claims = await bus.claim("w1", MODEL, 100)
    readers = [asyncio.create_task(result_of(bus, job.job_id)) for job in jobs]
    await until(lambda: len(bus._watcher._watches) == 100)
    with redis.Redis.from_url(store) as client:
        assert sum(entry["cmd"] == "xread" for entry in client.client_list()) <= 1
    for number in range(3):
        await bus.append([Append(claim, [tokens_event(number, number)]) for claim in claims])
    await bus.append([Append(claim, [finished_event()]) for claim in claims])
    assert [(await reader).token_ids for reader in readers] == [[0, 1, 2]] * 100
    assert bus._watcher._watches == {}


async def test_offsets_beyond_the_end(bus: Bus) -> None:
    job = make_job()
    await bus.submit(job)
    claim = await claim_one(bus, "w1")
    waiting = asyncio.create_task(read_all(bus, job.job_id, 5))
    await status(bus, claim, tokens_event(0, 1), finished_event())
    with pytest.raises(OffsetOutOfRangeError):
        await waiting
    with pytest.raises(OffsetOutOfRangeError) as caught:
        await read_all(bus, job.job_id, 3)
    assert caught.value.next_offset == 3
    with pytest.raises(JobNotFoundError):
        await read_all(bus, "job-unknown")
    with pytest.raises(JobNotFoundError):
        await bus.history("job-unknown")


# ---- leases and fences


async def test_an_ended_lease_is_taken_over_with_what_was_delivered(bus: Bus) -> None:
    job = make_job()
    await bus.submit(job)
    first = await claim_one(bus, "w1")
    await status(bus, first, tokens_event(0, 5, 6))
    second = await claim_one(bus, "w2")
    assert (second.epoch, second.attempts, second.next_offset) == (2, 2, 2)
    assert (second.progress.token_ids, second.progress.text) == ([5, 6], " w5 w6")
    assert await status(bus, second, tokens_event(2, 7)) is AppendStatus.STORED
    assert await status(bus, first, tokens_event(2, 7)) is AppendStatus.FENCED
    assert await status(bus, first, finished_event()) is AppendStatus.FENCED
    assert (await bus.heartbeat(make_card("w1"), [first])).lost == (job.job_id,)
    assert await status(bus, second, finished_event()) is AppendStatus.STORED
    assert (await result_of(bus, job.job_id)).token_ids == [5, 6, 7]


async def test_an_older_claim_of_the_same_worker_is_fenced_too(bus: Bus) -> None:
    await bus.submit(make_job())
    first = await claim_one(bus, "w1")
    second = await claim_one(bus, "w1")
    assert await status(bus, first, tokens_event(0, 5)) is AppendStatus.FENCED
    assert await status(bus, second, tokens_event(0, 5)) is AppendStatus.STORED


async def test_two_workers_that_write_at_once_leave_one_stream(bus: Bus) -> None:
    job = make_job()
    await bus.submit(job)
    first = await claim_one(bus, "w1")
    second = await claim_one(bus, "w2")

    async def write(claim: Claim) -> int:
        stored = 0
        for number in range(50):
            stored += await status(bus, claim, tokens_event(number, number)) is AppendStatus.STORED
        return stored

    assert await asyncio.gather(write(first), write(second)) == [0, 50]
    await status(bus, second, finished_event())
    assert (await result_of(bus, job.job_id)).token_ids == list(range(50))


async def test_heartbeats_renew_leases_and_tell_of_cancels(bus: Bus) -> None:
    job = make_job()
    await bus.submit(job)
    claim = await claim_one(bus, "w1")
    loop = asyncio.get_running_loop()
    end = loop.time() + 2 * FAST_BUS.lease_s
    while loop.time() < end:
        renewal = await bus.heartbeat(make_card("w1"), [claim])
        assert (renewal.lost, renewal.cancelled) == ((), ())
        assert await bus.claim("w2", MODEL, 1, block_ms=50) == []
    await bus.cancel(job.job_id)
    assert (await bus.heartbeat(make_card("w1"), [claim])).cancelled == (job.job_id,)


async def test_ended_leases_can_be_left_alone(bus: Bus) -> None:
    await bus.submit(make_job())
    await claim_one(bus, "w1")
    await asyncio.sleep(FAST_BUS.lease_s * 1.2)  # the lease runs out
    assert await bus.claim("w2", MODEL, 1, take_over=False) == []
    assert len(await bus.claim("w2", MODEL, 1)) == 1


async def test_an_append_may_be_repeated(bus: Bus) -> None:
    job = make_job()
    await bus.submit(job)
    claim = await claim_one(bus, "w1")
    outcome = job_pb2.Outcome(job_id=job.job_id)
    for _ in range(3):  # as after answers that were lost
        claim.next_offset = 1
        assert await status(bus, claim, tokens_event(0, 5), tokens_event(1, 6)) is AppendStatus.STORED
    for _ in range(3):
        claim.next_offset = 2
        (answer,) = await bus.append([Append(claim, [tokens_event(1, 6), finished_event()], outcome)])
        assert answer.status is AppendStatus.STORED
    assert (await result_of(bus, job.job_id)).token_ids == [5, 6]
    assert len(await bus.outcomes()) == 1
    assert await status(bus, claim, tokens_event(2, 7)) is AppendStatus.FENCED  # nothing after Finished


async def test_a_gap_is_refused(bus: Bus) -> None:
    await bus.submit(make_job())
    claim = await claim_one(bus, "w1")
    claim.next_offset = 3  # as if the store had lost the last events
    assert await status(bus, claim, tokens_event(2, 7)) is AppendStatus.GAP


async def test_a_store_that_forgot_the_job_says_so(forgetful_redis: RedisProcess) -> None:
    async with connected(forgetful_redis.url) as bus:
        job = make_job()
        await bus.submit(job)
        claim = await claim_one(bus, "w1")
        forgetful_redis.kill()
        forgetful_redis.start()
        assert await status(bus, claim, tokens_event(0, 1)) is AppendStatus.GONE
        assert (await bus.heartbeat(make_card("w1"), [claim])).lost == (job.job_id,)
        with pytest.raises(JobNotFoundError):
            await bus.record(job.job_id)


async def test_released_jobs_go_on_at_once_and_before_queued_ones(bus: Bus) -> None:
    jobs = [make_job(f"p{number}") for number in range(3)]
    for job in jobs:
        await bus.submit(job)
    first, second = await bus.claim("w1", MODEL, 2)
    await bus.release([second])
    claims = await bus.claim("w2", MODEL, 8)
    assert [(claim.job.job_id, claim.attempts) for claim in claims] == [(jobs[1].job_id, 1), (jobs[2].job_id, 1)]
    assert [claim.epoch for claim in (first, second, *claims)] == [1, 1, 3, 1]  # 1 at a job's first claim alone
    assert await status(bus, second, tokens_event(0, 1)) is AppendStatus.FENCED
    assert await status(bus, first, tokens_event(0, 1)) is AppendStatus.STORED
    await bus.release([second])  # lost claims are left alone
    assert await status(bus, claims[0], tokens_event(0, 1)) is AppendStatus.STORED


# ---- cancelling


async def test_cancel_ends_a_job_that_nobody_works_on(bus: Bus) -> None:
    queued, abandoned = make_job(), make_job()
    await bus.submit(abandoned)
    claim = await claim_one(bus, "dead")  # a worker without a card
    await status(bus, claim, tokens_event(0, 5))
    await bus.submit(queued)
    assert await bus.cancel(queued.job_id) == generation_pb2.JOB_STATE_QUEUED
    assert await bus.cancel(abandoned.job_id) == generation_pb2.JOB_STATE_RUNNING
    for job, tokens in ((queued, []), (abandoned, [5])):
        result = await result_of(bus, job.job_id)
        assert (result.finish_reason, result.token_ids) == ("cancelled", tokens)
        assert result.usage.generated_tokens == len(tokens)
        assert await bus.cancel(job.job_id) == generation_pb2.JOB_STATE_FINISHED
    assert await status(bus, claim, tokens_event(1, 6)) is AppendStatus.FENCED
    assert await bus.claim("w2", MODEL, 8) == []
    with pytest.raises(JobNotFoundError):
        await bus.cancel("job-unknown")


async def test_cancel_tells_the_worker(store: str, bus: Bus) -> None:
    job = make_job()
    await bus.submit(job)
    await bus.heartbeat(make_card("w1"), [])
    claim = await claim_one(bus, "w1")
    notices = bus.cancellations("w1")
    notice = asyncio.create_task(anext(notices))
    with redis.Redis.from_url(store) as client:
        await until(lambda: any(entry["cmd"] == "xread" for entry in client.client_list()))
    assert await bus.cancel(job.job_id) == generation_pb2.JOB_STATE_RUNNING
    async with asyncio.timeout(TIMEOUT_S):
        assert await notice == job.job_id
    await notices.aclose()
    (answer,) = await bus.append([Append(claim, [tokens_event(0, 1)])])
    assert (answer.status, answer.cancelled) == (AppendStatus.STORED, True)


# ---- sessions


async def test_a_session_goes_back_to_its_worker(bus: Bus) -> None:
    for name in ("w1", "w2"):
        await bus.heartbeat(make_card(name), [])
    await bus.submit(make_job(session_id="s"))
    await status(bus, await claim_one(bus, "w2"), finished_event())
    turn, other = make_job(session_id="s"), make_job()
    await bus.submit(turn)
    await bus.submit(other)
    assert [claim.job.job_id for claim in await bus.claim("w1", MODEL, 8)] == [other.job_id]
    assert [claim.job.job_id for claim in await bus.claim("w2", MODEL, 8)] == [turn.job_id]


async def test_a_session_does_not_wait_long_for_a_busy_worker(bus: Bus) -> None:
    for name in ("w1", "w2"):
        await bus.heartbeat(make_card(name), [])
    await bus.submit(make_job(session_id="s"))
    await claim_one(bus, "w2")
    turn = make_job(session_id="s")
    await bus.submit(turn)
    waited = asyncio.get_running_loop().time()
    assert (await claim_one(bus, "w1")).job.job_id == turn.job_id  # w2 does not ask for more
    assert asyncio.get_running_loop().time() - waited >= FAST_BUS.affinity_s / 2


async def test_a_session_does_not_wait_for_a_worker_that_is_gone(bus: Bus) -> None:
    for name in ("w1", "w2"):
        await bus.heartbeat(make_card(name), [])
    await bus.submit(make_job(session_id="s"))
    await status(bus, await claim_one(bus, "w2"), finished_event())
    queued = make_job(session_id="s")
    await bus.submit(queued)
    await bus.retire("w2")
    later = make_job(session_id="s")
    await bus.submit(later)
    claims = await bus.claim("w1", MODEL, 8)
    assert {claim.job.job_id for claim in claims} == {queued.job_id, later.job_id}
    for claim in claims:
        await status(bus, claim, finished_event())
    await bus.claim("w1", MODEL, 8)
    assert [card.hello.worker for card in await bus.cards()] == ["w1"]


# ---- workers


async def test_cards_live_as_long_as_heartbeats_and_models_stay(bus: Bus) -> None:
    assert await bus.cards() == []
    assert await bus.models() == {}
    await bus.heartbeat(make_card("w1"), [])
    await bus.heartbeat(make_card("w2"), [])
    assert [card.hello.worker for card in await bus.cards()] == ["w1", "w2"]
    await bus.retire("w1")
    assert [card.hello.worker for card in await bus.cards()] == ["w2"]
    await asyncio.sleep(FAST_BUS.lease_s * 1.2)  # the card runs out
    assert await bus.cards() == []
    assert list(await bus.models()) == [MODEL]


# ---- operators' orders


async def test_orders_are_kept_changed_and_removed(bus: Bus) -> None:
    assert await bus.orders() == Orders(None, {})
    one, two = job_pb2.Override(pipeline="int8", reason="a"), job_pb2.Override(pipeline="full", reason="b")
    await bus.keep_orders(Mode.MODE_OFF, {"job-1": one, "job-2": one})
    await bus.keep_orders(None, {"job-1": None, "job-2": two, "job-9": None})
    assert await bus.orders() == Orders(Mode.MODE_OFF, {"job-2": two})
    assert await bus.overridden() == {"job-2"}
    await bus.keep_orders(Mode.MODE_ACTIVE, {"job-2": None})
    assert await bus.orders() == Orders(Mode.MODE_ACTIVE, {})


async def test_ended_jobs_are_those_that_finished_or_are_unknown(bus: Bus) -> None:
    queued, finished = make_job(), make_job()
    await bus.submit(finished)
    claim = await claim_one(bus, "w1")
    assert await bus.ended([finished.job_id]) == set()
    await status(bus, claim, finished_event())
    await bus.submit(queued)
    assert await bus.ended([queued.job_id, finished.job_id, "job-9"]) == {finished.job_id, "job-9"}
    assert await bus.ended([]) == set()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("SET", keys.MODE, "MODE_WARP"), "expected one of MODE_UNSPECIFIED, MODE_OFF"),
        (("HSET", keys.OVERRIDES, "job-1", b"\xff"), "'job-1'"),
        (("SET", keys.OVERRIDES, "text"), "refused"),
    ],
)
async def test_orders_that_cannot_be_read_are_named(bus: Bus, command: tuple[str | bytes, ...], words: str) -> None:
    await bus._client.execute_command(*command)
    with pytest.raises(BusError, match=words):
        await bus.orders()


# ---- outages


async def test_orders_survive_kill_minus_nine(durable_redis: RedisProcess) -> None:
    async with connected(durable_redis.url) as bus:
        durable_redis.write_at_once()
        kept = {"job-1": job_pb2.Override(pipeline="int8", reason="a")}
        await bus.keep_orders(Mode.MODE_OFF, kept)
        durable_redis.kill()
        with pytest.raises(BusUnavailableError):
            await bus.orders()
        with pytest.raises(BusUnavailableError):
            await bus.keep_orders(Mode.MODE_ACTIVE, {})
        durable_redis.start()
        assert await bus.orders() == Orders(Mode.MODE_OFF, kept)


async def test_a_bus_opens_before_its_store_is_there(forgetful_redis: RedisProcess) -> None:
    forgetful_redis.kill()
    bus = Bus.open(forgetful_redis.url, FAST_BUS)
    with pytest.raises(BusUnavailableError):
        await bus.ping()
    forgetful_redis.start()
    await bus.ping()
    await bus.close()


async def test_a_store_that_is_not_there() -> None:
    with pytest.raises(BusUnavailableError):
        await Bus.connect(f"redis://127.0.0.1:{free_port()}/0", BusSettings(retries=0, timeout_s=1.0))


async def read_notices(bus: Bus) -> None:
    await anext(bus.cancellations("w1"))


async def watch_nothing(bus: Bus) -> None:
    async with bus._watcher.watch("job-1", 0):
        pass


async def commit_late(bus: Bus) -> None:
    """A transaction that the store takes command by command, and as a whole no more."""
    with translated_errors():
        async with bus._client.client() as connection:
            await connection.execute_command("MULTI")
            await connection.execute_command("SET", "key", "value")
            await bus._client.config_set("min-replicas-to-write", 1)
            await connection.execute_command("EXEC")


CALLS: dict[str, Callable[[Bus], Awaitable[Any]]] = {
    "script": lambda bus: bus.submit(make_job()),
    "transaction": lambda bus: bus.keep_orders(Mode.MODE_OFF, {}),
    "pipeline": watch_nothing,
    "command": lambda bus: bus.order_log_level(LogLevelOrder(level=LOG_LEVEL_DEBUG)),
    "read": lambda bus: bus.models(),
}


async def assert_waits(bus: Bus, call: Callable[[Bus], Awaitable[Any]], words: str) -> None:
    """A call that cannot be done now says so, and counts as such."""
    unavailable, refused = STORE_COUNTS.unavailable, STORE_COUNTS.refused
    with pytest.raises(BusUnavailableError, match=words):
        await call(bus)
    assert STORE_COUNTS.unavailable > unavailable
    assert STORE_COUNTS.refused == refused


@pytest.mark.parametrize("call", ["script", "transaction", "pipeline", "command"])
async def test_a_store_without_enough_replicas_is_unavailable(forgetful_redis: RedisProcess, call: str) -> None:
    async with connected(forgetful_redis.url) as bus:
        await bus._client.config_set("min-replicas-to-write", 1)
        await assert_waits(bus, CALLS[call], "NOREPLICAS")
        await bus._client.config_set("min-replicas-to-write", 0)
        await CALLS[call](bus)


async def test_a_transaction_that_comes_too_late_is_unavailable(forgetful_redis: RedisProcess) -> None:
    async with connected(forgetful_redis.url) as bus:
        await assert_waits(bus, commit_late, "NOREPLICAS")


@pytest.mark.parametrize("call", CALLS)
async def test_a_store_that_is_busy_with_a_script_is_unavailable(forgetful_redis: RedisProcess, call: str) -> None:
    with redis.Redis.from_url(forgetful_redis.url) as client:
        client.config_set("busy-reply-threshold", 1)
    async with connected(forgetful_redis.url) as bus, asyncio.TaskGroup() as tasks:
        tasks.create_task(asyncio.to_thread(run_until_killed, forgetful_redis.url))
        await until(lambda: is_busy(forgetful_redis.url))
        await assert_waits(bus, CALLS[call], "BUSY")
        await bus._client.script_kill()


def run_until_killed(url: str) -> None:
    with redis.Redis.from_url(url) as client, pytest.raises(redis.ResponseError, match="killed"):
        client.eval("while true do end", 0)


def is_busy(url: str) -> bool:
    with redis.Redis.from_url(url) as client:
        try:
            return not client.ping()
        except redis.ResponseError:
            return True


async def test_a_primary_that_becomes_a_replica_is_unavailable(forgetful_redis: RedisProcess) -> None:
    async with connected(forgetful_redis.url) as bus:
        with redis.Redis.from_url(forgetful_redis.url) as client:
            waiting = asyncio.create_task(assert_waits(bus, read_notices, "UNBLOCKED"))
            await until(lambda: bool(blocked_reads(client)))
            client.replicaof("127.0.0.1", free_port())
            await waiting
            for call in ("script", "transaction", "pipeline", "command"):
                await assert_waits(bus, CALLS[call], "read only replica")
            client.config_set("replica-serve-stale-data", "no")
            await assert_waits(bus, CALLS["read"], "Link with MASTER is down")
            client.replicaof("no", "one")
        await bus.submit(make_job())


async def test_what_will_never_work_is_refused(bus: Bus) -> None:
    await bus._client.xgroup_create("stream", "group", mkstream=True)
    with pytest.raises(BusError, match="BUSYGROUP") as caught, translated_errors():
        await bus._client.xgroup_create("stream", "group")
    assert not isinstance(caught.value, BusUnavailableError)


async def test_kill_minus_nine_loses_no_accepted_job_and_no_event(durable_redis: RedisProcess) -> None:
    async with connected(durable_redis.url) as bus:
        job, queued = make_job(), make_job()
        await bus.submit(job)
        claim = await claim_one(bus, "w1")
        await bus.submit(queued)
        await status(bus, claim, tokens_event(0, 5, 6))
        reader = asyncio.create_task(result_of(bus, job.job_id))
        await until(lambda: bool(bus._watcher._watches))
        durable_redis.kill()
        with pytest.raises(BusUnavailableError):
            await status(bus, claim, tokens_event(2, 7))
        durable_redis.start()
        assert await status(bus, claim, tokens_event(2, 7)) is AppendStatus.STORED
        await status(bus, claim, finished_event())
        assert (await reader).token_ids == [5, 6, 7]
        assert (await bus.record(queued.job_id)).state == generation_pb2.JOB_STATE_QUEUED
        assert (await claim_one(bus, "w1")).job.job_id == queued.job_id


async def test_a_stream_gives_up_on_a_store_that_stays_away(forgetful_redis: RedisProcess) -> None:
    impatient = BusSettings(retries=0, patience_s=0.3, block_s=0.1, timeout_s=1.0)
    async with connected(forgetful_redis.url, impatient) as bus:
        job = make_job()
        await bus.submit(job)
        stream = bus.events(job.job_id)
        await anext(stream)
        forgetful_redis.kill()
        with pytest.raises(BusUnavailableError):
            await anext(stream)


# ---- names


def test_scripts_and_keys_spell_the_same_names() -> None:
    everything = "".join(
        getattr(scripts, name) for name in ("SUBMIT", "CLAIM", "APPEND", "HEARTBEAT", "RELEASE", "CANCEL", "RETIRE")
    )
    spelled = set(re.findall(r"'(kvpilot:[a-z:-]+)'", everything))
    named = {keys.WORKERS, keys.MODELS, keys.OUTCOMES, keys.TAKERS, keys.LEAVING}
    makers = (keys.job, keys.events, keys.queue, keys.queue_for, keys.card, keys.notices, keys.turns, keys.released)
    named |= {make("") for make in makers}
    assert spelled == named
    suffixes = re.search(r"SUFFIXES = \{(.*)\}", everything)
    assert suffixes is not None
    assert re.findall(r"'([a-z:]*)'", suffixes[1]) == [priority.suffix for priority in keys.Priority]
    assert set(re.findall(r"'XGROUP', 'CREATE', queue, '(\w+)'", everything)) == {keys.GROUP}


def test_job_ids_are_unique_and_well_formed() -> None:
    ids = [new_job_id() for _ in range(1000)]
    assert len(set(ids)) == 1000
    assert all(re.fullmatch(r"job-[0-9a-hjkmnp-tv-z]{26}", job_id) for job_id in ids)
