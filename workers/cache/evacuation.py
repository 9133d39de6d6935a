"""Prompts that leave the device while they are computed: their oldest rows move to lower tiers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kernels.layout import BLOCK_TOKENS, Format, Tier
from workers.cache.arena import TierFullError
from workers.cache.arrangement import blocks_of
from workers.cache.commit import Commits
from workers.cache.copies import ExactCopies
from workers.cache.memory import CacheMemory
from workers.cache.sequence_cache import SequenceCache
from workers.cache.style import Style, off_device, tiers_in
from workers.stages.base import Pipeline

_TO_HOST = Style(places=((0, Tier.HOST),))


class Evacuation:
    """Makes room on the device for the rest of a prompt.

    Args:
        memory: the worker's.
        copies: exact ones, on the host.
        commits: puts blocks in force.
        abandon: gives up what was built ahead of a request's switch.
    """

    def __init__(
        self,
        memory: CacheMemory,
        copies: ExactCopies,
        commits: Commits,
        abandon: Callable[[SequenceCache], None],
    ) -> None:
        self._memory = memory
        self._copies = copies
        self._commits = commits
        self._abandon = abandon

    def evacuate(self, seq: SequenceCache, pipeline: Pipeline | None = None) -> int:
        """Moves a prompt's oldest finished rows to the host tier, as many as it has room for; returns how many.

        Without it, the device would hold the whole raw prompt before a pipeline that compresses it takes effect. Where
        ``pipeline`` will have them on disk, or off the device in some layers only, and needs no exact copy on the host,
        they go to their places at once, and whatever must leave the device after them too.
        """
        if seq.evicted and seq.shadow is None:  # rows are not whole any more
            return 0
        self._abandon(seq)
        if not (seq.shadow or (pipeline and pipeline.wants_shadow)):
            styles = self._memory.styles(seq, pipeline) if pipeline else (_TO_HOST,) * self._memory.shape.layers
            begun = bool(len(blocks_of(self._memory.tables, seq.slot).on(Tier.HOST)))
            by_layer = len({bool(style.places) for style in styles}) == 2
            ways = off_device(styles) if Tier.DISK in tiers_in(styles) else [styles] if begun or by_layer else []
            full = False
            for way in ways:
                try:
                    if moved := self._to_places(seq, way):
                        return moved
                except TierFullError:
                    full = True
            if begun or (ways and not full):
                return 0
        copied = seq.shadow.rows if seq.shadow else 0
        self._copies.extend(seq, at_most=self._memory.host.room_bytes // self._memory.worst_bytes(1))
        assert seq.shadow is not None
        device_tokens = seq.seen - seq.shadow.rows * BLOCK_TOKENS
        older_to_host = Style(places=((device_tokens, Tier.HOST),))
        self._commits.commit(seq, self._commits.restyle(seq, (older_to_host,) * self._memory.shape.layers))
        return seq.shadow.rows - copied

    def _to_places(self, seq: SequenceCache, styles: Sequence[Style]) -> int:
        """Moves a prompt's finished blocks to where these have them, raw, but no more than the host has room for.

        Returns:
            How many, as whole rows, rounded up.
        """
        now, heads = blocks_of(self._memory.tables, seq.slot), self._memory.shape.kv_heads
        row = heads * sum(Tier.HOST in tiers_in([style]) for style in styles)
        more = self._memory.host.room_bytes // self._memory.shape.block_bytes(Format.RAW) // max(1, row)
        there = (now.tier == Tier.HOST).sum(axis=(1, 2)) // heads  # [L] rows
        raw = []
        for style, rows in zip(styles, (there + more).tolist(), strict=True):
            least = {Tier.HOST: seq.seen - rows * BLOCK_TOKENS, Tier.DISK: 0}
            raw.append(Style(places=tuple((max(age, least[tier]), tier) for age, tier in style.places)))
        target = self._commits.restyle(seq, raw)
        moved = int((target.blocks.tier != now.tier).sum())
        self._commits.commit(seq, target)
        return -(-moved // self._memory.row_blocks)
