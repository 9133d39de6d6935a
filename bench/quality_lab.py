"""A cache in this process on which pipelines are tried: a prompt is computed once, each pipeline has a fork of it."""

from __future__ import annotations

import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from kernels.layout import BLOCK_TOKENS, Format, Tier
from workers.cache.accounting import TABLE_BYTES_PER_BLOCK, measure
from workers.cache.arena import page_blocks
from workers.cache.arrangement import blocks_of
from workers.cache.disk import DiskStore
from workers.cache.kvcache import KVCache
from workers.cache.sequence_cache import Occasion, SequenceCache
from workers.engine.attention import cache_shape
from workers.engine.catalyst import catalyst
from workers.engine.repeating import Repetition, Words, is_missing
from workers.engine.runner import LoadedModel, ModelRunner
from workers.engine.scoring import divergences
from workers.stages.base import Pipeline
from workers.stages.evict.snapkv import OBSERVATION_WINDOW

STEP_TOKENS = 256
"""Tokens of a prompt computed in one pass, as a worker does by default."""
_SPARE_ROWS = 64
"""Room beside what is asked for, in rows of blocks: tails of forks, and pages that are not full."""


@dataclass
class Clock:
    """Seconds by what they were spent on."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Counts the time until the end of the block."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - began


@dataclass(frozen=True)
class Bytes:
    """What a request takes, as if raw blocks held a 16-bit dtype: scales, zero points and tables included."""

    device: int
    elsewhere: int
    """On all lower tiers."""
    full: int
    """Of the full cache, with the same tokens."""


@dataclass(frozen=True)
class Compared:
    """N next-token distributions of a pipeline beside the full cache's; M of them with the token that came."""

    divergence: torch.Tensor  # [N] nats
    agreement: torch.Tensor  # bool [N] the same most probable token
    loss: torch.Tensor  # [M] -log p of the token that came
    hit: torch.Tensor  # bool [M] it is the most probable one


def compare(exact: torch.Tensor, other: torch.Tensor, following: Sequence[int]) -> Compared:
    """Compares log-probabilities [N, V].

    Args:
        exact: behind the full cache.
        other: behind a pipeline's.
        following: the token that came behind each, or behind the first M of them.
    """
    came = torch.tensor(following, device=other.device)
    known = other[: len(came)]
    return Compared(
        divergence=divergences(exact, other).cpu(),
        agreement=(exact.argmax(dim=-1) == other.argmax(dim=-1)).cpu(),
        loss=-known.gather(1, came[:, None])[:, 0].cpu(),
        hit=(known.argmax(dim=-1) == came).cpu(),
    )


class Lab:
    """One model over one cache.

    Args:
        loaded: the model.
        tokens: of the longest sequence.
        forks: most pipelines that have a fork at once.
        placed: most of them that put blocks on a lower tier.
        clock: counts prompts, repetitions, switches, scores and decode steps.
    """

    def __init__(self, loaded: LoadedModel, tokens: int, forks: int, placed: int, clock: Clock) -> None:
        self.clock = clock
        room = tokens + OBSERVATION_WINDOW + STEP_TOKENS
        self._context_tokens = loaded.context_tokens
        row_bytes = row_bytes_of(loaded)
        rows = -(-room // BLOCK_TOKENS)
        parameter = next(loaded.model.parameters())
        self._folder = tempfile.TemporaryDirectory(prefix="kvpilot-")
        disk = DiskStore(Path(self._folder.name), 2 * rows * placed * row_bytes)
        weakref.finalize(self, disk.close)
        self.cache = KVCache(
            cache_shape(loaded.model.config, parameter.dtype),
            (rows * (2 + forks) + _SPARE_ROWS) * row_bytes,  # one for what is repeated
            (rows * placed + _SPARE_ROWS) * row_bytes,
            forks + 5,
            room,
            loaded.name,
            parameter.device,
            profile=loaded.profile,
            disk=disk,
        )
        self._room = room
        self._runner = ModelRunner(loaded, self.cache)
        self.cache.catalyse = catalyst(self._runner, loaded, room)
        self._words = Words.of(loaded)
        self._texts: dict[int, list[int]] = {}
        """Token ids of sequences by their slots."""

    def open(self) -> SequenceCache:
        """A new sequence."""
        return self.cache.open(self._room)

    def compute(self, seq: SequenceCache, ids: Sequence[int], until: int) -> None:
        """Computes the prompt ``ids`` up to, and without, a token that is not among its last."""
        self._texts[seq.slot] = list(ids)
        with self.clock("prompts"):
            while seq.seen < until:
                self._prefill(seq, ids[seq.seen : min(until, seq.seen + STEP_TOKENS)], len(ids))

    @contextmanager
    def prompt(self, base: SequenceCache, ids: Sequence[int]) -> Iterator[tuple[SequenceCache, torch.Tensor]]:
        """A fork of ``base``, which has computed the beginning of ``ids``, at their end; and the distribution there.

        All queries of an evictor's observation window are in what the fork computes, if ``base`` stopped that long
        before the end. The votes are then those of a prompt that was computed alone.
        """
        with self.fork(base) as seq:
            self._texts[seq.slot] = list(ids)
            with self.clock("prompts"):
                logits = self._prefill(seq, ids[seq.seen :], len(ids))
            yield seq, torch.log_softmax(logits.float(), dim=-1)

    @contextmanager
    def fork(self, seq: SequenceCache) -> Iterator[SequenceCache]:
        """A fork, closed at the end."""
        forked = self.cache.fork(seq)
        try:
            yield forked
        finally:
            self.cache.close(forked)

    def apply(self, seq: SequenceCache, pipeline: Pipeline, occasion: Occasion = Occasion.PROMPT) -> None:
        """Puts a pipeline in force, without an exact copy of what it loses; or does its upkeep."""
        if occasion is not Occasion.SETTLE and is_missing(seq, pipeline):
            self._repeat(seq)
        with self.clock("switches"):
            self.cache.apply(seq, pipeline.without_shadow(), occasion)

    def _repeat(self, seq: SequenceCache) -> None:
        """Has the model repeat a sequence's text; once for all forks of one that have not gone their own way yet."""
        text = seq.origin if seq.origin and seq.origin.seen == seq.seen else seq
        if text.reconstruction is None or text.reconstruction.shape[2] < text.seen:
            text.reconstruction = None
            assert self._words is not None, "the tables are made of text, so there is a tokenizer"
            with self.clock("repetitions"):
                work = Repetition(
                    self.cache, self._runner, text, self._texts[text.slot], self._words, self._context_tokens
                )
                while work.left:
                    work.step(STEP_TOKENS)
        seq.reconstruction = text.reconstruction

    def score(self, seq: SequenceCache, ids: Sequence[int]) -> torch.Tensor:
        """Log-probabilities [len(ids), V] behind each of these tokens, which are not kept."""
        with self.clock("scores"):
            logits = self._runner.score(self.cache.context(seq), seq.seen, ids)
            return torch.log_softmax(logits.float(), dim=-1)

    def decode(
        self,
        trials: Sequence[tuple[SequenceCache, Pipeline]],
        ids: Sequence[int],
        behind: Callable[[int, torch.Tensor], None],
    ) -> None:
        """The same tokens for all, step by step, each with its pipeline's upkeep every 32 tokens, as the engine has it.

        Args:
            trials: sequences, and the pipelines in force.
            ids: the tokens.
            behind: is told the index of each token and log-probabilities [trials, V] behind it, before the upkeep.
        """
        for index, token in enumerate(ids):
            with self.clock("decode steps"):
                for seq, _ in trials:
                    self.cache.reserve(seq, 1)
                logits, _ = self._runner.decode([seq for seq, _ in trials], [token] * len(trials))
                logprobs = torch.log_softmax(logits.float(), dim=-1)
            behind(index, logprobs)
            for seq, pipeline in trials:
                if seq.seen % BLOCK_TOKENS == 0 and not pipeline.is_full:
                    self.apply(seq, pipeline, Occasion.SETTLE)

    def bytes(self, seq: SequenceCache) -> Bytes:
        """What a sequence takes now."""
        use, now = self.cache.use(seq), blocks_of(self.cache.tables, seq.slot)
        away = now.valid & (now.tier != Tier.DEVICE)
        as_if_here = measure(self.cache.shape, away, now.format, np.full_like(now.tier, Tier.DEVICE), seq.seen, 0)
        elsewhere = as_if_here.device_bytes_16bit - int(away.sum()) * TABLE_BYTES_PER_BLOCK
        return Bytes(use.device_bytes_16bit, elsewhere, use.full_bytes_16bit)

    def _prefill(self, seq: SequenceCache, chunk: Sequence[int], prompt_tokens: int) -> torch.Tensor:
        self.cache.reserve(seq, len(chunk))
        return self._runner.prefill(seq, chunk, prompt_tokens, all_queries=True)


def row_bytes_of(loaded: LoadedModel) -> int:
    """Bytes of 32 raw tokens in whole pages."""
    shape = cache_shape(loaded.model.config, next(loaded.model.parameters()).dtype)
    page = page_blocks(shape)
    return -(-shape.layers * shape.kv_heads // page) * page * shape.block_bytes(Format.RAW)
