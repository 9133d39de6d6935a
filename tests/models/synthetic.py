"""Replays that never happened: a dataset as `kvpilot models collect` writes it, with divergence by a known rule."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from models import dataset
from models.features import DEPTHS, HORIZONS_TOKENS, NAMES, REQUEST_FEATURES, SIGNAL_FEATURES, FeatureBuilder
from models.footprint import CacheLayout
from tests.controller.scripted import CATALOG

LAYOUT = CacheLayout.of(30, 3, 64, "bfloat16")
BUILDER = FeatureBuilder(CATALOG, LAYOUT, HORIZONS_TOKENS)
KINDS = ("prose", "code", "chat")
PIPELINES = (
    "full",
    "host(recent=256)",
    "int8",
    "kivi(bits=4)",
    "kivi(bits=2)",
    "window(recent=128)",
    "window(recent=256)",
    "window(recent=512)",
    "h2o(keep=0.25)",
    "h2o(keep=0.5)",
    "snapkv(keep=0.25)",
    "snapkv(keep=0.5)",
    "window(recent=256) | kivi(bits=4)",
    "window(recent=512) | kivi(bits=4)",
    "snapkv(keep=0.25) | kivi(bits=4)",
    "snapkv(keep=0.5) | kivi(bits=4)",
)
STATE_NAMES = [feature.name for feature in (*REQUEST_FEATURES, *SIGNAL_FEATURES)]
_ROUNDING = {16.0: -np.inf, 8.0: np.log(5e-5), 4.0: np.log(0.004), 2.0: np.log(0.05)}
"""Log nats that bits alone cost."""


def states(windows: int, far: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """State rows [windows, request and signal features] and tokens seen [windows]; ``far`` moves attention back."""
    random = np.random.default_rng(seed)
    seen = random.integers(300, 3000, windows)
    out = random.uniform(0, 1, (windows, len(STATE_NAMES)))
    columns = {name: place for place, name in enumerate(STATE_NAMES)}
    out[:, columns["log2_seen"]] = np.log2(seen)
    reach = far + 0.3 * random.standard_normal(windows)
    for horizon in HORIZONS_TOKENS:
        mass = 1 / (1 + np.exp(-(reach + 1.0 - 0.7 * np.log2(horizon / 32))))
        for which in ("", "_max", "_last", "_layer", *(f"_depth{depth}" for depth in range(DEPTHS))):
            out[:, columns[f"far_mass{which}_{horizon}"]] = mass * random.uniform(0.9, 1.0, windows)
    missed_by_depth = [f"missed_votes_depth{depth}" for depth in range(DEPTHS)]
    spread = 1 / (1 + np.exp(-(far - 1 + 0.3 * random.standard_normal(windows))))
    for percent, dropped in ((12, 0.8), (25, 0.4), (50, 0.2), (75, 0.1)):
        for signal in ("dropped_votes", "dropped_votes_max", "missed_votes", "missed_votes_max", *missed_by_depth):
            out[:, columns[f"{signal}_{percent}"]] = spread * dropped * random.uniform(0.9, 1.0, windows)
    out[:, columns["audited_log_divergence"]] = np.nan
    return out, seen


def table(documents: int = 60, windows: int = 3, noise: float = 0.5, seed: int = 0) -> pa.Table:
    """A dataset of ``documents * windows`` places with all of :data:`PIPELINES` at each."""
    random = np.random.default_rng(seed)
    of_document = np.repeat(random.standard_normal(documents), windows)
    places = documents * windows
    rows, seen = states(places, of_document, seed + 1)
    matrix = BUILDER.matrix(rows, seen, PIPELINES).astype(np.float32).astype(np.float64)
    luck = noise * random.standard_normal((places, len(PIPELINES)))
    column = {name: matrix[:, :, place] for place, name in enumerate(NAMES)}
    evicted = np.where(
        column["log2_dropped"] > 0,
        np.log(1e-3 + 0.3 * column["mass_beyond"] ** 2 + 0.5 * column["votes_dropped"]),
        -np.inf,
    )
    rounded = np.where(column["coded_share"] > 0, np.vectorize(_ROUNDING.__getitem__)(column["bits"]), -np.inf)
    divergence = np.exp(np.logaddexp(evicted, rounded + 0.5 * of_document[:, None]) + luck)
    full = BUILDER.describe("full", seen).device_bytes
    found = []
    for place in range(places):
        for number, pipeline in enumerate(PIPELINES):
            described = BUILDER.describe(pipeline, seen[place : place + 1])
            device, lower = float(described.device_bytes[0]), float(described.lower_tier_bytes[0])
            lost = float(divergence[place, number])
            found.append(
                {
                    "document": f"doc-{seed}-{place // windows:04}",
                    "kind": KINDS[place // windows % len(KINDS)],
                    "model": "made-up",
                    "pipeline": pipeline,
                    "family": described.family.value,
                    "measured_under": "full",
                    "at_token": int(seen[place]),
                    **dict(zip(NAMES, matrix[place, number].tolist(), strict=True)),
                    "divergence": lost,
                    "divergence_max": 3 * lost,
                    "top1_agreement": 1 - min(1.0, lost),
                    "loss": 2 + lost,
                    "full_loss": 2.0,
                    "device_bytes": device,
                    "host_bytes": 0.0,
                    "shadow_bytes": lower,
                    "full_cache_bytes": float(full[place]),
                    "device_bytes_16bit": device,
                    "full_cache_bytes_16bit": float(full[place]),
                    "conversion_ms": 1.0,
                    "step_ms": 10.0,
                }
            )
    return pa.Table.from_pylist(found, schema=dataset.SCHEMA)


@cache
def usual() -> pa.Table:
    """One dataset that tests share."""
    return table(documents=150)


def write(folder: Path, content: pa.Table) -> Path:
    """Puts a dataset into a folder of its own."""
    path = folder / "replays.parquet"
    dataset.write(path, content.to_pylist())
    return path
