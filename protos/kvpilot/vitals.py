"""The metrics that every kvpilot process has: what it is, and how it fares with the job store."""

from __future__ import annotations

from importlib.metadata import version

from kvpilot import metrics
from kvpilot.bus.connection import STORE_COUNTS
from kvpilot.exposition import Instruments


def show_vitals(instruments: Instruments, kind: str, process: str) -> None:
    """Shows them for a process of this kind, ``controller`` or ``worker``, and name."""
    instruments.gauge(metrics.BUILD_INFO).labels(version("kvpilot"), kind, process).set(1)
    instruments.show(metrics.STORE_CONNECTS, lambda: [((), STORE_COUNTS.connects)])
    instruments.show(
        metrics.STORE_ERRORS,
        lambda: [(("unavailable",), STORE_COUNTS.unavailable), (("refused",), STORE_COUNTS.refused)],
    )
