"""The interface every kernel backend implements, and the values that pass through it.

Backends: ``kernels.reference`` (torch, the definition), ``kernels.cpu`` (Numba) and ``kernels.triton_backend`` (Triton,
for NVIDIA GPUs). All must pass the same tests.
All arrays a backend sees are host numpy arrays unless said otherwise; arenas are flat uint8 torch tensors, one a tier.

A *table* is (sequence slot, layer, KV head). ``Tables`` holds all of them; a backend only reads it, except for the
masses and votes, which decode attention adds to.

A step is ``plan``, ``decode`` for every layer, ``finish``. ``decode`` merges, as ``kernels.partials``, what its queries
found elsewhere: in a state of fixed size, or in blocks that the plan leaves out, and that another backend's ``attend``
goes over beside their memory.

A backend may run ``decode`` behind the caller's back and keep what it adds to masses and votes to itself, so on the
host

- ``plan.block_mass`` is there after ``finish(plan)``, and
- ``mass`` and ``votes`` of a slot are up to date after ``settle`` of that slot: call it before anything reads them,
  before anything but a step's new tokens changes which kept token is where (a switch, a fork, a slot that is given
  away), and before anything writes them, except zeros for tokens that are being appended.

Addresses, formats, tiers and lengths are read by ``plan`` alone; a block may be given away or overwritten when the
step that read it has finished.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from kernels.layout import BLOCK_TOKENS, MEMORY_TIERS, BlockFormat, CacheShape, Format, Tier
from kernels.partials import Partial

I32 = npt.NDArray[np.int32]
U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
F16 = npt.NDArray[np.float16]


@dataclass
class Tables:
    """Block tables of all sequence slots. S slots, L layers, H KV heads, B blocks and T = 32 * B tokens at most.

    Block b of a table holds its kept tokens 32 b .. 32 b + 31, oldest first; only the last block may be partly filled.
    """

    address: I32  # [S, L, H, B] unit offset in the block's tier's arena
    format: U8  # [S, L, H, B] kernels.layout.Format
    tier: U8  # [S, L, H, B] kernels.layout.Tier
    length: I32  # [S, L, H] kept tokens
    position: I32  # [S, L, H, T] original position of each kept token, rising
    mass: F32  # [S, L, H, T] attention received by each kept token, summed over queries and the head's query group
    votes: F16  # [S, L, H, T] the same, but each step multiplies what is there by VOTE_DECAY first

    @staticmethod
    def allocate(slots: int, shape: CacheShape, max_tokens: int) -> Tables:
        """Zeroed tables with room for ``max_tokens`` (rounded up to whole blocks, plus one block) per table."""
        blocks = -(-max_tokens // BLOCK_TOKENS) + 1
        heads = (slots, shape.layers, shape.kv_heads)
        return Tables(
            address=np.zeros((*heads, blocks), np.int32),
            format=np.zeros((*heads, blocks), np.uint8),
            tier=np.zeros((*heads, blocks), np.uint8),
            length=np.zeros(heads, np.int32),
            position=np.zeros((*heads, blocks * BLOCK_TOKENS), np.int32),
            mass=np.zeros((*heads, blocks * BLOCK_TOKENS), np.float32),
            votes=np.zeros((*heads, blocks * BLOCK_TOKENS), np.float16),
        )


VOTE_DECAY = 1.0 - 1.0 / 64.0
"""Decay of ``Tables.votes`` per decode step: a window of about 64 queries, SnapKV's observation window."""


@dataclass
class DecodePlan:
    """One decode step: which slots are in the batch, in row order. Made by ``Backend.plan``, read by ``decode``.

    ``length`` of every table already counts the step's new token, whose K and V ``decode`` writes first. A plan that
    appends nothing is for ``attend``: every token that it reads is there.
    ``block_mass`` is an output, to be read after ``finish``: the share of attention each block got, mean over the
    head's query group. A plan is good for one step, and until the next one is made.
    """

    slots: I32  # [R] slot of each batch row
    tiers: tuple[Tier, ...] = MEMORY_TIERS  # whose blocks are read; others count as if they were not there
    appends: bool = True
    block_mass: F32 = field(
        default_factory=lambda: np.zeros((0, 0, 0, 0), np.float32)
    )  # [L, R, H, B'] B' = most blocks


@dataclass(frozen=True)
class TokenSource:
    """Where the tokens of new blocks come from: N blocks of 32 tokens, each token named by block and row.

    Rows past the end of a partly filled block have ``address`` -1; their bytes are written as zeros.
    """

    address: I32  # [N, 32] unit offset of the block that holds the token
    format: U8  # [N, 32]
    tier: U8  # [N, 32]
    row: U8  # [N, 32] token's row in that block


class Backend(Protocol):
    """Kernels over one worker's arenas. ``arenas`` is indexed by Tier."""

    shape: CacheShape
    arenas: tuple[torch.Tensor, ...]
    tables: Tables

    def warm_up(self) -> None:
        """Does what would make first calls slow, such as compiling."""
        ...

    def plan(
        self, slots: I32, tiers: Collection[Tier] = MEMORY_TIERS, *, appends: bool = True, changing: bool = False
    ) -> DecodePlan:
        """Makes the host-side decisions of one decode step over these slots.

        Args:
            slots: of the batch's rows, each at most once.
            tiers: whose blocks the step reads. The tokens of other blocks get no mass (their votes fade all the same).
            appends: whether the plan is for ``decode``, and every table has a raw block on the device, which is one of
                the tiers, for the new token. Otherwise it is for ``attend``, and tables may be empty.
            changing: whether, between layers, tables may come to name other blocks in the places of full ones, or none
                to read; see ``refresh``.
        """
        ...

    def refresh(self, plan: DecodePlan, layer: int) -> None:
        """Takes note that addresses, formats or tiers in the slots' tables of a layer are others than at the plan.

        The plan must have been made as ``changing``.
        """
        ...

    def decode(
        self,
        plan: DecodePlan,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scaling: float,
        partials: Sequence[Partial] = (),
        lse: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Writes the step's K and V to each row's tail block, then attends over all kept tokens of the row's slot.

        Args:
            q: [R, query_heads, D] after rotary embedding; query head i reads KV head i // queries_per_kv_head.
            k, v: [R, kv_heads, D] of the new token, which becomes the last kept token of every table of its row.
            scaling: factor on the scores.
            partials: what the same queries found elsewhere, on any device. The output is that over everything; masses,
                votes and block masses are shares of everything too, and sum to less than 1 a query by what is in here.
            lse: float32 [R, query_heads] on q's device; receives the natural log of the sum of exp(score) over
                everything, from which who made a partial result knows the shares of its tokens.

        Returns:
            [R, query_heads, D] in q's dtype. Also fills ``plan.block_mass[layer]`` and adds to the tables' masses and
            votes, where ``finish`` and ``settle`` make them visible.
        """
        ...

    def attend(self, plan: DecodePlan, layer: int, q: torch.Tensor, scaling: float) -> Partial:
        """Attends over what a plan that appends nothing reads; writes no token and adds to no mass.

        Where the blocks of some tiers lie in another processor's memory, a backend on that processor may attend over
        them, with the same tables, for ``decode`` here.

        Args:
            q, scaling: as ``decode`` has them.
        """
        ...

    def finish(self, plan: DecodePlan) -> None:
        """Makes ``plan.block_mass`` readable on the host; waits for the decode calls so far.

        To be called after the last layer and before the next ``plan``, if at all: masses that nobody looks at need no
        copy. Calling it again brings it up to date again. Nothing to do where ``decode`` runs on the host.
        """
        ...

    def settle(self, slots: I32) -> None:
        """Brings ``tables.mass`` and ``tables.votes`` of these slots up to date; waits for the decode calls so far.

        With n steps since the last settlement, ``mass += received`` and ``votes = votes * VOTE_DECAY ** n + faded``,
        where ``faded`` is what the steps added, fading since. A slot without steps since costs nothing. Nothing to do
        where ``decode`` runs on the host.
        """
        ...

    def write(self, slot: int, layer: int, start: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Stores K and V [kv_heads, N, D] as kept tokens start .. start + N - 1 of a slot's raw device blocks."""
        ...

    def read(self, source: TokenSource) -> tuple[torch.Tensor, torch.Tensor]:
        """Gathers tokens out of blocks of any format and tier.

        Returns:
            K and V, each [N, 32, D] in the model's dtype (raw: bit for bit; else dequantised).
        """
        ...

    def encode(self, source: TokenSource, fmt: Format) -> torch.Tensor:
        """Builds new blocks from tokens of existing ones: gather, transcode, compact in one pass.

        Returns:
            uint8 [N, block_bytes(fmt)], each row a block ready to be copied to its place. Raw to raw is bit for bit.
        """
        ...

    def transcode(self, source: TokenSource, fmt: Format, tier: int, address: I32) -> None:
        """:meth:`encode` straight to unit offsets ``address`` [N] of a tier's arena, which must hold no block of the
        source."""
        ...

    def store(self, tier: int, address: I32, blocks: torch.Tensor) -> None:
        """Unpacks built or packed blocks uint8 [N, block_bytes] to unit offsets ``address`` [N] of a tier's arena."""
        ...

    def load(self, tier: int, address: I32, fmt: BlockFormat) -> torch.Tensor:
        """Packs blocks of a tier's arena into one piece, for a single large copy: uint8 [N, block_bytes(fmt)]."""
        ...
