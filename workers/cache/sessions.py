"""Sessions between their turns: the exact rows that a turn left, on the host tier and, later, on disk.

A row is 32 tokens over all layers and KV heads, raw, as the full cache computed them: the next turn starts from them as
it would from its own computation, whatever pipeline either has. Rows on the host lie in the arena like any request's,
but give way: where a request needs the room they go to disk, the longest unused session first, and are dropped where
that is full or too slow. No request waits for a disk to write.

Used by the engine thread alone; the disk's own threads only write and read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import wait

import numpy as np
import structlog
import torch

from kernels.api import F32, U8
from kernels.layout import BLOCK_TOKENS, Format, Tier
from kvpilot.v1 import policy_pb2
from workers.cache.arena import TierFullError
from workers.cache.disk import Batch, CorruptBlockError, DiskFullError, DiskStore
from workers.cache.kvcache import KVCache
from workers.cache.parked import Leaving, Parked, Piece, SessionCounts, SessionKey
from workers.cache.sequence_cache import SequenceCache
from workers.cache.shadow import Shadow

PIECE_BYTES = 8 << 20
"""About what goes to disk, and comes back, at a time."""
SLICE_BYTES = 4 << 20
"""About what is copied to the host between two steps when a turn has ended."""
STAGED_BYTES = 64 << 20
"""Most bytes, outside all tiers, that wait to be written: a piece is copied, so that its memory is free at once."""
PATIENCE_S = 0.1
"""How long a request that needs room at once lets the disk catch up before sessions are dropped instead."""
RESERVE_SHARE = 1 / 8
"""Sessions leave the host tier before their time while less than this share of it is free."""
SCAN_S = 0.1
"""How often sessions are looked through for those whose time has come."""
REST_S = 10.0
"""How long nothing is moved to a disk that has failed to write."""
NEWS_S = 1.0
"""How often they are news at most: they move in many pieces."""
READ_AHEAD = 2
"""Pieces read from disk at a time."""

log = structlog.get_logger(__name__)


class ParkedSessions:
    """The sessions of one worker that have no turn under way.

    One turn at a time is being parked, and keeps its slot of the cache until it is.

    Args:
        cache: whose host tier they live on; their bytes there are never in the way of a request.
        disk: where they go from there; None: nowhere.
        host_s: how long they stay on the host, seconds.
        keep_s: how long they are kept at all.
        wake: called, from any thread, when :meth:`tick` has something to do.
        clock: seconds.
    """

    def __init__(
        self,
        cache: KVCache,
        disk: DiskStore | None,
        host_s: float,
        keep_s: float,
        wake: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counts = SessionCounts()
        self._cache = cache
        self._arena = cache.host
        self._disk = disk
        self._host_s, self._keep_s = host_s, keep_s
        self._wake, self._clock = wake, clock
        self._entries: dict[SessionKey, Parked] = {}  # the longest unused one first
        self._leaving: Leaving | None = None
        self._told, self._told_s = policy_pb2.ParkedSessions(), -math.inf
        self._writing: list[tuple[Parked, Piece, Batch]] = []
        self._next_scan_s = self._disk_rests_s = -math.inf
        shape = cache.shape
        self._row_blocks = shape.layers * shape.kv_heads
        self._row_bytes = self._row_blocks * shape.block_bytes(Format.RAW)
        self._piece_rows = max(1, PIECE_BYTES // self._row_bytes)
        self._slice_rows = max(1, SLICE_BYTES // self._row_bytes)
        cache.host.guests.append(self)

    @property
    def parked(self) -> int:
        """Sessions kept now."""
        return len(self._entries)

    @property
    def host_bytes(self) -> int:
        """Bytes on the host tier, in whole pages."""
        return sum(entry.lot.pages for entry in self._entries.values()) * self._arena.page_bytes

    @property
    def yielding_bytes(self) -> int:
        """Of the bytes on the host tier those that no request waits for."""
        pages = sum(entry.lot.pages for entry in self._entries.values() if not entry.wanted_rows)
        return pages * self._arena.page_bytes

    @property
    def disk_bytes(self) -> int:
        """Bytes of files."""
        pieces = (piece for entry in self._entries.values() for piece in entry.pieces)
        return sum(piece.batch.nbytes for piece in pieces if piece.batch)

    def has_news(self) -> bool:
        """Whether :meth:`to_proto` is another than when this was asked before, some time ago."""
        now = self._clock()
        if now - self._told_s < NEWS_S:
            return False
        told, self._told, self._told_s = self._told, self.to_proto(), now
        return bool(told != self._told)

    def to_proto(self) -> policy_pb2.ParkedSessions:
        """The API's form of what is here and what became of it."""
        counts = self.counts
        return policy_pb2.ParkedSessions(
            parked=self.parked,
            host_bytes=self.host_bytes,
            disk_bytes=self.disk_bytes,
            restored_turns=counts.restored,
            restored_tokens=counts.restored_tokens,
            dropped_pieces=counts.dropped,
            expired=counts.expired,
            corrupt_pieces=counts.corrupt,
        )

    # -- turns ---------------------------------------------------------------------------------------------------------

    def park(self, key: SessionKey, token_ids: Sequence[int], cache: SequenceCache) -> None:
        """Keeps the exact rows of a turn that has ended, as many as the host has room for, and closes its cache.

        What has to be copied is, by :meth:`tick`, a slice at a time. The rows replace what the session had before. A
        turn that leaves none (its tokens were rounded or evicted for good) leaves that as it is.
        """
        self.conclude()
        self._leaving = Leaving(key, list(token_ids), cache)

    @property
    def parking(self) -> bool:
        """Whether a turn is being parked: :meth:`tick` has something to do now."""
        return self._leaving is not None

    def conclude(self, copy: bool = True) -> bool:
        """Ends the parking of a turn at once: copies what is left of it, or gives that up. False: none is parked."""
        leaving, self._leaving = self._leaving, None
        if leaving is None:
            return False
        key, token_ids = leaving.key, leaving.token_ids
        row_mass = leaving.cache.row_mass
        shadow = self._cache.close_keeping(leaving.cache, copy)
        if shadow is None:
            return True
        if key in self._entries:
            self._cut(key, 0)
        shadow.lot.borrowed = False
        rows = shadow.address[: shadow.rows]
        self._entries[key] = Parked(
            np.array(token_ids[: shadow.rows * BLOCK_TOKENS], np.int32),
            shadow.lot,
            [
                Piece(len(piece), piece)
                for piece in (rows[at : at + self._piece_rows].copy() for at in range(0, shadow.rows, self._piece_rows))
            ],
            row_mass,
            self._clock(),
        )
        self.counts.parked += 1
        return True

    def _find(self, key: SessionKey) -> Parked | None:
        if self._leaving and self._leaving.key == key:
            self.conclude()
        return self._entries.get(key)

    def ready_rows(self, key: SessionKey, token_ids: Sequence[int], with_mass: bool = False) -> int:
        """Rows that :meth:`take` would give now."""
        entry = self._find(key)
        return entry.usable(min(entry.common_rows(token_ids), entry.host_rows()), with_mass) if entry else 0

    def take(
        self, key: SessionKey, token_ids: Sequence[int], max_tokens: int, with_mass: bool = False
    ) -> tuple[Shadow, F32 | None]:
        """The rows that a request's tokens begin with, for the request to have; there must be some ready.

        The session is no longer here: it comes back, longer, when the turn ends.

        Args:
            key: the session.
            token_ids: what the request starts with and may reuse.
            max_tokens: tokens the request may come to hold.
            with_mass: whether it needs the masses of its whole prompt.

        Returns:
            The rows, and, if asked for, the masses [L, H, tokens] that their queries pay.
        """
        rows = self.ready_rows(key, token_ids, with_mass)
        entry = self._entries[key]
        address = np.concatenate([piece.address for piece in entry.pieces if piece.address is not None])[:rows]
        kept = 0
        for piece in entry.pieces:  # what is handed over is no longer its own
            if piece.address is not None:
                piece.address = piece.address[max(0, rows - kept) :]
            kept += piece.rows
        self._cut(key, 0)
        self.counts.restored += 1
        self.counts.restored_tokens += rows * BLOCK_TOKENS
        return Shadow.of_rows(self._arena, max_tokens, entry.lot, address), entry.row_mass if with_mass else None

    def fetch(self, key: SessionKey, token_ids: Sequence[int], with_mass: bool = False, beyond_rows: int = 0) -> bool:
        """Starts to bring from disk what a request could begin with. False: there is nothing to wait for.

        Args:
            key: the session.
            token_ids: what the request starts with and may reuse.
            with_mass: whether it needs the masses of its whole prompt.
            beyond_rows: rows that it can have from elsewhere; the session is left alone if it has no more.
        """
        entry = self._find(key)
        rows = entry.usable(entry.common_rows(token_ids), with_mass) if entry else 0
        if entry is None or rows <= beyond_rows:
            return False
        self._entries[key] = self._entries.pop(key)  # the last to give way
        entry.since_s = self._clock()
        for piece in entry.pieces:
            piece.leaving = False
        entry.wanted_rows = max(entry.wanted_rows, rows)
        self._read_on(key, entry)
        return self.fetching(key)

    def fetching(self, key: SessionKey) -> bool:
        """Whether rows of a session are on their way from disk."""
        entry = self._entries.get(key)
        return bool(entry and entry.wanted_rows)

    # -- room ----------------------------------------------------------------------------------------------------------

    def give_up(self, nbytes: int) -> None:
        """Frees so many bytes of the host tier, or all there are: to disk, and where that cannot be, for good."""
        wanted = self._arena.free_bytes + nbytes
        deadline = time.monotonic() + PATIENCE_S
        for key, entry in list(self._entries.items()):
            if entry.wanted_rows:
                continue
            for index in reversed(range(len(entry.pieces))):
                if self._arena.free_bytes >= wanted:
                    return
                if index >= len(entry.pieces):
                    continue  # what could not be written has taken it along
                piece = entry.pieces[index]
                if piece.address is not None and (piece.batch or self._stage(key, entry, piece, deadline)):
                    self._leave_host(piece)
                elif piece.address is not None:
                    self._drop(key, index)
        if self._arena.free_bytes < wanted and self.conclude(copy=False):
            self.give_up(wanted - self._arena.free_bytes)

    def give_up_disk(self, nbytes: int, but: SessionKey | None = None) -> bool:
        """Frees so many bytes of the disk tier by dropping the sessions there that were unused for longest.

        Returns:
            Whether there is so much room now; what is still being written makes room only when it is.
        """
        assert self._disk is not None
        missing = nbytes - self._disk.free_bytes
        for key, entry in list(self._entries.items()):
            if missing <= 0 or key == but:
                break
            if entry.wanted_rows or not any(piece.batch for piece in entry.pieces):
                continue
            index = len(entry.pieces)
            while index and missing > 0:
                index -= 1
                batch = entry.pieces[index].batch
                missing -= batch.nbytes if batch else 0
            self._drop(key, index)
        return self._disk.free_bytes >= nbytes

    def tick(self) -> None:
        """Goes on with what is under way; to be called often, and after ``wake``."""
        now = self._clock()
        written = self._take_in_writes()
        if leaving := self._leaving:
            self._leaving = None  # the room it needs is not its own to give up
            copied = self._cache.keep_rows(leaving.cache, self._slice_rows)
            self._leaving = leaving
            if copied < self._slice_rows:
                self.conclude()
        for key in [key for key, entry in self._entries.items() if entry.wanted_rows]:
            if key in self._entries:
                self._read_on(key, self._entries[key])
        if not written and now < self._next_scan_s:
            return
        self._next_scan_s = now + SCAN_S
        for key, entry in list(self._entries.items()):
            if entry.wanted_rows or key not in self._entries:
                continue
            age_s = now - entry.since_s
            if age_s >= self._keep_s:
                self._cut(key, 0)
                self.counts.expired += 1
            elif age_s >= self._host_s or self._host_is_short():
                self._move_on(key, entry)
            else:
                break  # those behind it are younger

    def clear(self) -> None:
        """Drops all sessions."""
        self.conclude()
        for key in list(self._entries):
            self._cut(key, 0)

    # -- to disk -------------------------------------------------------------------------------------------------------

    def _move_on(self, key: SessionKey, entry: Parked) -> None:
        """Starts to write a session's next piece, the last first. What is written leaves the host."""
        for piece in reversed(entry.pieces):
            if piece.address is None:
                continue
            if piece.batch is None:
                piece.leaving = self._stage(key, entry, piece)
                return
            piece.leaving = True
            if piece.batch.written.done():
                self._leave_host(piece)

    def _host_is_short(self) -> bool:
        leaving = sum(piece.rows for _, piece, _ in self._writing if piece.leaving) * self._row_bytes
        return self._arena.free_bytes + leaving < RESERVE_SHARE * self._arena.budget_bytes

    def _staged_bytes(self) -> int:
        return sum(batch.nbytes for _, _, batch in self._writing)

    def _stage(self, key: SessionKey, entry: Parked, piece: Piece, deadline: float | None = None) -> bool:
        """Copies a piece and starts to write the copy. False: the disk is full, has failed or does not keep up."""
        if self._disk is None or self._clock() < self._disk_rests_s:
            return False
        while self._writing and self._staged_bytes() >= STAGED_BYTES:
            patience_s = deadline - time.monotonic() if deadline else 0.0
            if patience_s <= 0:
                return False
            wait([self._writing[0][2].written], patience_s)
            self._take_in_writes()
        if piece.address is None:
            return False  # gone with a piece before it
        blocks = self._cache.backend.load(Tier.HOST, piece.address.reshape(-1), Format.RAW).numpy()
        rows = blocks.reshape(piece.rows, self._row_bytes)  # a checksum each
        try:
            piece.batch = self._disk.write(rows)
        except DiskFullError as full:
            if not self.give_up_disk(full.needed_bytes, but=key):
                return False
            piece.batch = self._disk.write(rows)
        self._writing.append((entry, piece, piece.batch))
        piece.batch.written.add_done_callback(lambda _: self._wake())
        return True

    def _take_in_writes(self) -> bool:
        """Sees to pieces that are written, or could not be. False: there are none."""
        ended = [writing for writing in self._writing if writing[2].written.done()]
        self._writing = [writing for writing in self._writing if writing not in ended]
        for entry, piece, batch in ended:
            if piece.batch is not batch:
                continue  # it is not wanted any more
            problem = batch.written.exception()
            if problem is None:
                if piece.leaving:
                    self._leave_host(piece)
                continue
            log.warning("a session could not be written to disk", why=str(problem))
            self._disk_rests_s = self._clock() + REST_S
            piece.batch, piece.leaving = None, False
            if piece.address is None:
                key = next(key for key, other in self._entries.items() if other is entry)
                self._drop(key, entry.pieces.index(piece))
        return bool(ended)

    def _leave_host(self, piece: Piece) -> None:
        if piece.address is not None:
            self._arena.release(piece.address.reshape(-1))
            piece.address, piece.leaving = None, False

    # -- from disk -----------------------------------------------------------------------------------------------------

    def _read_on(self, key: SessionKey, entry: Parked) -> None:
        """Brings pieces that have been read to the host, and starts to read the next."""
        while entry.reads and entry.reads[0][1].done():
            piece, found = entry.reads.popleft()
            try:
                self._bring(entry, piece, found.result())
            except (CorruptBlockError, DiskFullError) as problem:
                log.warning("a session's blocks on disk are damaged and computed again", why=str(problem))
                self.counts.corrupt += 1
                self._stop_reading(entry)
                self._cut(key, entry.pieces.index(piece))
                return
            except TierFullError:  # the rest stays where it is
                self._stop_reading(entry)
                return
        rows, wanted, missing = 0, entry.wanted_rows, 0
        under_way = [piece for piece, _ in entry.reads]
        for piece in entry.pieces:
            if rows >= wanted:
                break
            rows += piece.rows
            if piece.address is not None:
                continue
            missing += 1
            if piece not in under_way and len(entry.reads) < READ_AHEAD:
                assert self._disk is not None
                assert piece.batch is not None
                found = self._disk.read(piece.batch)
                entry.reads.append((piece, found))
                found.add_done_callback(lambda _: self._wake())
        if not missing:
            self._stop_reading(entry)

    def _bring(self, entry: Parked, piece: Piece, rows: U8) -> None:
        address = self._arena.allocate(entry.lot, piece.rows * self._row_blocks)
        blocks = torch.from_numpy(rows.reshape(len(address), -1))
        self._cache.backend.store(Tier.HOST, address, blocks)
        shape = self._cache.shape
        piece.address = address.reshape(piece.rows, shape.layers, shape.kv_heads)
        self._free_batch(piece)

    def _stop_reading(self, entry: Parked) -> None:
        entry.reads.clear()
        entry.wanted_rows = 0

    # -- the end -------------------------------------------------------------------------------------------------------

    def _drop(self, key: SessionKey, index: int) -> None:
        """Gives up what a session has from a piece on, for want of room."""
        self.counts.dropped += 1
        self._cut(key, index)

    def _cut(self, key: SessionKey, index: int) -> None:
        """Removes a session's pieces from one on; without pieces there is no session."""
        entry = self._entries[key]
        for piece in entry.pieces[index:]:
            self._leave_host(piece)
            self._free_batch(piece)
        del entry.pieces[index:]
        entry.token_ids = entry.token_ids[: sum(piece.rows for piece in entry.pieces) * BLOCK_TOKENS]
        if not entry.pieces:
            del self._entries[key]

    def _free_batch(self, piece: Piece) -> None:
        if piece.batch is not None:
            assert self._disk is not None
            self._disk.free(piece.batch)
            piece.batch = None
