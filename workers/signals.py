"""What decoding shows of a request: measured from the attention pass and the sampler, reported to the controller.

Attention is looked at in one step of ``SAMPLE_EVERY``; a signal is the mean over the steps looked at since the last
report. Block masses come from the decode kernel at no extra pass over the cache. Votes are looked at once a report.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kernels.api import F32, I32, DecodePlan, Tables
from kernels.layout import BLOCK_TOKENS, CacheShape
from kvpilot.v1 import policy_pb2
from models.features import DEPTHS, F64, KEPT_SHARES
from workers.cache.arrangement import Mask, block_count
from workers.counting import count_votes
from workers.hindsight import U16, Hindsight

FAR_HORIZONS_TOKENS = (32, 64, 128, 256, 512, 1024)
SINK_TOKENS = 4
SAMPLE_EVERY = 4
REPEAT_WINDOW_TOKENS = 32
REPEAT_NGRAM = 3
_HALVES: F32 = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
"""Every float16 by its bits: looking them up is several times faster than numpy's conversion."""


class SignalMeter:
    """Signals of one request since its last report.

    Args:
        token_ids: its tokens so far.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._repeats = Repeats(token_ids)
        self._hindsight = Hindsight()
        self._steps = 0
        self._clear()

    def _clear(self) -> None:
        horizons = len(FAR_HORIZONS_TOKENS)
        self._samples = self._token_samples = 0
        self._far, self._far_max, self._far_layer, self._far_last = np.zeros((4, horizons))
        self._far_depth = np.zeros((DEPTHS, horizons))
        self._sink = self._attention_entropy = self._token_entropy = self._top1 = self._surprise = 0.0
        self._token_entropy_max = 0.0
        self._votes: VoteSignals | None = None
        self._missed: F64 | None = None

    def note_choice(self, token_id: int, entropy: float, top1_probability: float, surprise: float) -> None:
        """Counts a token that came, and what the distribution it came from looked like.

        Args:
            token_id: the token.
            entropy: of the distribution, nats.
            top1_probability: of its most likely token.
            surprise: -log p of the token that came, nats.
        """
        self._repeats.add(token_id)
        self._token_entropy += entropy
        self._token_entropy_max = max(self._token_entropy_max, entropy)
        self._top1 += top1_probability
        self._surprise += surprise
        self._token_samples += 1

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
        age, holds_sinks = _ages(tables, slot, blocks, seen)
        far = _beyond_horizons(mass, age)  # [L, H, horizons]
        by_layer = far.mean(axis=1)
        self._far_last = by_layer.mean(axis=0)
        self._far += self._far_last
        self._far_max += far.max(axis=(0, 1))
        self._far_layer += by_layer.max(axis=0)
        self._far_depth += _by_depth(by_layer)
        self._sink += float((mass * holds_sinks).sum(axis=2).mean())
        self._attention_entropy += _entropy(mass)
        self._samples += 1

    def note_votes(self, tables: Tables, slot: int, seen: int) -> None:
        """Looks at the votes as they are now; :meth:`take` tells what was seen last."""
        self._votes = vote_signals(tables, slot, seen)
        self._missed = self._hindsight.look(tables, slot, seen, self._votes.least)

    def take(self) -> policy_pb2.Signals:
        """The means so far, and starts anew."""
        signals = policy_pb2.Signals(steps=self._samples)
        if self._samples:
            signals.far_mass.extend(self._far / self._samples)
            signals.far_mass_max.extend(self._far_max / self._samples)
            signals.far_mass_last.extend(self._far_last)
            signals.far_mass_worst_layer.extend(self._far_layer / self._samples)
            signals.far_mass_by_depth.extend((self._far_depth / self._samples).ravel())
            signals.sink_mass = self._sink / self._samples
            signals.attention_entropy = self._attention_entropy / self._samples
        if self._token_samples:
            signals.next_token_entropy = self._token_entropy / self._token_samples
            signals.next_token_entropy_max = self._token_entropy_max
            signals.top1_probability = self._top1 / self._token_samples
            signals.surprise = self._surprise / self._token_samples
        self._repeats.tell(signals)
        if self._votes is not None:
            dropped, far = self._votes.dropped, self._votes.far
            signals.dropped_votes.extend(dropped.mean(axis=(0, 1)))
            signals.dropped_votes_max.extend(dropped.max(axis=(0, 1)))
            signals.far_votes.extend(far.mean(axis=(0, 1)))
            signals.far_votes_max.extend(far.max(axis=(0, 1)))
            signals.far_votes_by_depth.extend(_by_depth(far.mean(axis=1)).ravel())
        if self._missed is not None:
            by_layer = self._missed.mean(axis=1)
            signals.missed_votes.extend(by_layer.mean(axis=0))
            signals.missed_votes_max.extend(self._missed.max(axis=(0, 1)))
            signals.missed_votes_by_depth.extend(_by_depth(by_layer).ravel())
        self._clear()
        return signals


class Repeats:
    """How much of a text continues what stands earlier in it, and how far back that is.

    Args:
        token_ids: the text so far.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        older = max(0, len(token_ids) - REPEAT_WINDOW_TOKENS)
        self._last = dict(zip(_ngrams(token_ids[:older]), range(REPEAT_NGRAM - 1, older), strict=False))
        self._recent = list(token_ids[max(0, older + 1 - REPEAT_NGRAM) : older])
        self._count = older
        self._distances: deque[int] = deque(maxlen=REPEAT_WINDOW_TOKENS)  # 0: no repeat
        self._run = 0
        for token_id in token_ids[older:]:
            self.add(token_id)

    def add(self, token_id: int) -> None:
        """Takes the next token."""
        self._recent = [*self._recent[1 - REPEAT_NGRAM :], token_id]
        ngram, distance = tuple(self._recent), 0
        if len(ngram) == REPEAT_NGRAM:
            distance = self._count - self._last.get(ngram, self._count)
            self._last[ngram] = self._count
        before = self._distances[-1] if self._distances else 0
        self._run = 0 if not distance else self._run + 1 if distance == before else 1
        self._distances.append(distance)
        self._count += 1

    def tell(self, signals: policy_pb2.Signals) -> None:
        """Writes what the last tokens show."""
        if not self._distances:
            return
        distances = np.array(self._distances)
        signals.repeat_rate = float((distances > 0).mean())
        signals.repeat_beyond.extend(float((distances > horizon).mean()) for horizon in FAR_HORIZONS_TOKENS)
        signals.copied_tokens = min(self._run, REPEAT_WINDOW_TOKENS)
        signals.copied_from_tokens = self._distances[-1]


def warm_up(shape: CacheShape) -> None:
    """Compiles what else would be compiled when a first request is looked at, in the middle of its generation."""
    tables = Tables.allocate(1, shape, BLOCK_TOKENS)
    tables.length[:] = 2
    hindsight = Hindsight()
    for seen in (2, 3):
        hindsight.look(tables, 0, seen, vote_signals(tables, 0, seen).least)
        tables.length += 1


@dataclass(frozen=True)
class VoteSignals:
    """What each head's votes, its attention of about the last 64 queries, say of its tokens."""

    dropped: F64
    """[L, H, KEPT_SHARES] share of the votes that the best tokens do not have, if only that share of all tokens seen
    may stay; 0 where a head holds no more than may stay, or nothing was voted for."""
    far: F64
    """[L, H, horizons] share of the votes on whole blocks older than each horizon, that of the sinks left out."""
    least: U16
    """[L, H, KEPT_SHARES] least vote of the tokens that may stay, as the bits of a float16; 0 where all may."""


def vote_signals(tables: Tables, slot: int, seen: int) -> VoteSignals:
    """Looks at a request's votes.

    Args:
        tables: whose votes to look at.
        slot: the request's.
        seen: its tokens so far, kept or not.
    """
    length = tables.length[slot]  # [L, H]
    blocks = int(block_count(length).max(initial=0))
    by_block = np.zeros((*length.shape, blocks))
    dropped = np.zeros((*length.shape, len(KEPT_SHARES)))
    least = np.zeros(dropped.shape, np.uint16)
    may_stay = np.array([math.ceil(share * seen) for share in KEPT_SHARES])
    count_votes(tables.votes[slot].view(np.uint16), length, _HALVES, may_stay, by_block, dropped, least)
    total = by_block.sum(axis=2)[..., None]
    far = _beyond_horizons(by_block, _ages(tables, slot, blocks, seen)[0])
    for part in (far, dropped):
        np.divide(part, total, out=part, where=total > 0)
    return VoteSignals(dropped, far, least)


def _ages(tables: Tables, slot: int, blocks: int, seen: int) -> tuple[I32, Mask]:
    """Tokens since the last one of each block [L, H, B], 0 for those not full or with sinks; and which have sinks."""
    length = tables.length[slot]
    last = tables.position[slot, :, :, BLOCK_TOKENS - 1 : blocks * BLOCK_TOKENS : BLOCK_TOKENS]  # [L, H, B]
    full = np.arange(blocks) < (length // BLOCK_TOKENS)[..., None]
    holds_sinks = tables.position[slot, :, :, : blocks * BLOCK_TOKENS : BLOCK_TOKENS] < SINK_TOKENS
    return np.where(full & ~holds_sinks, seen - last, np.int32(0)), holds_sinks


def prompt_statistics(token_ids: Sequence[int], turns: int = 1) -> policy_pb2.PromptStatistics:
    """What a prompt looks like.

    Args:
        token_ids: the whole prompt.
        turns: user turns of a chat so far.

    Raises:
        ValueError: a prompt without tokens.
    """
    if not len(token_ids):
        raise ValueError("prompt of 0 tokens; statistics need at least 1")
    _, kind, counts = np.unique(np.asarray(token_ids), return_inverse=True, return_counts=True)
    grams, width = max(0, len(kind) - REPEAT_NGRAM + 1), len(counts)
    number = np.zeros(grams, np.int64)  # names a gram: its tokens as digits, exact up to 2 million different tokens
    for place in range(REPEAT_NGRAM):
        number = number * width + kind[place : place + grams]
    return policy_pb2.PromptStatistics(
        distinct_share=width / len(kind),
        repeated_share=1.0 - len(np.unique(number)) / grams if grams else 0.0,
        unigram_entropy=float((counts / len(kind) * np.log(len(kind) / counts)).sum()),
        turns=turns,
    )


def _ngrams(token_ids: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All runs of ``REPEAT_NGRAM`` tokens."""
    return zip(*(token_ids[start:] for start in range(REPEAT_NGRAM)), strict=False)


def _beyond_horizons(mass: F32 | F64, age: I32) -> F64:
    """Mass on blocks that are older than each of ``FAR_HORIZONS_TOKENS``: [L, H, horizons] of [L, H, B]."""
    heads, horizons = mass.shape[0] * mass.shape[1], len(FAR_HORIZONS_TOKENS)
    passed = np.searchsorted(FAR_HORIZONS_TOKENS, age).reshape(heads, -1)  # horizons that a block is older than
    passed += np.arange(heads)[:, None] * (horizons + 1)
    sums = np.bincount(passed.ravel(), mass.ravel(), heads * (horizons + 1)).reshape(*mass.shape[:2], horizons + 1)
    beyond: F64 = sums[..., :0:-1].cumsum(axis=2)[..., ::-1]
    return beyond


def _by_depth(by_layer: F64) -> F64:
    """Means [DEPTHS, N] of [L, N] over each quarter of the layers; over all of them for one that has none."""
    parts = np.array_split(by_layer, DEPTHS)
    return np.stack([(part if len(part) else by_layer).mean(axis=0) for part in parts])


def _entropy(mass: F32) -> float:
    """Mean entropy of [L, H, B] shares over blocks, divided by its largest value."""
    blocks = mass.shape[2]
    if blocks < 2:
        return 0.0
    terms = -mass * np.log(np.maximum(mass, 1e-12))
    return float(terms.sum(axis=2).mean() / np.log(blocks))
