"""Where the controller's bundles come from: the registry, pointed at from the job store; and what audits teach them."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Sequence

import structlog

from controller.bundles import Pointers
from kvpilot.bus import Bus, Pointer, PointerMovedError
from kvpilot.v1 import job_pb2
from models import promotion
from models.features import Family
from models.online import AdaptivePredictor, OnlineCalibrator
from models.predictor import Predictor
from models.registry import Registry
from models.relearning import audits_of, measured_nats, relearn

log = structlog.get_logger()

LOG_ENTRIES = 20_000
"""Of the log of decisions, the newest so many are looked through for a bundle's audits when it is first loaded."""
MOST_AUDITS = 2_000
"""Audits that are learnt from then: bounds settle after some hundreds."""
LOG_PATIENCE_S = 3.0
"""A log that takes longer to read is done without."""
_PAGE = 200
"""Entries read at a time: taking them apart holds up the event loop for some milliseconds."""


class RegistrySource:
    """A :class:`controller.bundles.BundleSource` and a :class:`controller.guard.Calibrator`.

    While no operator has moved the active pointer, or there is no job store to hold one, the newest bundle that came
    with kvpilot is the active one. Each bundle has its bounds moved by what audits measure. At its first load it learns
    from the newest audits in the job store's log, so that a controller goes on where others, or it before a restart,
    had got to.

    Args:
        registry: the bundles.
        bus: the job store with the pointers; None: there is none.
    """

    def __init__(self, registry: Registry, bus: Bus | None) -> None:
        self._registry = registry
        self._bus = bus
        self._calibrators: dict[str, OnlineCalibrator] = {}

    async def pointers(self) -> Pointers:
        """See BundleSource."""
        if self._bus is None:
            return Pointers(active=await self._shipped())
        active, shadow = await self._bus.pointer(Pointer.ACTIVE), await self._bus.pointer(Pointer.SHADOW)
        version = (active.version or "") if active.revision else await self._shipped()
        return Pointers(active=version, shadow=shadow.version or "")

    async def changed(self) -> None:
        """See BundleSource."""
        if self._bus is None:
            await asyncio.Event().wait()  # never
            return
        moves = self._bus.pointer_moves()
        try:
            await anext(moves)
        finally:
            await moves.aclose()  # type: ignore[attr-defined]  # it is an async generator

    async def load(self, version: str) -> Predictor:
        """See BundleSource."""
        bundle = await asyncio.to_thread(self._registry.load, version)
        if version not in self._calibrators:
            taught = await self._taught(version, bundle)
            # One for all copies of a bundle: it may be active, remembered as the one before, and in the shadow.
            self._calibrators.setdefault(version, taught)
        return AdaptivePredictor(bundle, self._calibrators[version])

    async def _taught(self, version: str, bundle: Predictor) -> OnlineCalibrator:
        """A calibrator that knows what the log does; a new one if the log cannot be read."""
        calibrator = OnlineCalibrator(bundle.alpha)
        try:
            async with asyncio.timeout(LOG_PATIENCE_S):
                events = await self._logged(version)
            learnt = await asyncio.to_thread(_relearn, calibrator, bundle, events)
        except Exception as error:  # whatever it is, the bundle can be used
            told = str(error) or f"no answer within {LOG_PATIENCE_S:g} s"
            log.warning("bounds are those of the bundle: the log cannot be read", bundle=version, error=told)
            return OnlineCalibrator(bundle.alpha)
        if learnt:
            log.info("bounds learnt from the log", bundle=version, audits=learnt)
        return calibrator

    async def _logged(self, version: str) -> list[job_pb2.DecisionEvent]:
        """The newest of the log that may be a bundle's decisions or audits of them, by any controller, oldest first."""
        if self._bus is None:
            return []
        events: list[job_pb2.DecisionEvent] = []
        before = "+"
        for _ in range(LOG_ENTRIES // _PAGE):
            page = await self._bus.decisions_before(before, _PAGE)
            if not page:
                break
            before = page[-1][0]
            events += (event for _, event in page if event.HasField("measured") or event.decided.bundle == version)
        return events[::-1]

    async def rollback(self, version: str, reason: str) -> None:
        """See BundleSource."""
        if self._bus is None:
            return  # there is no pointer to move; the holder remembers as long as this process lives
        with contextlib.suppress(PointerMovedError):  # an operator was quicker
            await promotion.rollback(
                self._bus, self._registry, reason, away_from=version, or_none=True, passed_over=_passed_over
            )

    def observe(self, bundle: str, family: Family, bound: float, measured: float) -> None:
        """See Calibrator."""
        calibrator = self._calibrators.get(bundle)
        if calibrator is None or not math.isfinite(bound):
            return
        calibrator.observe(family, max(0.0, bound), measured_nats(measured))

    async def _shipped(self) -> str:
        return await asyncio.to_thread(self._registry.shipped) or ""


def _relearn(calibrator: OnlineCalibrator, bundle: Predictor, events: Sequence[job_pb2.DecisionEvent]) -> int:
    audits = audits_of(bundle.version, events)[-MOST_AUDITS:]
    relearn(calibrator, bundle, audits)
    return len(audits)


def _passed_over(version: str, error: Exception) -> None:
    log.warning("bundle passed over on the way back: it does not load", bundle=version, error=str(error))
