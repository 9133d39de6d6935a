"""What a bundle says of itself: ``bundle.json``."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from models.calibration import Calibration, Shift
from models.features import Family

FORMAT = 1
"""Of the folder; readers refuse others."""
MANIFEST, PREDICTOR, SELF_TEST = "bundle.json", "predictor.skops", "selftest.json"
VERSION_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ShiftEntry(_Part):
    """See :class:`models.calibration.Shift`."""

    bound: float
    point: float
    windows: int = Field(ge=0)
    documents: int = Field(ge=0)

    @classmethod
    def of(cls, shift: Shift) -> ShiftEntry:
        """As written."""
        return cls(bound=shift.bound, point=shift.point, windows=shift.windows, documents=shift.documents)

    def read(self) -> Shift:
        """As used."""
        return Shift(self.bound, self.point, self.windows, self.documents)


class CalibrationTable(_Part):
    """Corrections per family; families that are not named have the pooled one."""

    alpha: float = Field(gt=0, lt=1)
    pooled: ShiftEntry
    families: dict[Family, ShiftEntry]

    @classmethod
    def of(cls, calibration: Calibration) -> CalibrationTable:
        """As written."""
        families = {family: ShiftEntry.of(shift) for family, shift in calibration.families.items()}
        return cls(alpha=calibration.alpha, pooled=ShiftEntry.of(calibration.pooled), families=families)

    def read(self) -> Calibration:
        """As used."""
        families = {family: entry.read() for family, entry in self.families.items()}
        return Calibration(self.alpha, self.pooled.read(), families)


class SplitCount(_Part):
    """Size of a split."""

    rows: int = Field(ge=0)
    documents: int = Field(ge=0)


class Provenance(_Part):
    """What it was trained on."""

    models: list[str]
    """Names of the language models whose caches were replayed."""
    files: dict[str, str]
    """SHA-256 of each dataset file, by name."""
    splits: dict[str, SplitCount]
    kinds: list[str]
    pipelines: list[str]


class Manifest(_Part):
    """All that is known of a bundle without loading its models."""

    format: int = FORMAT
    version: Annotated[str, Field(pattern=VERSION_PATTERN)]
    created: datetime
    schema_hash: str
    schema_version: int
    calibration: CalibrationTable
    provenance: Provenance
    hyperparameters: dict[str, float | int | bool]
    metrics: dict[str, float | None]
    """Of the cross-validation on the training split; None where there was too little to tell."""
    libraries: dict[str, str]
    """Versions it was made with."""
    sha256: dict[str, str]
    """Of the bundle's other files."""
    note: str = ""

    def text(self) -> str:
        """As JSON."""
        return self.model_dump_json(indent=2) + "\n"


def sha256(data: bytes) -> str:
    """Checksum of a file's content."""
    return hashlib.sha256(data).hexdigest()


def file_hashes(path: Path) -> dict[str, str]:
    """Checksums of a dataset's files, by name within its folder."""
    if not path.is_dir():
        return {path.name: sha256(path.read_bytes())}
    return {str(file.relative_to(path)): sha256(file.read_bytes()) for file in sorted(path.rglob("*.parquet"))}


def version_name(content: bytes, now: datetime | None = None) -> str:
    """``YYYYMMDD-HHMMSS-<hash8>``, UTC: sorts by time."""
    at = (now or datetime.now(UTC)).astimezone(UTC)
    return f"{at:%Y%m%d-%H%M%S}-{sha256(content)[:8]}"


def library_versions() -> dict[str, str]:
    """Of what a bundle's behaviour depends on."""
    from importlib.metadata import version

    return {name: version(name) for name in ("kvpilot", "numpy", "scikit-learn", "skops")}


def finite(values: dict[str, Any]) -> dict[str, float | None]:
    """Figures as JSON knows them: no NaN."""
    return {name: float(value) if value == value else None for name, value in values.items()}
