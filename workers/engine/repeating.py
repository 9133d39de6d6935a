"""The model repeats a text: which cached tokens does it look at? For evictors that go by this reconstruction.

A text that is in the cache is fed once more behind it, chunk by chunk, each chunk after words that ask the model to
repeat it. Nothing is written to the request's cache; the tokens fed again lie in a second one, a chunk's at most,
within the device tier's budget. Of each cached token the most attention is noted that a query of its chunk's repetition
pays it (KVzip, arXiv 2505.23416). As in the paper, the shares are over the chunk and what is fed again, so that the
cost grows linearly with the text, and, as in its authors' code, over the text's first tokens too, on which heads rest
that look for nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Ids
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from kernels.layout import BLOCK_TOKENS
from workers.cache.arena import TierFullError
from workers.cache.kvcache import KVCache
from workers.cache.sequence_cache import SequenceCache
from workers.engine.attention import causal
from workers.engine.runner import LoadedModel, ModelRunner
from workers.engine.scoring import Context
from workers.engine.sequence import Sequence
from workers.stages.base import Pipeline

CHUNK_TOKENS = 2048
LEAST_CHUNK_TOKENS = 64
"""Room for fewer repeated tokens than this behind the text (or than there are) is too little."""
SINK_TOKENS = 4
PREVIOUS_TOKENS = 8
"""Last tokens of the chunk before, which say where to begin."""
QUERIES_AT_ONCE = 64
"""Queries whose shares are worked out together: query heads x this x two chunks numbers."""

_WHOLE = "Repeat the previous context exactly."
_PART = "Repeat the part of the previous context exactly, starting with"
_ANSWER, _PREVIOUS = "@answer@", "@previous@"


@dataclass(frozen=True)
class Words:
    """Token ids that ask a model to repeat what it has read."""

    whole: tuple[int, ...]
    before: tuple[int, ...]
    """Asks for a later chunk; the last tokens of the chunk before it follow, then ``after``."""
    after: tuple[int, ...]

    @staticmethod
    def of(loaded: LoadedModel) -> Words | None:
        """As the next turn of a chat where the model has a template for one, else as plain text; None: no tokenizer."""
        if loaded.tokenizer is None:
            return None

        def ids(text: str) -> tuple[int, ...]:
            return tuple(loaded.tokenizer(text, add_special_tokens=False)["input_ids"])

        part = turn(loaded, f"{_PART} {_PREVIOUS}").split(_PREVIOUS)
        return Words(ids(turn(loaded, _WHOLE)), ids(part[0]), ids(part[1]))

    @property
    def most(self) -> int:
        """Tokens of the longest request."""
        return max(len(self.whole), len(self.before) + PREVIOUS_TOKENS + len(self.after))

    def ask(self, text: Ids[int], first: int) -> list[int]:
        """Asks for the text from token ``first`` on."""
        if not first:
            return list(self.whole)
        return [*self.before, *text[max(0, first - PREVIOUS_TOKENS) : first], *self.after]

    def chunk_tokens(self, tokens: int, context_tokens: int) -> int:
        """Tokens of a text of so many that the model can repeat at a time; 0: too few, its context ends before."""
        room = context_tokens - tokens - self.most
        return min(CHUNK_TOKENS, room) if room >= min(tokens, LEAST_CHUNK_TOKENS) else 0


def turn(loaded: LoadedModel, text: str) -> str:
    """A user's turn behind what there is, and the beginning of its answer."""
    if loaded.chat:
        roles = (("user", "."), ("assistant", _ANSWER), ("user", text))
        messages = [{"role": role, "content": content} for role, content in roles]
        whole = loaded.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        _, answer, turn = str(whole).rpartition(_ANSWER)
        if answer and text in turn:
            return turn
    return f"\n\n{text}\n\n"


def refusal(pipeline: Pipeline, words: Words | None, tokens: int, context_tokens: int) -> str:
    """Why a model cannot repeat a text of so many tokens for a pipeline; empty: it can, or need not."""
    evictor = pipeline.evictor
    if not (evictor and evictor.needs_reconstruction):
        return ""
    if words is None:
        return f"stage {evictor.name!r} asks the model in words to repeat the text; this model has no tokenizer"
    if not words.chunk_tokens(tokens, context_tokens):
        least = min(tokens, LEAST_CHUNK_TOKENS) + words.most
        return (
            f"stage {evictor.name!r} has the model repeat the text behind it: {tokens} tokens and {least} more do not"
            f" fit the context of {context_tokens}"
        )
    return ""


class RepeatingAttention:
    """Attention of tokens that repeat a chunk of a text, behind the text and those fed before them.

    Args:
        cache: the worker's cache.
        text: its exact tokens, or what is left of them.
        tokens: how many there were when the pass began; later ones are not seen.
        scratch: the cache of the tokens fed again, these counted in already.
        first: position of the chunk's first token.
        most: float32 [layers, kv_heads, chunk + 1] the most attention each of its tokens has received, is updated; the
            last entry is scrap.
    """

    def __init__(
        self, cache: KVCache, text: Context, tokens: int, scratch: SequenceCache, first: int, most: torch.Tensor
    ) -> None:
        self._cache = cache
        self._text = text
        self._tokens = tokens
        self._slot = scratch.slot
        self._again = cache.context(scratch)
        self._first = first
        self._most = most

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
        """See :class:`workers.engine.attention.Attend`; B is 1, S the number of tokens."""
        queries = q.shape[2]
        self._cache.backend.write(self._slot, layer, self._again.tokens - queries, k[0], v[0])
        (old_k, old_v), (new_k, new_v) = self._text.read(layer), self._again.read(layer)
        position = torch.from_numpy(np.ascontiguousarray(self._text.position[layer])).to(q.device).long()  # [H, T]
        length = torch.from_numpy(self._text.length[layer]).to(q.device)
        there = (torch.arange(position.shape[1], device=q.device) < length[:, None]) & (position < self._tokens)
        self._note(layer, q[0], old_k, position, there, new_k, scaling)
        before = there[:, None].expand(-1, queries, -1)  # [H, queries, T]
        own = causal(queries, new_k.shape[1], q.device).expand(len(there), -1, -1)
        mask = torch.cat([before, own], dim=2).repeat_interleave(q.shape[1] // len(there), dim=0)
        out = F.scaled_dot_product_attention(
            q,
            torch.cat([old_k, new_k], dim=1)[None],
            torch.cat([old_v, new_v], dim=1)[None],
            attn_mask=mask[None],
            scale=scaling,
            enable_gqa=True,
        )
        return out.transpose(1, 2)

    def _note(
        self,
        layer: int,
        q: torch.Tensor,
        keys: torch.Tensor,
        position: torch.Tensor,
        there: torch.Tensor,
        again: torch.Tensor,
        scaling: float,
    ) -> None:
        """Raises ``most`` to the largest shares that these queries [query_heads, N, D] pay to the chunk's tokens."""
        kv_heads, dim, tokens = len(keys), keys.shape[2], self._most.shape[2] - 1
        chunk = there & (position >= self._first) & (position < self._first + tokens)
        counted = chunk | (there & (position < SINK_TOKENS))
        index = (~counted).byte().argsort(dim=1, stable=True)[:, : int(counted.sum(dim=1).max())]  # [H, C]
        counted, chunk = counted.gather(1, index), chunk.gather(1, index)
        place = torch.where(chunk, position.gather(1, index) - self._first, tokens)
        chosen = keys.gather(1, index[..., None].expand(-1, -1, dim))
        columns = torch.cat([chosen, again], dim=1).float().mT  # [H, D, C + R]
        own = causal(q.shape[1], again.shape[1], q.device)
        grouped = q.float().reshape(kv_heads, -1, q.shape[1], dim)  # [H, G, N, D]
        for start in range(0, q.shape[1], QUERIES_AT_ONCE):
            asking = grouped[:, :, start : start + QUERIES_AT_ONCE]
            count = asking.shape[2]
            seen = torch.cat(
                [counted[:, None].expand(-1, count, -1), own[start : start + count].expand(kv_heads, -1, -1)], dim=2
            )
            scores = asking.flatten(1, 2) @ columns * scaling
            scores = scores.view(kv_heads, -1, count, scores.shape[2])  # [H, G, count, C + R]
            shares = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)[..., : index.shape[1]]
            self._most[layer].scatter_reduce_(1, place, shares.amax(dim=(1, 2)), "amax")


class Repetition:
    """One request's text being repeated, piece by piece; afterwards ``SequenceCache.reconstruction`` covers it.

    What an earlier pass has covered is not fed again. Between two pieces the request may decode and be moved about.

    Args:
        cache, runner: the worker's.
        seq: the request's cache.
        token_ids: its tokens, those counted in its cache at least.
        words: how to ask.
        context_tokens: longest sequence of the model.
    """

    def __init__(
        self,
        cache: KVCache,
        runner: ModelRunner,
        seq: SequenceCache,
        token_ids: Ids[int],
        words: Words,
        context_tokens: int,
    ) -> None:
        self._cache = cache
        self._runner = runner
        self.cache = seq
        self._text = list(token_ids[: seq.seen])
        self._words = words
        known = seq.reconstruction
        self._found = [] if known is None else [known]
        size = words.chunk_tokens(len(self._text), context_tokens)
        if not size:
            raise ValueError(f"a text of {len(self._text)} tokens leaves no room in the context of {context_tokens}")
        starts = range(0 if known is None else known.shape[2], len(self._text), size)
        self._chunks = [(first, min(len(self._text), first + size)) for first in starts]
        self._scratch: SequenceCache | None = None
        self._most = torch.zeros(0)
        self.left = sum(len(words.ask(self._text, first)) + end - first for first, end in self._chunks)
        """Tokens yet to be fed."""

    def step(self, most: int) -> None:
        """Feeds the next tokens, at most so many and of one chunk.

        Raises:
            TierFullError: the device has no room for them, though prefixes that nobody uses were dropped.
        """
        first, end = self._chunks[0]
        fed = [*self._words.ask(self._text, first), *self._text[first:end]]
        cache, shape = self._cache, self._cache.shape
        if self._scratch is None:
            self._scratch = cache.open(len(fed))
            size = (shape.layers, shape.kv_heads, end - first + 1)
            self._most = torch.zeros(size, device=cache.device.data.device)
        scratch = self._scratch
        piece = fed[scratch.seen : scratch.seen + most]
        self._reserve(scratch, len(piece))
        start = len(self._text) + scratch.seen
        cache.advance(scratch, len(piece))
        text = cache.exact_context(self.cache, len(self._text)) or cache.context(self.cache)
        attend = RepeatingAttention(cache, text, len(self._text), scratch, first, self._most)
        self._runner.attend(attend, start, piece)
        self.left -= len(piece)
        if scratch.seen == len(fed):
            self._found.append(self._most[:, :, :-1].cpu().numpy())
            self._chunks.pop(0)
            self.close()
            if not self._chunks:
                self.cache.reconstruction = np.concatenate(self._found, axis=2)

    @property
    def holds_memory(self) -> bool:
        """Whether tokens fed again take device memory now."""
        return self._scratch is not None

    def close(self) -> None:
        """Gives back the memory of the tokens fed again."""
        if self._scratch:
            self._cache.close(self._scratch)
            self._scratch = None

    def _reserve(self, scratch: SequenceCache, tokens: int) -> None:
        while True:
            try:
                self._cache.reserve(scratch, tokens)
                break
            except TierFullError as full:
                if not self._cache.prefixes.drop(full.needed_bytes - full.free_bytes):
                    raise
        self._cache.note_scratch(self.cache, scratch)


def is_missing(seq: SequenceCache, pipeline: Pipeline) -> bool:
    """Whether the model must repeat a request's text before a pipeline can take effect."""
    return bool(pipeline.evictor and pipeline.evictor.needs_reconstruction) and seq.reconstruction is None


def is_behind(seq: SequenceCache, pipeline: Pipeline) -> bool:
    """Whether it should before a switch: for the first time, or because two blocks or more have come since.

    Fewer than that are young, or were generated meanwhile; they stay, as all do where the worker's own rule switches.
    """
    if seq.reconstruction is None:
        return is_missing(seq, pipeline)
    known = seq.reconstruction.shape[2]
    return bool(pipeline.evictor and pipeline.evictor.needs_reconstruction) and seq.seen - known >= 2 * BLOCK_TOKENS


class Repeater:
    """Repetitions of one worker's requests. Each is fed as much in a step as the scheduler says.

    Args:
        cache, runner: the worker's; the cache has a slot to spare.
        words: how to ask, or None where the model has no words.
        context_tokens: longest sequence of the model.
    """

    def __init__(self, cache: KVCache, runner: ModelRunner, words: Words | None, context_tokens: int) -> None:
        self._cache = cache
        self._runner = runner
        self.words = words
        self._context_tokens = context_tokens
        self._work: dict[str, Repetition] = {}  # by job
        self._pause_ms: dict[str, float] = {}

    def refusal(self, pipeline: Pipeline, tokens: int) -> str:
        """Why no request of so many tokens can have this pipeline; empty: it can."""
        return refusal(pipeline, self.words, tokens, self._context_tokens)

    def begin(self, seq: Sequence, pipeline: Pipeline) -> bool:
        """Has the model repeat a request's text if a pipeline asks for that. False: there is no need, or no way."""
        assert seq.cache is not None
        self.drop(seq)
        if not is_behind(seq.cache, pipeline) or self.refusal(pipeline, seq.cache.seen):
            return False
        assert self.words is not None
        work = Repetition(self._cache, self._runner, seq.cache, seq.token_ids, self.words, self._context_tokens)
        self._work[seq.job_id] = work
        seq.to_repeat = work.left
        return True

    def step(self, seq: Sequence, most: int) -> None:
        """Feeds the next tokens; ``seq.to_repeat`` tells how many are left, 0 too where memory ran out."""
        work = self._work.get(seq.job_id)
        if work is None or work.cache is not seq.cache:
            self.drop(seq)
            return
        began = time.monotonic()
        try:
            work.step(most)
        except TierFullError:
            self.drop(seq)
            return
        seq.to_repeat = work.left
        took_ms = (time.monotonic() - began) * 1e3
        self._pause_ms[seq.job_id] = max(took_ms, self._pause_ms.get(seq.job_id, 0.0))
        if not work.left:
            del self._work[seq.job_id]

    def take_pause_ms(self, seq: Sequence) -> float:
        """The longest piece of a request's repetitions since this was last asked."""
        return self._pause_ms.pop(seq.job_id, 0.0)

    def drop(self, seq: Sequence) -> None:
        """Ends a request's repetition, if there is one, without a result."""
        seq.to_repeat = 0
        if work := self._work.pop(seq.job_id, None):
            work.close()

    def give_way(self) -> bool:
        """Ends repetitions that hold memory. False: there are none."""
        holding = [job for job, work in self._work.items() if work.holds_memory]
        for job in holding:
            self._work.pop(job).close()
        return bool(holding)
