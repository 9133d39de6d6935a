"""The disk tier: blocks in files of their own, each with a checksum, written and read on threads.

Blocks come in batches, and a batch is one file, so that copies are large: a header with what is in it, then the blocks
one after the other. Nothing is synced: a cache may be lost, it must not lie. Files belong to the process that wrote
them; what a killed one left behind is removed by the next that opens the folder.

File: 8 bytes of magic, then little-endian uint32 version, block_bytes, blocks, 0; ``blocks`` uint64 checksums (XXH3-64
of each block); one more of all before it; the blocks.
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
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import structlog
import xxhash

U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]

MAGIC, VERSION = b"kvpilot\0", 1
_HEAD = struct.Struct("<8s4I")
LOCK_NAME, SUB_FOLDER = "in-use", "worker-"
THREADS = 2

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


@dataclass(frozen=True)
class Batch:
    """Blocks that were written together. ``written`` is done when they are on disk, or fails with DiskFullError."""

    path: Path
    blocks: int
    block_bytes: int
    written: Future[None]

    @property
    def nbytes(self) -> int:
        """Of its file."""
        return _file_bytes(self.blocks, self.block_bytes)


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

    def write(self, blocks: U8) -> Batch:
        """Starts to store blocks uint8 [N, block_bytes], which must not change until ``written`` is done. N > 0.

        Raises:
            DiskFullError: the budget is too small.
        """
        count, block_bytes = blocks.shape
        needed = _file_bytes(count, block_bytes)
        with self._lock:
            if needed > self.free_bytes:
                free = f"{self.free_bytes} of {self.budget_bytes} free"
                raise DiskFullError(f"disk tier: {needed} bytes needed, {free}", needed)
            self._used_bytes += needed
            path = self._folder / f"{self._next_number:08}.blocks"
            self._next_number += 1
        return Batch(path, count, block_bytes, self._threads.submit(self._write, path, blocks, needed))

    def read(self, batch: Batch, blocks: npt.NDArray[np.integer] | None = None) -> Future[U8]:
        """Starts to read blocks of a batch, by number; None: all.

        Returns:
            uint8 [n, block_bytes]; fails with CorruptBlockError, naming the damaged ones, or as ``written`` did.
        """
        wanted = np.arange(batch.blocks) if blocks is None else np.asarray(blocks)
        with self._lock:
            self._reads[batch.path] += 1
        found = self._threads.submit(self._read, batch, wanted)
        found.add_done_callback(lambda _: self._read_ended(batch))
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

    def close(self) -> None:
        """Waits for what is under way and removes all files."""
        self._threads.shutdown(wait=True)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._lock_file.close()

    def _write(self, path: Path, blocks: U8, needed: int) -> None:
        began = time.monotonic()
        blocks = np.ascontiguousarray(blocks)
        sums = np.array([xxhash.xxh3_64_intdigest(block.data) for block in blocks], "<u8")
        head = _HEAD.pack(MAGIC, VERSION, blocks.shape[1], len(blocks), 0) + sums.tobytes()
        try:
            with path.open("xb", buffering=0) as file:
                _write_all(file, head + struct.pack("<Q", xxhash.xxh3_64_intdigest(head)))
                _write_all(file, blocks.reshape(-1).data)
        except OSError as error:
            path.unlink(missing_ok=True)
            self._give_back(needed)
            raise DiskFullError(f"{path}: {error.strerror or error}", needed) from error
        self._count(written_bytes=needed, write_s=time.monotonic() - began)

    def _read(self, batch: Batch, wanted: npt.NDArray[np.integer]) -> U8:
        batch.written.result()
        began = time.monotonic()
        found = np.empty((len(wanted), batch.block_bytes), np.uint8)
        everything = list(range(batch.blocks))
        try:
            with batch.path.open("rb", buffering=0) as file:
                sums = self._checksums(file, batch)
                for start, end, number in _runs(wanted):
                    _read_all(file, _data_at(batch.blocks) + number * batch.block_bytes, found[start:end].reshape(-1))
        except (OSError, EOFError) as error:
            self._count(corrupt_blocks=batch.blocks)
            raise CorruptBlockError(batch.path, everything, str(error)) from error
        damaged = [
            int(number)
            for number, block in zip(wanted, found, strict=True)
            if xxhash.xxh3_64_intdigest(block.data) != sums[number]
        ]
        if damaged:
            self._count(corrupt_blocks=len(damaged))
            raise CorruptBlockError(batch.path, damaged, f"wrong checksum of blocks {damaged}")
        self._count(read_bytes=found.nbytes, read_s=time.monotonic() - began)
        return found

    def _checksums(self, file: IO[bytes], batch: Batch) -> U64:
        head = np.empty(_data_at(batch.blocks), np.uint8)
        _read_all(file, 0, head)
        raw = head.tobytes()
        expected = _HEAD.pack(MAGIC, VERSION, batch.block_bytes, batch.blocks, 0)
        stated = struct.unpack("<Q", raw[-8:])[0]
        if raw[: _HEAD.size] != expected or xxhash.xxh3_64_intdigest(raw[:-8]) != stated:
            raise EOFError("the header is damaged")
        return np.frombuffer(raw, "<u8", batch.blocks, _HEAD.size)

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
    return _HEAD.size + 8 * blocks + 8


def _file_bytes(blocks: int, block_bytes: int) -> int:
    return _data_at(blocks) + blocks * block_bytes


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


def _read_all(file: IO[bytes], offset: int, into: U8) -> None:
    view = into.data
    while len(view):
        got = os.preadv(file.fileno(), [view], offset)
        if not got:
            raise EOFError("the file is too short")
        view, offset = view[got:], offset + got
