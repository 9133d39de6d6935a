"""What operators have ordered, overrides and the mode, kept in the job store so that a restart does not forget it.

Nothing here is on the steering's way: changes are noted and return, a task of its own carries them to the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Collection, Mapping
from typing import Protocol

import structlog

from controller.settings import SteeringMode
from controller.state import Override
from kvpilot.bus import Bus, BusError
from kvpilot.v1 import job_pb2
from kvpilot.v1.operator_pb2 import Mode

log = structlog.get_logger()

MODES = {
    SteeringMode.OFF: Mode.MODE_OFF,
    SteeringMode.ADVISORY: Mode.MODE_ADVISORY,
    SteeringMode.ACTIVE: Mode.MODE_ACTIVE,
}
STEERING_MODES = {number: mode for mode, number in MODES.items()}

LOAD_PATIENCE_S = 5.0
"""A starting controller waits this long for what is kept; it serves then, and takes it up when it comes."""
WRITE_PATIENCE_S = 1.0
"""An operator's call waits this long for its change to be kept."""
SWEEP_S = 30.0
"""Time between two looks for overrides whose request has ended without a worker's saying so here."""
_FIRST_BACKOFF_S = 0.1
_LAST_BACKOFF_S = 2.0


class Owner(Protocol):
    """Whose orders are kept: the steering."""

    def restore(self, mode: SteeringMode | None, overrides: Mapping[str, Override]) -> None:
        """Takes up what was kept; a mode of None leaves the present one."""

    def follow(self, mode: SteeringMode | None, overrides: Mapping[str, Override], settled: Collection[str]) -> None:
        """Takes up what another controller has set: a mode of None leaves the present one; of the requests named in
        ``settled`` the overrides are as given, and none where none is given."""

    def overridden(self) -> Collection[str]:
        """Ids of the requests with an override."""

    def drop_overrides(self, request_ids: Collection[str]) -> None:
        """Forgets the overrides of requests that have ended."""


class Ledger:
    """Keeps an owner's orders in the job store.

    A change that the store does not take is tried again until it does, the newest of each request and of the mode; what
    was changed here before the load wins over what was loaded. Without a bus nothing is kept and every call returns at
    once.
    """

    def __init__(self, bus: Bus | None, owner: Owner) -> None:
        self._bus = bus
        self._owner = owner
        self._mode: Mode | None = None
        """To be written; None: nothing new."""
        self._overrides: dict[str, job_pb2.Override | None] = {}
        """To be written; None: to be removed."""
        self._loaded = False
        self._reachable = True
        self._sweep_s = 0.0  # when, monotonic
        self._stale = False  # another controller may have changed something
        self._news = asyncio.Event()
        self._settled = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._listening: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Loads what is kept. Returns when it is loaded, the store fails, or LOAD_PATIENCE_S are over."""
        if self._bus is not None:
            self._listening = asyncio.create_task(self._listen(self._bus), name="orders")
            self._task = asyncio.create_task(self._run(self._bus), name="ledger")
            await self.settle(LOAD_PATIENCE_S)

    async def stop(self) -> None:
        """Stops keeping, after a last moment for what is not written yet."""
        if self._task is None:
            return
        await self.settle()
        tasks = [task for task in (self._task, self._listening) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._unwritten:
            log.warning("orders end with this process", mode=self._mode, overrides=sorted(self._overrides))

    # --- changes ------------------------------------------------------------------------------------------------------

    def set_mode(self, mode: SteeringMode) -> None:
        """Notes a mode."""
        if self._bus is not None:
            self._mode = MODES[mode]
            self._note("mode")

    def pin(self, request_id: str, override: Override) -> None:
        """Notes an override."""
        if self._bus is not None:
            self._overrides[request_id] = job_pb2.Override(pipeline=override.pipeline, reason=override.reason)
            self._note(request_id)

    def unpin(self, request_id: str) -> None:
        """Notes that a request has no override any more."""
        if self._bus is not None:
            self._overrides[request_id] = None
            self._note(request_id)

    def ask_after(self, request_ids: Collection[str]) -> None:
        """Drops the overrides of those of the requests that have ended, not of those that go on elsewhere.

        Only the job store can tell; without one, they have ended.
        """
        if self._bus is None:
            self._owner.drop_overrides(request_ids)
        else:
            self._sweep_s = 0.0
            self._news.set()

    async def settle(self, patience_s: float = WRITE_PATIENCE_S) -> None:
        """Waits until what was noted is written; at most ``patience_s``, and not at all for a store that fails."""
        if self._bus is None:
            return
        try:
            async with asyncio.timeout(patience_s):
                await self._settled.wait()
        except TimeoutError:
            log.warning("the job store is slow; going on without its answer", waited_s=patience_s)

    def _note(self, what: str) -> None:
        if self._reachable:
            self._settled.clear()
        else:
            log.warning("kept in this process only until the job store is back", order=what)
        self._news.set()

    @property
    def _unwritten(self) -> bool:
        return self._mode is not None or bool(self._overrides)

    # --- the task -----------------------------------------------------------------------------------------------------

    async def _run(self, bus: Bus) -> None:
        backoff_s = _FIRST_BACKOFF_S
        while True:
            try:
                await self._visit(bus)
            except Exception as error:  # whatever it is, the orders must not be lost with this task
                self._fail(error)
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)
                continue
            if not self._reachable:
                log.info("the job store is back; it has all orders")
            self._reachable, backoff_s = True, _FIRST_BACKOFF_S
            self._settled.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, self._sweep_s - time.monotonic())):
                    await self._news.wait()
            self._news.clear()

    def _fail(self, error: Exception) -> None:
        if self._reachable:
            unforeseen = not isinstance(error, BusError)
            log.warning("orders are kept in this process only for now", error=str(error), exc_info=unforeseen)
        self._reachable = False
        self._settled.set()

    async def _visit(self, bus: Bus) -> None:
        """Whatever is due at the store. Ends without a wait after the last write."""
        if not self._loaded:
            await self._load(bus)
        if self._stale or time.monotonic() >= self._sweep_s:
            self._stale = False
            try:
                await self._follow(bus)
            except BaseException:
                self._stale = True
                raise
        if time.monotonic() >= self._sweep_s:
            await self._sweep(bus)
        while self._unwritten:
            await self._write(bus)

    async def _load(self, bus: Bus) -> None:
        orders = await bus.orders()
        ended = await bus.ended(orders.overrides)
        overrides = {
            request_id: Override(kept.pipeline, kept.reason, restored=True)
            for request_id, kept in orders.overrides.items()
            if request_id not in ended and request_id not in self._overrides
        }
        for request_id in ended:
            self._overrides.setdefault(request_id, None)
        mode = STEERING_MODES.get(orders.mode) if orders.mode is not None and self._mode is None else None
        self._loaded, self._sweep_s = True, time.monotonic() + SWEEP_S
        self._owner.restore(mode, overrides)

    async def _listen(self, bus: Bus) -> None:
        """Notes when orders change; a message that is lost is made up for by the next sweep."""
        while True:
            try:
                async for _ in bus.order_changes():
                    self._stale = True
                    self._news.set()
            except Exception as error:  # whatever it is, changes must not go unheard from then on
                if not isinstance(error, BusError):
                    log.exception("listening for orders failed; it is tried again")
                await asyncio.sleep(_LAST_BACKOFF_S)
                self._stale = True
                self._news.set()

    async def _follow(self, bus: Bus) -> None:
        """Takes up what other controllers have changed. What was changed here and is not written yet stays."""
        known = set(self._owner.overridden()) - self._overrides.keys()  # before the read: later ones are not in it
        orders = await bus.orders()
        overrides = {
            request_id: Override(kept.pipeline, kept.reason, restored=True)
            for request_id, kept in orders.overrides.items()
            if request_id not in self._overrides
        }
        settled = (known | overrides.keys()) - self._overrides.keys()
        mode = STEERING_MODES.get(orders.mode) if orders.mode is not None and self._mode is None else None
        self._owner.follow(mode, overrides, settled)

    async def _sweep(self, bus: Bus) -> None:
        """Drops the overrides of ended requests, also those that only the store has: another controller's, say."""
        ended = await bus.ended({*self._owner.overridden(), *await bus.overridden()})
        self._overrides |= dict.fromkeys(ended)
        self._owner.drop_overrides(ended)
        self._sweep_s = time.monotonic() + SWEEP_S

    async def _write(self, bus: Bus) -> None:
        mode, overrides = self._mode, dict(self._overrides)
        await bus.keep_orders(mode, overrides)
        if self._mode == mode:
            self._mode = None
        for request_id, value in overrides.items():
            if self._overrides[request_id] == value:
                del self._overrides[request_id]
