"""The scheduler over a memory that is a few integers: who runs, who waits, who gives way."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpilot.v1 import common_pb2
from workers.engine.sampler import SamplingParameters
from workers.engine.scheduler import Scheduler, Step
from workers.engine.sequence import Phase, Sequence
from workers.stages.base import Pipeline

BLOCK = 4  # tokens that a unit of memory holds; any granularity will do
fixed = settings(derandomize=True, max_examples=60, deadline=None, database=None)


@dataclass
class PlainMemory:
    """``blocks`` of memory, one byte each. A prefix of ``shared`` tokens costs its users nothing once it is known."""

    blocks: int
    watermark: int = 0
    held: dict[str, int] = field(default_factory=dict)
    reused: dict[str, int] = field(default_factory=dict)
    prefix: dict[str, int] = field(default_factory=dict)
    """Tokens that a job finds computed at admission."""
    prefix_blocks: int = 0
    """Blocks of published prefixes: free while nobody uses them."""

    def free_bytes(self) -> int:
        lent = self.prefix_blocks if any(self.reused.values()) else 0
        return self.blocks - sum(self.held.values()) - lent

    def room_bytes(self) -> int:
        return self.free_bytes()

    def watermark_bytes(self) -> int:
        return self.watermark

    def prompt_bytes(self, tokens: int) -> int:
        return -(-tokens // BLOCK)

    def grow(self, seq: Sequence, tokens: int) -> bool:
        more = self.prompt_bytes(seq.computed - self.reused[seq.job_id] + tokens) - self.held[seq.job_id]
        if more > self.free_bytes():
            return False
        self.held[seq.job_id] += max(0, more)
        return True

    def admit(self, seq: Sequence) -> None:
        assert seq.job_id not in self.held
        self.held[seq.job_id] = 0
        seq.computed = self.reused[seq.job_id] = self.prefix.get(seq.job_id, 0)

    def evict(self, seq: Sequence) -> None:
        del self.held[seq.job_id], self.reused[seq.job_id]


def job(name: str, prompt_tokens: int, max_tokens: int = 100) -> Sequence:
    return Sequence(
        job_id=name,
        session_id="",
        scenario=common_pb2.SCENARIO_UNSPECIFIED,
        objective=common_pb2.Objective(),
        token_ids=list(range(prompt_tokens)),
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        sampling=SamplingParameters(),
        stop_token_ids=frozenset(),
        text=None,
        top_logprobs=0,
        pipeline=Pipeline(),
        pinned=None,
        accept_time_s=0.0,
    )


def compute(step: Step) -> None:
    """What the engine does with a step."""
    for seq in step.decode:
        seq.computed += 1
        seq.token_ids.append(0)
    for seq, tokens in step.prefill:
        seq.computed += tokens
        if not seq.to_compute:
            seq.phase = Phase.DECODE
            seq.token_ids.append(0)


def advance(scheduler: Scheduler) -> Step:
    step = scheduler.schedule()
    compute(step)
    return step


def names(step: Step) -> tuple[list[str], list[tuple[str, int]]]:
    return [seq.job_id for seq in step.decode], [(seq.job_id, tokens) for seq, tokens in step.prefill]


def test_decodes_come_first_and_prompts_fill_the_rest() -> None:
    scheduler = Scheduler(PlainMemory(1000), step_tokens=10, max_running=8)
    scheduler.add(job("a", 3))
    scheduler.add(job("b", 5))
    assert names(advance(scheduler)) == ([], [("a", 3), ("b", 5)])
    scheduler.add(job("c", 20))
    assert names(advance(scheduler)) == (["a", "b"], [("c", 8)])
    assert names(advance(scheduler)) == (["a", "b"], [("c", 8)])
    assert names(advance(scheduler)) == (["a", "b"], [("c", 4)])
    assert names(advance(scheduler)) == (["a", "b", "c"], [])


def test_a_prompt_is_cut_into_chunks_and_leaves_room_for_others() -> None:
    scheduler = Scheduler(PlainMemory(1000), step_tokens=10, max_running=8, chunk_tokens=4)
    scheduler.add(job("a", 9))
    scheduler.add(job("b", 5))
    assert names(advance(scheduler)) == ([], [("a", 4), ("b", 4)])
    assert names(advance(scheduler)) == ([], [("a", 4), ("b", 1)])
    assert names(advance(scheduler)) == (["b"], [("a", 1)])


def test_no_more_run_than_may() -> None:
    scheduler = Scheduler(PlainMemory(1000), step_tokens=100, max_running=2)
    for name in "abc":
        scheduler.add(job(name, 4))
    assert names(advance(scheduler)) == ([], [("a", 4), ("b", 4)])
    assert names(advance(scheduler)) == (["a", "b"], [])
    scheduler.remove(scheduler.running[0])
    assert names(advance(scheduler)) == (["b"], [("c", 4)])


@pytest.mark.parametrize(("watermark", "admitted"), [(0, True), (2, True), (3, False)])
def test_admission_leaves_the_watermark_free(watermark: int, admitted: bool) -> None:
    scheduler = Scheduler(PlainMemory(12, watermark), step_tokens=100, max_running=8)
    scheduler.add(job("a", 6 * BLOCK))
    scheduler.add(job("b", 4 * BLOCK))
    assert ("b", 4 * BLOCK) in names(scheduler.schedule())[1] or not admitted
    assert bool(scheduler.waiting) is not admitted


def test_one_that_has_the_worker_to_itself_needs_no_watermark() -> None:
    scheduler = Scheduler(PlainMemory(4, watermark=3), step_tokens=100, max_running=8)
    scheduler.add(job("a", 4 * BLOCK))
    assert names(scheduler.schedule()) == ([], [("a", 16)])


def test_only_the_first_chunk_counts_at_admission() -> None:
    scheduler = Scheduler(PlainMemory(6, watermark=1), step_tokens=8, max_running=8, chunk_tokens=4)
    scheduler.add(job("a", 4))
    scheduler.add(job("b", 100))
    assert names(scheduler.schedule()) == ([], [("a", 4), ("b", 4)])


def test_the_least_computed_gives_way_and_comes_back_first() -> None:
    memory = PlainMemory(6)
    scheduler = Scheduler(memory, step_tokens=100, max_running=8)
    old, young, new = job("old", 12), job("young", 8), job("new", 4)
    scheduler.add(old)
    scheduler.add(young)
    advance(scheduler)  # five blocks, all full
    scheduler.add(new)
    step = advance(scheduler)  # old takes the sixth block; young finds none and is the least computed
    assert names(step) == (["old"], [])
    assert step.preempted == [young]
    assert (young.phase, young.computed, young.preemptions) == (Phase.WAITING, 0, 1)
    assert list(scheduler.waiting) == [young, new]
    assert "young" not in memory.held
    assert young.to_compute == 9  # its first token is not lost


def test_one_that_was_planned_already_can_still_be_preempted() -> None:
    scheduler = Scheduler(PlainMemory(6), step_tokens=100, max_running=8)
    small, large = job("small", 8), job("large", 16)
    scheduler.add(small)
    scheduler.add(large)
    advance(scheduler)  # all six blocks, all full
    small.computed, small.token_ids = 7, small.token_ids[:8]  # the small one has room for a token, the large one not
    step = scheduler.schedule()
    assert step.preempted == [small]
    assert step.decode == [large]


def test_among_equals_the_latest_gives_way() -> None:
    scheduler = Scheduler(PlainMemory(4), step_tokens=100, max_running=8)
    first, second = job("first", 8), job("second", 8)
    scheduler.add(first)
    scheduler.add(second)
    advance(scheduler)
    assert advance(scheduler).preempted == [second]
    assert scheduler.running == [first]


def test_nobody_is_admitted_in_a_step_that_preempted() -> None:
    scheduler = Scheduler(PlainMemory(5), step_tokens=100, max_running=8)
    scheduler.add(job("old", 12))
    scheduler.add(job("young", 8))
    advance(scheduler)
    scheduler.add(job("new", 4))
    step = advance(scheduler)
    assert len(step.preempted) == 1
    assert names(step) == (["old"], [])
    assert [seq.job_id for seq in scheduler.waiting] == ["young", "new"]


def test_one_that_cannot_grow_alone_is_stuck() -> None:
    scheduler = Scheduler(PlainMemory(3), step_tokens=100, max_running=8)
    seq = job("a", 12)
    scheduler.add(seq)
    advance(scheduler)
    step = scheduler.schedule()
    assert (step.stuck, step.preempted, step.empty) == ([seq], [], True)
    scheduler.remove(seq)
    assert seq.phase is Phase.FINISHED
    assert scheduler.schedule().empty


def test_a_prompt_that_cannot_fit_is_stuck_too() -> None:
    scheduler = Scheduler(PlainMemory(3), step_tokens=100, max_running=8)
    seq = job("a", 13)
    scheduler.add(seq)
    assert scheduler.schedule().stuck == [seq]


def test_a_prefix_found_at_admission_is_not_computed() -> None:
    memory = PlainMemory(100, prefix={"a": 8}, prefix_blocks=2)
    scheduler = Scheduler(memory, step_tokens=100, max_running=8)
    scheduler.add(job("a", 11))
    assert names(advance(scheduler)) == ([], [("a", 3)])


def test_an_admission_that_finds_no_room_after_all_ends_the_step() -> None:
    memory = PlainMemory(17, prefix={"new": 24}, prefix_blocks=6)
    scheduler = Scheduler(memory, step_tokens=31, max_running=8)
    scheduler.add(job("old", 31))
    advance(scheduler)
    assert memory.free_bytes() == 9  # enough for a chunk, but six of them are the prefix that the newcomer will use
    scheduler.add(job("new", 24 + 16))
    step = scheduler.schedule()
    assert names(step) == (["old"], [])
    assert [seq.job_id for seq in step.preempted] == [seq.job_id for seq in scheduler.waiting] == ["new"]


def test_removing_takes_out_the_waiting_and_the_unknown() -> None:
    scheduler = Scheduler(PlainMemory(10), step_tokens=10, max_running=1)
    waiting, stranger = job("a", 4), job("b", 4)
    scheduler.add(waiting)
    scheduler.remove(waiting)
    scheduler.remove(stranger)
    assert scheduler.schedule().empty
    assert waiting.phase is stranger.phase is Phase.FINISHED


jobs = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 20), st.integers(0, 30)), min_size=1, max_size=8
)  # prompt tokens, tokens to generate, step of arrival


@fixed
@given(
    jobs=jobs,
    blocks=st.integers(15, 40),
    watermark=st.integers(0, 3),
    step_tokens=st.integers(4, 30),
    chunk_tokens=st.none() | st.integers(1, 30),
    max_running=st.integers(1, 4),
)
def test_every_job_finishes_however_tight_memory_is(
    jobs, blocks, watermark, step_tokens, chunk_tokens, max_running
) -> None:
    memory = PlainMemory(blocks, watermark)
    scheduler = Scheduler(memory, step_tokens, max_running, chunk_tokens)
    coming = {f"job{n}": arrival for n, (_, _, arrival) in enumerate(jobs)}
    sequences = [job(f"job{n}", prompt, wanted) for n, (prompt, wanted, _) in enumerate(jobs)]
    # 15 blocks hold the longest of them alone, so none is ever stuck. At worst they run one after the other, each
    # computed anew by every preemption; a preempted one lost fewer tokens than the one that went on has.
    bound = 31 + 4 * sum(prompt + wanted for prompt, wanted, _ in jobs) * len(jobs)
    for number in range(bound):
        for seq in sequences:
            if coming.get(seq.job_id) == number:
                scheduler.add(seq)
                del coming[seq.job_id]
        running_before = [seq for seq in scheduler.running if seq.phase is Phase.DECODE]
        step = scheduler.schedule()
        check_step(scheduler, memory, step, running_before, step_tokens, chunk_tokens or step_tokens, max_running)
        if scheduler.running or scheduler.waiting:
            assert not step.empty or step.preempted
        compute(step)
        for seq in list(scheduler.running):
            if seq.generated >= seq.max_tokens:
                scheduler.remove(seq)
                memory.evict(seq)
        if not coming and not scheduler.running and not scheduler.waiting:
            break
    assert all(seq.phase is Phase.FINISHED for seq in sequences)
    assert all(seq.generated == seq.max_tokens for seq in sequences)
    assert not memory.held


def check_step(scheduler, memory, step, running_before, step_tokens, chunk_tokens, max_running) -> None:
    assert not step.stuck
    planned = [*step.decode, *(seq for seq, _ in step.prefill)]
    assert len(planned) == len(set(planned))
    assert set(planned) <= set(scheduler.running)
    assert len(scheduler.running) <= max_running
    assert step.decode == [seq for seq in running_before if seq in scheduler.running]  # every one, each time
    assert all(0 < tokens <= min(chunk_tokens, seq.to_compute) for seq, tokens in step.prefill)
    assert len(step.decode) + sum(tokens for _, tokens in step.prefill) <= step_tokens
    assert set(memory.held) == {seq.job_id for seq in scheduler.running}
    assert sum(memory.held.values()) <= memory.blocks
    most = max((seq.computed for seq in running_before), default=0)
    for seq in step.preempted:
        assert (seq.phase, seq.computed) == (Phase.WAITING, 0)
        assert seq in scheduler.waiting
    if running_before:  # whoever is furthest goes on: this is why there is no livelock
        assert any(seq.computed == most for seq in step.decode)


def test_those_that_wait_for_memory_are_told_from_those_that_just_came() -> None:
    scheduler = Scheduler(PlainMemory(6), step_tokens=100, max_running=2)
    scheduler.add(job("a", 16))
    scheduler.add(job("b", 16))
    assert scheduler.waiting_for_memory == 0
    advance(scheduler)
    assert scheduler.waiting_for_memory == 1
    scheduler.remove(scheduler.running[0])
    scheduler.schedule()
    assert scheduler.waiting_for_memory == 0
