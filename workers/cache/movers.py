"""What brings blocks from one tier to places in a faster tier's arena, behind the caller's back."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from kernels.api import I32, U8
from kernels.layout import UNIT_BYTES, CacheShape, Tier
from workers.cache.arena import Arena
from workers.cache.disk_tier import DiskTier
from workers.cache.formats import formats


class Waitable(Protocol):
    """What a GPU has yet to do."""

    def wait(self) -> None:
        """Until it has done it."""
        ...


class Move(Protocol):
    """Blocks under way."""

    def done(self) -> bool:
        """Whether they are there."""
        ...

    def result(self) -> list[int]:
        """Has whatever is started from now on find them there.

        Returns:
            Places, among those moved, of blocks whose bytes are not those that were stored.
        """
        ...

    def wait(self) -> None:
        """Until nothing is written to their new places any more, whatever came of it."""
        ...


class Mover(Protocol):
    """Brings blocks of one tier to an arena."""

    source: Tier
    target: Arena

    def move(self, address: I32, kinds: U8, into: I32) -> Move:
        """Starts to bring blocks; nobody else may touch their new places until they are there.

        Args:
            address: [N] where they live.
            kinds: [N] their formats.
            into: [N] unit offsets in the arena.
        """
        ...

    def mend(self, address: int, kind: int, made: int) -> int:
        """Stores a block again, of which what is stored is damaged.

        Args:
            address: where it lives.
            kind: its format.
            made: where in the arena it was just made anew.

        Returns:
            Bytes written; 0: there is no room, the damaged one stays.
        """
        ...

    def readers(self) -> Waitable | None:
        """What must end before :meth:`move` may write where kernels launched so far read; None: it sees to that."""
        ...


@dataclass(frozen=True)
class ThreadMove:
    """Blocks that threads bring."""

    future: Future[list[int]]

    def done(self) -> bool:
        """See :class:`Move`."""
        return self.future.done()

    def result(self) -> list[int]:
        """See :class:`Move`."""
        return self.future.result()

    def wait(self) -> None:
        """See :class:`Move`."""
        self.future.exception()


@dataclass(frozen=True)
class GpuEvent:
    """A moment in a GPU's work."""

    event: torch.cuda.Event
    device: torch.device

    @classmethod
    def now(cls, stream: torch.cuda.Stream) -> GpuEvent:
        """Behind all that is launched so far on a stream."""
        return cls(stream.record_event(), stream.device)

    def done(self) -> bool:
        """Whether it has come."""
        return bool(self.event.query())  # type: ignore[no-untyped-call]

    def result(self) -> list[int]:
        """Has the current stream wait for it, and not the caller: see :class:`Move`."""
        torch.cuda.current_stream(self.device).wait_event(self.event)
        return []

    def wait(self) -> None:
        """Until it has come."""
        self.event.synchronize()


class DiskMover:
    """From files to the host's arena, on the store's threads.

    Args:
        disk: the disk tier.
        host: the arena.
        device: where kernels that read the arena run.
    """

    source = Tier.DISK

    def __init__(self, disk: DiskTier, host: Arena, device: torch.device) -> None:
        self.target = host
        self._disk = disk
        self._memory: U8 = host.data.numpy()
        self._gpu = None if device.type == "cpu" else device

    def move(self, address: I32, kinds: U8, into: I32) -> Move:
        """See :class:`Mover`; an address is a number on disk."""
        return ThreadMove(self._disk.read(address, self._rows(kinds, into)))

    def mend(self, address: int, kind: int, made: int) -> int:
        """See :class:`Mover`."""
        if self._gpu:
            torch.cuda.synchronize(self._gpu)  # a kernel has made it
        (block,) = self._rows(np.array([kind], np.uint8), np.array([made], np.int32))
        return int(self._disk.stored_bytes(address)) if self._disk.rewrite(address, block) else 0

    def _rows(self, kinds: U8, places: I32) -> list[U8]:
        """The bytes of blocks in the arena."""
        sizes = [self.target.shape.block_bytes(fmt) for fmt in formats()]
        starts = (places.astype(np.int64) * UNIT_BYTES).tolist()
        return [self._memory[start : start + sizes[fmt]] for start, fmt in zip(starts, kinds.tolist(), strict=True)]

    def readers(self) -> Waitable | None:
        """See :class:`Mover`."""
        return GpuEvent.now(torch.cuda.current_stream(self._gpu)) if self._gpu else None


class HostMover:
    """From the host's arena to the device's: on a GPU on a stream of its own, out of pinned memory, else on a thread.

    Blocks that lie together in both arenas are copied together.

    Args:
        host, device: the arenas.
    """

    source = Tier.HOST

    def __init__(self, host: Arena, device: Arena) -> None:
        self.target = device
        self._host = host.data
        self._stream = torch.cuda.Stream(device.data.device) if device.data.is_cuda else None  # type: ignore[no-untyped-call]
        self._thread = ThreadPoolExecutor(1, "host-to-device")  # starts with the first that is submitted

    def move(self, address: I32, kinds: U8, into: I32) -> Move:
        """See :class:`Mover`."""
        runs = list(copies(self.target.shape, address, kinds, into))
        if self._stream is None:
            return ThreadMove(self._thread.submit(self._copy, runs))
        self._stream.wait_stream(torch.cuda.current_stream(self.target.data.device))
        with torch.cuda.stream(self._stream):
            for start, place, size in runs:
                self.target.data[place : place + size].copy_(self._host[start : start + size], non_blocking=True)
        return GpuEvent.now(self._stream)

    def mend(self, address: int, kind: int, made: int) -> int:
        """See :class:`Mover`; memory is taken at its word."""
        return 0

    def readers(self) -> Waitable | None:
        """See :class:`Mover`: its stream waits for what is launched when it moves."""
        return None

    def _copy(self, runs: list[tuple[int, int, int]]) -> list[int]:
        source, target = self._host.numpy(), self.target.data.numpy()
        for start, place, size in runs:
            target[place : place + size] = source[start : start + size]  # unlike torch's it takes no other core
        return []


def copies(shape: CacheShape, address: I32, kinds: U8, into: I32) -> Iterator[tuple[int, int, int]]:
    """What is to be copied to move blocks: (first byte there, first byte here, bytes), as few as their order allows.

    Args:
        shape: of the cache.
        address, into: [N] unit offsets of blocks, and of their new places.
        kinds: [N] formats.
    """
    if not len(address):
        return
    units = np.array([shape.block_units(fmt) for fmt in formats()])[kinds]  # [N]
    together = (np.diff(address) == units[:-1]) & (np.diff(into) == units[:-1])
    first = np.flatnonzero(np.concatenate([[True], ~together]))
    sizes = np.add.reduceat(units, first) * UNIT_BYTES
    starts, places = (where[first].astype(np.int64) * UNIT_BYTES for where in (address, into))
    yield from zip(starts.tolist(), places.tolist(), sizes.tolist(), strict=True)
