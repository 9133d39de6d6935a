"""One request in this process, and what its cache holds afterwards: tokens, formats, tiers, bytes, scores."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kernels.api import F32, I32
from kernels.layout import BLOCK_TOKENS, BlockFormat, CacheShape, Format, Tier
from workers.cache.accounting import CacheUse, measure
from workers.cache.arena import page_blocks
from workers.cache.arrangement import Mask, blocks_of, tokens_of
from workers.cache.disk import DiskStore
from workers.cache.formats import format_of, formats
from workers.cache.kvcache import KVCache
from workers.cache.recalls import Recalls
from workers.cache.sequence_cache import Occasion, SequenceCache
from workers.cache.staging import SLOTS
from workers.cache.style import styles_of, tiers_in
from workers.engine.attention import cache_shape
from workers.engine.catalyst import catalyst
from workers.engine.repeating import Repetition, Words, is_missing, refusal
from workers.engine.runner import LoadedModel, ModelRunner
from workers.engine.sampler import SampleRequest, SamplingParameters, sample
from workers.stages.base import Evictor, LayerView, LossClass, Pipeline

STEP_TOKENS = 256
"""Tokens of a prompt computed in one pass, as a worker does by default."""
_SPARE_ROWS = 16
"""Room beside the prompt and what follows it, in rows of blocks."""


@dataclass(frozen=True)
class Block:
    """A block of a table. It holds the tokens at ``position`` [up to 32]."""

    format: BlockFormat
    tier: Tier
    position: I32


@dataclass(frozen=True)
class Kind:
    """All of a request's blocks of one format on one tier."""

    format: BlockFormat
    tier: Tier
    blocks: int
    tokens: int


@dataclass(frozen=True)
class Scores:
    """What one head's tokens were worth when tokens were last chosen: N it chose among."""

    position: I32  # [N] rising
    score: F32  # [N] as the evictor gave them; protected tokens stay whatever theirs is


@dataclass(frozen=True)
class Head:
    """What one KV head of one layer keeps."""

    layer: int
    head: int
    blocks: tuple[Block, ...]
    scores: Scores | None
    """None where nothing is evicted."""
    use: CacheUse
    """Its part of the request's bytes, peaks left out."""

    @property
    def kept(self) -> I32:
        """[kept tokens] their positions, rising."""
        return np.concatenate([np.zeros(0, np.int32), *(block.position for block in self.blocks)])


@dataclass(frozen=True)
class Choice:
    """The last time that an evictor chose."""

    seen: int
    """Tokens seen by then; all that came later are kept."""
    budget: int
    """Tokens a head keeps, in the mean; where each head has its own number, at most."""
    first: int
    """Tokens at the beginning that stay whatever their score."""
    recent: int
    """Tokens at the end that do."""


@dataclass(frozen=True)
class Inspection:
    """What a pipeline made of a request's cache."""

    model: str
    pipeline: str
    loss_class: LossClass
    shape: CacheShape
    prompt_tokens: int
    token_ids: tuple[int, ...]
    """The prompt and what was generated: all tokens that the cache has seen."""
    tokens: tuple[str, ...]
    """The same as text, token by token."""
    choice: Choice | None
    use: CacheUse
    recalls: Recalls
    heads: tuple[Head, ...]
    """Of layer 0, then of layer 1, and so on."""

    @property
    def seen(self) -> int:
        """Tokens seen, kept or not."""
        return len(self.token_ids)

    @property
    def kept(self) -> Mask:
        """[heads, seen] which tokens each head keeps."""
        kept = np.zeros((len(self.heads), self.seen), bool)
        for row, head in enumerate(self.heads):
            kept[row, head.kept] = True
        return kept

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Blocks and their tokens by format and tier, those that occur."""
        blocks = [block for head in self.heads for block in head.blocks]
        return tuple(
            Kind(fmt, tier, len(alike), sum(len(block.position) for block in alike))
            for tier in Tier
            for fmt in formats()
            if (alike := [block for block in blocks if (block.format, block.tier) == (fmt, tier)])
        )


def inspect_request(
    loaded: LoadedModel,
    pipeline: Pipeline,
    prompt: list[int],
    tokens: int,
    progress: Callable[[int], None] = lambda seen: None,
) -> Inspection:
    """Runs a prompt and so many greedy tokens behind it, as a worker that serves nothing else would.

    Tokens are generated past the model's end token.

    Args:
        loaded: the model.
        pipeline: in force from the end of the prompt on.
        prompt: its tokens, at least one; with ``tokens`` more they must fit the model's context.
        tokens: to generate.
        progress: is told how many tokens are computed.

    Raises:
        ValueError: the model cannot do what the pipeline asks of it.
    """
    words = Words.of(loaded)
    if reason := refusal(pipeline, words, len(prompt), loaded.context_tokens):
        raise ValueError(reason)
    with _cache_for(loaded, pipeline, len(prompt) + tokens) as cache:
        return _inspect(cache, loaded, words, pipeline, prompt, tokens, progress)


def _inspect(
    cache: KVCache,
    loaded: LoadedModel,
    words: Words | None,
    pipeline: Pipeline,
    prompt: list[int],
    tokens: int,
    progress: Callable[[int], None],
) -> Inspection:
    chosen: dict[int, _Scored] = {}
    watched = _watched(pipeline, chosen)
    seq, ids = cache.open(len(prompt) + tokens), list(prompt)
    runner = ModelRunner(loaded, cache)
    cache.catalyse = catalyst(runner, loaded, loaded.context_tokens)
    logits = _compute_prompt(cache, runner, seq, watched, ids, progress)
    if words and is_missing(seq, watched):
        work = Repetition(cache, runner, seq, ids, words, loaded.context_tokens)
        while work.left:
            work.step(STEP_TOKENS)
    cache.apply(seq, watched, Occasion.PROMPT)
    while len(ids) < len(prompt) + tokens:
        request = SampleRequest(SamplingParameters(), ids, len(ids) - len(prompt), 0)
        choice = sample(logits, [request])[0]
        ids.append(choice.token_id)
        seq.note_surprises(len(ids) - 1, [choice.surprise])
        cache.reserve(seq, 1)
        logits, _ = runner.decode([seq], ids[-1:])
        if seq.seen % BLOCK_TOKENS == 0 and not watched.is_full:
            cache.apply(seq, watched, Occasion.SETTLE)
        progress(seq.seen)
    cache.settle(seq)
    return Inspection(
        model=loaded.name,
        pipeline=pipeline.text,
        loss_class=cache.loss_class(seq, watched),
        shape=cache.shape,
        prompt_tokens=len(prompt),
        token_ids=tuple(ids),
        tokens=tuple(loaded.tokenizer.decode([token_id]) for token_id in ids),
        choice=_choice(pipeline.evictor, chosen),
        use=cache.use(seq),
        recalls=seq.recalls,
        heads=read_heads(cache, seq, {layer: scored.heads for layer, scored in chosen.items()}),
    )


@contextlib.contextmanager
def _cache_for(loaded: LoadedModel, pipeline: Pipeline, tokens: int) -> Iterator[KVCache]:
    """A cache with room for one request, and for what it may have the model repeat: raw on the device, beside what
    passes through it, and, unless that is all, twice that on the host, and on disk where it goes there."""
    parameter = next(loaded.model.parameters())
    shape = cache_shape(loaded.model.config, parameter.dtype)
    rows = -(-tokens // BLOCK_TOKENS) + _SPARE_ROWS
    page = page_blocks(shape)
    row_bytes = -(-shape.layers * shape.kv_heads // page) * page * shape.block_bytes(Format.RAW)  # in whole pages
    host_rows = 0 if pipeline.is_full else 2 * rows
    remade = pipeline.recomputed * shape.queries_per_kv_head  # inputs come as well, about a query head's each
    through = math.ceil(SLOTS * rows / shape.layers * (1 + remade)) if pipeline.fetches else 0
    sizes = ((rows + through) * row_bytes, host_rows * row_bytes, 2, tokens)
    rest = (loaded.name, parameter.device)
    if Tier.DISK not in tiers_in(styles_of(pipeline, shape, tokens, loaded.profile)):
        yield KVCache(shape, *sizes, *rest, profile=loaded.profile)
        return
    with tempfile.TemporaryDirectory(prefix="kvpilot-") as folder:
        disk = DiskStore(Path(folder), 2 * host_rows * row_bytes)
        try:
            yield KVCache(shape, *sizes, *rest, profile=loaded.profile, disk=disk)
        finally:
            disk.close()


def _compute_prompt(
    cache: KVCache,
    runner: ModelRunner,
    seq: SequenceCache,
    pipeline: Pipeline,
    prompt: list[int],
    progress: Callable[[int], None],
) -> torch.Tensor:
    """Logits behind the prompt; the pipeline is about to take effect."""
    evictor = pipeline.evictor
    all_queries = bool(evictor and evictor.needs_prompt_mass)
    cache.note_inputs(seq, pipeline)
    while True:
        pot = evictor if evictor and evictor.evicts_while_prefilling else None
        full_at = pot.next_eviction(seq.seen) if pot else len(prompt) + 1
        chunk = prompt[seq.seen : min(full_at, seq.seen + STEP_TOKENS)]
        following = prompt[seq.seen + 1 :][: len(chunk)] if pot else ()
        cache.reserve(seq, len(chunk))
        logits = runner.prefill(seq, chunk, len(prompt), all_queries, following)
        progress(seq.seen)
        if pot and seq.seen == full_at:
            cache.apply(seq, Pipeline((pot,)), Occasion.SETTLE)
        elif not (pot or pipeline.is_full):
            cache.evacuate(seq, pipeline)
        if seq.seen == len(prompt):
            return logits


# -- scores ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scored:
    """One layer's scores of a choice, and how many tokens had been seen."""

    seen: int
    heads: tuple[Scores, ...]


def _watched(pipeline: Pipeline, chosen: dict[int, _Scored]) -> Pipeline:
    """The same pipeline, whose evictor notes the scores that it last gave to each layer."""
    stages = tuple(_noting(stage, chosen) if isinstance(stage, Evictor) else stage for stage in pipeline.stages)
    return Pipeline(stages)


def _noting(evictor: Evictor, chosen: dict[int, _Scored]) -> Evictor:
    kind: Any = type(evictor)

    class Noting(kind):  # type: ignore[misc]  # the class is known at run time only
        """The same evictor; its scores are noted."""

        def score(self, layer: LayerView) -> torch.Tensor:
            """As the evictor scores."""
            found: torch.Tensor = super().score(layer)
            values, valid = found.float().cpu().numpy(), layer.valid.numpy()
            position = layer.position.numpy()
            heads = [Scores(position[head, here].copy(), values[head, here]) for head, here in enumerate(valid)]
            chosen[layer.index] = _Scored(layer.seen, tuple(heads))
            return found

    same = {field.name: getattr(evictor, field.name) for field in dataclasses.fields(evictor)}
    noting: Evictor = Noting(**same)
    return noting


def _choice(evictor: Evictor | None, chosen: dict[int, _Scored]) -> Choice | None:
    if evictor is None:
        return None
    seen = chosen[0].seen
    first, recent = evictor.protected(seen)
    return Choice(seen, evictor.budget(seen), min(first, seen), min(recent, seen))


# -- what is kept ------------------------------------------------------------------------------------------------------


def read_heads(cache: KVCache, seq: SequenceCache, scores: dict[int, tuple[Scores, ...]]) -> tuple[Head, ...]:
    """What every head keeps, by the block tables.

    Args:
        cache: the cache.
        seq: the request's.
        scores: of each layer's heads; empty where nothing is evicted.
    """
    blocks, tokens = blocks_of(cache.tables, seq.slot), tokens_of(cache.tables, seq.slot)
    valid, shape = blocks.valid, cache.shape
    one_head = dataclasses.replace(shape, layers=1, kv_heads=1)
    raw_bytes = shape.block_bytes(Format.RAW)
    heads = []
    for layer, head in np.ndindex(valid.shape[:2]):
        here: npt.NDArray[np.bool_] = valid[layer, head]
        away = blocks.address[layer, head][here & (blocks.tier[layer, head] == Tier.HOST)]
        # A host block that the exact copy lends to the table counts once, as the table's.
        referred = len(away) - len(cache.host.owned(away))
        shadow_bytes = (seq.shadow.rows - referred) * raw_bytes if seq.shadow else 0
        one = (slice(layer, layer + 1), slice(head, head + 1))
        heads.append(
            Head(
                layer,
                head,
                tuple(
                    Block(
                        format_of(int(blocks.format[layer, head, index])),
                        Tier(int(blocks.tier[layer, head, index])),
                        _positions(tokens.position[layer, head], tokens.valid[layer, head], int(index)),
                    )
                    for index in np.flatnonzero(here)
                ),
                scores[layer][head] if scores else None,
                measure(one_head, valid[one], blocks.format[one], blocks.tier[one], seq.seen, shadow_bytes),
            )
        )
    return tuple(heads)


def _positions(position: I32, valid: Mask, block: int) -> I32:
    rows = slice(block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS)
    return position[rows][valid[rows]]
