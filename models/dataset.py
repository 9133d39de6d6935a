"""Replayed windows on disk: one row per place in a text and candidate pipeline, as Parquet.

Columns: what was replayed (:data:`KEYS`), the features of :mod:`models.features` by name, and what was measured
(:data:`MEASURES`). The file's metadata names the feature schema; files of another schema are refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from enum import Enum
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from models.features import F64, NAMES, SCHEMA_HASH

KEYS = ("document", "kind", "model", "pipeline", "family", "measured_under")
"""Text columns: the document's name (see :func:`source_of`), its kind (``prose``, ``code``, ``chat``, a task)."""
MEASURES = (
    "divergence",
    "divergence_max",
    "top1_agreement",
    "loss",
    "full_loss",
    "device_bytes",
    "host_bytes",
    "shadow_bytes",
    "full_cache_bytes",
    "device_bytes_16bit",
    "full_cache_bytes_16bit",
    "conversion_ms",
    "step_ms",
)
"""float64 columns, named and meant as in ``ReplayedPipeline`` and ``CacheBytes``."""
SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in KEYS),
        pa.field("at_token", pa.int32()),
        *(pa.field(name, pa.float32()) for name in NAMES),
        *(pa.field(name, pa.float64()) for name in MEASURES),
    ],
    metadata={"feature_schema_hash": SCHEMA_HASH},
)


class DatasetError(ValueError):
    """A file that is no dataset of this schema; says which file and why."""


class Split(Enum):
    """What a document is for. All windows of a document are in one split."""

    TRAIN = "train"
    CALIBRATE = "calibrate"
    TEST = "test"


def source_of(document: str) -> str:
    """The document that another one was made of: ``<source>#<what>`` is made of ``<source>``'s text.

    What shares a source shares text: it belongs to one split, and to one group of a cross-validation.
    """
    return document.partition("#")[0]


def split_of(document: str) -> Split:
    """60 % train, 20 % calibrate, 20 % test, by the name of the document's source alone."""
    place = int.from_bytes(hashlib.sha256(source_of(document).encode()).digest()[:4], "big") / 2**32
    return Split.TRAIN if place < 0.6 else Split.CALIBRATE if place < 0.8 else Split.TEST


def write(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """Writes a dataset file, whole or not at all.

    Raises:
        DatasetError: a row lacks a column.
    """
    content = list(rows)
    for number, row in enumerate(content):  # pyarrow would write nulls for what is not there
        if missing := [name for name in SCHEMA.names if name not in row]:
            raise DatasetError(f"{path}: row {number} has no {', '.join(missing)}")
    try:
        table = pa.Table.from_pylist(content, schema=SCHEMA)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DatasetError(f"{path}: {error}") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    pq.write_table(table, part, compression="zstd")
    part.replace(path)


def holds(path: Path) -> bool:
    """Whether there is a dataset: a Parquet file, or a folder with some in or below it."""
    return any(path.rglob("*.parquet")) if path.is_dir() else path.suffix == ".parquet" and path.is_file()


def read(path: Path) -> pa.Table:
    """Reads a dataset file, or all in and below a folder, in the order of their names.

    Raises:
        DatasetError: there is none, or one of another feature schema, or with a column missing or of another type.
    """
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise DatasetError(f"{path}: no dataset there; `kvpilot models collect` makes one")
    return pa.concat_tables([_read_file(file) for file in files])


def _read_file(path: Path) -> pa.Table:
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise DatasetError(f"{path}: not a Parquet file: {error}") from None
    found = (table.schema.metadata or {}).get(b"feature_schema_hash", b"").decode()
    if found != SCHEMA_HASH:
        raise DatasetError(f"{path}: feature schema {found or 'not named'}; this version reads {SCHEMA_HASH}")
    if missing := [name for name in SCHEMA.names if name not in table.column_names]:
        raise DatasetError(f"{path}: no column {', '.join(missing)}")
    for field in SCHEMA:
        if (kind := table.schema.field(field.name).type) != field.type:
            raise DatasetError(f"{path}: column {field.name} is {kind}, expected {field.type}")
    return table.select(SCHEMA.names)


def features(table: pa.Table) -> F64:
    """The feature columns, float64 [rows, features]."""
    return np.column_stack([table[name].to_numpy().astype(np.float64) for name in NAMES])


def only(table: pa.Table, split: Split) -> pa.Table:
    """The rows whose documents are in a split."""
    wanted = {document: split_of(document) is split for document in table["document"].unique().to_pylist()}
    return table.filter(pa.array([wanted[document] for document in table["document"].to_pylist()], pa.bool_()))
