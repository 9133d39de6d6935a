"""A dataset's folder: a Parquet file per document, and ``manifest.json``, which says what is in it and from where.

A file's name ends with the digest of all its results depend on, so that what is there already is known by its name.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from models import dataset
from models.collect.plan import Asked, Plan, file_stem
from models.features import SCHEMA_HASH

MANIFEST = "manifest.json"
_DIGEST_CHARACTERS = 16


class FolderError(ValueError):
    """A folder that cannot be collected into; says why."""


@dataclass(frozen=True)
class Failure:
    """A document that could not be measured.

    Attributes:
        reason: why, the last time.
        attempts: how often it was tried.
    """

    reason: str
    attempts: int


class Folder:
    """Where a run's results go.

    Raises:
        FolderError: it holds the results of another model or feature schema.
    """

    def __init__(self, path: Path, asked: Asked) -> None:
        self.path = path
        self.failures: dict[str, Failure] = {}
        self._asked = asked
        self._read_manifest()

    def _read_manifest(self) -> None:
        file = self.path / MANIFEST
        if not file.is_file():
            return
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
            found = {"model": manifest["model"], "feature_schema_hash": manifest["feature_schema_hash"]}
            self.failures = {name: Failure(**failure) for name, failure in manifest["failed"].items()}
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise FolderError(f"{file}: cannot be read ({error!r}); remove it, or choose another folder") from None
        expected = {"model": self._asked.model, "feature_schema_hash": SCHEMA_HASH}
        for name, value in expected.items():
            if found[name] != value:
                raise FolderError(
                    f"{self.path}: holds data of {name} {found[name]!r}, not {value!r}; choose another folder"
                )

    def file(self, plan: Plan) -> Path:
        """The file of a document's results."""
        return self.path / f"{file_stem(plan.document)}.{plan.digest(self._asked)[:_DIGEST_CHARACTERS]}.parquet"

    def has(self, plan: Plan) -> bool:
        """Whether these very results are there."""
        return self.file(plan).is_file()

    def key(self, plan: Plan, replay: int) -> str:
        """Idempotency key of a replay; another one after each failure, since the old one names the failed job."""
        failure = self.failures.get(plan.document)
        return f"collect-{plan.digest(self._asked)[:40]}-{replay}-{failure.attempts if failure else 0}"

    def write(self, plan: Plan, rows: Iterable[dict[str, Any]]) -> None:
        """Writes a document's results, whole or not at all, in place of older ones of the same document."""
        target = self.file(plan)
        dataset.write(target, rows)
        for older in self.path.glob(f"{file_stem(plan.document)}.*.parquet"):
            if older != target:
                older.unlink()
        self.failures.pop(plan.document, None)

    def write_served(self, document: str, rows: Iterable[dict[str, Any]]) -> None:
        """Writes rows that were not replayed, whole or not at all, in place of older ones of the same document."""
        dataset.write(self.path / f"{file_stem(document)}.served.parquet", rows)

    def fail(self, plan: Plan, reason: str) -> None:
        """Keeps that a document could not be measured."""
        before = self.failures.get(plan.document)
        self.failures[plan.document] = Failure(reason, before.attempts + 1 if before else 1)

    def write_manifest(self, options: Mapping[str, object], skipped: Mapping[str, int]) -> None:
        """Writes what the folder holds now, and how the last run was called."""
        documents: Counter[tuple[str, str]] = Counter()
        rows: Counter[tuple[str, str]] = Counter()
        for file in sorted(self.path.glob("*.parquet")):
            table = pq.read_table(file, columns=["document", "kind"])
            if table.num_rows:
                name, kind = table["document"][0].as_py(), table["kind"][0].as_py()
                group = (kind, dataset.split_of(name).value)
                documents[group] += 1
                rows[group] += table.num_rows
        content = {
            "model": self._asked.model,
            "feature_schema_hash": SCHEMA_HASH,
            "candidates": list(self._asked.pipelines),
            "horizon_tokens": self._asked.horizon_tokens,
            "options": dict(options),
            "documents": _nested(documents),
            "rows": _nested(rows),
            "skipped": dict(skipped),
            "failed": {name: asdict(failure) for name, failure in sorted(self.failures.items())},
        }
        self.path.mkdir(parents=True, exist_ok=True)
        part = self.path / f".{MANIFEST}.part"
        part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(part, self.path / MANIFEST)


def _nested(counts: Mapping[tuple[str, str], int]) -> dict[str, dict[str, int]]:
    """By kind, then by split."""
    nested: dict[str, dict[str, int]] = {}
    for (kind, split), count in sorted(counts.items()):
        nested.setdefault(kind, {})[split] = count
    return nested
