"""From logits to the next token, for a whole batch, each request by its own rule and random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class SamplingParameters:
    """How one request chooses tokens; see ``kvpilot.v1.Sampling`` for ranges."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Choice:
    """A chosen token and what its distribution looked like."""

    token_id: int
    logprob: float | None  # of the unmodified distribution, where asked for
    top: tuple[tuple[int, float], ...]  # most likely tokens and their log-probabilities, as many as asked for
    entropy: float  # nats, of the unmodified distribution
    top1_probability: float
    surprise: float  # -log p of the chosen token, nats, of the unmodified distribution


@dataclass(frozen=True)
class SampleRequest:
    """One row's rule: parameters, tokens so far (for the penalty), index of the token to come, log-probs wanted."""

    parameters: SamplingParameters
    token_ids: Sequence[int]
    index: int
    top_logprobs: int


@torch.inference_mode()
def sample(logits: torch.Tensor, requests: Sequence[SampleRequest]) -> list[Choice]:
    """Chooses the next token of each row.

    A token is a function of its row's logits, parameters, seed and index alone: what else is in the batch, preemption
    and a change of worker leave it as it is.

    Args:
        logits: [R, vocabulary].
        requests: one per row.
    """
    logits = logits.float()
    logprobs = torch.log_softmax(logits, dim=-1)  # [R, V]
    entropies = torch.special.entr(logprobs.exp()).sum(dim=-1)  # 0 for a token that the model rules out
    best_logprobs, best = logprobs.max(dim=-1)
    best_ids, best_values, entropy_values = best.tolist(), best_logprobs.tolist(), entropies.tolist()
    choices = []
    for row, request in enumerate(requests):
        parameters = request.parameters
        plain_greedy = parameters.temperature == 0 and parameters.repetition_penalty == 1
        token_id = best_ids[row] if plain_greedy else _choose(logits[row], request)
        logprob = best_values[row] if plain_greedy else float(logprobs[row, token_id])
        top: tuple[tuple[int, float], ...] = ()
        if request.top_logprobs:
            values, ids = logprobs[row].topk(request.top_logprobs)
            top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        choices.append(
            Choice(
                token_id,
                logprob if request.top_logprobs else None,
                top,
                entropy_values[row],
                top1_probability=float(np.exp(best_values[row])),
                surprise=0.0 - logprob,
            )
        )
    return choices


def _choose(logits: torch.Tensor, request: SampleRequest) -> int:
    parameters = request.parameters
    logits = _penalise(logits, request)
    if parameters.temperature == 0:
        return int(logits.argmax())
    values, ids = (logits / parameters.temperature).sort(descending=True, stable=True)
    if parameters.top_k:
        values, ids = values[: parameters.top_k], ids[: parameters.top_k]
    probabilities = torch.softmax(values.double(), dim=-1)
    keep = probabilities >= parameters.min_p * probabilities[0]
    before = probabilities.cumsum(dim=-1) - probabilities
    keep &= before < parameters.top_p
    kept = probabilities[keep]
    cumulative = kept.cumsum(dim=-1)
    uniform = np.random.Generator(np.random.Philox(key=parameters.seed, counter=request.index)).random()
    place = int(torch.searchsorted(cumulative, torch.tensor([uniform * float(cumulative[-1])]).double(), right=True))
    return int(ids[keep][min(place, len(kept) - 1)])


def _penalise(logits: torch.Tensor, request: SampleRequest) -> torch.Tensor:
    """Divides positive and multiplies negative logits of tokens already seen (CTRL, arXiv 1909.05858)."""
    penalty = request.parameters.repetition_penalty
    if penalty == 1:
        return logits
    seen = torch.tensor(sorted(set(request.token_ids)), device=logits.device)
    chosen = logits[seen]
    return logits.index_put((seen,), torch.where(chosen > 0, chosen / penalty, chosen * penalty))
