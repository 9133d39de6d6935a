"""How good a bundle is on documents that it has not seen: ranks, coverage, policies, and the time of a tick."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pyarrow as pa

from models import dataset
from models.bundle import Bundle
from models.dataset import Split
from models.examples import Examples
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
from models.predictor import Prediction


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
        tick_ms: of the planner with this bundle, measured elsewhere.
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


def known(value: float) -> float | None:
    """None for NaN, as JSON wants it."""
    return None if math.isnan(value) else value
