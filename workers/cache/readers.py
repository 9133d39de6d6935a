"""Who reads each request's cache in decode steps, beside the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kernels.api import I32
from kernels.layout import BlockFormat, Format
from workers.cache.coded import CodedReader
from workers.cache.memory import CacheMemory
from workers.cache.near import NearReader
from workers.cache.reading import StepReading
from workers.cache.recall import SelectiveReader
from workers.cache.sequence_cache import SequenceCache
from workers.cache.style import largest_format
from workers.stages.base import Pipeline
from workers.stages.selecting import Selector


class Readers:
    """Gives each request the readers that its blocks and its pipeline need, and takes them away again."""

    def __init__(self, memory: CacheMemory) -> None:
        self._memory = memory
        self._selecting: dict[int, SelectiveReader] = {}  # by slot

    def reading(self, sequences: Sequence[SequenceCache]) -> StepReading:
        """Readers of a decode step over these requests."""
        coded = {row: seq.coded for row, seq in enumerate(sequences) if seq.coded}
        readers = {
            row: tuple(reader for reader in (seq.staging, *seq.readers, seq.coded) if reader)
            for row, seq in enumerate(sequences)
        }
        return StepReading(readers, len(sequences), self._memory.shape, coded)

    def read_coded(self, seq: SequenceCache) -> None:
        """Gives a request whose tables have coded blocks their reader, and no other."""
        coded = (self._memory.tables.format[seq.slot] >= len(Format)) & self._memory.valid(seq)
        seq.coded = CodedReader(self._memory.blocks, self._memory.tables, seq.slot) if coded.any() else None

    def select(self, seq: SequenceCache, stage: Selector, fmt: BlockFormat, anew: bool) -> None:
        """Has a stage choose what queries read from here on."""
        reader = seq.selective
        if reader is None or reader.stage != stage or reader.pool.format is not fmt:
            self.stop_selecting(seq)
            reader = SelectiveReader(stage, fmt, seq.slot, self._memory.blocks, self._memory.device, seq.recalls)
            seq.readers = (*seq.readers, reader)
            self._selecting[seq.slot] = reader
        reader.changed(anew)

    def stop_selecting(self, seq: SequenceCache) -> None:
        """Has queries read everything again."""
        if reader := self._selecting.pop(seq.slot, None):
            reader.close()
            seq.readers = tuple(other for other in seq.readers if other is not reader)

    def follow(self, seq: SequenceCache, pipeline: Pipeline, anew: bool) -> None:
        """Has a request read as its pipeline says.

        Args:
            seq: the request.
            pipeline: which is in force.
            anew: whether what earlier queries read is to be forgotten.
        """
        if isinstance(pipeline.placer, Selector):
            self.select(seq, pipeline.placer, largest_format(pipeline, self._memory.shape), anew)
        else:
            self.stop_selecting(seq)
        if not pipeline.near:
            seq.readers = tuple(reader for reader in seq.readers if not isinstance(reader, NearReader))
        elif not any(isinstance(reader, NearReader) for reader in seq.readers):
            seq.readers = (*seq.readers, NearReader(self._memory.near, self._memory.tables, seq.slot))

    def moved(self, now: Callable[[I32], I32]) -> None:
        """Blocks of the device have moved; ``now`` says where to."""
        for reader in self._selecting.values():
            reader.pool.moved(now)

    def pool_bytes(self) -> int:
        """Device bytes of all pools of recalled blocks: what :meth:`give_up_pools` gives back."""
        return sum(reader.pool.nbytes for reader in self._selecting.values())

    def give_up_pools(self, wanted_bytes: int) -> int:
        """Takes pools of recalled blocks, which only save time, until so many bytes are free; returns those freed."""
        freed = 0
        for reader in sorted(self._selecting.values(), key=lambda reader: reader.pool.nbytes, reverse=True):
            if freed >= wanted_bytes:
                break
            freed += reader.pool.nbytes
            reader.close()
        return freed
