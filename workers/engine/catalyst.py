"""A catalyst prompt: asks, behind what a request keeps, what of it will matter, and leaves nothing there.

Its queries stand for those to come (InfiniPot, arXiv 2410.01518), so that an evictor need not know the question.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from workers.cache.selection import Queries
from workers.cache.sequence_cache import SequenceCache
from workers.engine.repeating import turn
from workers.engine.runner import LoadedModel, ModelRunner

TEXT = "Which facts, names, numbers and instructions above will be needed to answer whatever is asked next?"


def catalyst(
    runner: ModelRunner, loaded: LoadedModel, context_tokens: int
) -> Callable[[SequenceCache], Queries] | None:
    """What ``KVCache.catalyse`` is for a model; None where it has no tokenizer, and so no words.

    At the very end of the context the prompt is put before it, among the last tokens.
    """
    if loaded.tokenizer is None:
        return None
    ids = list(loaded.tokenizer(turn(loaded, TEXT), add_special_tokens=False)["input_ids"])

    def catalyse(seq: SequenceCache) -> Queries:
        start = max(0, min(seq.seen, context_tokens - len(ids)))
        found = runner.ask(seq, ids, start)  # [layers, query_heads, N, D]
        asked_at = torch.arange(seq.seen, seq.seen + len(ids), device=found.device)  # they see all that is kept
        return lambda layer, most: (found[layer, :, -most:].float(), asked_at[-most:])

    return catalyse
