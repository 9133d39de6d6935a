"""ShadowKV: keys are made again on the device from factors of low rank, and only values come from the host."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from kernels.layout import CacheShape
from kvpilot.bounds import Bounds
from workers.stages.base import parameter
from workers.stages.selecting import BlockView, Digest, Reconstructing


@dataclass(frozen=True)
class ShadowKV(Reconstructing):
    """Older blocks live on the host; a query reads the ``share`` of their chunks of 8 tokens whose mean key it scores
    highest, with keys reconstructed on the device and values from the host: half of what recalled blocks would move.

    At the end of a prompt or at a switch, the keys of all KV heads of a layer before their rotation by position, a row
    for each older token, are factored by SVD; the device keeps the ``rank * H * D`` greatest directions, each token's
    coordinates in them, and of each chunk the mean of its rotated keys, its landmark. The ``outliers`` chunks of each
    head with the key least like its landmark, by cosine, stay on the device exactly and are always read. A chunk counts
    as the greatest share, in the query group, of a softmax over landmarks. Values read stay in a pool on the device,
    with room for as many chunks as a query reads, until others are needed.

    Source: Sun et al., ShadowKV: KV Cache in Shadows for High-Throughput Long-Context LLM Inference, arXiv 2410.21465.
    There all but values leaves the host, and rank, budget and outliers are numbers: of 128K tokens and 1,024 key
    channels ``shadowkv(recent=32, share=0.0156, rank=0.156, outliers=0.003)``. Here the host has keys as well, so that
    a switch away loses nothing. There generated tokens stay raw on the device; here a block that grows older than
    ``recent`` tokens joins with coordinates in the directions there are, and what is older is factored anew each time
    it has doubled, or has changed by eviction. Behind an evictor whose heads keep different tokens a row has the i-th
    kept token of each head: less is common to them, and more is lost. Blocks that a codec made are factored as they
    were rounded, and move whole when a value of theirs is read. Copies do not run beside the reconstruction.
    """

    name: ClassVar[str] = "shadowkv"
    summary: ClassVar[str] = "Keys of low rank on the device choose and stand in; only values come from the host."
    rank: float = parameter(0.5, Bounds(above=0, most=1), "share of a layer's key channels")
    outliers: float = parameter(0.05, Bounds(least=0, most=1), "share of a head's older chunks")

    def width(self, shape: CacheShape) -> int:
        """See ``Reconstructing``."""
        return max(1, round(self.rank * shape.kv_heads * shape.head_dim))

    def basis(self, moment: torch.Tensor, width: int) -> torch.Tensor:
        """See ``Reconstructing``: the greatest right singular vectors, as eigenvectors of the second moment."""
        vectors: torch.Tensor = torch.linalg.eigh(moment)[1]  # of rising eigenvalues
        return vectors.flip(1)[:, :width]

    def exact_chunks(self, older: int) -> int:
        """See ``Reconstructing``: the share, rounded up."""
        return math.ceil(self.outliers * older)

    def fit(self, keys: torch.Tensor, landmarks: torch.Tensor) -> torch.Tensor:
        """See ``Reconstructing``: the least cosine."""
        return F.cosine_similarity(keys.float(), landmarks.float()[:, None], dim=-1).amin(1)

    def select(self, view: BlockView, q: torch.Tensor) -> torch.Tensor:
        """The chunks with the greatest shares."""
        score = view.grouped(q) @ view.digests[Digest.MEAN].float().mT * view.scaling  # [H, G, C]
        shares = score.masked_fill(~view.valid[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
        return view.best(shares.amax(dim=1))
