"""Replays: what pipelines would do to a text whose continuation is known.

The text's first tokens are computed with the full cache. At each place asked for, the cache is forked once for each
pipeline; the fork is switched to it, and the text's next tokens are scored behind it and behind the full cache. Beside
the divergence stands what a predictor would have seen just before: the same signals as of any request, measured in the
same decode steps.

A replay is work for idle moments: it runs in small pieces when there is nothing else to compute, and gives its memory
back, to start over at the first place not yet delivered, as soon as a request needs it.
"""

from __future__ import annotations

import time
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import structlog
import torch

from kernels.api import DecodePlan
from kernels.layout import BLOCK_TOKENS
from kvpilot.v1 import common_pb2, generation_pb2, policy_pb2
from models.features import SCHEMA_HASH, FeatureBuilder
from workers.cache.arena import TierFullError
from workers.cache.kvcache import KVCache
from workers.cache.sequence_cache import Occasion, SequenceCache
from workers.cache.staging import DamagedCacheError
from workers.engine.repeating import Repetition, Words, is_missing
from workers.engine.runner import ModelRunner
from workers.engine.scoring import divergences
from workers.errors import INTERNAL, RESOURCE_EXHAUSTED
from workers.signals import SignalMeter, prompt_statistics
from workers.stages.base import LossClass, Pipeline
from workers.stages.registry import loss_class_proto

SIGNAL_TOKENS = 16
"""Tokens decoded before a place to measure the signals: a report interval."""
SLOTS = 3
"""Caches a replay holds at once: the text's, one under the pipeline of the signals, one under the pipeline at hand; or
the text's and that of what the model is fed again."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Place:
    """Where to measure, and the pipeline in force while the signals before it are."""

    at_token: int
    measured_under: Pipeline


@dataclass
class Replay:
    """A replay as admitted. ``places`` are those that are still to be measured."""

    job_id: str
    token_ids: list[int]
    places: deque[Place]
    pipelines: tuple[tuple[str, Pipeline], ...]
    """As asked for, and as built."""
    horizon_tokens: int
    scenario: common_pb2.Scenario
    objective: common_pb2.Objective
    prompt_tokens: int
    """Where the prompt ends, if the text is a prompt and its answer; else 0."""
    first_token: int
    """Where the signals of the first place begin: for the features, any other text's prompt ends there."""
    turns: int
    """User turns of the prompt."""

    def prompt_end(self, at_token: int) -> int:
        """Where the prompt ends for the features of a place: at a prompt's end nothing is generated yet."""
        if self.prompt_tokens and at_token > self.prompt_tokens - self.horizon_tokens:
            return min(at_token, self.prompt_tokens)
        return self.first_token

    @property
    def needs_prompt_mass(self) -> bool:
        """Whether the masses must count every query."""
        built = [*(pipeline for _, pipeline in self.pipelines), *(place.measured_under for place in self.places)]
        return any(pipeline.evictor and pipeline.evictor.needs_prompt_mass for pipeline in built)


Emit = Callable[..., None]
"""``emit(replay, event_name=message)``."""


class Replayer:
    """Replays of one worker, one at a time. Used by the engine thread alone.

    Args:
        cache: the worker's cache, with ``SLOTS`` slots to spare.
        runner: its model.
        features: turns states into rows.
        step_tokens: tokens of a prompt computed in one piece.
        emit: takes the events.
        ended: told when a replay is over.
        words: how the model is asked to repeat a text; None where it has no words.
        context_tokens: longest sequence of the model.
    """

    def __init__(
        self,
        cache: KVCache,
        runner: ModelRunner,
        features: FeatureBuilder,
        step_tokens: int,
        emit: Emit,
        ended: Callable[[Replay], None],
        words: Words | None = None,
        context_tokens: int = 0,
    ) -> None:
        self._cache = cache
        self._runner = runner
        self._features = features
        self._step_tokens = step_tokens
        self._emit = emit
        self._ended = ended
        self._words = words
        self._context_tokens = context_tokens
        self._queue: deque[Replay] = deque()
        self._work: Iterator[None] | None = None
        self._open: list[SequenceCache] = []

    def add(self, replay: Replay) -> None:
        """Queues a replay."""
        self._queue.append(replay)

    def cancel(self, job_id: str) -> None:
        """Ends a replay; an unknown one is left alone."""
        for replay in list(self._queue):
            if replay.job_id == job_id:
                if replay is self._queue[0]:
                    self.give_way()
                self._queue.remove(replay)
                self._finish(replay, generation_pb2.FINISH_REASON_CANCELLED)

    def give_way(self) -> bool:
        """Gives all memory back; the replay at work starts over where it was. False: there was none."""
        if self._work is None:
            return False
        self._work = None
        self._close_all()
        log.debug("replay gave way", request=self._queue[0].job_id)
        return True

    def step(self) -> bool:
        """Does one piece of work. False: there is none."""
        if not self._queue:
            return False
        replay = self._queue[0]
        try:
            if self._work is None:
                self._work = self._run(replay)
            next(self._work)
            return True
        except StopIteration:
            self._end(replay, generation_pb2.FINISH_REASON_MEASURED)
        except TierFullError as full:
            message = f"the text and its forks do not fit this worker: {full}"
            self._end(replay, generation_pb2.FINISH_REASON_FAILED, RESOURCE_EXHAUSTED, message)
        except DamagedCacheError as error:
            log.warning("replay begins again where it was", request=replay.job_id, why=str(error))
            self.give_way()
        except Exception as error:
            log.exception("replay failed", request=replay.job_id)
            self._end(replay, generation_pb2.FINISH_REASON_FAILED, INTERNAL, f"the replay failed: {error!r}")
        return True

    def _end(self, replay: Replay, reason: generation_pb2.FinishReason, code: int = 0, message: str = "") -> None:
        self._work = None
        self._close_all()
        self._queue.popleft()
        self._finish(replay, reason, common_pb2.Problem(code=code, message=message) if code else None)

    def _finish(
        self, replay: Replay, reason: generation_pb2.FinishReason, problem: common_pb2.Problem | None = None
    ) -> None:
        usage = generation_pb2.Usage(prompt_tokens=len(replay.token_ids))
        self._emit(replay, finished=generation_pb2.Finished(reason=reason, problem=problem, usage=usage))
        self._ended(replay)

    # -- the work ------------------------------------------------------------------------------------------------------

    def _run(self, replay: Replay) -> Iterator[None]:
        """Measures place after place; yields between pieces."""
        base = self._hold(self._cache.open(len(replay.token_ids)))
        while replay.places:
            place = replay.places[0]
            base.reconstruction = None  # each place stands for a request that is switched there for the first time
            yield from self._compute(replay, base, place.at_token - SIGNAL_TOKENS)
            state = yield from self._watch(replay, base, place)
            horizon = replay.token_ids[place.at_token : place.at_token + replay.horizon_tokens]
            exact = self._score(base, horizon)
            yield
            replayed = generation_pb2.Replayed(
                at_token=place.at_token, feature_schema_hash=SCHEMA_HASH, measured_under=place.measured_under.text
            )
            scored = {Pipeline().logits_key: exact}
            for _, pipeline in replay.pipelines:
                yield from self._repeat(replay, base, pipeline)
            rows = self._features.rows(state, [text for text, _ in replay.pipelines])
            for (text, pipeline), row in zip(replay.pipelines, rows, strict=True):
                measured = self._try_pipeline(base, pipeline, horizon, scored)
                measured.pipeline = text
                measured.features.extend(row.tolist())
                replayed.pipelines.append(measured)
                yield
            self._emit(replay, replayed=replayed)
            replay.places.popleft()

    def _compute(self, replay: Replay, base: SequenceCache, end: int) -> Iterator[None]:
        """Computes the text up to ``end`` with the full cache."""
        while base.seen < end:
            chunk = replay.token_ids[base.seen : min(end, base.seen + self._step_tokens)]
            self._reserve(base, len(chunk))
            self._runner.prefill(base, chunk, end, all_queries=replay.needs_prompt_mass)
            yield

    def _repeat(self, replay: Replay, base: SequenceCache, pipeline: Pipeline) -> Iterator[None]:
        """Has the model repeat the text so far where a pipeline asks for it; forks share what comes of it."""
        if not is_missing(base, pipeline):
            return
        assert self._words is not None
        work = Repetition(self._cache, self._runner, base, replay.token_ids, self._words, self._context_tokens)
        try:
            while work.left:
                work.step(self._step_tokens)
                yield
        finally:
            work.close()

    def _watch(
        self, replay: Replay, base: SequenceCache, place: Place
    ) -> Generator[None, None, policy_pb2.RequestState]:
        """Decodes the text's tokens up to a place, and gives the request's state as a report there would."""
        watched, pipeline, tokens = base, place.measured_under, replay.token_ids
        if not pipeline.is_full:
            yield from self._repeat(replay, base, pipeline)
            watched = self._hold(self._cache.fork(base))
            self._cache.apply(watched, pipeline, Occasion.SWITCH)
            yield
        both = [base] if watched is base else [base, watched]
        first = place.at_token - SIGNAL_TOKENS
        meter = SignalMeter(tokens[: first + 1])
        self._cache.settle(watched)
        meter.note_votes(self._cache.tables, watched.slot, watched.seen)  # for later ones to be held against
        audited = pipeline.loss_class is LossClass.RECOVERABLE and _audited(tokens[first : place.at_token])
        drift: list[torch.Tensor] = []
        for index in range(first, place.at_token):
            for cache in both:
                self._reserve(cache, 1)
            logits, plan = self._decode(both, tokens[index])
            meter.note_attention(plan, len(both) - 1, self._cache.tables)
            _note_token(meter, logits[-1], tokens[index + 1])
            if audited:
                drift.append(divergences(*torch.log_softmax(logits.float(), dim=-1)[:, None]))
            if watched.seen % BLOCK_TOKENS == 0 and watched is not base:
                self._cache.apply(watched, pipeline, Occasion.SETTLE)
            yield
        state = self._state(replay, watched, pipeline, place.at_token, meter)
        if audited:
            found = torch.cat(drift)
            state.audits.add(
                at_token=max(0, first - state.prompt_tokens),
                pipeline=pipeline.text,
                divergence=float(found.mean()),
                divergence_max=float(found.max()),
                tokens=len(found),
            )
        if watched is not base:
            self._release(watched)
        return state

    def _state(
        self, replay: Replay, seq: SequenceCache, pipeline: Pipeline, at_token: int, meter: SignalMeter
    ) -> policy_pb2.RequestState:
        """The request as its report would describe it."""
        self._cache.settle(seq)
        meter.note_votes(self._cache.tables, seq.slot, seq.seen)
        prompt_tokens = replay.prompt_end(at_token)
        return policy_pb2.RequestState(
            request_id=replay.job_id,
            scenario=replay.scenario,
            objective=replay.objective,
            pipeline=pipeline.text,
            prompt_tokens=prompt_tokens,
            generated_tokens=at_token - prompt_tokens,
            max_tokens=len(replay.token_ids) - prompt_tokens,
            kept_tokens=float(self._cache.tables.length[seq.slot].mean()),
            cache=self._cache.use(seq).to_proto(),
            signals=meter.take(),
            loss_class=loss_class_proto(self._cache.loss_class(seq, pipeline)),
            prompt=prompt_statistics(replay.token_ids[:prompt_tokens], replay.turns),
        )

    def _try_pipeline(
        self, base: SequenceCache, pipeline: Pipeline, horizon: Sequence[int], scored: dict[Pipeline, torch.Tensor]
    ) -> generation_pb2.ReplayedPipeline:
        """Switches a fork to a pipeline and scores the horizon behind it.

        Args:
            base: the full cache.
            pipeline: what to try.
            horizon: the text's next tokens.
            scored: [horizon, V] log-probabilities by ``Pipeline.logits_key``: those behind the full cache, and those of
                pipelines tried before, to which this one's are added.
        """
        fork = self._hold(self._cache.fork(base))
        began = time.perf_counter()
        self._cache.apply(fork, pipeline, Occasion.SWITCH)
        conversion_s = time.perf_counter() - began
        cache_bytes = self._cache.use(fork).to_proto()
        key, exact = pipeline.logits_key, scored[Pipeline().logits_key]
        if key not in scored:
            scored[key] = self._score(fork, horizon)
        lossy = scored[key]
        self._reserve(fork, 1)
        began = time.perf_counter()
        self._decode([fork], horizon[0])
        step_s = time.perf_counter() - began
        self._release(fork)
        divergence = divergences(exact, lossy)
        return generation_pb2.ReplayedPipeline(
            divergence=float(divergence.mean()),
            divergence_max=float(divergence.max()),
            top1_agreement=float((exact.argmax(dim=-1) == lossy.argmax(dim=-1)).float().mean()),
            cache=cache_bytes,
            conversion_ms=conversion_s * 1e3,
            step_ms=step_s * 1e3,
            loss=_loss(lossy, horizon),
            full_loss=_loss(exact, horizon),
        )

    def _decode(self, caches: list[SequenceCache], token_id: int) -> tuple[torch.Tensor, DecodePlan]:
        """The same token for each; DamagedCacheError where one could not read all that it should."""
        logits, plan = self._runner.decode(caches, [token_id] * len(caches))
        if any(cache.damaged for cache in caches):
            raise DamagedCacheError("blocks on disk were damaged")
        return logits, plan

    def _score(self, seq: SequenceCache, horizon: Sequence[int]) -> torch.Tensor:
        """Log-probabilities [horizon, V] behind each of the horizon's tokens."""
        logits = self._runner.score(self._cache.context(seq), seq.seen, horizon)
        return torch.log_softmax(logits.float(), dim=-1)

    # -- memory --------------------------------------------------------------------------------------------------------

    def _reserve(self, seq: SequenceCache, tokens: int) -> None:
        """Makes room for tokens, at the cost of prefixes that nobody uses.

        Raises:
            TierFullError: there is none.
        """
        while True:
            try:
                return self._cache.reserve(seq, tokens)
            except TierFullError as full:
                if not self._cache.prefixes.drop(full.needed_bytes - full.free_bytes):
                    raise

    def _hold(self, seq: SequenceCache) -> SequenceCache:
        self._open.append(seq)
        return seq

    def _release(self, seq: SequenceCache) -> None:
        self._open.remove(seq)
        self._cache.close(seq)

    def _close_all(self) -> None:
        for seq in reversed(self._open):  # forks before what they are forks of
            self._cache.close(seq)
        self._open = []


def _audited(token_ids: Sequence[int]) -> bool:
    """Whether a place's signals include an audit, as those of served requests now and then do: every other text's."""
    return bool(zlib.crc32(np.array(token_ids, np.int64).tobytes()) & 1)


def _loss(logprobs: torch.Tensor, horizon: Sequence[int]) -> float:
    """Mean -log p of each token given those before; of the first one only the cache's last distribution could tell."""
    following = torch.tensor(horizon[1:], device=logprobs.device)
    return float(-logprobs[:-1].gather(1, following[:, None]).mean()) if len(horizon) > 1 else 0.0


def _note_token(meter: SignalMeter, logits: torch.Tensor, token_id: int) -> None:
    """Counts a token of the text as the sampler would count one it chose."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    entropy = float(torch.special.entr(logprobs.exp()).sum())
    meter.note_choice(token_id, entropy, float(logprobs.max().exp()), -float(logprobs[token_id]))
