"""The bundle that comes with kvpilot: it loads, its data is beside it, and its figures are those it states."""

from __future__ import annotations

import json

import pytest

from models import dataset
from models.bundle import Bundle
from models.candidates import CANDIDATES
from models.dataset import Split
from models.evaluation import Evaluation, evaluate
from models.examples import Examples
from models.manifest import file_hashes
from models.registry import SHIPPED, Registry
from models.report import as_json

DATA = SHIPPED / "data"


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    version = Registry().shipped()
    assert version is not None
    return Registry().load(version)


@pytest.fixture(scope="module")
def evaluation(bundle: Bundle) -> Evaluation:
    return evaluate(bundle, dataset.read(DATA))


def test_it_was_made_of_the_data_beside_it(bundle: Bundle) -> None:
    provenance = bundle.manifest.provenance
    assert provenance.files == file_hashes(DATA)
    table = dataset.read(DATA)
    assert sum(count.rows for count in provenance.splits.values()) == table.num_rows
    assert set(provenance.pipelines) >= set(CANDIDATES)


def test_no_source_is_in_two_splits() -> None:
    table = dataset.read(DATA)
    sources = {split: set(Examples.of(dataset.only(table, split)).source.tolist()) for split in Split}
    assert all(len(found) > 10 for found in sources.values())
    assert not sources[Split.TRAIN] & sources[Split.TEST]
    assert not sources[Split.CALIBRATE] & sources[Split.TEST]


def test_the_data_cards_figures_are_what_evaluation_finds(bundle: Bundle, evaluation: Evaluation) -> None:
    """So they cannot go stale; the times in them are not compared."""
    stated = json.loads((SHIPPED / bundle.version / "evaluation.json").read_text())
    found = as_json(evaluation)
    for name in ("spearman_pooled", "spearman_within", "auc_within", "coverage", "oracle_regret"):
        assert found[name] == pytest.approx(stated[name], rel=1e-6), name
    assert found["beats"] == stated["beats"]
    assert (found["documents"], found["windows"]) == (stated["documents"], stated["windows"])


def test_its_predictions_are_worth_something(evaluation: Evaluation) -> None:
    """Far below what was measured, so that another platform's rounding does not matter; far above chance."""
    assert evaluation.ranking.spearman_pooled > 0.6
    assert evaluation.ranking.spearman_within > 0.3
    assert evaluation.ranking.auc_within > 0.65
    assert 0.8 < evaluation.coverage.overall < 0.97
    assert min(evaluation.coverage.by_family.values()) > 0.8
