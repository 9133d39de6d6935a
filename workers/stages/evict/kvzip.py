"""KVzip: what the model needs in order to repeat the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from workers.stages.base import LayerView, Share, budgets, shadow


@dataclass(frozen=True)
class KVzip(Share):
    """Once, after the prompt or at a switch: per head the tokens that the model looks at to repeat the text.

    The text is fed again behind the cache, in chunks, each after a request to repeat it (``workers.engine.repeating``).
    A token's score is the most attention that one of these queries pays it, over the KV head's query group and the
    chunk that it is in. The pass takes 2-3 times as long as the prompt did, and other requests go on meanwhile. Tokens
    generated later all stay. Query-agnostic: what stays does not depend on what is asked last.

    Head budgets are uniform unless ``budgets=ada`` shares them out among the heads of a layer; the paper takes the best
    of all heads of all layers together. It keeps the system prompt; here it must earn its place like other tokens.

    Source: Kim et al., KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction, arXiv 2505.23416.
    """

    name: ClassVar[str] = "kvzip"
    summary: ClassVar[str] = "Tokens the model looks at when it repeats the text, chosen once per head."
    evicts_while_decoding: ClassVar[bool] = False
    needs_reconstruction: ClassVar[bool] = True
    budgets: str = budgets()
    shadow: bool = shadow()

    def score(self, layer: LayerView) -> torch.Tensor:
        """The most attention received while the text was repeated.

        Raises:
            ValueError: it was not repeated.
        """
        if layer.reconstruction is None:
            raise ValueError(f"stage {self.name!r}: the model has not repeated this request's text yet")
        return layer.reconstruction
