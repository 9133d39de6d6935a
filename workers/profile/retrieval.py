"""Which heads retrieve: what queries pay to far tokens because of what these say.

Two texts show it. Random tokens that come again have nothing to be known by but their copies: attention to the token
itself in earlier copies (echo) and to what followed it there (induction) is what RazorAttention (Tang et al., arXiv
2407.15891) goes by. A passage of real text that comes again behind other text asks for its first copy as a question
asks for a fact; how much of their attention its tokens pay to their own places there is measured directly here, where
DuoAttention (Xiao et al., arXiv 2410.10819) trains gates on passkeys to learn which heads need more than sinks and
recent tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.layout import CacheShape
from models.profiles import ProfileError
from workers.profile.statistics import SINKS

RANDOM_TOKENS = 256
COPIES = 3
PASSAGE_TOKENS = 192
BETWEEN_TOKENS = 512
NEAR = 8
"""Tokens to each side of a token's own place in the first copy that count as found."""
LEAST_CONTEXT = 64


class Retrieval:
    """Lays out the texts and takes attention in.

    Args:
        shape: the model's cache dimensions.
        context: tokens the model can hold; texts are shorter where it is small.

    Raises:
        ProfileError: a context too short for anything to be far.
    """

    def __init__(self, shape: CacheShape, context: int, device: torch.device) -> None:
        if context < LEAST_CONTEXT:
            raise ProfileError(f"a context of {context} tokens; a profile needs at least {LEAST_CONTEXT}")
        self.random_tokens = min(RANDOM_TOKENS, context // COPIES)
        self.passage_tokens = min(PASSAGE_TOKENS, context // 4)
        self.between_tokens = min(BETWEEN_TOKENS, context - 2 * self.passage_tokens)
        size = (shape.layers, shape.query_heads)
        self._group = shape.queries_per_kv_head
        self._echo, self._induction, self._found = (
            torch.zeros(size, dtype=torch.float64, device=device) for _ in range(3)
        )
        self._texts = {"random": [0] * shape.layers, "passage": [0] * shape.layers}

    def random_text(self, ordinary: Sequence[int], seed: int) -> list[int]:
        """Random tokens of the ordinary ones, so many times over."""
        generator = torch.Generator().manual_seed(seed)
        picked = torch.randint(len(ordinary), (self.random_tokens,), generator=generator).tolist()
        return [ordinary[index] for index in picked] * COPIES

    def passage_text(self, text: Sequence[int]) -> list[int]:
        """A text's beginning, what follows it, and the beginning again."""
        passage = list(text[: self.passage_tokens])
        return [*passage, *text[self.passage_tokens : self.passage_tokens + self.between_tokens], *passage]

    def add_random(self, layer: int, queries: torch.Tensor, keys: torch.Tensor, scaling: float) -> None:
        """Takes in a random text's queries [Q, n, D] and keys [H, n, D], rotated."""
        period = self.random_tokens
        for copy in range(1, COPIES):
            asked = torch.arange(copy * period, (copy + 1) * period, device=queries.device)
            paid = attention(queries, keys, asked, scaling)  # [Q, period, n]
            for before in range(1, copy + 1):
                there = asked - before * period
                self._echo[layer] += _at(paid, there).mean(1) / (COPIES - 1)
                self._induction[layer] += _at(paid, there + 1).mean(1) / (COPIES - 1)
        self._texts["random"][layer] += 1

    def add_passage(self, layer: int, queries: torch.Tensor, keys: torch.Tensor, scaling: float) -> None:
        """Takes in a passage text's queries [Q, n, D] and keys [H, n, D], rotated.

        The first tokens of the second copy, which cannot know yet that it is one, do not count, nor do sinks.
        """
        count, end = self.passage_tokens, queries.shape[1]
        asked = torch.arange(end - count + NEAR + SINKS, end, device=queries.device)
        paid = attention(queries, keys, asked, scaling)
        own = asked - (end - count)
        near = (torch.arange(end, device=own.device) - own[:, None]).abs() <= NEAR  # [asked, n]
        self._found[layer] += (paid * near).sum(-1).double().mean(1)
        self._texts["passage"][layer] += 1

    def tensors(self) -> dict[str, torch.Tensor]:
        """``echo``, ``induction`` and ``retrieval``, as ``workers.profile.profile`` lists them."""
        random, passage = (torch.tensor(self._texts[kind], device=self._echo.device) for kind in ("random", "passage"))
        found = self._found / passage[:, None]
        return {
            "echo": (self._echo / random[:, None]).float(),
            "induction": (self._induction / random[:, None]).float(),
            "retrieval": found.reshape(len(found), -1, self._group).amax(-1).float(),
        }


def attention(queries: torch.Tensor, keys: torch.Tensor, asked: torch.Tensor, scaling: float) -> torch.Tensor:
    """What the queries at places asked [m] pay to all tokens: float32 [Q, m, n]."""
    heads, tokens, dim = keys.shape
    grouped = queries[:, asked].float().reshape(heads, -1, dim)
    scores = (grouped @ keys.float().mT * scaling).view(len(queries), len(asked), tokens)
    later = torch.arange(tokens, device=asked.device) > asked[:, None]
    return scores.masked_fill(later, -torch.inf).softmax(-1)


def _at(paid: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """What each query pays to its place: [Q, m] of [Q, m, n]."""
    return paid.gather(2, there.expand(len(paid), -1)[..., None])[..., 0].double()
