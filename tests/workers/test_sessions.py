"""Sessions between turns: what comes back is what was there, answers are those of a cold run, and budgets hold."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kernels.layout import BLOCK_TOKENS, Format, Tier
from kvpilot.v1 import generation_pb2
from tests.tiny import Drive, prompt, tiny_engine, tiny_loaded
from workers.cache.parked import SessionKey
from workers.engine.engine import Engine
from workers.engine.sequence import Sequence

pytestmark = pytest.mark.usefixtures("one_torch_thread")

LOADED = tiny_loaded()
ROW_BYTES = 2 * 2 * 2 * BLOCK_TOKENS * 16 * 4
"""Of the tiny model: layers, heads, keys and values, tokens, channels, bytes of a number."""
TURN = 300
ANSWER = 40


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Stage:
    """An engine with sessions whose time the test tells, and a disk of its own."""

    def __init__(self, folder: Path, **settings) -> None:
        settings = {"disk_budget_bytes": 16 << 20, "session_host_s": 10.0, "session_keep_s": 100.0} | settings
        self.engine = tiny_engine(LOADED, disk_folder=folder, **settings)
        self.drive = Drive(self.engine)
        self.sessions = self.engine.sessions
        self.clock = self.sessions._clock = Clock()
        self.folder = folder
        self._jobs = 0

    def turn(self, token_ids: list[int], session_id: str = "s", max_tokens: int = ANSWER, **request):
        """One turn, to its end."""
        self._jobs += 1
        name = f"turn-{self._jobs}"
        self.drive.submit(name, token_ids, max_tokens, session_id=session_id, top_logprobs=1, **request)
        return self.drive.finish()[name]

    def forget_prefixes(self) -> None:
        """Nothing but sessions is left to start from."""
        self.engine.cache.prefixes.drop(1 << 40)

    def pass_time(self, seconds: float) -> None:
        """Lets time pass, and all that is then under way end."""
        self.clock.now_s += seconds
        self.sessions.tick()
        while self.sessions._writing:
            self.sessions._writing[0][2].written.exception()
            self.clock.now_s += 1e-9
            self.sessions.tick()

    def files(self) -> list[Path]:
        return sorted(self.folder.rglob("*.blocks"))


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path)
    yield stage
    stage.engine.stop(1)


def next_turn(token_ids: list[int], outcome, seed: int = 9, more: int = 60) -> list[int]:
    """The conversation so far and what its client says next."""
    return [*token_ids, *outcome.token_ids, *prompt(more, seed)]


def cold(token_ids: list[int], **request):
    """The same turn where nothing was before."""
    drive = Drive(tiny_engine(LOADED))
    drive.submit("cold", token_ids, ANSWER, top_logprobs=1, **request)
    return drive.finish()["cold"]


def assert_same(outcome, reference) -> None:
    assert outcome.token_ids == reference.token_ids
    for token, other in zip(outcome.tokens, reference.tokens, strict=True):
        assert token.logprob == pytest.approx(other.logprob, abs=2e-4)


def rows_of(engine: Engine, seq: Sequence, rows: int) -> np.ndarray:
    """The raw blocks of a request's first rows: uint8 [rows, L, H, bytes]."""
    tables, slot = engine.cache.tables, seq.cache.slot
    assert not tables.format[slot, :, :, :rows].any()
    blocks = np.zeros((rows, 2, 2, ROW_BYTES // 4), np.uint8)
    for row, layer, head in np.ndindex(rows, 2, 2):
        tier, address = Tier(int(tables.tier[slot, layer, head, row])), tables.address[slot, layer, head, row]
        blocks[row, layer, head] = engine.cache.backend.load(tier, np.array([address]), Format.RAW).numpy()
    return blocks


EXACT = ["", "host(recent=64)"]
PIPELINES = [
    *EXACT,
    "kivi(bits=4)",
    "h2o(keep=0.5)",
    "snapkv(keep=0.5)",
    "kivi | host(recent=64)",
    "window(recent=64)",
    "conversation",
]


# -- what a turn answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("from_disk", [False, True])
def test_a_resumed_turn_answers_as_a_cold_one(stage: Stage, pipeline: str, from_disk: bool) -> None:
    first = prompt(TURN)
    answer = stage.turn(first, pipeline=pipeline)
    stage.forget_prefixes()
    if from_disk:
        stage.pass_time(11)
        assert stage.engine.cache.host.used_bytes == stage.sessions.host_bytes == 0
        assert stage.sessions.disk_bytes == stage.engine._disk.used_bytes > 0
    second = next_turn(first, answer)
    resumed = stage.turn(second, pipeline=pipeline)
    assert_same(resumed, cold(second, pipeline=pipeline))
    # What lossy steps have written is not what the full cache would have: it is computed again.
    exact = TURN + ANSWER - 1 if pipeline in EXACT else TURN
    assert resumed.finished.usage.reused_prompt_tokens == exact // BLOCK_TOKENS * BLOCK_TOKENS
    assert stage.sessions.counts.restored == 1
    assert not stage.files()
    third = next_turn(second, resumed)
    assert_same(stage.turn(third, pipeline=pipeline), cold(third, pipeline=pipeline))


@pytest.mark.parametrize("after", PIPELINES)
def test_a_turn_may_have_another_pipeline_than_the_one_before(stage: Stage, after: str) -> None:
    first = prompt(TURN)
    answer = stage.turn(first, pipeline="kivi(bits=4)")
    stage.forget_prefixes()
    second = next_turn(first, answer)
    resumed = stage.turn(second, pipeline=after)
    assert_same(resumed, cold(second, pipeline=after))
    # What the prompt's queries paid to each token was not counted, so h2o computes it all again.
    assert resumed.finished.usage.reused_prompt_tokens == (0 if after.startswith("h2o") else 288)


@pytest.mark.parametrize("from_disk", [False, True])
def test_restored_blocks_are_those_that_were_parked(stage: Stage, from_disk: bool) -> None:
    stage.sessions._piece_rows = 3
    first, rows = prompt(TURN), TURN // BLOCK_TOKENS
    stage.drive.submit("first", first, ANSWER, session_id="s", pipeline="h2o(keep=0.5)")
    stage.drive.until(lambda: stage.drive.generated("first") == 1)
    before = stage.engine._live["first"]
    shadow, masses = before.cache.shadow, before.cache.row_mass
    blocks = stage.engine.cache.backend.load(Tier.HOST, shadow.address[:rows].reshape(-1), Format.RAW).numpy()
    stage.drive.finish()
    stage.forget_prefixes()
    if from_disk:
        stage.pass_time(11)
        stage.pass_time(1)
        stage.pass_time(1)
        stage.pass_time(1)
        assert len(stage.files()) == 3
        assert stage.sessions.host_bytes == 0
    second = [*first, *stage.drive.outcomes["first"].token_ids, *prompt(300, 4)]
    stage.drive.submit("second", second, ANSWER, session_id="s", pipeline="host(recent=32)")
    after = stage.engine._live["second"]
    while not after.computed:  # nothing to compute while the disk is read
        stage.engine.step()
    np.testing.assert_array_equal(rows_of(stage.engine, after, rows).reshape(blocks.shape), blocks)
    np.testing.assert_array_equal(stage.engine.cache.tables.position[after.cache.slot, 1, 1, :288], np.arange(288))
    assert masses.shape == (2, 2, 288)


def test_masses_come_back_as_they_were(stage: Stage) -> None:
    """An evictor that goes by all of the prompt's queries starts from what those of the parked rows have paid."""
    first = prompt(TURN)
    answer = stage.turn(first, pipeline="h2o(keep=0.5)")
    tokens = next_turn(first, answer)
    taken = []
    resume = stage.engine.cache.resume
    stage.engine.cache.resume = lambda seq, shadow, mass: taken.append(mass) or resume(seq, shadow, mass)
    stage.turn(tokens, pipeline="h2o(keep=0.5)")
    # Queries of the first 288 tokens alone, computed another way: the same prompt cut off there.
    drive = Drive(tiny_engine(LOADED))
    drive.submit("cut", first[:288], 8, pipeline="h2o(keep=1.0)")
    drive.until(lambda: drive.generated("cut") == 1)
    seq = drive.engine._live["cut"]
    [mass] = taken
    np.testing.assert_allclose(mass, drive.engine.cache.tables.mass[seq.cache.slot, :, :, :288], rtol=1e-4, atol=1e-5)
    assert mass.sum() == pytest.approx(2 * 4 * 288, rel=1e-4)  # a query pays 1 in each layer and query head


def test_a_conversation_that_turns_back_starts_from_what_is_common(stage: Stage) -> None:
    first = prompt(TURN)
    answer = stage.turn(first)
    second = next_turn(first, answer)
    stage.turn(second)
    stage.forget_prefixes()
    edited = [*first, *prompt(100, seed=77)]
    resumed = stage.turn(edited)
    assert resumed.finished.usage.reused_prompt_tokens == 288
    assert_same(resumed, cold(edited))
    stage.forget_prefixes()
    elsewhere = prompt(TURN, seed=78)
    assert stage.turn(elsewhere).finished.usage.reused_prompt_tokens == 0


def test_the_last_token_is_left_to_compute(stage: Stage) -> None:
    answer = stage.turn(prompt(64), max_tokens=33)
    stage.forget_prefixes()
    again = [*prompt(64), *answer.token_ids[:32]]  # 96 tokens, all of them parked
    resumed = stage.turn(again, max_tokens=1)
    assert resumed.finished.usage.reused_prompt_tokens == 64
    assert resumed.token_ids == answer.token_ids[32:]


def test_the_longer_of_session_and_prefixes_is_reused(stage: Stage) -> None:
    answer = stage.turn(prompt(TURN))
    second = next_turn(prompt(TURN), answer)
    resumed = stage.turn(second)  # all its rows are published too: nothing need be moved
    assert (resumed.finished.usage.reused_prompt_tokens, stage.sessions.counts.restored) == (320, 0)
    third = next_turn(second, resumed)
    stage.engine.cache.prefixes.drop(3 * ROW_BYTES)
    assert stage.turn(third).finished.usage.reused_prompt_tokens == 416
    assert stage.sessions.counts.restored == 1


def test_a_turn_is_parked_a_slice_a_step(stage: Stage) -> None:
    """So that no other request stands still for all of it."""
    stage.sessions._slice_rows = 1
    stage.drive.submit("other", prompt(40, 3), 200)
    stage.drive.until(lambda: stage.drive.generated("other") > 0)
    first, host = prompt(TURN), stage.engine.cache.host
    stage.drive.submit("turn", first, ANSWER, session_id="s")
    stage.drive.until(lambda: stage.sessions.parking)
    seen = []
    while stage.sessions.parking:
        before = stage.drive.generated("other")
        assert stage.engine.step()
        seen.append(host.used_bytes // ROW_BYTES)
        assert stage.drive.generated("other") == before + 1
    assert seen == [*range(1, 11), 10]  # the last look finds no more
    stage.drive.finish()
    assert stage.engine.cache.device.used_bytes == stage.engine.cache.prefixes.unused_bytes()


def test_the_next_turn_may_come_while_the_last_one_is_parked(stage: Stage) -> None:
    stage.sessions._slice_rows = 1
    first = prompt(TURN)
    stage.drive.submit("first", first, ANSWER, session_id="s", pipeline="host(recent=320)")
    stage.drive.until(lambda: stage.sessions.parking)
    second = next_turn(first, stage.drive.outcomes["first"])
    resumed = stage.turn(second, pipeline="host(recent=320)")
    assert resumed.finished.usage.reused_prompt_tokens == 320
    assert_same(resumed, cold(second, pipeline="host(recent=320)"))


@pytest.mark.parametrize("tier", ["device", "host"])
def test_a_turn_that_is_parked_gives_way_at_once(stage: Stage, tier: str) -> None:
    stage.sessions._slice_rows = 2
    stage.drive.submit("turn", prompt(TURN), ANSWER, session_id="s")
    stage.drive.until(lambda: stage.sessions.parking)
    stage.engine.step()
    cache = stage.engine.cache
    assert cache.host.used_bytes == 2 * ROW_BYTES
    stage.forget_prefixes()
    if tier == "device":
        assert cache.device.used_bytes
        assert stage.engine._memory._relieve(1)
        stage.forget_prefixes()
        assert cache.device.used_bytes == 0
        assert stage.sessions.host_bytes == 10 * ROW_BYTES
    else:
        lot = cache.host.open_lot(Format.RAW)
        cache.host.allocate(lot, cache.host.budget_bytes // (ROW_BYTES // 4))  # all there is
        assert stage.sessions.host_bytes == 0
        assert stage.sessions.parked == 1  # two rows of it, on their way to disk
        cache.host.close_lot(lot)
    assert not stage.sessions.parking


def test_nothing_is_read_from_disk_that_prefixes_have(stage: Stage) -> None:
    answer = stage.turn(prompt(TURN))
    stage.pass_time(11)
    assert stage.sessions.disk_bytes
    resumed = stage.turn(next_turn(prompt(TURN), answer))
    assert resumed.finished.usage.reused_prompt_tokens == 320
    assert stage.engine.disk_counts.read_bytes == 0


def test_a_session_on_its_way_from_disk_is_not_promised_to_others(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    stage.sessions._piece_rows = 2
    first = prompt(TURN)
    stage.turn(first)
    assert stage.engine.cache.host.guest_bytes == stage.sessions.host_bytes == 10 * ROW_BYTES
    stage.sessions.give_up(4 * ROW_BYTES)
    assert stage.engine.cache.host.guest_bytes == stage.sessions.host_bytes == 6 * ROW_BYTES
    assert stage.sessions.fetch(SessionKey("", "s"), first)
    assert stage.engine.cache.host.guest_bytes == 0
    before = stage.sessions.host_bytes
    stage.sessions.give_up(1 << 30)
    assert stage.sessions.host_bytes == before
    stage.engine.stop(1)


def test_a_cancelled_turn_is_parked_as_far_as_it_came(stage: Stage) -> None:
    first = prompt(1000)
    stage.drive.submit("cancelled", first, session_id="s")
    stage.engine.step()  # 256 tokens of the prompt
    stage.engine.cancel("cancelled")
    stage.drive.finish()
    stage.forget_prefixes()
    resumed = stage.turn(first)
    assert resumed.finished.usage.reused_prompt_tokens == 256
    assert_same(resumed, cold(first))


def test_a_request_without_a_session_is_not_parked(stage: Stage) -> None:
    stage.turn(prompt(TURN), session_id="")
    assert stage.sessions.parked == stage.sessions.counts.parked == 0
    assert stage.engine.cache.host.used_bytes == 0


def test_what_is_lost_for_good_is_not_parked_and_the_turn_before_stays(stage: Stage) -> None:
    first = prompt(TURN)
    answer = stage.turn(first)
    second = next_turn(first, answer)
    stage.forget_prefixes()
    lost = stage.turn(second, pipeline="kivi(bits=2, shadow=false)")
    assert lost.finished.usage.reused_prompt_tokens == 320
    assert stage.sessions.parked == 0  # it took what there was along
    assert stage.engine.cache.host.used_bytes == 0


# -- whose it is -------------------------------------------------------------------------------------------------------


def test_no_other_session_and_no_other_caller_reads_it(stage: Stage) -> None:
    first = prompt(TURN)
    stage.turn(first, session_id="mine")
    stage.forget_prefixes()
    assert stage.turn(first, session_id="yours").finished.usage.reused_prompt_tokens == 0
    stage.forget_prefixes()
    assert stage.turn(first, session_id="").finished.usage.reused_prompt_tokens == 0
    assert stage.sessions.ready_rows(SessionKey("", "mine"), first) == 9
    assert stage.sessions.ready_rows(SessionKey("someone else", "mine"), first) == 0
    assert not stage.sessions.fetch(SessionKey("someone else", "mine"), first)


# -- time and room -----------------------------------------------------------------------------------------------------


def test_sessions_go_to_disk_by_age_and_end_with_their_time(stage: Stage) -> None:
    stage.turn(prompt(TURN), "old")
    stage.pass_time(6)
    stage.turn(prompt(TURN, 1), "young")
    stage.pass_time(6)
    assert stage.sessions.disk_bytes == stage.engine._disk.used_bytes == sum(f.stat().st_size for f in stage.files())
    assert stage.sessions.host_bytes == 10 * ROW_BYTES  # of the younger one: 300 + 39 tokens
    stage.pass_time(90)
    assert (stage.sessions.parked, stage.sessions.counts.expired) == (1, 1)
    stage.pass_time(10)
    assert (stage.sessions.parked, stage.sessions.counts.expired) == (0, 2)
    assert not stage.files()
    assert stage.engine.cache.host.used_bytes == stage.engine._disk.used_bytes == 0


def test_a_worker_tells_of_sessions_that_move_while_it_has_nothing_to_do(stage: Stage) -> None:
    stage.turn(prompt(TURN))
    stage.pass_time(11)
    reports = len(stage.drive.reports)
    assert not stage.engine.step()
    assert len(stage.drive.reports) == reports + 1
    told = stage.drive.reports[-1].worker.sessions
    assert (told.parked, told.host_bytes, told.disk_bytes) == (1, 0, stage.sessions.disk_bytes)
    stage.clock.now_s += 11
    assert not stage.engine.step()
    assert len(stage.drive.reports) == reports + 1


@pytest.mark.parametrize("disk_bytes", [0, 16 << 20])
def test_a_request_that_needs_the_host_gets_it_all(tmp_path: Path, disk_bytes: int) -> None:
    host_rows = 24
    stage = Stage(tmp_path, host_budget_bytes=host_rows * ROW_BYTES, disk_budget_bytes=disk_bytes)
    stage.sessions._piece_rows = 2
    first, answers = [prompt(TURN, seed) for seed in (1, 2)], []
    for name, token_ids in zip("ab", first, strict=True):
        answers.append(stage.turn(token_ids, name))
    assert stage.sessions.host_bytes == 20 * ROW_BYTES
    state = stage.drive.reports[-1].worker.tiers[1]
    assert (state.name, state.used_bytes) == ("host", 0)  # a planner need not heed what gives way
    alone = tiny_engine(LOADED, host_budget_bytes=host_rows * ROW_BYTES)
    big = prompt((host_rows - 2) * BLOCK_TOKENS, 3)
    used = stage.turn(big, "", pipeline="kivi(bits=4)").finished.cache.shadow_bytes
    drive = Drive(alone)
    drive.submit("big", big, ANSWER, pipeline="kivi(bits=4)")
    assert used == drive.finish()["big"].finished.cache.shadow_bytes > 21 * ROW_BYTES
    assert stage.sessions.host_bytes == 0
    assert stage.sessions.parked == (2 if disk_bytes else 0)
    assert stage.sessions.counts.dropped == (0 if disk_bytes else 10)
    stage.forget_prefixes()
    second = next_turn(first[0], answers[0])
    resumed = stage.turn(second, "a")
    assert_same(resumed, cold(second))
    assert resumed.finished.usage.reused_prompt_tokens == (320 if disk_bytes else 0)
    stage.engine.stop(1)


def test_sessions_leave_a_short_host_before_anybody_asks(tmp_path: Path) -> None:
    stage = Stage(tmp_path, host_budget_bytes=24 * ROW_BYTES)
    stage.sessions._piece_rows = 2
    for number in range(3):
        stage.turn(prompt(TURN, number), str(number))
        stage.pass_time(0.5)
    assert stage.sessions.counts.dropped == 0
    assert stage.engine.cache.host.free_bytes >= 3 * ROW_BYTES
    assert [entry.host_rows() < 10 for entry in stage.sessions._entries.values()] == [True, True, False]
    stage.engine.stop(1)


def test_budgets_hold_and_the_oldest_sessions_go(tmp_path: Path) -> None:
    disk_bytes = 26 * ROW_BYTES
    stage = Stage(tmp_path, host_budget_bytes=24 * ROW_BYTES, disk_budget_bytes=disk_bytes)
    stage.sessions._piece_rows = 2
    for number in range(12):
        stage.turn(prompt(TURN, number), str(number))
        stage.pass_time(4)
        assert sum(file.stat().st_size for file in stage.files()) <= stage.engine._disk.used_bytes <= disk_bytes
        assert stage.sessions.host_bytes == stage.engine.cache.host.used_bytes
    kept = [int(key.session_id) for key in stage.sessions._entries]
    assert kept == list(range(12 - len(kept), 12))
    assert 3 <= len(kept) <= 5
    assert stage.sessions.counts.dropped > 0
    stage.sessions.clear()
    stage.pass_time(1)
    assert stage.engine.cache.host.used_bytes == stage.engine._disk.used_bytes == 0
    assert not stage.files()
    stage.engine.stop(1)


def test_a_session_that_the_host_has_no_room_for_is_restored_in_part(tmp_path: Path) -> None:
    stage = Stage(tmp_path, host_budget_bytes=24 * ROW_BYTES)
    stage.sessions._piece_rows = 2
    first = prompt(TURN)
    answer = stage.turn(first)
    for _ in range(5):
        stage.pass_time(11)
    stage.forget_prefixes()
    stage.drive.submit("holder", prompt(20 * BLOCK_TOKENS, 5), 400, pipeline="kivi(bits=4)")
    stage.drive.until(lambda: stage.drive.generated("holder") == 1)
    second = next_turn(first, answer)
    resumed = stage.turn(second)
    assert resumed.finished.usage.reused_prompt_tokens == 4 * BLOCK_TOKENS
    assert_same(resumed, cold(second))
    stage.engine.stop(1)


def test_a_disk_that_does_not_keep_up_costs_sessions_and_no_request_waits(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("workers.cache.sessions.PATIENCE_S", 0.0)
    monkeypatch.setattr("workers.cache.sessions.STAGED_BYTES", 1)  # one piece at a time
    stage = Stage(tmp_path)
    stage.sessions._piece_rows = 2
    release = threading.Event()
    write = stage.engine._disk._write
    monkeypatch.setattr(stage.engine._disk, "_write", lambda *arguments: release.wait(30) and write(*arguments))
    first = prompt(TURN)
    answer = stage.turn(first)
    stage.sessions.give_up(4 * ROW_BYTES)
    assert stage.sessions.host_bytes == 6 * ROW_BYTES
    assert stage.sessions.counts.dropped == 1  # the last but one piece, and the last with it
    release.set()
    stage.forget_prefixes()
    second = next_turn(first, answer)
    resumed = stage.turn(second)
    assert resumed.finished.usage.reused_prompt_tokens == 6 * BLOCK_TOKENS
    assert_same(resumed, cold(second))
    stage.engine.stop(1)


# -- what a disk does to it --------------------------------------------------------------------------------------------


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [_flip, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])])
@pytest.mark.parametrize("which", [0, 3])
def test_damage_on_disk_is_found_and_computed_again(stage: Stage, damage, which: int) -> None:
    stage.sessions._piece_rows = 2
    first = prompt(TURN)
    answer = stage.turn(first)
    stage.forget_prefixes()
    for _ in range(5):
        stage.pass_time(11)
    damage(stage.files()[4 - which])  # the last piece was written first
    second = next_turn(first, answer)
    resumed = stage.turn(second)
    assert_same(resumed, cold(second))
    assert resumed.finished.usage.reused_prompt_tokens == 2 * which * BLOCK_TOKENS
    assert stage.sessions.counts.corrupt == 1
    stage.forget_prefixes()
    third = next_turn(second, resumed)
    assert stage.turn(third).finished.usage.reused_prompt_tokens == 416  # the turn was parked whole
    told = stage.engine._reporter.worker_state(0, 0).sessions
    assert (told.parked, told.restored_turns, told.corrupt_pieces) == (1, 2 if which else 1, 1)
    assert told.restored_tokens == 416 + 2 * which * BLOCK_TOKENS
    assert (told.host_bytes, told.disk_bytes) == (stage.sessions.host_bytes, 0)
    assert not stage.files()


def test_a_disk_that_cannot_be_written_to_leaves_sessions_on_the_host(stage: Stage) -> None:
    first = prompt(TURN)
    answer = stage.turn(first)
    stage.forget_prefixes()
    shutil.rmtree(stage.engine._disk._folder)
    stage.pass_time(11)
    assert stage.sessions.host_bytes == 10 * ROW_BYTES
    assert stage.engine._disk.used_bytes == 0
    second = next_turn(first, answer)
    assert stage.turn(second).finished.usage.reused_prompt_tokens == 320


def test_a_request_that_is_cancelled_while_its_session_is_read_leaves_it_there(stage: Stage) -> None:
    first = prompt(TURN)
    answer = stage.turn(first)
    stage.forget_prefixes()
    stage.pass_time(11)
    second = next_turn(first, answer)
    stage.drive.submit("impatient", second, session_id="s")
    stage.engine.cancel("impatient")
    outcome = stage.drive.finish()["impatient"]
    assert outcome.finished.reason == generation_pb2.FINISH_REASON_CANCELLED
    resumed = stage.turn(second)
    assert resumed.finished.usage.reused_prompt_tokens == 320
    assert_same(resumed, cold(second))


def test_a_folder_that_cannot_be_written_to_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"disk_folder .*/file/blocks'.*disk_budget_bytes = 0"):
        tiny_engine(LOADED, disk_folder=tmp_path / "file" / "blocks", disk_budget_bytes=1 << 20)
