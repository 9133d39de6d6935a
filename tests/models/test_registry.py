"""Stores of bundles: a folder, memory and S3 behave alike."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

from models import bundle as bundles
from models.bundle import BundleError
from models.manifest import MANIFEST, PREDICTOR, SELF_TEST
from models.registry import Registry, RegistryError, StoreUnavailableError
from tests.models.fitted import made


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """URL of an S3 server on this machine."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3FileSystem]:
    """The server, known by environment alone, as AWS tools are told."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    told = {"ENDPOINT_URL": s3_server, "ACCESS_KEY_ID": "id", "SECRET_ACCESS_KEY": "key", "DEFAULT_REGION": "us-east-1"}
    files = {"CONFIG_FILE": tmp_path / "none", "SHARED_CREDENTIALS_FILE": tmp_path / "none"}
    for name, value in {**told, **files}.items():
        monkeypatch.setenv(f"AWS_{name}", str(value))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    S3FileSystem.clear_instance_cache()
    yield S3FileSystem()
    S3FileSystem.clear_instance_cache()


@pytest.fixture(params=["folder", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "store")
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/store"
    bucket = f"kvpilot-{uuid.uuid4().hex}"
    request.getfixturevalue("s3").mkdir(bucket)
    return f"s3://{bucket}/store"


@pytest.fixture
def registry(url: str, tmp_path: Path) -> Registry:
    return Registry(url, cache=tmp_path / "cache", shipped=tmp_path / "shipped")


def overwrite(url: str, version: str, name: str, content: bytes) -> None:
    files, root = fsspec.url_to_fs(url)
    files.makedirs(f"{root}/{version}", exist_ok=True)
    files.pipe_file(f"{root}/{version}/{name}", content)


def test_what_is_put_is_listed_and_loads(registry: Registry) -> None:
    assert registry.list() == []
    assert registry.put(made("one")) == "one"
    assert registry.put(made("two")) == "two"
    assert [entry.version for entry in registry.list()] == ["two", "one"]
    assert registry.newest() == "two"
    assert registry.load("one").version == "one"
    assert registry.manifest("two").version == "two"


def test_a_folder_can_be_put(registry: Registry, tmp_path: Path) -> None:
    bundles.write(tmp_path / "made", made("one"))
    assert registry.put(tmp_path / "made") == "one"
    assert (registry.get("one") / PREDICTOR).read_bytes() == made("one")[PREDICTOR]


def test_bundles_never_change(registry: Registry) -> None:
    registry.put(made("one"))
    with pytest.raises(RegistryError, match="bundle one is there already"):
        registry.put(made("one"))


def test_shipped_bundles_are_there_too_and_their_names_are_taken(registry: Registry, tmp_path: Path) -> None:
    assert registry.shipped() is None
    bundles.write(tmp_path / "shipped" / "default", made("default"))
    registry.put(made("own"))
    assert registry.shipped() == "default"
    assert {entry.version for entry in registry.list()} == {"own", "default"}
    assert registry.load("default").version == "default"
    with pytest.raises(RegistryError, match="default is there already"):
        registry.put(made("default"))


def test_what_is_not_there_is_named_beside_what_is(registry: Registry) -> None:
    with pytest.raises(RegistryError, match=r"no bundle in .*; `kvpilot models train` makes one"):
        registry.newest()
    registry.put(made("one"))
    with pytest.raises(RegistryError, match=r"no bundle 'other' in .*; there are: one"):
        registry.get("other")
    with pytest.raises(RegistryError, match="expected at most 64"):
        registry.get("../one")


def test_an_upload_that_broke_off_is_not_there_and_can_be_done_again(registry: Registry, url: str) -> None:
    overwrite(url, "one", PREDICTOR, b"half")
    assert registry.list() == []
    with pytest.raises(RegistryError, match="no bundle 'one'"):
        registry.get("one")
    registry.put(made("one"))
    assert registry.load("one").version == "one"


def test_wrong_files_are_not_put(registry: Registry) -> None:
    with pytest.raises(BundleError, match=r"bundle one: selftest\.json does not have the checksum"):
        registry.put({**made("one"), SELF_TEST: b"{}"})
    with pytest.raises(BundleError, match=r"bundle one: predictor\.skops is missing"):
        registry.put({name: content for name, content in made("one").items() if name != PREDICTOR})
    assert registry.list() == []


def test_a_store_that_changed_a_file_is_noticed_and_others_are_not_touched(registry: Registry, url: str) -> None:
    registry.put(made("one"))
    registry.put(made("two"))
    overwrite(url, "one", PREDICTOR, made("one")[PREDICTOR][:-1])
    with pytest.raises(BundleError, match=r"bundle one: predictor\.skops does not have the checksum"):
        registry.load("one")
    assert registry.load("two").version == "two"


def test_an_unreadable_manifest_is_listed_last_with_its_problem(registry: Registry, url: str) -> None:
    registry.put(made("two"))
    overwrite(url, "broken", MANIFEST, b"{")
    overwrite(url, "misnamed", MANIFEST, made("two")[MANIFEST])
    entries = registry.list()
    assert [entry.version for entry in entries] == ["two", "broken", "misnamed"]
    assert "bundle broken: bundle.json is not JSON" in entries[1].problem
    assert "bundle misnamed: its manifest names it 'two'" in entries[2].problem


def test_a_download_is_kept_and_checked_each_time(tmp_path: Path) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    registry = Registry(url, cache=tmp_path / "cache", shipped=tmp_path / "shipped")
    registry.put(made("one"))
    folder = registry.get("one")
    assert folder.is_relative_to(tmp_path / "cache")
    assert sorted(path.name for path in folder.iterdir()) == sorted([MANIFEST, PREDICTOR, SELF_TEST])
    assert [path.name for path in folder.parent.iterdir()] == ["one"]  # nothing half done beside it
    (folder / SELF_TEST).write_bytes(b"{}")
    with pytest.raises(BundleError, match=r"selftest\.json does not have the checksum"):
        registry.get("one")


def test_a_bucket_that_does_not_exist_is_named_and_not_made(s3: S3FileSystem, tmp_path: Path) -> None:
    registry = Registry("s3://no-such-bucket/store", cache=tmp_path / "cache", shipped=tmp_path / "shipped")
    assert registry.list() == []
    with pytest.raises(RegistryError, match=r"bundle store s3://no-such-bucket/store: .*bucket does not exist"):
        registry.put(made("one"))
    assert "no-such-bucket" not in s3.ls("")


def test_a_store_that_lets_nobody_in_is_not_an_empty_one(
    s3: S3FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    S3FileSystem.clear_instance_cache()
    registry = Registry("s3://bucket/store", cache=tmp_path / "cache", shipped=tmp_path / "shipped")
    with pytest.raises(StoreUnavailableError, match="Unable to locate credentials"):
        registry.list()


def test_a_store_that_does_not_exist_is_named() -> None:
    with pytest.raises(RegistryError, match="no-such-protocol"):
        Registry("no-such-protocol://somewhere")
