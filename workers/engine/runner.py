"""Runs the model: one decode step of many requests, or one chunk of a prompt."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kernels.api import DecodePlan
from workers.cache.kvcache import KVCache
from workers.cache.sequence_cache import SequenceCache
from workers.engine.attention import (
    ATTENTION_NAME,
    STEP_ARGUMENT,
    Attend,
    DecodeAttention,
    PromptAttention,
    cache_shape,
    check_servable,
)
from workers.engine.guessing import QueryGuesser
from workers.engine.remaking import ModelRemaker
from workers.engine.scoring import Context, ScoringAttention
from workers.profile.files import load_if_there
from workers.profile.profile import ModelProfile


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and what the engine must know of it."""

    name: str
    model: Any  # a transformers PreTrainedModel
    tokenizer: Any  # its tokenizer, or None where it has none
    context_tokens: int
    vocabulary_size: int
    eos_token_ids: frozenset[int]
    profile: ModelProfile | None = None
    """What was found out about it, for stages that need it."""

    @property
    def chat(self) -> bool:
        """Whether it has a chat template."""
        return bool(self.tokenizer is not None and self.tokenizer.chat_template)


def load_model(path: Path, name: str, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """Loads a transformers model folder, and the model's profile where the cache folder has one.

    Raises:
        ValueError: a model that kvpilot does not serve, saying why.
        OSError: a folder that holds no model.
    """
    config = load_config(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=ATTENTION_NAME)
    model = model.to(device)
    profile = load_if_there(path, name, model, cache_shape(config, dtype))
    return wrap_model(model, AutoTokenizer.from_pretrained(path), name, profile)


def load_config(path: Path) -> Any:
    """The transformers configuration of a model folder.

    Raises:
        ValueError: a model that kvpilot does not serve, saying why.
        OSError: a folder that holds no model.
    """
    config = AutoConfig.from_pretrained(path)
    check_servable(config)
    return config


def wrap_model(model: Any, tokenizer: Any, name: str, profile: ModelProfile | None = None) -> LoadedModel:
    """Describes a model object that already uses kvpilot's attention."""
    eos = model.generation_config.eos_token_id if model.generation_config else model.config.eos_token_id
    eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return LoadedModel(
        name=name,
        model=model.eval(),
        tokenizer=tokenizer,
        context_tokens=model.config.max_position_embeddings,
        vocabulary_size=model.config.vocab_size,
        eos_token_ids=frozenset(eos_ids),
        profile=profile,
    )


class ModelRunner:
    """Forward passes of one model over one cache."""

    def __init__(self, loaded: LoadedModel, cache: KVCache) -> None:
        self._model = loaded.model
        self._cache = cache
        self._device = next(loaded.model.parameters()).device
        self._guesser = QueryGuesser(loaded.model)
        self._remaker = cache.remaker = ModelRemaker(loaded.model, self._run)

    @torch.inference_mode()
    def decode(self, sequences: Sequence[SequenceCache], token_ids: Sequence[int]) -> tuple[torch.Tensor, DecodePlan]:
        """The next token of each sequence, whose memory is reserved.

        Returns:
            Logits [R, vocabulary], and the step's plan with each block's attention mass.
        """
        positions = [seq.seen for seq in sequences]
        for seq in sequences:
            self._cache.advance(seq, 1)
        reading = self._cache.reading(sequences)
        slots = np.array([seq.slot for seq in sequences], np.int32)
        plan = self._cache.backend.plan(slots, changing=bool(reading))
        guesser = self._guesser if reading.guesses else None
        attend = DecodeAttention(self._cache, plan, reading, guesser.next_queries if guesser else None)
        given: list[torch.Tensor] = []  # [R, 1, width] by layer
        noting = [(row, seq.inputs) for row, seq in enumerate(sequences) if seq.inputs]
        with contextlib.ExitStack() as watching:
            if guesser:
                watching.enter_context(guesser.watching())
            if noting:
                watching.enter_context(self._remaker.watching(lambda layer, inputs: given.append(inputs)))
            logits = self._forward([[token] for token in token_ids], [[position] for position in positions], attend)
        for row, inputs in noting:
            for layer, values in enumerate(torch.stack([of_layer[row] for of_layer in given]).cpu()):
                inputs.note(layer, positions[row], values)
        self._cache.backend.finish(plan)
        reading.finish(plan)
        queries = attend.queries()
        for row, seq in enumerate(sequences):
            self._cache.recent.note(seq.slot, positions[row], queries[:, row])
        return logits, plan

    @torch.inference_mode()
    def prefill(
        self,
        seq: SequenceCache,
        token_ids: Sequence[int],
        prompt_tokens: int,
        all_queries: bool,
        following: Sequence[int] = (),
    ) -> torch.Tensor:
        """The next chunk of a prompt, whose memory is reserved.

        Args:
            seq: the request's cache.
            token_ids: the chunk.
            prompt_tokens: length of the whole prompt.
            all_queries: whether masses count every query.
            following: the tokens behind each of the chunk's (behind the prompt's last one none is known), whose
                surprises are to be noted; empty: of none. Takes the logits of the whole chunk.

        Returns:
            Logits [1, vocabulary] behind the chunk's last token.
        """
        start, end = seq.seen, seq.seen + len(token_ids)
        self._cache.advance(seq, len(token_ids))
        if seq.prompt_votes is None:
            heads = (self._cache.shape.layers, self._cache.shape.kv_heads)
            seq.prompt_votes = np.zeros((*heads, prompt_tokens), np.float32)
        attend = PromptAttention(self._cache, seq.slot, self._cache.context(seq), start, seq.prompt_votes, all_queries)
        keep = len(token_ids) if following else 1
        inputs = seq.inputs
        with contextlib.ExitStack() as watching:
            if inputs:
                watching.enter_context(self._remaker.watching(lambda layer, given: inputs.note(layer, start, given[0])))
            logits = self._run([list(token_ids)], [list(range(start, end))], attend, keep)[0]
        if following:
            behind = torch.tensor(following, device=logits.device)
            expected = logits[: len(following)].float()
            surprises = expected.logsumexp(dim=-1) - expected.gather(1, behind[:, None])[:, 0]
            seq.note_surprises(start + 1, surprises.tolist())
        queries = attend.queries()
        self._cache.recent.note(seq.slot, end - queries.shape[2], queries)
        if end == prompt_tokens:
            tables, kept = self._cache.tables, int(self._cache.tables.length[seq.slot].max())
            position = tables.position[seq.slot, :, :, :kept]
            tables.votes[seq.slot, :, :, :kept] = np.take_along_axis(seq.prompt_votes, position, axis=2)
            seq.prompt_votes = None
        return logits[-1:]

    @torch.inference_mode()
    def score(self, context: Context, start: int, token_ids: Sequence[int]) -> torch.Tensor:
        """What the model expects behind each of these tokens, at positions from ``start`` on.

        Nothing is written. Decode steps of these tokens would give the same as long as they move no block.

        Returns:
            Logits [len(token_ids), vocabulary]; row i is the distribution of the token behind token i.
        """
        positions = list(range(start, start + len(token_ids)))
        guesser = self._guesser if context.selective and context.selective.stage.guesses else None
        with guesser.watching() if guesser else contextlib.nullcontext():
            attend = ScoringAttention(context, guesser)
            return self._run([list(token_ids)], [positions], attend, keep=len(token_ids))[0]

    @torch.inference_mode()
    def ask(self, seq: SequenceCache, token_ids: Sequence[int], start: int) -> torch.Tensor:
        """Queries [layers, query_heads, N, D] of tokens behind what a request keeps; nothing is written."""
        attend = ScoringAttention(self._cache.context(seq))
        self._forward([list(token_ids)], [list(range(start, start + len(token_ids)))], attend)
        return torch.stack(attend.queries)

    @torch.inference_mode()
    def attend(self, attend: Attend, start: int, token_ids: Sequence[int]) -> None:
        """Runs tokens at positions from ``start`` on for what their attention does; what is expected behind them is
        not asked."""
        self._forward([list(token_ids)], [list(range(start, start + len(token_ids)))], attend)

    def _forward(self, token_ids: list[list[int]], positions: list[list[int]], attend: Attend) -> torch.Tensor:
        return self._run(token_ids, positions, attend, keep=1)[:, -1]

    def _run(self, token_ids: list[list[int]], positions: list[list[int]], attend: Attend, keep: int) -> torch.Tensor:
        output = self._model(
            input_ids=torch.tensor(token_ids, device=self._device),
            position_ids=torch.tensor(positions, device=self._device),
            use_cache=False,
            logits_to_keep=keep,
            **{STEP_ARGUMENT: attend},
        )
        logits: torch.Tensor = output.logits
        return logits
