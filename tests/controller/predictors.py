"""Predictors and bundle sources that tests are in control of."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from controller.bundles import Pointers
from models.features import NAMES, SCHEMA_HASH, Family
from models.predictor import Prediction

LOSSES: Mapping[Family, float] = {
    Family.EXACT: 0.0,
    Family.QUANTISE: 0.004,
    Family.WINDOW: 0.02,
    Family.SCORED: 0.02,
    Family.WINDOW_QUANTISE: 0.03,
    Family.SCORED_QUANTISE: 0.03,
    Family.OTHER: 1.0,
}
_BITS, _KEPT, _SEEN = NAMES.index("bits"), NAMES.index("kept_share"), NAMES.index("log2_seen")
_TURBO = NAMES.index("has_turboquant")


@dataclass
class FakePredictor:
    """Divergence by family, more where fewer bits or tokens are kept, and of one codec; the bound is twice that, times
    ``caution``.

    Its long-range need is a hundredth of the logarithm of a request's tokens.
    """

    version: str = "v1"
    schema_hash: str = SCHEMA_HASH
    alpha: float = 0.1
    caution: float = 1.0
    losses: Mapping[Family, float] = field(default_factory=lambda: dict(LOSSES))
    calls: list[int] = field(default_factory=list)

    def predict(self, rows: np.ndarray, families: Sequence[Family]) -> Prediction:
        assert len(rows) == len(families)
        self.calls.append(len(rows))
        base = np.array([self.losses[family] for family in families])
        codes = (4 / np.maximum(4, rows[:, _BITS])) ** 2 * np.where(rows[:, _TURBO], 6, 1)
        divergence = base * codes + 0.02 * (1 - rows[:, _KEPT])
        divergence = np.where(base > 0, divergence, 0.0)
        return Prediction(divergence, 2 * self.caution * divergence, rows[:, _SEEN] / 100)


@dataclass
class Holding:
    """A holder of one predictor."""

    active: FakePredictor | None = field(default_factory=FakePredictor)


class FakeSource:
    """A bundle source in a test's hands: ``store`` holds what can be loaded, an exception for what cannot."""

    def __init__(self, active: str = "", shadow: str = "", **store: FakePredictor | Exception) -> None:
        self.wanted = Pointers(active, shadow)
        self.store: dict[str, FakePredictor | Exception] = dict(store)
        self.loads: list[str] = []
        self.rollbacks: list[tuple[str, str]] = []
        self.reads = 0
        self.reachable = True
        self.gate = asyncio.Event()
        self.gate.set()
        self.wake = asyncio.Event()

    def point(self, active: str = "", shadow: str = "", wake: bool = True) -> None:
        self.wanted = Pointers(active, shadow)
        if wake:
            self.wake.set()

    async def pointers(self) -> Pointers:
        self.reads += 1
        if not self.reachable:
            raise OSError("no route")
        return self.wanted

    async def changed(self) -> None:
        await self.wake.wait()
        self.wake.clear()

    async def load(self, version: str) -> FakePredictor:
        self.loads.append(version)
        async with asyncio.timeout(10):
            await self.gate.wait()
        found = self.store.get(version, FileNotFoundError(f"no bundle {version}"))
        if isinstance(found, Exception):
            raise found
        return found

    async def rollback(self, version: str, reason: str) -> None:
        if not self.reachable:
            raise OSError("no route")
        self.rollbacks.append((version, reason))
