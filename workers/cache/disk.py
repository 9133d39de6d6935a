"""The disk tier: blocks in files of their own, each with a checksum, written and read on threads.

Blocks come in batches, and a batch is one file, so that copies are large: a header with what is in it, then the blocks
one after the other. Nothing is synced: a cache may be lost, it must not lie. Files belong to the process that wrote
them; what a killed one left behind is removed by the next that opens the folder.

Blocks may be packed (``Packing``): the store then packs them as it writes and unpacks them as it reads, on its threads.

File: 8 bytes of magic, then little-endian uint32 version, block_bytes, blocks, 0; ``blocks`` uint64 checksums (XXH3-64
of each block as it is in the file); ``blocks`` uint32 sizes there; one more checksum, of all before it; the blocks. One
whose size is block_bytes is not packed: that would have made it no smaller.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import structlog
import xxhash

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]

MAGIC, VERSION = b"kvpilot\0", 2
_HEAD = struct.Struct("<8s4I")
LOCK_NAME, SUB_FOLDER = "in-use", "worker-"
THREADS = 2
MEASURED_BYTES, MEASURED_BLOCK_BYTES = 8 << 20, 16 << 10
_VIEWS_AT_ONCE = min(os.sysconf("SC_IOV_MAX"), 1024)
T = TypeVar("T")

log = structlog.get_logger(__name__)


class DiskFullError(Exception):
    """The disk tier's budget, or the file system, cannot hold what was asked for; nothing was stored."""

    def __init__(self, message: str, needed_bytes: int) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes


class CorruptBlockError(Exception):
    """Bytes on disk are not those that were written.

    ``blocks`` are the numbers of the damaged ones within their batch: all of it where the file itself is damaged.
    """

    def __init__(self, path: Path, blocks: list[int], why: str) -> None:
        super().__init__(f"{path}: {why}")
        self.blocks = blocks


class Packing(Protocol):
    """Makes blocks smaller for their time in files, and gives them back bit for bit. Several threads use it at once."""

    def pack(self, blocks: U8) -> list[bytes]:
        """Each of the blocks [N, block_bytes] by itself."""
        ...

    def unpack(self, packed: Sequence[U8]) -> U8:
        """Blocks [N, block_bytes] back from what :meth:`pack` made of them; N > 0."""
        ...


@dataclass(frozen=True)
class Batch:
    """Blocks that were written together. ``written`` is done when they are on disk, or fails with DiskFullError."""

    path: Path
    sizes: U32
    """[blocks] bytes of each in the file; until they are written, the most that it can be."""
    block_bytes: int
    packing: Packing | None
    written: Future[None]

    @property
    def blocks(self) -> int:
        """How many."""
        return len(self.sizes)

    @property
    def nbytes(self) -> int:
        """Of its file; until it is written, the most that it can be."""
        return _data_at(self.blocks) + int(self.sizes.sum())


@dataclass(frozen=True)
class Part:
    """Blocks of one batch that are to be read, and where to: a row [block_bytes] of memory for each."""

    batch: Batch
    blocks: npt.NDArray[np.integer]  # numbers within the batch
    into: Sequence[U8]
    names: Sequence[int]  # what the reader calls them


@dataclass
class DiskCounts:
    """What a store has done so far."""

    written_bytes: int = 0
    read_bytes: int = 0
    write_s: float = 0.0
    read_s: float = 0.0
    corrupt_blocks: int = 0


class DiskStore:
    """Blocks of one worker process on disk, never more than ``budget_bytes`` of files.

    Methods may be called from any thread; what they start runs on threads of the store's own.

    Args:
        folder: where every worker of the machine may have its own sub-folder.
        budget_bytes: most bytes of files at once, headers included.

    Raises:
        OSError: the folder cannot be made or written to.
    """

    def __init__(self, folder: Path, budget_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.budget_bytes = budget_bytes
        self.counts = DiskCounts()
        with (folder / LOCK_NAME).open("ab") as turn:  # one process at a time comes or clears up
            fcntl.flock(turn, fcntl.LOCK_EX)
            _remove_abandoned(folder)
            self._folder, self._lock_file = _claim(folder)
        self._lock = threading.Lock()
        self._used_bytes = 0
        self._next_number = 0
        self._reads: Counter[Path] = Counter()  # asked for and not done
        self._leaving: dict[Path, Batch] = {}  # freed, but still being read
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="disk")

    @property
    def used_bytes(self) -> int:
        """Bytes of files, those still being written included."""
        return self._used_bytes

    @property
    def free_bytes(self) -> int:
        """What is left of the budget."""
        return self.budget_bytes - self._used_bytes

    def write(self, blocks: U8, packing: Packing | None = None) -> Batch:
        """Starts to store blocks uint8 [N, block_bytes], which must not change until ``written`` is done. N > 0.

        Packed blocks take what they do without packing out of the budget until they are written, and then what they
        take in the file.

        Raises:
            DiskFullError: the budget is too small.
        """
        count, block_bytes = blocks.shape
        sizes = np.full(count, block_bytes, np.uint32)
        needed = _data_at(count) + blocks.size
        with self._lock:
            if needed > self.free_bytes:
                free = f"{self.free_bytes} of {self.budget_bytes} free"
                raise DiskFullError(f"disk tier: {needed} bytes needed, {free}", needed)
            self._used_bytes += needed
            path = self._folder / f"{self._next_number:08}.blocks"
            self._next_number += 1
        written = self._threads.submit(self._write, path, blocks, sizes, packing)
        return Batch(path, sizes, block_bytes, packing, written)

    def read(self, batch: Batch, blocks: npt.NDArray[np.integer] | None = None) -> Future[U8]:
        """Starts to read blocks of a batch, by number; None: all.

        Returns:
            uint8 [n, block_bytes]; fails with CorruptBlockError, naming the damaged ones, or as ``written`` did.
        """
        wanted = np.arange(batch.blocks) if blocks is None else np.asarray(blocks)
        return self._start_read([batch], self._read, batch, wanted)

    def read_into(self, parts: Sequence[Part]) -> Future[list[int]]:
        """Starts to read blocks to where they are wanted, which nobody else may touch until it is done.

        Returns:
            Names of damaged blocks, whose rows then hold anything.
        """
        return self._start_read([part.batch for part in parts], self._read_parts, parts)

    def _start_read(self, batches: list[Batch], read: Callable[..., T], *args: object) -> Future[T]:
        def ended(_: Future[T]) -> None:
            for batch in batches:
                self._read_ended(batch)

        with self._lock:
            self._reads.update(batch.path for batch in batches)
        found = self._threads.submit(read, *args)
        found.add_done_callback(ended)
        return found

    def free(self, batch: Batch) -> None:
        """Removes a batch, once it is written and what was asked of it before is read."""

        def remove(_: Future[None]) -> None:
            with self._lock:
                if self._reads[batch.path]:
                    self._leaving[batch.path] = batch
                    return
            self._remove(batch)

        batch.written.add_done_callback(remove)

    def _read_ended(self, batch: Batch) -> None:
        with self._lock:
            self._reads[batch.path] -= 1
            if self._reads[batch.path]:
                return
            del self._reads[batch.path]
            leaving = self._leaving.pop(batch.path, None)
        if leaving:
            self._remove(batch)

    def _remove(self, batch: Batch) -> None:
        batch.path.unlink(missing_ok=True)
        if batch.written.exception() is None:  # else it has given its bytes back itself
            self._give_back(batch.nbytes)

    def measure(self) -> float:
        """Bytes per second at which a file just written is read back and checked; 0 where there is no room for it.

        From the system's memory, for most of it: what blocks that were just written cost. To be called before anything
        else; nothing of it is counted.
        """
        count = min(MEASURED_BYTES, self.free_bytes // 2) // MEASURED_BLOCK_BYTES
        try:
            batch = self.write(np.zeros((count, MEASURED_BLOCK_BYTES), np.uint8))
            batch.written.result()
        except DiskFullError:
            return 0.0
        best = float("inf")
        for _ in range(3):
            began = time.monotonic()
            self.read(batch).result()
            best = min(best, time.monotonic() - began)
        self.free(batch)
        self.counts = DiskCounts()
        return batch.nbytes / best

    def close(self) -> None:
        """Waits for what is under way and removes all files."""
        self._threads.shutdown(wait=True)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._lock_file.close()

    def _write(self, path: Path, blocks: U8, sizes: U32, packing: Packing | None) -> None:
        """Writes a file and notes the sizes of its blocks in ``sizes``."""
        began = time.monotonic()
        blocks = np.ascontiguousarray(blocks)
        reserved = _data_at(len(blocks)) + blocks.size
        try:
            stored = [block.data for block in blocks]
            if packing:
                packed = [memoryview(block) for block in packing.pack(blocks)]
                stored = [min(pair, key=len) for pair in zip(stored, packed, strict=True)]
            sums = np.array([xxhash.xxh3_64_intdigest(block) for block in stored], "<u8")
            in_file = np.array([len(block) for block in stored], "<u4")
            head = _HEAD.pack(MAGIC, VERSION, blocks.shape[1], len(blocks), 0) + sums.tobytes() + in_file.tobytes()
            with path.open("xb", buffering=0) as file:
                _write_all(file, head + struct.pack("<Q", xxhash.xxh3_64_intdigest(head)))
                _write_all(file, b"".join(stored) if packing else blocks.reshape(-1).data)
        except BaseException as error:
            path.unlink(missing_ok=True)
            self._give_back(reserved)
            if isinstance(error, OSError):
                raise DiskFullError(f"{path}: {error.strerror or error}", reserved) from error
            raise
        nbytes = _data_at(len(blocks)) + int(in_file.sum())
        with self._lock:
            sizes[:] = in_file
            self._used_bytes -= reserved - nbytes
        self._count(written_bytes=nbytes, write_s=time.monotonic() - began)

    def _read(self, batch: Batch, wanted: npt.NDArray[np.integer]) -> U8:
        batch.written.result()
        found = np.empty((len(wanted), batch.block_bytes), np.uint8)
        try:
            damaged = self._fetch(Part(batch, wanted, list(found), range(len(wanted))))
        except (OSError, EOFError) as error:
            raise CorruptBlockError(batch.path, list(range(batch.blocks)), str(error)) from error
        if damaged:
            numbers = [int(wanted[place]) for place in damaged]
            raise CorruptBlockError(batch.path, numbers, f"wrong checksum of blocks {numbers}")
        return found

    def _read_parts(self, parts: Sequence[Part]) -> list[int]:
        damaged: list[int] = []
        for part in parts:
            try:
                part.batch.written.result()
                damaged += [part.names[place] for place in self._fetch(part)]
            except (OSError, EOFError, DiskFullError) as error:
                log.error("blocks on disk cannot be read", file=str(part.batch.path), why=str(error))
                damaged += part.names
        return damaged

    def _fetch(self, part: Part) -> list[int]:
        """Reads a part and returns the places of those of its blocks whose checksum is wrong."""
        began, batch = time.monotonic(), part.batch
        try:
            with batch.path.open("rb", buffering=0) as file:
                sums, sizes = self._header(file, batch)
                starts = _data_at(batch.blocks) + np.cumsum(sizes, dtype=np.int64) - sizes
                stored = part.into if batch.packing is None else [np.empty(n, np.uint8) for n in sizes[part.blocks]]
                for start, end, number in _runs(part.blocks):
                    _read_all(file, int(starts[number]), [block.data for block in stored[start:end]])
        except (OSError, EOFError):
            self._count(corrupt_blocks=batch.blocks)
            raise
        damaged = [
            place
            for place, (number, block) in enumerate(zip(part.blocks, stored, strict=True))
            if xxhash.xxh3_64_intdigest(block.data) != sums[number]
        ]
        whole = sorted(set(range(len(stored))) - set(damaged))
        if batch.packing:
            _unpack(batch.packing, batch.block_bytes, [stored[place] for place in whole], [part.into[p] for p in whole])
        nbytes = int(sizes[part.blocks[whole]].sum())
        self._count(read_bytes=nbytes, read_s=time.monotonic() - began, corrupt_blocks=len(damaged))
        return damaged

    def _header(self, file: IO[bytes], batch: Batch) -> tuple[U64, U32]:
        """The checksums of a file's blocks, and their sizes."""
        head = np.empty(_data_at(batch.blocks), np.uint8)
        _read_all(file, 0, [head.data])
        raw = head.tobytes()
        expected = _HEAD.pack(MAGIC, VERSION, batch.block_bytes, batch.blocks, 0)
        stated = struct.unpack("<Q", raw[-8:])[0]
        if raw[: _HEAD.size] != expected or xxhash.xxh3_64_intdigest(raw[:-8]) != stated:
            raise EOFError("the header is damaged")
        sums = np.frombuffer(raw, "<u8", batch.blocks, _HEAD.size)
        return sums, np.frombuffer(raw, "<u4", batch.blocks, _HEAD.size + sums.nbytes)

    def _give_back(self, nbytes: int) -> None:
        with self._lock:
            self._used_bytes -= nbytes

    def _count(self, **more: float) -> None:
        with self._lock:
            for name, amount in more.items():
                setattr(self.counts, name, getattr(self.counts, name) + amount)


def _remove_abandoned(folder: Path) -> None:
    """Removes the files of processes that are no more."""
    for sub in sorted(path for path in folder.iterdir() if path.is_dir() and path.name.startswith(SUB_FOLDER)):
        try:
            with (sub / LOCK_NAME).open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # whoever lives holds it
            continue
        log.info("removing cache files that a killed process left", folder=str(sub))
        shutil.rmtree(sub, ignore_errors=True)


def _claim(folder: Path) -> tuple[Path, IO[bytes]]:
    """A sub-folder of this process's own, and the lock that says so; the system drops it when the process ends."""
    sub = Path(tempfile.mkdtemp(prefix=SUB_FOLDER, dir=folder))
    file = (sub / LOCK_NAME).open("xb")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return sub, file


def _data_at(blocks: int) -> int:
    """Where the blocks begin."""
    return _HEAD.size + (8 + 4) * blocks + 8


def _unpack(packing: Packing, block_bytes: int, stored: Sequence[U8], into: Sequence[U8]) -> None:
    """Brings blocks as they are in a file to where they are wanted."""
    packed = [place for place, block in enumerate(stored) if len(block) < block_bytes]
    plain = dict(enumerate(stored))
    if packed:
        plain |= zip(packed, packing.unpack([stored[place] for place in packed]), strict=True)
    for place, row in enumerate(into):
        row[:] = plain[place]


def _runs(wanted: npt.NDArray[np.integer]) -> list[tuple[int, int, int]]:
    """Adjacent blocks as one piece: first and end place among the wanted, and the first one's number."""
    if not len(wanted):
        return []
    bounds = [0, *(np.flatnonzero(np.diff(wanted) != 1) + 1).tolist(), len(wanted)]
    return [(start, end, int(wanted[start])) for start, end in pairwise(bounds)]


def _write_all(file: IO[bytes], data: bytes | memoryview) -> None:
    view = memoryview(data)
    while len(view):
        view = view[file.write(view) :]


def _read_all(file: IO[bytes], offset: int, views: list[memoryview]) -> None:
    """Fills the views, one after the other, from one stretch of a file."""
    at = 0  # the first view that is not full
    while at < len(views):
        got = os.preadv(file.fileno(), views[at : at + _VIEWS_AT_ONCE], offset)
        if not got:
            raise EOFError("the file is too short")
        offset += got
        while at < len(views) and got >= len(views[at]):
            got -= len(views[at])
            at += 1
        if got:
            views[at] = views[at][got:]
