"""Audits: now and then a step of a lossy request is computed again with the exact cache, and the two are compared.

A recoverable pipeline keeps an exact copy of what it loses (``workers.cache.shadow``). So the input token of a decode
step can be run once more, attending over the exact keys and values of all tokens before it, and the divergence of the
distribution that was delivered from this one is a true label of what the pipeline costs.

It is the loss of this one step. Keys and values of tokens that were generated under the lossy pipeline come from hidden
states that were lossy already: the exact copy holds them as they were computed, and what they have drifted is not seen.

An audit reads and writes nothing else: tokens, tables, masses and bytes are the same with it and without.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence as Rows

import torch

from kvpilot.v1 import policy_pb2
from workers.cache.kvcache import KVCache
from workers.engine.reports import Reporter
from workers.engine.runner import ModelRunner
from workers.engine.scoring import divergences
from workers.engine.sequence import Sequence


class Auditor:
    """Audits the requests of one worker.

    Args:
        cache: the worker's cache.
        runner: its model.
        reporter: is told each audit, and counts.
        every_tokens: generated tokens between two audits of a request; 0: none.
        budget: most time audits may take over the worker's life, as a share of that of decode steps.
    """

    def __init__(
        self, cache: KVCache, runner: ModelRunner, reporter: Reporter, every_tokens: int, budget: float
    ) -> None:
        self._cache = cache
        self._runner = runner
        self._reporter = reporter
        self._every_tokens = every_tokens
        self._budget = budget
        self._decode_ms = 0.0

    def decoded(self, sequences: Rows[Sequence], logits: torch.Tensor, decode_ms: float) -> None:
        """A decode step is done and no token chosen yet: audits the requests whose turn it is.

        Args:
            sequences: the step's requests, whose caches count the step's token.
            logits: [R, vocabulary] that the step gave.
            decode_ms: what the step took.
        """
        self._decode_ms += decode_ms
        for row, seq in enumerate(sequences):
            if self._due(seq):
                spent = self._reporter.audit_ms >= self._budget * self._decode_ms
                audit = None if spent else self._audit(seq, logits[row])
                if audit:
                    self._reporter.audited(seq, audit)
                else:
                    self._reporter.audits_skipped += 1

    def _due(self, seq: Sequence) -> bool:
        if not self._every_tokens or not seq.pipeline.wants_shadow:
            return False
        if not seq.cache or not seq.cache.shadow or seq.cache.lost:
            return False
        phase = zlib.crc32(seq.job_id.encode())  # requests that began together are not audited in the same step
        return (seq.generated + phase) % self._every_tokens == 0

    def _audit(self, seq: Sequence, logits: torch.Tensor) -> policy_pb2.Audit | None:
        """Computes the step of a request again; None where no exact copy of everything before it is there."""
        assert seq.cache is not None
        began = time.monotonic()
        position = seq.cache.seen - 1
        context = self._cache.exact_context(seq.cache, position)
        if context is None:
            return None
        exact, lossy = (
            torch.log_softmax(row.float(), dim=-1)
            for row in (self._runner.score(context, position, seq.token_ids[-1:]), logits[None])
        )  # [1, vocabulary]
        return policy_pb2.Audit(
            at_token=seq.generated,
            pipeline=seq.pipeline.text,
            divergence=float(divergences(exact, lossy)),
            same_top1=bool(exact.argmax() == lossy.argmax()),
            cost_ms=(time.monotonic() - began) * 1e3,
        )
