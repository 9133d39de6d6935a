"""The predictors in force: loaded beside the planning, checked, and swapped between two plans.

The planner reads :attr:`BundleHolder.active` once per plan, so that a swap is one assignment, seen by the next plan; no
stream and no directive under way takes notice. A bundle that cannot be used is refused by name; what is active stays.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

import structlog

from models.features import SCHEMA_HASH
from models.predictor import Predictor

log = structlog.get_logger()

_RETRY_S = 30.0
"""A bundle that was refused is tried again this much later at the earliest, if it is still wanted: its file may have
come to be whole, or its store reachable."""


@dataclass(frozen=True)
class Pointers:
    """Versions of the bundles that are to be in force; empty for none."""

    active: str = ""
    shadow: str = ""


class BundleSource(Protocol):
    """Where bundles come from: the registry, and the pointers in the job store."""

    async def pointers(self) -> Pointers:
        """What is wanted.

        Raises:
            Exception: it cannot be said now; what is in force stays.
        """
        ...

    async def changed(self) -> None:
        """Returns when the pointers may have changed. May be cancelled at any time."""
        ...

    async def load(self, version: str) -> Predictor:
        """Loads and checks a bundle; may take seconds, but none of the event loop's.

        Raises:
            Exception: why it must not be used (schema, self-test, untrusted types, not found).
        """
        ...

    async def rollback(self, version: str, reason: str) -> None:
        """Takes the active pointer off ``version``, if it is still there, to the bundle before it or to none.

        Raises:
            Exception: the store cannot take it now; the holder has fallen back all the same.
        """
        ...


class BundleRefusedError(Exception):
    """A bundle that this controller cannot use."""


class BundleHolder:
    """Holds the active and the shadow predictor, and follows the source's pointers.

    Attributes:
        active: decides; None: there is none.
        shadow: predicts beside it and decides nothing.
        refused: reasons by version, of the bundles that are wanted and could not be used.
    """

    def __init__(self, source: BundleSource, poll_s: float) -> None:
        self.active: Predictor | None = None
        self.shadow: Predictor | None = None
        self.refused: dict[str, str] = {}
        self.swaps = self.rollbacks = 0
        self._source = source
        self._poll_s = poll_s
        self._retry_s: dict[str, float] = {}
        self._previous: Predictor | None = None
        self._rolled_back: str = ""
        """Version that broke its bound: not taken again while the pointer still names it."""
        self._task: asyncio.Task[None] | None = None
        self._telling: set[asyncio.Task[None]] = set()

    async def start(self, patience_s: float = 5.0) -> None:
        """Takes up what is wanted, waiting ``patience_s`` at most, and follows it from then on."""
        first = asyncio.create_task(self.refresh(), name="first bundles")
        await asyncio.wait({first}, timeout=patience_s)
        self._task = asyncio.create_task(self._follow(first), name="bundles")

    async def stop(self) -> None:
        """Stops following."""
        for task in (self._task, *self._telling):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def refresh(self) -> None:
        """Reads the pointers and swaps what has changed. Never raises: what cannot be had is logged."""
        try:
            wanted = await self._source.pointers()
        except Exception as error:
            log.warning("bundle pointers out of reach; what is in force stays", error=str(error))
            return
        if wanted.active != self._rolled_back:
            self._rolled_back = ""
        for version in self.refused.keys() - {wanted.active, wanted.shadow}:
            del self.refused[version]
        if not self._rolled_back and await self._want(wanted.active, self.active):
            await self._swap_active(wanted.active)
        if await self._want(wanted.shadow, self.shadow):
            await self._swap_shadow(wanted.shadow)

    def rollback(self, version: str, reason: str) -> bool:
        """Falls back at once from ``version`` to the predictor before it, or to none, and tells the source.

        Returns:
            False where ``version`` is not active any more; then nothing is done.
        """
        if self.active is None or self.active.version != version:
            return False
        self._rolled_back = version
        before, self._previous = self._previous, None
        self._set_active(before)
        self.rollbacks += 1
        log.error("bundle rolled back", bundle=version, to=_version(before) or "the rule", reason=reason)
        task = asyncio.get_running_loop().create_task(self._tell(version, reason), name="rollback")
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)
        return True

    async def _tell(self, version: str, reason: str) -> None:
        while True:
            try:
                await self._source.rollback(version, reason)
                return
            except Exception as error:
                log.warning("rollback not kept yet; trying again", bundle=version, error=str(error))
                await asyncio.sleep(self._poll_s)

    async def _follow(self, first: asyncio.Task[None]) -> None:
        await first
        while True:
            try:
                async with asyncio.timeout(self._poll_s):
                    await self._source.changed()
            except TimeoutError:
                pass  # a wake may have been lost
            except Exception as error:
                log.debug("no wake from the bundle source", error=str(error))
                await asyncio.sleep(self._poll_s)
            await self.refresh()

    async def _want(self, version: str, held: Predictor | None) -> bool:
        due = asyncio.get_running_loop().time() >= self._retry_s.get(version, 0.0)
        return version != _version(held) and (version not in self.refused or due)

    async def _swap_active(self, version: str) -> None:
        before = self.active
        if version and self.shadow is not None and self.shadow.version == version:
            loaded: Predictor | None = self.shadow
        elif version and self._previous is not None and self._previous.version == version:
            loaded = self._previous
        else:
            loaded = await self._load(version)
            if loaded is None and version:
                return
        if self.active is not before:
            return  # rolled back while it was loading: the next look at the pointers decides
        self._previous = before
        self._set_active(loaded)
        log.info("bundle active", bundle=version or "none: the rule decides", before=_version(before))

    async def _swap_shadow(self, version: str) -> None:
        loaded = await self._load(version)
        if loaded is not None or not version:
            self.shadow = loaded
            log.info("bundle in the shadow", bundle=version or "none")

    async def _load(self, version: str) -> Predictor | None:
        """None, with the reason in ``refused``, for what cannot be used."""
        if not version:
            return None
        try:
            loaded = await self._source.load(version)
            _check(version, loaded)
        except Exception as error:
            if self.refused.get(version) != str(error):
                log.error("bundle refused", bundle=version, error=str(error), active=_version(self.active))
            self.refused[version] = str(error)
            self._retry_s[version] = asyncio.get_running_loop().time() + _RETRY_S
            return None
        self.refused.pop(version, None)
        self._retry_s.pop(version, None)
        return loaded

    def _set_active(self, predictor: Predictor | None) -> None:
        self.active = predictor
        self.swaps += 1


def _check(version: str, loaded: Predictor) -> None:
    if loaded.version != version:
        raise BundleRefusedError(f"bundle {version!r} calls itself {loaded.version!r}")
    if loaded.schema_hash != SCHEMA_HASH:
        raise BundleRefusedError(
            f"bundle {version!r} reads feature schema {loaded.schema_hash or 'none'};"
            f" this controller makes {SCHEMA_HASH}"
        )
    if not 0 < loaded.alpha < 1:
        raise BundleRefusedError(f"bundle {version!r} has alpha {loaded.alpha:g}: expected one between 0 and 1")


def _version(predictor: Predictor | None) -> str:
    return predictor.version if predictor is not None else ""
