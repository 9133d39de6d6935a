"""An evaluation's figures are those of its parts, and its report holds all that was promised."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest

from models import bundle as bundles
from models import dataset
from models.bundle import Bundle
from models.dataset import Split
from models.evaluation import Evaluation, EvaluationError, evaluate
from models.explain import ExplainError, contributions, find_row, importance
from models.features import NAMES
from models.metrics import coverage, ranking
from models.policies import LEARNED, ORACLE, STATIC
from models.report import as_json, targets, write
from tests.models.fitted import held_out, made, trained
from tests.models.synthetic import table, usual

PROMISED = (
    *("spearman_pooled", "spearman_within", "auc_within", "coverage", "coverage_by_family"),
    *("bytes_ratio_best_static", "beats", "oracle_regret", "tick_ms_256", "steering_overhead"),
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle") / "one"
    bundles.write(folder, made("one"))
    return bundles.load(folder)


@pytest.fixture(scope="module")
def found(bundle: Bundle) -> Evaluation:
    return evaluate(bundle, usual(), tick_ms=7.5)


def test_it_looks_at_the_test_split_only(bundle: Bundle, found: Evaluation) -> None:
    examples = held_out()
    assert (found.documents, found.rows) == (examples.documents, len(examples))
    prediction = bundle.predict(examples.rows, examples.families)
    assert found.ranking == ranking(examples, prediction.divergence)
    assert found.coverage == coverage(examples, prediction.bound)
    everything = evaluate(bundle, table(documents=9, seed=5), every_document=True)
    assert everything.documents == 9


def test_headline_figures_are_those_of_the_comparison(found: Evaluation) -> None:
    one = found.headline
    assert one is not None
    assert one.level == 0.03
    assert found.statics[one.pipeline] == (one.divergence, one.bytes_share[STATIC])
    within = [share for lost, share in found.statics.values() if lost <= 0.03]
    assert min(within) == one.bytes_share[STATIC]
    assert found.bytes_ratio_best_static == one.bytes_share[LEARNED] / one.bytes_share[STATIC]
    assert found.oracle_regret == pytest.approx(one.bytes_share[LEARNED] / one.bytes_share[ORACLE] - 1)
    assert found.oracle_regret is not None
    assert found.oracle_regret >= 0
    assert set(found.beats) == {"best_static", "best_static_by_kind", "attention_mass_rule", "random"}
    for name, won in found.beats.items():
        assert won == (one.bytes_share[LEARNED] < one.bytes_share[name])


def test_the_report_holds_what_was_promised(found: Evaluation, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in write(found, tmp_path / "deep" / "report")}
    assert set(files) == {
        "predicted_measured.png",
        "calibration.png",
        "pareto.png",
        "regret.png",
        "report.html",
        "report.json",
    }
    for name, content in files.items():
        if name.endswith(".png"):
            assert content.startswith(b"\x89PNG")
            assert len(content) > 10_000
    figures = json.loads(files["report.json"])
    for key in PROMISED:
        assert key in figures
    assert figures["tick_ms_256"] == 7.5
    assert figures["steering_overhead"] is None
    assert figures["spearman_within"] == found.ranking.spearman_within
    page = files["report.html"].decode()
    assert page.count("data:image/png;base64,") == 4
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing to be fetched


def test_targets_pass_and_fail_by_their_figures(found: Evaluation) -> None:
    by_name = {one.name: one for one in targets(found)}
    assert by_name["spearman_within"].passed == (found.ranking.spearman_within >= 0.7)
    assert by_name["tick_ms_256"].passed is True
    assert by_name["steering_overhead"].passed is None
    exceeded = 1 - found.coverage.overall
    assert by_name["bound exceeded"].passed == (0.08 <= exceeded <= 0.12)
    assert as_json(found)["passed"] == {one.name: one.passed for one in targets(found)}


def test_bytes_against_other_static_pipelines_are_reported(found: Evaluation) -> None:
    assert found.headline is not None
    shares = found.headline.bytes_share | {"learned": 0.1, "best_static": 0.2, "oracle": 0.05}
    other = replace(found.headline, level=0.5, divergence=0.4, pipeline="window(recent=1)", bytes_share=shares)
    (row,) = (
        one
        for one in targets(replace(found, comparisons=[found.headline, other]))
        if one.name.startswith("the same at")
    )
    assert (row.name, row.passed) == ("the same at 0.4 nats", None)
    assert row.value == "0.500 against window(recent=1), the oracle 0.250"


def test_without_a_comparison_the_report_says_why(bundle: Bundle, tmp_path: Path) -> None:
    one_pipeline = usual().filter(pc.equal(usual()["pipeline"], "window(recent=128)"))
    lonely = evaluate(bundle, one_pipeline)
    write(lonely, tmp_path)
    figures = json.loads((tmp_path / "report.json").read_text())
    assert figures["bytes_ratio_best_static"] is None
    assert figures["no_comparison"] == "1 pipelines on the device at a place: a choice takes at least two"
    assert figures["no_comparison"] in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "pareto.png").exists()


def test_nothing_to_evaluate_on_is_said(bundle: Bundle) -> None:
    exact = usual().filter(pc.equal(usual()["pipeline"], "full"))
    with pytest.raises(EvaluationError, match="no rows of lossy pipelines in its test split"):
        evaluate(bundle, exact)


def test_importance_finds_what_the_data_was_made_of(bundle: Bundle) -> None:
    found = importance(bundle, held_out(), repeats=1)
    assert [one.error for one in found] == sorted((one.error for one in found), reverse=True)
    assert {"mass_beyond", "votes_dropped", "bits"} & {one.feature for one in found[:5]}
    assert "surprise" not in {one.feature for one in found[:8]}  # noise here
    assert importance(bundle, held_out(), repeats=1) == found


def test_contributions_are_ablations(bundle: Bundle) -> None:
    examples, training = held_out(), trained().training
    row = examples.rows[np.flatnonzero(examples.evicting)[0]]
    found = contributions(bundle, row, training)
    assert found
    sizes = [abs(one.log_nats) for one in found]
    assert sizes == sorted(sizes, reverse=True)
    for one in found[:3]:
        ablated = row.copy()
        place = NAMES.index(one.feature)
        known = training.rows[training.lossy][:, place]
        ablated[place] = np.median(known[~np.isnan(known)])
        moved = bundle.models.point.predict([row])[0] - bundle.models.point.predict([ablated])[0]
        assert one.log_nats == pytest.approx(moved)
        assert one.value == row[place]


def test_rows_are_found_by_name(bundle: Bundle) -> None:
    examples = held_out()
    document, token = str(examples.document[40]), int(examples.at_token[40])
    row = find_row(examples, document, token, "int8")
    assert (examples.document[row], examples.at_token[row], examples.pipeline[row]) == (document, token, "int8")
    with pytest.raises(ExplainError, match="document 'x' is not in the dataset"):
        find_row(examples, "x", None, "int8")
    with pytest.raises(ExplainError, match="at token 1 of"):
        find_row(examples, document, 1, "int8")
    with pytest.raises(ExplainError, match="pipeline 'int9' was not measured there; measured: full"):
        find_row(examples, document, None, "int9")


def test_splits_are_by_document() -> None:
    splits = [set(dataset.only(usual(), split)["document"].to_pylist()) for split in Split]
    assert all(splits)
    assert sum(map(len, splits)) == len(set.union(*splits)) == 150
