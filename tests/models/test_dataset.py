"""Dataset files: what is written is read, what is none is refused by name, and documents keep to their split."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models import dataset
from models.dataset import KEYS, MEASURES, SCHEMA, DatasetError, Split, source_of, split_of
from models.features import NAMES, SCHEMA_HASH


def row(document: str = "a.py", pipeline: str = "int8", value: float = 0.5) -> dict[str, object]:
    return {
        **dict.fromkeys(KEYS, "word"),
        "document": document,
        "pipeline": pipeline,
        "at_token": 700,
        **{name: value + place for place, name in enumerate(NAMES)},
        **{name: value / (place + 1) for place, name in enumerate(MEASURES)},
    }


def put(path: Path, *documents: str) -> Path:
    dataset.write(path, [row(document) for document in documents])
    return path


def rewrite(path: Path, table: pa.Table) -> None:
    pq.write_table(table, path)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    rows = [row("a.py", "full", 0.25), row("b.py", "int8", 0.5)]
    path = tmp_path / "not" / "there" / "yet.parquet"
    dataset.write(path, iter(rows))
    table = dataset.read(path)
    assert table.schema.names == [*KEYS, "at_token", *NAMES, *MEASURES]
    assert table.to_pylist() == rows  # quarters and halves of small numbers are exact in 32 bits
    assert [file.name for file in path.parent.iterdir()] == ["yet.parquet"]
    columns = dataset.features(table)
    assert columns.dtype == np.float64
    assert columns.tolist() == [[one[name] for name in NAMES] for one in rows]


def test_what_is_not_known_comes_back_as_nan(tmp_path: Path) -> None:
    dataset.write(tmp_path / "a.parquet", [row() | {NAMES[3]: float("nan")}])
    assert np.flatnonzero(np.isnan(dataset.features(dataset.read(tmp_path))[0])).tolist() == [3]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = put(tmp_path / "a.parquet", "old.py")
    lacking = row("new.py")
    del lacking["divergence"], lacking["log2_seen"]
    with pytest.raises(DatasetError, match=r"a\.parquet: row 1 has no log2_seen, divergence"):
        dataset.write(path, [row("new.py"), lacking])
    with pytest.raises(DatasetError, match=r"a\.parquet: "):
        dataset.write(path, [row("new.py") | {"at_token": "seven"}])
    assert dataset.read(path)["document"].to_pylist() == ["old.py"]
    put(path, "new.py")
    assert dataset.read(path)["document"].to_pylist() == ["new.py"]


def test_a_folder_is_read_through_and_through_in_the_order_of_names(tmp_path: Path) -> None:
    put(tmp_path / "b.parquet", "3", "4")
    put(tmp_path / "a" / "z.parquet", "2")
    put(tmp_path / "a" / "deep" / "er.parquet", "1")
    put(tmp_path / "c.parquet", "5")
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "d.parquet.part").write_bytes(b"half")
    assert dataset.read(tmp_path)["document"].to_pylist() == ["1", "2", "3", "4", "5"]


def test_nothing_there_is_said(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.parquet"):
        with pytest.raises(DatasetError, match=rf"{path}: no dataset there; `kvpilot models collect` makes one"):
            dataset.read(path)


def test_a_file_that_does_not_fit_is_named(tmp_path: Path) -> None:
    good = dataset.read(put(tmp_path / "a.parquet", "a.py"))
    odd = tmp_path / "b.parquet"

    odd.write_bytes(b"rubbish")
    with pytest.raises(DatasetError, match=r"b\.parquet: not a Parquet file"):
        dataset.read(tmp_path)

    rewrite(odd, good.replace_schema_metadata({"feature_schema_hash": "0123456789abcdef"}))
    with pytest.raises(
        DatasetError, match=rf"b\.parquet: feature schema 0123456789abcdef; this version reads {SCHEMA_HASH}"
    ):
        dataset.read(tmp_path)

    rewrite(odd, good.replace_schema_metadata(None))
    with pytest.raises(DatasetError, match=r"b\.parquet: feature schema not named"):
        dataset.read(tmp_path)

    for name in (NAMES[5], "divergence", "document"):
        rewrite(odd, good.drop_columns([name]))
        for path in (tmp_path, odd):
            with pytest.raises(DatasetError, match=rf"b\.parquet: no column {name}"):
                dataset.read(path)

    odd.unlink()
    assert dataset.read(tmp_path).equals(good)


def test_files_of_one_schema_with_columns_of_another_type_are_named(tmp_path: Path) -> None:
    good = dataset.read(put(tmp_path / "a.parquet", "a.py"))
    place = SCHEMA.names.index("at_token")
    words = good.set_column(place, "at_token", pa.array(["seven"]))
    rewrite(tmp_path / "b.parquet", words)
    with pytest.raises(DatasetError, match=r"b\.parquet: column at_token is string, expected int32"):
        dataset.read(tmp_path)


def test_splits_have_their_shares() -> None:
    count = 20_000
    found = Counter(split_of(f"corpus/file-{number}.txt") for number in range(count))
    for split, share in ((Split.TRAIN, 0.6), (Split.CALIBRATE, 0.2), (Split.TEST, 0.2)):
        spread = (share * (1 - share) / count) ** 0.5
        assert abs(found[split] / count - share) < 4 * spread, split


def test_a_split_hangs_on_the_name_alone() -> None:
    for number in range(100):
        source = f"book-{number}.txt"
        splits = {split_of(name) for name in (source, f"{source}#needle-{number}", f"{source}#recall#again")}
        assert splits == {split_of(source)}
        assert source_of(f"{source}#recall#again") == source == source_of(source)
    assert len({split_of(f"task#book-{number}.txt") for number in range(50)}) == 1


def test_only_takes_the_rows_of_a_split(tmp_path: Path) -> None:
    documents = [f"doc-{number}{what}" for number in range(40) for what in ("", "#needle", "")]
    table = dataset.read(put(tmp_path / "a.parquet", *documents))
    parts = {split: dataset.only(table, split)["document"].to_pylist() for split in Split}
    for split, names in parts.items():
        assert names == [name for name in documents if split_of(name) is split]
        assert names, "the names were chosen so that no split is empty"
    assert sum(map(len, parts.values())) == len(documents)
    nothing = dataset.only(table.slice(0, 0), Split.TRAIN)
    assert (nothing.num_rows, nothing.schema) == (0, table.schema)
