"""Audits: now and then a run of a lossy request's steps is computed again with the exact cache, and both compared.

A recoverable pipeline keeps an exact copy of what it loses (``workers.cache.shadow``), or loses nothing but what its
queries do not read. So the input tokens of a run of
decode steps can be scored once more, in one pass, attending over the exact keys and values of all tokens before the
run. How far the distributions that were delivered are from these, in the mean over the run, is a true label: what a
bundle predicts and bounds is this very mean, over as many steps. A run costs little more than one step alone would, and
a single step's divergence, most often almost nothing and now and then very large, could not be held against a bound.

Keys and values of tokens generated under the lossy pipeline before the run come from hidden states that were lossy
already: the exact copy holds them as they were computed, and what they have drifted is not seen.

An audit reads and writes nothing else: tokens, tables, masses and bytes are the same with it and without.
"""

from __future__ import annotations

import time
import weakref
import zlib
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

import torch

from kvpilot.v1 import policy_pb2
from workers.cache.kvcache import KVCache
from workers.cache.sequence_cache import SequenceCache
from workers.cache.staging import DamagedCacheError
from workers.engine.reports import Reporter
from workers.engine.runner import ModelRunner
from workers.engine.scoring import divergences
from workers.engine.sequence import Sequence
from workers.stages.base import LossClass, Pipeline


@dataclass
class _Run:
    """Steps that are being audited."""

    cache: SequenceCache
    pipeline: Pipeline
    at_token: int
    start: int
    """Position of the first step's input token."""
    token_ids: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)  # [vocabulary] each, as delivered


class Auditor:
    """Audits the requests of one worker.

    Args:
        cache: the worker's cache.
        runner: its model.
        reporter: is told each audit, and counts.
        every_tokens: generated tokens between the beginnings of two audits of a request; 0: none.
        tokens: steps of an audit.
        budget: most time audits may take over the worker's life, as a share of that of decode steps.
    """

    def __init__(
        self, cache: KVCache, runner: ModelRunner, reporter: Reporter, every_tokens: int, tokens: int, budget: float
    ) -> None:
        self._cache = cache
        self._runner = runner
        self._reporter = reporter
        self._every_tokens = every_tokens
        self._tokens = tokens
        self._budget = budget
        self._decode_ms = 0.0
        self._runs: weakref.WeakKeyDictionary[Sequence, _Run] = weakref.WeakKeyDictionary()

    def decoded(self, sequences: Rows[Sequence], logits: torch.Tensor, decode_ms: float) -> None:
        """A decode step is done and no token chosen yet: takes note of it for requests under audit.

        Args:
            sequences: the step's requests, whose caches count the step's token.
            logits: [R, vocabulary] that the step gave.
            decode_ms: what the step took.
        """
        self._decode_ms += decode_ms
        for row, seq in enumerate(sequences):
            run = self._running(seq) or self._begin(seq)
            if run is None:
                continue
            run.token_ids.append(seq.token_ids[-1])
            run.logits.append(logits[row].clone())
            if len(run.token_ids) == self._tokens:
                del self._runs[seq]
                self._end(seq, run)

    def _running(self, seq: Sequence) -> _Run | None:
        """A request's run, unless it was switched or lost its memory meanwhile."""
        run = self._runs.get(seq)
        if run is not None and (run.cache is not seq.cache or run.pipeline is not seq.pipeline):
            del self._runs[seq]
            self._reporter.audits_skipped += 1
            return None
        return run

    def _begin(self, seq: Sequence) -> _Run | None:
        if not self._due(seq):
            return None
        if self._reporter.audit_ms >= self._budget * self._decode_ms:
            self._reporter.audits_skipped += 1
            return None
        assert seq.cache is not None
        run = self._runs[seq] = _Run(seq.cache, seq.pipeline, seq.generated, seq.cache.seen - 1)
        return run

    def _due(self, seq: Sequence) -> bool:
        if not self._every_tokens or seq.pipeline.loss_class is not LossClass.RECOVERABLE:
            return False
        if not seq.cache or seq.cache.lost or (seq.pipeline.wants_shadow and not seq.cache.shadow):
            return False
        phase = zlib.crc32(seq.job_id.encode())  # requests that began together are not audited in the same steps
        return (seq.generated + phase) % self._every_tokens == 0

    def _end(self, seq: Sequence, run: _Run) -> None:
        """Computes a run again; it is skipped where no exact copy of everything before it is there."""
        began = time.monotonic()
        context = self._cache.exact_context(run.cache, run.start)
        if context is None:
            self._reporter.audits_skipped += 1
            return
        try:
            scored = self._runner.score(context, run.start, run.token_ids)
        except DamagedCacheError:
            self._reporter.audits_skipped += 1
            return
        exact, lossy = (
            torch.log_softmax(rows.float(), dim=-1) for rows in (scored, torch.stack(run.logits))
        )  # [tokens, vocabulary]
        found = divergences(exact, lossy)
        audit = policy_pb2.Audit(
            at_token=run.at_token,
            pipeline=run.pipeline.text,
            divergence=float(found.mean()),
            divergence_max=float(found.max()),
            top1_agreement=float((exact.argmax(dim=-1) == lossy.argmax(dim=-1)).float().mean()),
            tokens=len(run.token_ids),
            cost_ms=(time.monotonic() - began) * 1e3,
        )
        self._reporter.audited(seq, audit)
