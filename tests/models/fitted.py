"""A small predictor that tests share, fitted once."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache

from models import bundle as bundles
from models import dataset
from models.dataset import Split
from models.examples import Examples
from models.fitting import Hyperparameters
from models.manifest import Provenance
from models.training import Trained, train
from tests.models.synthetic import usual

SMALL = Hyperparameters(trees=12, upper_trees=10, long_range_trees=6, leaves=9, depth=4, learning_rate=0.3)


@cache
def trained() -> Trained:
    return train(usual(), SMALL, folds=2)


@cache
def held_out() -> Examples:
    return Examples.of(dataset.only(usual(), Split.TEST))


@cache
def made(version: str | None) -> dict[str, bytes]:
    """The files of a bundle."""
    rows = trained().calibrating
    return bundles.make(
        trained().models,
        trained().calibration,
        Provenance(models=["made-up"], files={}, splits={}, kinds=[], pipelines=[]),
        rows.rows,
        rows.families,
        hyperparameters=asdict(trained().hyperparameters),
        metrics={"spearman_within": trained().validation.ranking.spearman_within, "nothing": float("nan")},
        version=version,
    )
