"""A bundle: a predictor on disk that is read without running code from it, and answers as it did when it was made.

A folder of three files: ``predictor.skops`` (the scikit-learn models), ``bundle.json`` (:mod:`models.manifest`) and
``selftest.json`` (rows, and what was predicted for them).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from pydantic import ValidationError
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

from models.calibration import Calibration
from models.features import F64, NAMES, SCHEMA_HASH, SCHEMA_VERSION, Family
from models.forest import STATE_FEATURES, Models
from models.manifest import (
    FORMAT,
    MANIFEST,
    PREDICTOR,
    SELF_TEST,
    CalibrationTable,
    Manifest,
    Provenance,
    finite,
    library_versions,
    sha256,
    version_name,
)
from models.predictor import Prediction
from models.safe_io import dumps, get_untrusted_types, loads
from models.scale import FLOOR

log = structlog.get_logger(__name__)

TRUSTED_TYPES = ("sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",)
"""Types that a bundle may hold beyond those that skops trusts itself. skops leaves this one out because scikit-learn
follows the trees' indices unchecked: :mod:`models.trees` checks each of them before any is followed."""
SELF_TEST_ROWS = 48
TOLERANCE = 1e-9
"""Most that an answer to the self-test may differ by, nats or probability."""
_CEILING = 50.0
"""Log nats, to stay finite."""
_PARTS = {
    "point": (HistGradientBoostingRegressor, len(NAMES)),
    "upper": (HistGradientBoostingRegressor, len(NAMES)),
    "long_range": (HistGradientBoostingClassifier, STATE_FEATURES),
}
_CODES = {family.value: code for code, family in enumerate(Family)}
_WORD = attrgetter("_value_")


class BundleError(Exception):
    """A bundle that must not be used: which one, and why."""

    def __init__(self, bundle: str, reason: str) -> None:
        super().__init__(f"bundle {bundle}: {reason}")
        self.bundle = bundle
        self.reason = reason


@dataclass(frozen=True)
class Bundle:
    """A calibrated predictor with its provenance; a :class:`models.predictor.Predictor`."""

    manifest: Manifest
    models: Models
    calibration: Calibration

    @property
    def version(self) -> str:
        """Its name."""
        return self.manifest.version

    @property
    def schema_hash(self) -> str:
        """Feature schema it was trained on."""
        return self.manifest.schema_hash

    @property
    def alpha(self) -> float:
        """Share of windows that may exceed their bound."""
        return self.calibration.alpha

    def predict(self, rows: F64, families: Sequence[Family]) -> Prediction:
        """See :class:`models.predictor.Predictor`. No bound is below its prediction.

        Raises:
            ValueError: rows of another shape, or not as many families as rows.
        """
        return predict(self.models, self.calibration, rows, families)


def predict(models: Models, calibration: Calibration, rows: F64, families: Sequence[Family]) -> Prediction:
    """What calibrated models say of rows [N, features].

    Raises:
        ValueError: rows of another shape, or not as many families as rows.
    """
    if rows.ndim != 2 or rows.shape[1] != len(NAMES) or len(families) != len(rows):
        raise ValueError(f"rows {rows.shape} of {len(families)} families: expected [N, {len(NAMES)}] of N")
    answer = models.answer(rows)
    code = np.fromiter(map(_CODES.__getitem__, map(_WORD, families)), np.intp, len(families))
    shifts = [calibration.shift(family) for family in Family]
    point = answer.point + np.array([shift.point for shift in shifts])[code]
    upper = answer.upper + np.array([shift.bound for shift in shifts])[code]
    lossy = code != _CODES[Family.EXACT.value]
    return Prediction(
        divergence=np.where(lossy, np.exp(np.minimum(point, _CEILING)), 0.0),
        bound=np.where(lossy, np.exp(np.clip(np.maximum(upper, point), FLOOR, _CEILING)), 0.0),
        long_range=answer.long_range,
    )


def make(
    models: Models,
    calibration: Calibration,
    provenance: Provenance,
    rows: F64,
    families: Sequence[Family],
    *,
    hyperparameters: Mapping[str, Any],
    metrics: Mapping[str, float],
    version: str | None = None,
    note: str = "",
    created: datetime | None = None,
) -> dict[str, bytes]:
    """The files of a new bundle by name, the manifest last.

    Args:
        models: fitted.
        calibration: of these models.
        provenance: what they were fitted on.
        rows: [N, features] to take the self-test from.
        families: [N]
        hyperparameters: by name.
        metrics: by name; NaN for unknown.
        version: its name, at most 64 letters, digits and ``._-``; by default time and content.
        note: a line for people.
        created: the time it is to bear; by default now.

    Raises:
        BundleError: the version is no name.
    """
    at = created or datetime.now(UTC)
    predictor = dumps({name: getattr(models, name) for name in _PARTS})
    table = CalibrationTable.of(calibration)
    self_test = _make_self_test(models, calibration, rows, families)
    version = version or version_name(predictor + table.model_dump_json().encode(), at)
    try:
        manifest = Manifest(
            version=version,
            created=at,
            schema_hash=SCHEMA_HASH,
            schema_version=SCHEMA_VERSION,
            calibration=table,
            provenance=provenance,
            hyperparameters=dict(hyperparameters),
            metrics=finite(dict(metrics)),
            libraries=library_versions(),
            sha256={PREDICTOR: sha256(predictor), SELF_TEST: sha256(self_test)},
            note=note,
        )
    except ValidationError as error:
        raise BundleError(version, _first_problem(error)) from None
    return {PREDICTOR: predictor, SELF_TEST: self_test, MANIFEST: manifest.text().encode()}


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes a new bundle's files.

    Raises:
        BundleError: there is a bundle in the folder.
    """
    if (folder / MANIFEST).exists():
        raise BundleError(folder.name, f"{folder} holds a bundle already")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def load(folder: Path) -> Bundle:
    """Reads a bundle and checks it: manifest, feature schema, types, then its self-test.

    Raises:
        BundleError: at the first check that fails, named by its version or, before that is known, by its folder.
    """
    manifest = read_manifest(_read(folder.name, folder / MANIFEST), folder.name)
    name = manifest.version
    if manifest.schema_hash != SCHEMA_HASH:
        raise BundleError(name, f"feature schema {manifest.schema_hash}; this version of kvpilot has {SCHEMA_HASH}")
    _note_libraries(manifest)
    models = _load_models(name, _read(name, folder / PREDICTOR))
    bundle = Bundle(manifest, models, manifest.calibration.read())
    _self_test(bundle, _read(name, folder / SELF_TEST))
    return bundle


def read_manifest(text: bytes, name: str) -> Manifest:
    """Reads ``bundle.json``; ``name`` stands for the bundle in errors.

    Raises:
        BundleError: it is none, or of another format.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise BundleError(name, f"{MANIFEST} is not JSON: {error}") from None
    if isinstance(found, dict) and found.get("format", FORMAT) != FORMAT:
        raise BundleError(name, f"format {found['format']!r}; this version of kvpilot reads {FORMAT}")
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        raise BundleError(name, _first_problem(error)) from None


def _read(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BundleError(name, f"{path}: {error.strerror}") from None


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    return f"{MANIFEST}, {'.'.join(str(part) for part in problem['loc']) or 'content'}: {problem['msg']}"


def _note_libraries(manifest: Manifest) -> None:
    made, here = manifest.libraries.get("scikit-learn", ""), library_versions()["scikit-learn"]
    if made.split(".")[:2] != here.split(".")[:2]:
        log.warning("bundle made with another scikit-learn", bundle=manifest.version, made_with=made, here=here)


def _load_models(name: str, data: bytes) -> Models:
    # A file that may be anything: whatever reading it raises means that it is no predictor.
    try:
        untrusted = sorted(set(get_untrusted_types(data=data)) - set(TRUSTED_TYPES))
    except Exception as error:
        raise BundleError(name, f"{PREDICTOR} cannot be read: {error}") from None
    if untrusted:
        raise BundleError(name, f"{PREDICTOR} holds types that are not trusted: {', '.join(untrusted)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # another version of scikit-learn: said above, and the self-test decides
            parts = loads(data, trusted=list(TRUSTED_TYPES))
    except Exception as error:
        raise BundleError(name, f"{PREDICTOR} cannot be read: {type(error).__name__}: {error}") from None
    if not isinstance(parts, dict) or set(parts) != set(_PARTS):
        raise BundleError(name, f"{PREDICTOR}: expected the models {', '.join(_PARTS)}")
    for part, (kind, features) in _PARTS.items():
        if type(parts[part]) is not kind or getattr(parts[part], "n_features_in_", None) != features:
            raise BundleError(name, f"{PREDICTOR}: expected {part} to be a {kind.__name__} of {features} features")
    models = Models(**parts)
    try:
        models.prepare()
    except Exception as error:
        raise BundleError(name, f"{PREDICTOR}: {type(error).__name__}: {error}") from None
    return models


def _make_self_test(models: Models, calibration: Calibration, rows: F64, families: Sequence[Family]) -> bytes:
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), SELF_TEST_ROWS)).round().astype(int))
    tested, of = rows[chosen], [families[row] for row in chosen]
    expected = predict(models, calibration, tested, of)
    content = {
        "rows": [[value if value == value else None for value in row] for row in tested.tolist()],
        "families": [family.value for family in of],
        "divergence": expected.divergence.tolist(),
        "bound": expected.bound.tolist(),
        "long_range": expected.long_range.tolist(),
    }
    return (json.dumps(content, allow_nan=False) + "\n").encode()


def _self_test(bundle: Bundle, text: bytes) -> None:
    name = bundle.version
    try:
        content = json.loads(text)
        rows = np.array(content["rows"], np.float64)  # null becomes NaN
        families = [Family(word) for word in content["families"]]
        expected = {part: np.array(content[part], np.float64) for part in ("divergence", "bound", "long_range")}
        answer = bundle.predict(rows, families)
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(name, f"{SELF_TEST} cannot be used: {type(error).__name__}: {error}") from None
    if not len(rows):
        raise BundleError(name, f"{SELF_TEST} tests nothing")
    for part, wanted in expected.items():
        given = getattr(answer, part)
        apart = np.abs(given - wanted).max() if wanted.shape == given.shape else np.inf
        if not apart <= TOLERANCE:
            raise BundleError(name, f"self-test failed: {part} differs by {apart:.3g} from what it was when made")
