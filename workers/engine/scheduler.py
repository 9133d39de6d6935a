"""Which requests take part in the next step: pure bookkeeping, no tensors.

A step serves every decoding request with one token, then fills what is left of the token budget: with tokens that one
request has repeated for its evictor (before prompts, which would put them off for ever), then with prompt chunks.
Memory is taken block by block as tokens come; admission leaves a watermark free so that running requests can grow.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from workers.engine.sequence import Phase, Sequence


class Memory(Protocol):
    """What the scheduler must know of the cache."""

    def room_bytes(self) -> int:
        """Device bytes that can be had without taking any request's."""
        ...

    def watermark_bytes(self) -> int:
        """Device bytes to leave free when a request is admitted."""
        ...

    def prompt_bytes(self, tokens: int) -> int:
        """Device bytes that so many prompt tokens take."""
        ...

    def grow(self, seq: Sequence, tokens: int) -> bool:
        """Makes room for so many more tokens of a request, relieving other pressure first. False: there is none."""
        ...

    def admit(self, seq: Sequence) -> None:
        """Opens a request's cache and reuses a published prefix: ``seq.computed`` says how much."""
        ...

    def evict(self, seq: Sequence) -> None:
        """Takes all memory of a request; it will be computed again."""
        ...


@dataclass
class Step:
    """One step's work."""

    decode: list[Sequence] = field(default_factory=list)
    prefill: list[tuple[Sequence, int]] = field(default_factory=list)
    """Requests with the number of their tokens to compute now."""
    repeat: list[tuple[Sequence, int]] = field(default_factory=list)
    """The request whose text is repeated, with the number of tokens to feed again now."""
    preempted: list[Sequence] = field(default_factory=list)
    """Requests that lost their memory to others."""
    stuck: list[Sequence] = field(default_factory=list)
    """Requests that cannot grow though they have the worker to themselves."""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute."""
        return not (self.decode or self.prefill or self.repeat)


class Scheduler:
    """Requests waiting and running.

    Args:
        memory: the cache's bookkeeping.
        step_tokens: token budget of a step.
        max_running: most requests that hold cache at once.
        chunk_tokens: most tokens of one prompt in a step; None: the step's budget.
    """

    def __init__(self, memory: Memory, step_tokens: int, max_running: int, chunk_tokens: int | None = None) -> None:
        self._memory = memory
        self._step_tokens = step_tokens
        self._chunk_tokens = chunk_tokens or step_tokens
        self._max_running = max_running
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._short_of_memory = False

    @property
    def waiting_for_memory(self) -> int:
        """Requests that the last step did not admit for want of memory; those that just came do not count."""
        return len(self.waiting) if self._short_of_memory else 0

    def add(self, seq: Sequence) -> None:
        """Queues a request."""
        self.waiting.append(seq)

    def remove(self, seq: Sequence) -> None:
        """Takes a request out, whatever it was doing."""
        if seq in self.waiting:
            self.waiting.remove(seq)
        if seq in self.running:
            self.running.remove(seq)
        seq.phase = Phase.FINISHED

    def preempt(self, seq: Sequence) -> None:
        """Takes a running request's memory; it waits to be computed again from its tokens."""
        self._memory.evict(seq)
        self.running.remove(seq)
        self.waiting.appendleft(seq)
        seq.phase = Phase.WAITING
        seq.computed = seq.to_repeat = 0
        seq.preemptions += 1

    def schedule(self) -> Step:
        """Plans the next step and takes the memory it needs."""
        step = Step()
        for seq in [seq for seq in self.running if seq.phase is Phase.DECODE]:
            if seq.phase is Phase.DECODE and self._grow(seq, 1, step):
                step.decode.append(seq)
        step.decode = [seq for seq in step.decode if seq.phase is Phase.DECODE]  # a later one may have preempted it
        budget = self._step_tokens - len(step.decode)
        for seq in [seq for seq in self.running if seq.to_repeat][:1]:  # one at a time: each holds memory for it
            step.repeat.append((seq, min(seq.to_repeat, budget, self._chunk_tokens)))
            budget -= step.repeat[-1][1]
        for seq in [seq for seq in self.running if seq.phase is Phase.PREFILL]:
            if budget > 0 and seq.phase is Phase.PREFILL:
                budget -= self._prefill(seq, budget, step)
        # Nobody is admitted in a step that had to preempt: the room there is belongs to those that run.
        self._short_of_memory = False
        while budget > 0 and not step.preempted and self._admissible():
            seq = self.waiting.popleft()
            self._memory.admit(seq)
            seq.phase = Phase.PREFILL
            self.running.append(seq)
            budget -= self._prefill(seq, budget, step)
        self._short_of_memory |= bool(step.preempted)
        step.decode = [seq for seq in step.decode if seq.phase is Phase.DECODE]
        step.prefill = [(seq, tokens) for seq, tokens in step.prefill if seq.phase is Phase.PREFILL]
        step.repeat = [(seq, tokens) for seq, tokens in step.repeat if seq.to_repeat]
        return step

    def _admissible(self) -> bool:
        """Whether a request waits that may start: alone always, else if its first chunk leaves the watermark free."""
        if not self.waiting or len(self.running) >= self._max_running:
            return False
        if not self.running:
            return True
        first = min(self.waiting[0].to_compute, self._chunk_tokens)
        needed = self._memory.prompt_bytes(first) + self._memory.watermark_bytes()
        self._short_of_memory = self._memory.room_bytes() < needed
        return not self._short_of_memory

    def _prefill(self, seq: Sequence, budget: int, step: Step) -> int:
        tokens = min(seq.next_chunk, budget, self._chunk_tokens)
        if not self._grow(seq, tokens, step):
            return 0
        step.prefill.append((seq, tokens))
        return tokens

    def _grow(self, seq: Sequence, tokens: int, step: Step) -> bool:
        while not self._memory.grow(seq, tokens):
            victim = self._victim()
            if victim is seq and len(self.running) == 1:
                step.stuck.append(seq)
                return False
            self.preempt(victim)
            step.preempted.append(victim)
            if victim is seq:
                return False
        return True

    def _victim(self) -> Sequence:
        """The least computed request: the one whose work is cheapest to repeat; the latest among equals."""
        return min(reversed(self.running), key=lambda seq: seq.computed)
