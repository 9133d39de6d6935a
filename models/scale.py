"""The scale on which divergences are learned and compared: log nats, floored where they no longer matter."""

from __future__ import annotations

import math

import numpy as np

from models.features import AUDIT_FLOOR, F64

FLOOR = math.log(AUDIT_FLOOR)
"""Log nats; no target and no bound lies below."""


def log_divergence(divergence: F64) -> F64:
    """Nats as log nats, floored."""
    return np.asarray(np.log(np.maximum(divergence, AUDIT_FLOOR)))
