"""What is kept of queries, keys and values while a model runs over text: sums, and a sample of tokens."""

from __future__ import annotations

import torch

from kernels.layout import CacheShape
from workers.profile.levels import fit_levels
from workers.profile.profile import LEVELS

SINKS = 4
"""First tokens of a text: attention sinks, whose queries are not like others'."""
SAMPLE_TOKENS = 2048
"""Most tokens whose keys and values are kept, for percentiles and levels."""
PERCENTILE = 0.01


class Statistics:
    """Statistics of texts of so many tokens altogether, layer by layer as they come.

    Memory does not grow with the text: sums in float64, and float32 keys and values of at most 2,048 tokens at equal
    distances.
    """

    def __init__(self, shape: CacheShape, tokens: int, device: torch.device) -> None:
        layers, heads, asking, dim = shape.layers, shape.kv_heads, shape.query_heads, shape.head_dim

        def zeros(*size: int) -> torch.Tensor:
            return torch.zeros(layers, *size, dtype=torch.float64, device=device)

        self._stride = max(1, -(-tokens // SAMPLE_TOKENS))
        self._query_sum, self._query_square = zeros(asking, dim), zeros(asking, dim, dim)
        self._key_square, self._value_square = zeros(heads, dim, dim), zeros(heads, dim, dim)
        self._queries = [0] * layers
        self._seen = [0] * layers
        self._sample: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(layers)]

    def add(self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Takes a whole text in: float32 queries [Q, n, D] and keys [H, n, D] before the rotation, values [H, n, D].

        Queries of the first tokens are left out, as sinks.
        """
        asked = queries[:, SINKS:].double()
        self._query_sum[layer] += asked.sum(1)
        self._query_square[layer] += asked.mT @ asked
        self._queries[layer] += asked.shape[1]
        self._key_square[layer] += keys.double().mT @ keys.double()
        self._value_square[layer] += values.double().mT @ values.double()
        first = -self._seen[layer] % self._stride
        taken = slice(first, None, self._stride)
        self._sample[layer].append((keys[:, taken].clone(), values[:, taken].clone()))
        self._seen[layer] += keys.shape[1]

    def tensors(self) -> dict[str, torch.Tensor]:
        """By name, as ``workers.profile.profile`` lists them, all but those of retrieval."""
        count = torch.tensor(self._queries, device=self._query_sum.device).double()[:, None, None]
        mean = self._query_sum / count
        found = {
            "query_mean": mean,
            "query_cov": self._query_square / count[..., None] - mean[..., None] * mean[..., None, :],
        }
        seen = torch.tensor(self._seen, device=mean.device).double()[:, None, None, None]
        for name, square in (("key", self._key_square), ("value", self._value_square)):
            spectrum, basis = torch.linalg.eigh(square / seen)  # rising
            found[f"{name}_basis"] = basis.flip(-1)
            found[f"{name}_spectrum"] = spectrum.flip(-1).clamp(min=0)
        by_layer = [self._of_sample(layer) for layer in range(len(self._sample))]
        found |= {name: torch.stack([layer[name] for layer in by_layer]) for name in by_layer[0]}
        return {name: tensor.float().contiguous() for name, tensor in found.items()}

    def _of_sample(self, layer: int) -> dict[str, torch.Tensor]:
        """Ranges and levels of one layer."""
        keys, values = (torch.cat(part, 1) for part in zip(*self._sample[layer], strict=True))  # [H, S, D]
        heads, tokens, dim = keys.shape
        beyond = int(PERCENTILE * tokens)
        inner = slice(beyond, tokens - beyond)
        ordered = keys.mT.reshape(heads * dim, tokens).sort(1).values[:, inner]
        found = {"key_range": _ends(ordered).reshape(heads, dim, 2)}
        found["value_range"] = _ends(values.mT.reshape(heads * dim, tokens).sort(1).values[:, inner]).reshape(
            heads, dim, 2
        )
        scaled = unit_scaled(values).reshape(heads, -1).sort(1).values
        for count in LEVELS:
            found[f"key_levels_{count}"] = fit_levels(ordered, count).reshape(heads, dim, count)
            found[f"value_levels_{count}"] = fit_levels(scaled, count)
        return found


def unit_scaled(values: torch.Tensor) -> torch.Tensor:
    """Each token's values [..., D] scaled so that the least is -1 and the greatest 1; equal ones become 0."""
    least, most = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    half = (most - least) / 2
    return torch.where(half > 0, (values - least) / half.where(half > 0, 1.0) - 1, 0.0)


def _ends(ordered: torch.Tensor) -> torch.Tensor:
    """The first and last of each row."""
    return torch.stack((ordered[:, 0], ordered[:, -1]), -1)
