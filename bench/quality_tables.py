"""The four tables: texts, retrieval, conversations, long generations."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch

from bench.quality_lab import Bytes, Clock, Compared, Lab, compare, row_bytes_of
from bench.quality_rows import Row, Table, Tally, tallies
from bench.quality_subjects import Subject
from bench.quality_tasks import Question, Recall, Text
from kernels.layout import BLOCK_TOKENS
from workers.cache.sequence_cache import SequenceCache
from workers.engine.runner import LoadedModel
from workers.stages.base import Pipeline
from workers.stages.evict.snapkv import OBSERVATION_WINDOW

MOST_FORKS = 24
"""Pipelines that decode as one batch."""
GROUP_BYTES = 2 << 30
"""Of raw forks that decode as one batch; a larger model has smaller batches."""

Say = Callable[[str], None]
Measure = Callable[[SequenceCache], list[Compared]]
Watch = Callable[[int, torch.Tensor], torch.Tensor]
Finish = Callable[[Sequence[SequenceCache], Sequence[torch.Tensor]], list[list[Compared]]]


@dataclass(frozen=True)
class Sizes:
    """What is measured in a mode."""

    contexts: tuple[int, ...]
    """Tokens of haystacks, and of texts as far as ``text_tokens``."""
    texts: int
    text_tokens: int
    """Of the longest text."""
    horizon: int
    """Tokens behind a text that are scored."""
    haystacks: int
    needles: int
    """In each haystack."""
    asked: int
    """Of them with the question in the prompt, which is then a prompt of its own."""
    conversations: int
    turn_tokens: int
    """Of the first turn."""
    prompts: int
    """For long generations."""
    prompt_tokens: int
    answer_tokens: int


FULL_SIZES = Sizes((1024, 2048, 4096), 6, 4096, 64, 3, 4, 4, 3, 1024, 3, 768, 512)
QUICK_SIZES = Sizes((1024, 2048), 1, 1024, 32, 1, 2, 1, 1, 704, 1, 704, 96)


class Tables:
    """Measures subjects with a model; rows come table by table.

    Args:
        loaded: the model.
        subjects: the full cache first.
        clock: counts what the time is spent on.
        say: is told how far it is.
    """

    def __init__(self, loaded: LoadedModel, subjects: Sequence[Subject], clock: Clock, say: Say) -> None:
        self._loaded = loaded
        self._subjects = subjects
        self._clock = clock
        self._say = say

    # -- texts ---------------------------------------------------------------------------------------------------------

    def text(self, texts: Sequence[Text], contexts: Sequence[int], horizon: int) -> list[Row]:
        """The tokens behind each length of each text, scored behind the text as each pipeline keeps it.

        Args:
            texts: of the longest length, ``horizon`` and one more tokens.
            contexts: lengths, rising.
            horizon: tokens scored.
        """
        lab = Lab(self._loaded, max(contexts) + horizon, 1, 1, self._clock)
        made = {context: tallies(Table.TEXT, self._subjects, context, context) for context in contexts}
        for text in texts:
            base = lab.open()
            for context in contexts:
                with self._told(f"text: {text.name}, {context} tokens"):
                    lab.compute(base, text.ids, context - OBSERVATION_WINDOW)
                    following = text.ids[context : context + horizon + 1]
                    with lab.prompt(base, text.ids[:context]) as (ready, _):
                        _each(lab, ready, made[context], _scoring(lab, ready, following))
            lab.cache.close(base)
        return [row for context in contexts for row in _rows(made[context], lab)]

    # -- retrieval -----------------------------------------------------------------------------------------------------

    def retrieval(self, haystacks: Sequence[Recall], asked: int) -> list[Row]:
        """Answers to each haystack's questions; the question comes behind the reduced context, or, of the first
        ``asked`` of them, is in the prompt."""
        lengths = sorted({len(stack.ids) for stack in haystacks})
        lab = Lab(self._loaded, max(lengths), 1, 1, self._clock)
        made = {
            (length, aware): tallies(Table.RETRIEVAL, self._subjects, length, length, aware)
            for length in lengths
            for aware in (False, True)
        }
        for stack in haystacks:
            length, base = len(stack.ids), lab.open()
            with self._told(f"retrieval: {stack.name}, question behind the reduced cache"):
                lab.compute(base, stack.ids, length - OBSERVATION_WINDOW)
                with lab.prompt(base, stack.ids) as (ready, _):
                    _each(lab, ready, made[length, False], _asking(lab, ready, stack.questions))
            with self._told(f"retrieval: {stack.name}, question in the prompt"):
                for question in stack.questions[:asked]:
                    with lab.prompt(base, stack.ids + question.ids) as (ready, first):
                        _each(lab, ready, made[length, True], _answering(lab, ready, first, question))
            lab.cache.close(base)
        return [row for these in made.values() for row in _rows(these, lab)]

    # -- conversations -------------------------------------------------------------------------------------------------

    def conversation(self, conversations: Sequence[Recall]) -> list[Row]:
        """The pipeline takes effect behind the first turn's prompt and stays; the last turn asks for the first one."""
        longest = max(len(one.ids) + len(one.between) for one in conversations)
        lab, size = self._lab_for_groups(longest)
        made = tallies(Table.CONVERSATION, self._subjects, longest, longest)
        for one in conversations:
            base = lab.open()
            with self._told(f"conversation: {one.name}, {len(one.ids)} + {len(one.between)} tokens"):
                lab.compute(base, one.ids, len(one.ids) - OBSERVATION_WINDOW)
                with lab.prompt(base, one.ids) as (ready, _), lab.fork(ready) as whole:
                    lab.decode([(whole, Pipeline())], one.between, lambda index, logprobs: None)
                    measure = _asking(lab, whole, one.questions)
                    drive = _Drive(lab, ready, one.between, _nothing, partial(_of_forks, measure))
                    for group in _groups(made, size):
                        drive(group)
            lab.cache.close(base)
        return _rows(made, lab)

    # -- long generations ----------------------------------------------------------------------------------------------

    def generation(self, prompts: Sequence[Text], tokens: int) -> list[Row]:
        """The full cache's greedy answer, along which every pipeline decodes with its upkeep."""
        longest = max(len(prompt.ids) for prompt in prompts) + tokens
        lab, size = self._lab_for_groups(longest)
        made = tallies(Table.GENERATION, self._subjects, longest, longest, query_aware=True)
        for prompt in prompts:
            base = lab.open()
            with self._told(f"generation: {prompt.name}, {len(prompt.ids)} + {tokens} tokens"):
                lab.compute(base, prompt.ids, len(prompt.ids) - OBSERVATION_WINDOW)
                with lab.prompt(base, prompt.ids) as (ready, first):
                    answer, exact = _greedy(lab, ready, first, tokens)
                    drive = _Drive(lab, ready, answer[:tokens], partial(_figures, exact, answer), _of_steps)
                    for group in _groups(made, size):
                        drive(group)
            lab.cache.close(base)
        return _rows(made, lab)

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _lab_for_groups(self, tokens: int) -> tuple[Lab, int]:
        """A lab for sequences of so many tokens, and how many of them decode as one batch."""
        row_bytes = row_bytes_of(self._loaded)
        size = max(1, min(MOST_FORKS, len(self._subjects), GROUP_BYTES // (row_bytes * (tokens // BLOCK_TOKENS + 1))))
        return Lab(self._loaded, tokens, size + 1, size, self._clock), size

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._say(f"{what}: {len(self._subjects)} rows, {time.perf_counter() - began:.0f} s")


def _rows(made: Sequence[Tally], lab: Lab) -> list[Row]:
    return [tally.row(made[0], lab.cache.shape, lab.cache.profile) for tally in made]


def _each(lab: Lab, ready: SequenceCache, made: Sequence[Tally], measure: Measure) -> None:
    """Measures every pipeline on a fork of its own; those with the same logits once. What raises has an error."""
    known: dict[Pipeline, list[Compared]] = {}
    for tally in made:
        if not tally.live:
            continue
        assert tally.pipeline is not None
        began = time.perf_counter()
        try:
            with lab.fork(ready) as fork:
                lab.apply(fork, tally.pipeline)
                used, key = lab.bytes(fork), tally.pipeline.logits_key
                if key not in known:
                    known[key] = measure(fork)
            tally.note(used, known[key])
        except Exception as error:
            tally.fail(error)
        tally.seconds += time.perf_counter() - began


def _scoring(lab: Lab, full: SequenceCache, following: Sequence[int]) -> Measure:
    """Scores the tokens that follow, but the last, which only comes."""
    exact = lab.score(full, following[:-1])
    return lambda fork: [compare(exact, lab.score(fork, following[:-1]), following[1:])]


def _asking(lab: Lab, full: SequenceCache, questions: Sequence[Question]) -> Measure:
    """Scores each question and its answer behind a cache, beside the full one's."""

    def answers(seq: SequenceCache, question: Question) -> torch.Tensor:
        """Log-probabilities [answer tokens, V], each before its token."""
        return lab.score(seq, question.ids + question.answer[:-1])[len(question.ids) - 1 :]

    exact = [answers(full, question) for question in questions]

    def measure(fork: SequenceCache) -> list[Compared]:
        return [
            compare(whole, answers(fork, question), question.answer)
            for whole, question in zip(exact, questions, strict=True)
        ]

    return measure


def _answering(lab: Lab, full: SequenceCache, first: torch.Tensor, question: Question) -> Measure:
    """Scores an answer whose question is in the prompt: the first token is by the prompt's own distribution [1, V]."""

    def answer(seq: SequenceCache) -> torch.Tensor:
        behind = question.answer[:-1]
        return torch.cat([first, lab.score(seq, behind)]) if behind else first

    exact = answer(full)
    return lambda fork: [compare(exact, answer(fork), question.answer)]


def _greedy(lab: Lab, ready: SequenceCache, first: torch.Tensor, tokens: int) -> tuple[list[int], list[torch.Tensor]]:
    """The full cache's answer of ``tokens + 1`` tokens, and log-probabilities [V] behind each but the last."""
    answer, exact = [int(first.argmax())], []
    with lab.fork(ready) as whole:
        for _ in range(tokens):
            lab.decode([(whole, Pipeline())], answer[-1:], lambda index, logprobs: exact.append(logprobs[0]))
            answer.append(int(exact[-1].argmax()))
    return answer, exact


def _nothing(index: int, logprobs: torch.Tensor) -> torch.Tensor:
    """Keeps nothing of a step."""
    return logprobs[:0]


def _figures(exact: Sequence[torch.Tensor], answer: Sequence[int], index: int, logprobs: torch.Tensor) -> torch.Tensor:
    """Keeps four numbers of a step for each trial, [4, trials]."""
    trials = len(logprobs)
    step = compare(exact[index].expand_as(logprobs), logprobs, [answer[index + 1]] * trials)
    return torch.stack([step.divergence, step.agreement.float(), step.loss, step.hit.float()])


def _of_forks(measure: Measure, forks: Sequence[SequenceCache], steps: Sequence[torch.Tensor]) -> list[list[Compared]]:
    """What is measured behind the last token."""
    return [measure(fork) for fork in forks]


def _of_steps(forks: Sequence[SequenceCache], steps: Sequence[torch.Tensor]) -> list[list[Compared]]:
    """What was measured step by step."""
    divergence, agreement, loss, hit = torch.stack(list(steps), dim=-1)  # each [trials, steps]
    return [
        [Compared(divergence[trial], agreement[trial].bool(), loss[trial], hit[trial].bool())]
        for trial in range(len(forks))
    ]


def _groups(made: Sequence[Tally], size: int) -> Iterator[list[Tally]]:
    live = [tally for tally in made if tally.live]
    for start in range(0, len(live), size):
        yield live[start : start + size]


@dataclass(frozen=True)
class _Drive:
    """Decodes the same tokens with every pipeline of a group as one batch, and notes what ``finish`` makes of it.

    Args:
        lab: where.
        ready: the prompt.
        ids: the tokens.
        watch: what is kept of each step, made of its index and log-probabilities [trials, V].
        finish: makes figures of the forks at the end and of what was kept.
    """

    lab: Lab
    ready: SequenceCache
    ids: Sequence[int]
    watch: Watch
    finish: Finish

    def __call__(self, group: Sequence[Tally]) -> None:
        """Measures a group. If a step fails, its halves are tried alone, down to the one whose fault it is."""
        began = time.perf_counter()
        try:
            self._together(group)
        except Exception as error:
            if len(group) == 1:
                group[0].fail(error)
            else:
                middle = len(group) // 2
                for half in (group[:middle], group[middle:]):
                    self([tally for tally in half if tally.live])
                return
        for tally in group:
            tally.seconds += (time.perf_counter() - began) / len(group)

    def _together(self, group: Sequence[Tally]) -> None:
        lab = self.lab
        with ExitStack() as stack:
            trials: list[tuple[Tally, SequenceCache, Pipeline]] = []
            for tally in group:
                assert tally.pipeline is not None
                fork = stack.enter_context(lab.fork(self.ready))
                try:
                    lab.apply(fork, tally.pipeline)
                except Exception as error:
                    tally.fail(error)
                else:
                    trials.append((tally, fork, tally.pipeline))
            if not trials:
                return
            forks = [fork for _, fork, _ in trials]
            most = [lab.bytes(fork) for fork in forks]
            steps: list[torch.Tensor] = []

            def behind(index: int, logprobs: torch.Tensor) -> None:
                steps.append(self.watch(index, logprobs))
                if index == len(self.ids) - 1 or forks[0].seen % BLOCK_TOKENS == 0:  # most are before the upkeep
                    most[:] = [_larger(before, lab.bytes(fork)) for before, fork in zip(most, forks, strict=True)]

            lab.decode([(fork, pipeline) for _, fork, pipeline in trials], self.ids, behind)
            found = self.finish(forks, steps)
            for (tally, _, _), used, compared in zip(trials, most, found, strict=True):
                tally.note(used, compared)


def _larger(before: Bytes, now: Bytes) -> Bytes:
    return replace(now, device=max(before.device, now.device), elsewhere=max(before.elsewhere, now.elsewhere))
