"""Where the controller's bundles come from: the registry, pointed at from the job store; and what audits teach them."""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys

import structlog

from controller.bundles import Pointers
from kvpilot.bus import Bus, Pointer, PointerMovedError
from models import promotion
from models.features import Family
from models.online import AdaptivePredictor, OnlineCalibrator
from models.predictor import Predictor
from models.registry import Registry

log = structlog.get_logger()


class RegistrySource:
    """A :class:`controller.bundles.BundleSource` and a :class:`controller.guard.Calibrator`.

    While no operator has moved the active pointer, or there is no job store to hold one, the newest bundle that came
    with kvpilot is the active one. Each bundle has its bounds moved by what audits measure, from its first load on.

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

    def load(self, version: str) -> Predictor:
        """See BundleSource."""
        bundle = self._registry.load(version)
        # One for all copies of a bundle: it may be active, remembered as the one before, and in the shadow.
        calibrator = self._calibrators.setdefault(version, OnlineCalibrator(bundle.alpha))
        return AdaptivePredictor(bundle, calibrator)

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
        # As the guard sees it: what is no number is above every bound. A distribution may rule out what came.
        lost = max(0.0, measured) if math.isfinite(measured) else sys.float_info.max
        calibrator.observe(family, max(0.0, bound), lost)

    async def _shipped(self) -> str:
        return await asyncio.to_thread(self._registry.shipped) or ""


def _passed_over(version: str, error: Exception) -> None:
    log.warning("bundle passed over on the way back: it does not load", bundle=version, error=str(error))
