"""What decoding shows of a request: measured from the attention pass and the sampler, reported to the controller.

Attention is looked at in one step of ``SAMPLE_EVERY``; a signal is the mean over the steps looked at since the last
report. Block masses come from the decode kernel at no extra pass over the cache.
"""

from __future__ import annotations

import numpy as np

from kernels.api import F32, DecodePlan, Tables
from kernels.layout import BLOCK_TOKENS
from kvpilot.v1 import policy_pb2
from workers.cache.arrangement import block_count

FAR_HORIZONS_TOKENS = (32, 64, 128, 256, 512, 1024)
SINK_TOKENS = 4
SAMPLE_EVERY = 4
REPEAT_WINDOW_TOKENS = 32
REPEAT_NGRAM = 3


class SignalMeter:
    """Signals of one request since its last report."""

    def __init__(self, token_ids: list[int]) -> None:
        self._ngrams: set[tuple[int, ...]] = set()
        self._repeats: list[bool] = []
        self._recent: list[int] = []
        for token_id in token_ids:
            self._note_token(token_id)
        self._repeats = []
        self._steps = 0
        self._clear()

    def _clear(self) -> None:
        horizons = len(FAR_HORIZONS_TOKENS)
        self._samples = self._token_samples = 0
        self._far, self._far_max = np.zeros(horizons), np.zeros(horizons)
        self._sink = self._attention_entropy = self._token_entropy = self._top1 = 0.0

    def note_choice(self, token_id: int, entropy: float, top1_probability: float) -> None:
        """Counts a token the sampler chose."""
        self._note_token(token_id)
        self._token_entropy += entropy
        self._top1 += top1_probability
        self._token_samples += 1

    def _note_token(self, token_id: int) -> None:
        self._recent = [*self._recent[1 - REPEAT_NGRAM :], token_id]
        ngram = tuple(self._recent)
        self._repeats = [*self._repeats[1 - REPEAT_WINDOW_TOKENS :], ngram in self._ngrams]
        if len(ngram) == REPEAT_NGRAM:
            self._ngrams.add(ngram)

    def note_attention(self, plan: DecodePlan, row: int, tables: Tables) -> None:
        """Looks at a decode step's attention, if it is this one's turn."""
        self._steps += 1
        if self._steps % SAMPLE_EVERY:
            return
        slot = int(plan.slots[row])
        length = tables.length[slot]  # [L, H]
        blocks = int(block_count(length).max())
        mass = plan.block_mass[:, row, :, :blocks]  # [L, H, B]
        seen = int(tables.position[slot, 0, 0, length[0, 0] - 1]) + 1
        last = tables.position[slot, :, :, BLOCK_TOKENS - 1 : blocks * BLOCK_TOKENS : BLOCK_TOKENS]  # [L, H, B]
        full = np.arange(blocks) < (length // BLOCK_TOKENS)[..., None]
        holds_sinks = tables.position[slot, :, :, : blocks * BLOCK_TOKENS : BLOCK_TOKENS] < SINK_TOKENS
        for index, horizon in enumerate(FAR_HORIZONS_TOKENS):
            far = (mass * (full & (last < seen - horizon) & ~holds_sinks)).sum(axis=2)  # [L, H]
            self._far[index] += far.mean()
            self._far_max[index] += far.max()
        self._sink += float((mass * holds_sinks).sum(axis=2).mean())
        self._attention_entropy += _entropy(mass)
        self._samples += 1

    def take(self) -> policy_pb2.Signals:
        """The means so far, and starts anew."""
        signals = policy_pb2.Signals(steps=self._samples)
        if self._samples:
            signals.far_mass.extend(self._far / self._samples)
            signals.far_mass_max.extend(self._far_max / self._samples)
            signals.sink_mass = self._sink / self._samples
            signals.attention_entropy = self._attention_entropy / self._samples
        if self._token_samples:
            signals.next_token_entropy = self._token_entropy / self._token_samples
            signals.top1_probability = self._top1 / self._token_samples
        if self._repeats:
            signals.repeat_rate = sum(self._repeats) / len(self._repeats)
        self._clear()
        return signals


def _entropy(mass: F32) -> float:
    """Mean entropy of [L, H, B] shares over blocks, divided by its largest value."""
    blocks = mass.shape[2]
    if blocks < 2:
        return 0.0
    terms = -mass * np.log(np.maximum(mass, 1e-12))
    return float(terms.sum(axis=2).mean() / np.log(blocks))


def prompt_statistics(token_ids: list[int], turns: int = 1) -> policy_pb2.PromptStatistics:
    """What a prompt looks like."""
    ids = np.asarray(token_ids)
    _, counts = np.unique(ids, return_counts=True)
    shares = counts / len(ids)
    trigrams = list(zip(token_ids, token_ids[1:], token_ids[2:], strict=False))
    return policy_pb2.PromptStatistics(
        distinct_share=len(counts) / len(ids),
        repeated_share=1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0,
        unigram_entropy=float(-(shares * np.log(shares)).sum()),
        turns=turns,
    )
