"""Keeps each request's blocks where its pipeline wants them, between switches."""

from __future__ import annotations

import structlog

from kvpilot.v1 import common_pb2
from workers.cache.arena import TierFullError
from workers.cache.kvcache import KVCache
from workers.cache.sequence_cache import Occasion
from workers.cache.staging import DamagedCacheError
from workers.engine.memory import EngineMemory
from workers.engine.repeating import Repeater, is_missing
from workers.engine.sequence import Sequence
from workers.engine.switching import Switching
from workers.stages.base import Evictor, Pipeline

log = structlog.get_logger(__name__)


class Keeper:
    """Applies the pipelines that are in force, as tokens come and as there is room."""

    def __init__(self, cache: KVCache, memory: EngineMemory, switching: Switching, repeater: Repeater) -> None:
        self._cache = cache
        self._memory = memory
        self._switching = switching
        self._repeater = repeater

    def settle(self, seq: Sequence) -> None:
        """Keeps a request's blocks where its pipeline wants them, as tokens come."""
        assert seq.cache is not None
        home = seq.home
        if home and seq.pipeline != home and self._roomy(seq):
            why = "pressure has gone; back to the pipeline the client named"
            self._switching.for_pressure(seq, home, why, common_pb2.CAUSE_ROOM)
        elif not seq.settled and is_missing(seq.cache, seq.pipeline):
            if not seq.to_repeat:
                self._repeater.begin(seq, seq.pipeline)
        elif not seq.settled:
            seq.settled = self.apply(seq, Occasion.SWITCH)
        elif not seq.pipeline.is_full:
            seq.settled = self.apply(seq, Occasion.SETTLE)

    def _roomy(self, seq: Sequence) -> bool:
        """Whether a request could hold everything on the device and leave twice the watermark free."""
        needed = self._cache.worst_bytes(len(seq.token_ids)) + 2 * self._memory.watermark_bytes()
        return self._memory.free_bytes() >= needed

    def apply(self, seq: Sequence, occasion: Occasion) -> bool:
        """Brings a request's blocks to where its pipeline wants them. False: not now, for want of room."""
        assert seq.cache is not None
        if occasion is not Occasion.SETTLE and is_missing(seq.cache, seq.pipeline):
            write = log.warning if seq.settled else log.debug
            write("pipeline waits for room to repeat the text", **seq.ids, pipeline=seq.pipeline.text)
            return False
        try:
            self._cache.apply(seq.cache, seq.pipeline, occasion)
            return True
        except TierFullError as full:
            write = log.warning if seq.settled else log.debug  # once, not at every attempt
            write("pipeline waits for room", **seq.ids, pipeline=seq.pipeline.text, why=str(full))
            return False
        except DamagedCacheError:
            return False  # it is about to begin again

    def boil_down(self, seq: Sequence) -> None:
        """Has an evictor work while the prompt is computed; formats and tiers follow when it is complete."""
        assert seq.cache is not None
        stages = Pipeline(tuple(stage for stage in seq.pipeline.stages if isinstance(stage, Evictor)))
        wanted = stages if seq.pipeline.wants_shadow else stages.without_shadow()
        try:
            self._cache.apply(seq.cache, wanted, Occasion.SETTLE)
        except TierFullError as full:  # it takes more memory until it can be done
            log.warning("eviction waits for room", **seq.ids, pipeline=seq.pipeline.text, why=str(full))
