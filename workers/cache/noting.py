"""Whose layers' inputs are noted, and who gives theirs up when others need the host's memory."""

from __future__ import annotations

from kernels.layout import BLOCK_TOKENS, Tier
from workers.cache.arrangement import blocks_of
from workers.cache.inputs import LayerInputs, rows_of
from workers.cache.memory import CacheMemory
from workers.cache.sequence_cache import SequenceCache
from workers.stages.base import Pipeline


class Noting:
    """Notes inputs for requests whose pipeline wants to make blocks again. These are copies that save the link some
    bytes: they give way to everybody (``workers.cache.arena.Guests``)."""

    def __init__(self, memory: CacheMemory) -> None:
        self._memory = memory
        memory.host.guests.insert(0, self)  # sessions are dearer

    def follow(self, seq: SequenceCache, pipeline: Pipeline) -> None:
        """Has the inputs of a request's coming tokens noted, or none any more, as its pipeline wants."""
        memory = self._memory
        if memory.remaker is None or not pipeline.recomputed:
            self.drop(seq)
            return
        seq.inputs = seq.inputs or LayerInputs(memory.host, memory.backend, memory.remaker, seq.max_tokens)
        seq.inputs.most_rows = rows_of(pipeline.recomputed, seq.max_tokens // BLOCK_TOKENS)

    def drop(self, seq: SequenceCache) -> None:
        """Gives a request's inputs up: its blocks are copied from here on."""
        inputs, seq.inputs = seq.inputs, None
        if inputs:
            if area := seq.areas.get(Tier.HOST):
                area.follow(blocks_of(self._memory.tables, seq.slot))
            inputs.close()

    @property
    def yielding_bytes(self) -> int:
        """See ``workers.cache.arena.Guests``."""
        return sum(seq.inputs.lot.pages for seq in self._memory.open_sequences if seq.inputs) * self._page_bytes

    def give_up(self, nbytes: int) -> None:
        """See ``workers.cache.arena.Guests``."""
        for seq in self._memory.open_sequences:
            if nbytes <= 0:
                return
            if seq.inputs:
                nbytes -= seq.inputs.lot.pages * self._page_bytes
                self.drop(seq)

    @property
    def _page_bytes(self) -> int:
        return self._memory.host.page_bytes
