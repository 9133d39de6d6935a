"""How good a bundle is on documents that it has not seen: ranks, coverage, policies, and the time of a tick."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from models import dataset
from models.bundle import Bundle
from models.dataset import Split
from models.examples import Examples
from models.features import F64, NAMES, Family, FeatureBuilder
from models.footprint import I64
from models.forest import STATE_FEATURES
from models.metrics import Coverage, Ranking, coverage, ranking
from models.policies import (
    HEADLINE_NATS,
    LEARNED,
    LEVELS_NATS,
    ORACLE,
    STATIC,
    Comparison,
    Front,
    Places,
    PolicyError,
    compare,
    fronts,
)
from models.predictor import Prediction, Predictor

Choose = Callable[[F64, F64, F64], object]
"""A planner's choice from predicted divergence, bound and device bytes, [requests, candidates] each."""
TICK_REQUESTS, TICK_CANDIDATES = 256, 16


class EvaluationError(ValueError):
    """There is nothing to evaluate on; says why."""


@dataclass(frozen=True)
class Evaluation:
    """All that a report shows. NaN and None mean: too little was measured to tell."""

    bundle: str
    alpha: float
    documents: int
    windows: int
    rows: int
    examples: Examples
    prediction: Prediction
    ranking: Ranking
    coverage: Coverage
    fronts: dict[str, Front]
    statics: dict[str, tuple[float, float]]
    """Mean divergence and bytes share of each static pipeline."""
    comparisons: list[Comparison]
    no_comparison: str
    """Why there is none."""
    tick_ms: float | None
    steering_overhead: float | None
    """Share of tokens per second that steering costs, as measured by a paired run elsewhere."""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def headline(self) -> Comparison | None:
        """The comparison at the mixed scenario's bound."""
        return next((one for one in self.comparisons if one.level == HEADLINE_NATS), None)

    @property
    def bytes_ratio_best_static(self) -> float | None:
        """Bytes of the learned policy over those of the best static pipeline, at equal mean divergence."""
        return known(self.headline.ratio(LEARNED, STATIC)) if self.headline else None

    @property
    def oracle_regret(self) -> float | None:
        """Bytes of the learned policy above the oracle's, as a share of these."""
        return known(self.headline.ratio(LEARNED, ORACLE) - 1) if self.headline else None

    @property
    def beats(self) -> dict[str, bool]:
        """Whether the learned policy takes fewer bytes than each baseline, at equal mean divergence."""
        if not self.headline:
            return {}
        shares = self.headline.bytes_share
        return {
            name: bool(shares[LEARNED] < shares[name])
            for name in self.fronts
            if name != ORACLE and not name.startswith(LEARNED)
        }


def evaluate(
    bundle: Bundle,
    table: pa.Table,
    *,
    every_document: bool = False,
    tick_ms: float | None = None,
    steering_overhead: float | None = None,
) -> Evaluation:
    """Evaluates on a dataset's test split.

    Args:
        bundle: what is judged.
        table: a dataset.
        every_document: on all of it: right only for documents that the bundle was not trained or calibrated on.
        tick_ms: see :func:`measure_tick`.
        steering_overhead: measured elsewhere.

    Raises:
        EvaluationError: no rows of lossy pipelines.
    """
    examples = Examples.of(table if every_document else dataset.only(table, Split.TEST))
    if not examples.lossy.any():
        where = "the dataset" if every_document else "its test split"
        raise EvaluationError(f"no rows of lossy pipelines in {where} ({examples.documents} documents)")
    prediction = bundle.predict(examples.rows, examples.families)
    found: dict[str, Front] = {}
    statics: dict[str, tuple[float, float]] = {}
    comparisons: list[Comparison] = []
    no_comparison = ""
    try:
        places = Places.of(examples, prediction)
        found = fronts(places)
        statics = places.statics()
        comparisons = [one for level in LEVELS_NATS if (one := compare(places, found, level))]
    except PolicyError as error:
        no_comparison = str(error)
    return Evaluation(
        bundle=bundle.version,
        alpha=bundle.alpha,
        documents=examples.documents,
        windows=examples.windows,
        rows=len(examples),
        examples=examples,
        prediction=prediction,
        ranking=ranking(examples, prediction.divergence),
        coverage=coverage(examples, prediction.bound),
        fronts=found,
        statics=statics,
        comparisons=comparisons,
        no_comparison=no_comparison,
        tick_ms=tick_ms,
        steering_overhead=steering_overhead,
        versions=dict(bundle.manifest.libraries),
    )


def measure_tick(
    predictor: Predictor, builder: FeatureBuilder, pipelines: list[str], states: F64, choose: Choose, rounds: int = 21
) -> float:
    """Median milliseconds of a tick on one core: features, prediction and choice of 256 requests, 16 candidates each.

    Args:
        predictor: the bundle.
        builder: of a worker's model.
        pipelines: candidates; as many as there are, repeated up to 16.
        states: [any, request and signal features], repeated up to 256.
        choose: the planner's choice.
        rounds: ticks that are timed, after one that is not.
    """
    from threadpoolctl import threadpool_limits

    candidates = [pipelines[place % len(pipelines)] for place in range(TICK_CANDIDATES)]
    states = np.resize(states[:, :STATE_FEATURES], (TICK_REQUESTS, STATE_FEATURES))
    states[:, NAMES.index("generated_share")] = np.linspace(0, 1, TICK_REQUESTS)  # no two requests are the same
    seen: I64 = np.exp2(np.nan_to_num(states[:, NAMES.index("log2_seen")], nan=10.0)).round().astype(np.int64)
    times = []
    with threadpool_limits(1):
        for _ in range(rounds + 1):
            start = time.perf_counter()
            described = [builder.describe(pipeline, seen) for pipeline in candidates]
            rows = builder.matrix(states, seen, candidates)
            families: list[Family] = [one.family for one in described] * TICK_REQUESTS
            prediction = predictor.predict(rows.reshape(-1, rows.shape[-1]), families)
            shape = (TICK_REQUESTS, TICK_CANDIDATES)
            device_bytes = np.stack([one.device_bytes for one in described], axis=1)
            choose(prediction.divergence.reshape(shape), prediction.bound.reshape(shape), device_bytes)
            times.append((time.perf_counter() - start) * 1e3)
    return float(np.median(times[1:]))


def choose_densest(divergence: F64, bound: F64, device_bytes: F64, limit: float = HEADLINE_NATS) -> object:
    """The simplest choice: fewest bytes within a bound."""
    return np.argmin(np.where(bound <= limit, device_bytes, np.inf), axis=1)


def known(value: float) -> float | None:
    """None for NaN, as JSON wants it."""
    return None if math.isnan(value) else value
