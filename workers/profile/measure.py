"""Runs a model over text once and makes its profile."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from kernels.layout import CacheShape
from models.profiles import ProfileError
from workers.engine.attention import STEP_ARGUMENT, cache_shape
from workers.engine.runner import LoadedModel
from workers.profile.concentration import Concentration
from workers.profile.profile import ModelProfile
from workers.profile.retrieval import LEAST_CONTEXT, Retrieval
from workers.profile.rotary import Rope, check_rope, rope_of
from workers.profile.statistics import SINKS, Statistics

PASSAGES = 2
_CHECKED_POSITIONS = (0, 1, 7, 50, 1000)
See = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], None]
"""Is shown a layer's queries [Q, n, D], keys and values [H, n, D], rotated, and the factor on scores."""


class Observed:
    """Plain causal attention over one whole text, which shows what it reads; an Attend of the engine."""

    def __init__(self, see: See) -> None:
        self._see = see

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> torch.Tensor:
        """B is 1, S the text's length."""
        self._see(layer, q[0], k[0], v[0], scaling)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True).transpose(1, 2)


def measure(
    loaded: LoadedModel,
    texts: Sequence[Sequence[int]],
    model_hash: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ModelProfile:
    """The profile of a model, from real text of at least a few hundred tokens; the more, the better.

    Args:
        loaded: the model, with kvpilot's attention.
        texts: token ids, each text within the model's context.
        model_hash: of its weights.
        progress: is told how many tokens of how many have been computed.

    Raises:
        ProfileError: a model whose positions or cache profiles do not describe, or no text.
    """
    parameter = next(loaded.model.parameters())
    shape, device = cache_shape(loaded.model.config, parameter.dtype), parameter.device
    texts = [text for text in texts if len(text) > SINKS]
    tokens = sum(len(text) for text in texts)
    if not any(len(text) >= LEAST_CONTEXT for text in texts):
        raise ProfileError(f"no text of {LEAST_CONTEXT} tokens or more to find a profile from")
    rope = rope_of(loaded.model, shape.head_dim)
    _check(loaded, rope, shape)
    statistics, concentration = Statistics(shape, tokens, device), Concentration(shape, device)
    longest = sorted(texts, key=len, reverse=True)[:PASSAGES]
    retrieval = Retrieval(shape, min(loaded.context_tokens, *map(len, longest)), device)
    random = retrieval.random_text(_ordinary(loaded), seed=0)
    passages = [retrieval.passage_text(text) for text in longest]
    total = tokens + len(random) + sum(len(text) for text in passages)
    done = 0

    def note(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> None:
        positions = torch.arange(k.shape[1], device=k.device)
        statistics.add(layer, rope.undo(q, positions), rope.undo(k, positions), v.float())
        concentration.add(layer, q, k, scaling)

    def note_random(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> None:
        retrieval.add_random(layer, q, k, scaling)

    def note_passage(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> None:
        retrieval.add_passage(layer, q, k, scaling)

    work: list[tuple[Sequence[int], See]] = [(text, note) for text in texts]
    work += [(random, note_random), *((text, note_passage) for text in passages)]
    for text, see in work:
        _show(loaded, text, range(len(text)), see)
        done += len(text)
        progress(done, total)
    tensors = statistics.tensors() | retrieval.tensors() | concentration.tensors()
    return ModelProfile(loaded.name, model_hash, shape, tokens, tensors, rope)


@torch.inference_mode()
def _show(loaded: LoadedModel, token_ids: Sequence[int], positions: Sequence[int], see: See) -> None:
    """Runs the model over a text and shows what its attention reads."""
    device = next(loaded.model.parameters()).device
    loaded.model(
        input_ids=torch.tensor([list(token_ids)], device=device),
        position_ids=torch.tensor([list(positions)], device=device),
        use_cache=False,
        logits_to_keep=1,
        **{STEP_ARGUMENT: Observed(see)},
    )


def _check(loaded: LoadedModel, rope: Rope, shape: CacheShape) -> None:
    """Holds the rope against the model. Equal tokens have equal values, so that attention gives all of them the same,
    whatever it looks at: in every layer, their queries and keys differ by their positions alone."""
    positions = [position for position in _CHECKED_POSITIONS if position < loaded.context_tokens]
    turned: list[torch.Tensor] = [torch.empty(0)] * shape.layers

    def see(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float) -> None:
        turned[layer] = torch.cat((q, k))

    _show(loaded, [_ordinary(loaded)[0]] * len(positions), positions, see)
    device = turned[0].device
    with torch.inference_mode():
        check_rope(rope, torch.tensor(positions, device=device), turned, loaded.model.config.model_type)


def _ordinary(loaded: LoadedModel) -> list[int]:
    """Token ids that are not special."""
    special = set(loaded.eos_token_ids) | set(loaded.tokenizer.all_special_ids if loaded.tokenizer else ())
    return [token_id for token_id in range(loaded.vocabulary_size) if token_id not in special]
