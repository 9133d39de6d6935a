"""A bundle comes back as it was, and each way of being wrong is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import skops.io
from sklearn.linear_model import LinearRegression
from structlog.testing import capture_logs

from models import bundle as bundles
from models.bundle import BundleError
from models.features import NAMES, SCHEMA_HASH, Family
from models.manifest import MANIFEST, PREDICTOR, SELF_TEST
from tests.models.fitted import held_out, made, trained


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bundles.write(tmp_path / "one", made("one"))
    bundles.write(tmp_path / "other", made("other"))
    return tmp_path / "one"


def change(folder: Path, **fields: object) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(content | fields))


def refused(folder: Path) -> str:
    """The reason given; the bundle beside it must still load."""
    with pytest.raises(BundleError) as error:
        bundles.load(folder)
    assert error.value.bundle == "one"
    assert str(error.value) == f"bundle one: {error.value.reason}"
    assert bundles.load(folder.parent / "other").version == "other"
    return error.value.reason


def test_round_trip_is_equal_to_the_bit(folder: Path) -> None:
    examples = held_out()
    expected = bundles.predict(trained().models, trained().calibration, examples.rows, examples.families)
    found = bundles.load(folder).predict(examples.rows, examples.families)
    for part in ("divergence", "bound", "long_range"):
        np.testing.assert_array_equal(getattr(found, part), getattr(expected, part))


def test_predictions_are_those_of_scikit_learn(folder: Path) -> None:
    examples, models, calibration = held_out(), trained().models, trained().calibration
    found = bundles.load(folder).predict(examples.rows, examples.families)
    shift = np.array([calibration.shift(family).bound for family in examples.families])
    upper = np.exp(models.upper.predict(examples.rows) + shift)
    clear = ~examples.exact & (found.bound > found.divergence) & (found.bound > 1.01e-6)
    assert clear.sum() > 0.9 * (~examples.exact).sum()
    np.testing.assert_allclose(found.bound[clear], upper[clear], rtol=1e-12)
    states = examples.rows[:, : models.long_range.n_features_in_]
    np.testing.assert_allclose(found.long_range, models.long_range.predict_proba(states)[:, 1], rtol=1e-12)


def test_exact_rows_are_zero_and_no_bound_is_below_its_prediction(folder: Path) -> None:
    examples = held_out()
    found = bundles.load(folder).predict(examples.rows, examples.families)
    exact = np.array([family is Family.EXACT for family in examples.families])
    assert exact.any()
    assert not found.divergence[exact].any()
    assert not found.bound[exact].any()
    assert (found.divergence[~exact] > 0).all()
    assert (found.bound >= found.divergence).all()


def test_no_rows_and_wrong_rows(folder: Path) -> None:
    bundle = bundles.load(folder)
    assert bundle.predict(np.empty((0, len(NAMES))), []).bound.shape == (0,)
    with pytest.raises(ValueError, match="expected"):
        bundle.predict(np.zeros((2, len(NAMES) - 1)), [Family.WINDOW] * 2)
    with pytest.raises(ValueError, match="expected"):
        bundle.predict(np.zeros((2, len(NAMES))), [Family.WINDOW])


def test_what_it_says_of_itself(folder: Path) -> None:
    bundle = bundles.load(folder)
    assert bundle.version == "one"
    assert bundle.schema_hash == SCHEMA_HASH
    assert bundle.alpha == 0.1
    assert bundle.manifest.provenance.models == ["made-up"]
    assert bundle.calibration == trained().calibration


def test_an_unnamed_bundle_is_named_by_time_and_content(tmp_path: Path) -> None:
    files = made(None)
    assert bundles.read_manifest(files[MANIFEST], "new").version.startswith("20")
    other = {name: made("third")[name] for name in (PREDICTOR, SELF_TEST)}
    assert set(other) | {MANIFEST} == set(files)
    assert list(files)[-1] == MANIFEST


def test_a_bad_name_is_refused() -> None:
    with pytest.raises(BundleError, match="version"):
        made("../up")


def test_a_folder_that_holds_a_bundle_is_not_written(folder: Path) -> None:
    with pytest.raises(BundleError, match="holds a bundle already"):
        bundles.write(folder, made("one"))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": "one"}'])
def test_an_unreadable_manifest_is_refused(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    assert MANIFEST in refused(folder)


def test_another_format_is_refused(folder: Path) -> None:
    change(folder, format=2)
    assert refused(folder) == "format 2; this version of kvpilot reads 1"


def test_another_schema_is_refused(folder: Path) -> None:
    change(folder, schema_hash="0" * 16)
    assert refused(folder) == f"feature schema {'0' * 16}; this version of kvpilot has {SCHEMA_HASH}"


def test_the_schema_is_looked_at_before_the_models(folder: Path) -> None:
    change(folder, schema_hash="0" * 16)
    (folder / PREDICTOR).unlink()
    assert "feature schema" in refused(folder)


def test_untrusted_types_are_refused_by_name(folder: Path) -> None:
    (folder / PREDICTOR).write_bytes(skops.io.dumps({"point": shutil.copyfile}))
    assert refused(folder) == "predictor.skops holds types that are not trusted: shutil.copyfile"


def test_other_models_are_refused(folder: Path) -> None:
    linear = LinearRegression().fit([[0.0], [1.0]], [0.0, 1.0])
    (folder / PREDICTOR).write_bytes(skops.io.dumps(dict.fromkeys(("point", "upper", "long_range"), linear)))
    assert "expected point to be a HistGradientBoostingRegressor of" in refused(folder)
    (folder / PREDICTOR).write_bytes(skops.io.dumps([1, 2]))
    assert "expected the models point, upper, long_range" in refused(folder)


def test_trees_that_lead_nowhere_are_refused(folder: Path) -> None:
    parts = skops.io.loads((folder / PREDICTOR).read_bytes(), trusted=list(bundles.TRUSTED_TYPES))
    parts["upper"]._predictors[0][0].nodes["left"][0] = 1 << 30
    (folder / PREDICTOR).write_bytes(skops.io.dumps(parts))
    assert "lead out of it" in refused(folder)


@pytest.mark.parametrize("name", [PREDICTOR, SELF_TEST])
def test_truncated_and_missing_files_are_refused(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    assert name in refused(folder)
    (folder / name).unlink()
    assert name in refused(folder)


@pytest.mark.parametrize("part", ["divergence", "bound", "long_range"])
def test_a_failed_self_test_is_refused(folder: Path, part: str) -> None:
    content = json.loads((folder / SELF_TEST).read_text())
    content[part][-1] += 1e-8
    (folder / SELF_TEST).write_text(json.dumps(content))
    assert refused(folder).startswith(f"self-test failed: {part} differs by 1e-08")


def test_models_of_another_fit_fail_the_self_test(folder: Path) -> None:
    parts = skops.io.loads((folder / PREDICTOR).read_bytes(), trusted=list(bundles.TRUSTED_TYPES))
    parts["point"]._predictors = parts["point"]._predictors[:-1]
    (folder / PREDICTOR).write_bytes(skops.io.dumps(parts))
    assert refused(folder).startswith("self-test failed: divergence differs")


@pytest.mark.parametrize(("made_with", "said"), [("1.2.0", 1), (None, 0)])
def test_another_scikit_learn_is_said_and_patches_are_not(folder: Path, made_with: str | None, said: int) -> None:
    libraries = json.loads((folder / MANIFEST).read_text())["libraries"]
    minor = ".".join(libraries["scikit-learn"].split(".")[:2])
    change(folder, libraries=libraries | {"scikit-learn": made_with or f"{minor}.99"})
    with capture_logs() as logs:
        assert bundles.load(folder).version == "one"
    assert len([entry for entry in logs if entry["log_level"] == "warning"]) == said
