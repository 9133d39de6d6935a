"""Where bundles are kept: a store named by an fsspec URL, and the bundles that ship with kvpilot.

A bundle is complete when its ``bundle.json`` is there, which is written last; from then on it never changes.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from models.bundle import Bundle, BundleError, load, read_manifest
from models.manifest import MANIFEST, PREDICTOR, SELF_TEST, VERSION_PATTERN, Manifest, sha256
from models.store import cache_folder

SHIPPED = Path(__file__).parent / "bundles"
_FILES = (PREDICTOR, SELF_TEST)


class RegistryError(Exception):
    """The store of bundles cannot be used, or has not what was asked for; says which and why."""


class StoreUnavailableError(RegistryError):
    """The store cannot be read or written now, whatever is in it; trying again later may help."""


@dataclass(frozen=True)
class Entry:
    """A bundle in a store."""

    version: str
    place: str
    """URL or folder of its store."""
    manifest: Manifest | None
    problem: str = ""
    """Why the manifest cannot be read."""


class Registry:
    """Bundles by version: those of a store that can be written, then the shipped ones.

    Args:
        url: ``s3://bucket/prefix``, a folder, or anything else that fsspec knows; by default ``bundles`` in kvpilot's
            cache folder. Other stores than folders need fsspec's package for them (s3fs, gcsfs, ...). S3 takes its
            credentials, region and endpoint from where AWS tools do (``AWS_*``, ``~/.aws``); its bucket must be there.
        cache: folder for downloaded bundles; by default in kvpilot's cache folder.
        shipped: folder of bundles that come with kvpilot; by default where they are installed.

    Raises:
        RegistryError: not such a URL, or a package for it is missing.
    """

    def __init__(self, url: str | Path | None = None, cache: Path | None = None, shipped: Path | None = None) -> None:
        self.url = str(url or cache_folder() / "bundles")
        self._cache = cache or cache_folder() / "downloaded-bundles"
        try:
            self._stores = [_Store.open(self.url), _Store.open(str(shipped or SHIPPED))]
        except (ValueError, ImportError) as error:
            raise RegistryError(f"bundle store {self.url!r}: {error}") from None

    def put(self, files: Mapping[str, bytes] | Path) -> str:
        """Adds a bundle, given by its files or its folder, and returns its version.

        Raises:
            BundleError: the manifest cannot be read, or files do not have the checksums that it states.
            RegistryError: the version is taken, or the store cannot be written.
        """
        if isinstance(files, Path):
            files = {name: _read_local(files / name) for name in (*_FILES, MANIFEST)}
        manifest = read_manifest(files[MANIFEST], "to be added")
        _check_sums(manifest, files)
        if any(store.holds(manifest.version) for store in self._stores):
            raise RegistryError(f"bundle {manifest.version} is there already; bundles never change: give another name")
        self._stores[0].write(manifest.version, files)
        return manifest.version

    def list(self) -> list[Entry]:
        """All bundles, newest first; those that cannot be read stand last and say why.

        Raises:
            RegistryError: the store cannot be read.
        """
        entries: dict[str, Entry] = {}
        for store in self._stores:
            for version in store.versions():
                entries.setdefault(version, _entry(store, version))
        made = sorted((entry for entry in entries.values() if entry.manifest), key=_made, reverse=True)
        return made + [entry for entry in entries.values() if not entry.manifest]

    def get(self, version: str) -> Path:
        """The folder of a bundle on this machine, downloaded where needed, its checksums verified.

        Raises:
            BundleError: its files do not have the checksums that its manifest states.
            RegistryError: there is none of this version, or the store cannot be read.
        """
        store = self._find(version)
        if store.folder is not None:
            folder = store.folder / version
            files = {name: _read_local(folder / name) for name in (*_FILES, MANIFEST)}
            _check_sums(_named(version, files[MANIFEST]), files)
            return folder
        folder = self._cache / hashlib.sha256(store.url.encode()).hexdigest()[:12] / version
        if not folder.is_dir():
            _download(store, version, folder)
        files = {name: _read_local(folder / name) for name in (*_FILES, MANIFEST)}
        _check_sums(_named(version, files[MANIFEST]), files)
        return folder

    def manifest(self, version: str) -> Manifest:
        """What a bundle says of itself, without loading it.

        Raises:
            BundleError: it cannot be read.
            RegistryError: there is none of this version, or the store cannot be read.
        """
        return _named(version, self._find(version).read(version, MANIFEST))

    def load(self, version: str) -> Bundle:
        """A bundle, checked by :func:`models.bundle.load`.

        Raises:
            BundleError: it must not be used.
            RegistryError: there is none of this version, or the store cannot be read.
        """
        return load(self.get(version))

    def shipped(self) -> str | None:
        """Version of the newest bundle that came with kvpilot: what decides while nothing was promoted."""
        entries = [_entry(self._stores[1], version) for version in self._stores[1].versions()]
        made = [entry for entry in entries if entry.manifest]
        return max(made, key=_made).version if made else None

    def newest(self) -> str:
        """Version of the newest bundle.

        Raises:
            RegistryError: there is none.
        """
        entries = self.list()
        if not entries or entries[0].manifest is None:
            raise RegistryError(f"no bundle in {self.url}; `kvpilot models train` makes one")
        return entries[0].version

    def _find(self, version: str) -> _Store:
        if not re.match(VERSION_PATTERN, version):
            raise RegistryError(f"bundle {version!r}: expected at most 64 letters, digits and ._-")
        for store in self._stores:
            if store.holds(version):
                return store
        known = ", ".join(entry.version for entry in self.list()) or "none"
        raise RegistryError(f"no bundle {version!r} in {self.url}; there are: {known}")


@dataclass(frozen=True)
class _Store:
    """A folder of bundles in some file system."""

    url: str
    files: Any
    root: str

    @classmethod
    def open(cls, url: str) -> _Store:
        files, root = fsspec.url_to_fs(os.path.expanduser(url))
        return cls(url, files, root.rstrip("/"))

    @property
    def folder(self) -> Path | None:
        """Where it is on this machine, if it is."""
        return Path(self.root) if isinstance(self.files, LocalFileSystem) else None

    def holds(self, version: str) -> bool:
        with _stated(self.url):
            self.files.invalidate_cache()
            return bool(self.files.exists(f"{self.root}/{version}/{MANIFEST}"))

    def versions(self) -> list[str]:
        with _stated(self.url):
            self.files.invalidate_cache()
            if not self.files.exists(self.root):
                return []
            names = sorted(str(path).rstrip("/").rsplit("/", 1)[-1] for path in self.files.ls(self.root, detail=False))
        return [name for name in names if re.match(VERSION_PATTERN, name) and self.holds(name)]

    def read(self, version: str, name: str) -> bytes:
        with _stated(self.url):
            content: bytes = self.files.cat_file(f"{self.root}/{version}/{name}")
            return content

    def write(self, version: str, files: Mapping[str, bytes]) -> None:
        """Every file whole or not at all, the manifest last."""
        folder = f"{self.root}/{version}"
        with _stated(self.url):
            if "s3" not in self.files.protocol:  # it knows no folders, and would make the bucket that is named
                self.files.makedirs(folder, exist_ok=True)
            for name in (*_FILES, MANIFEST):
                file = self.files.open(f"{folder}/{name}", "wb", autocommit=False)
                file.write(files[name])
                file.close()
                file.commit()


class _stated:  # noqa: N801  # reads as a statement: `with _stated(url):`
    """Turns what file systems raise into RegistryError, naming the store; unless a file is not there, that may pass."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, RegistryError):
            kind_of_error = RegistryError if isinstance(error, FileNotFoundError) else StoreUnavailableError
            raise kind_of_error(f"bundle store {self._url}: {type(error).__name__}: {error}") from error


def _download(store: _Store, version: str, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".part-") as part:
        complete = Path(part) / version
        complete.mkdir()
        files = {name: store.read(version, name) for name in (*_FILES, MANIFEST)}
        _check_sums(_named(version, files[MANIFEST]), files)
        for name, content in files.items():
            (complete / name).write_bytes(content)
        try:
            complete.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was quicker
                raise


def _entry(store: _Store, version: str) -> Entry:
    try:
        return Entry(version, store.url, _named(version, store.read(version, MANIFEST)))
    except (BundleError, RegistryError) as error:
        return Entry(version, store.url, None, str(error))


def _made(entry: Entry) -> tuple[float, str]:
    assert entry.manifest is not None
    return entry.manifest.created.timestamp(), entry.version


def _named(version: str, text: bytes) -> Manifest:
    manifest = read_manifest(text, version)
    if manifest.version != version:
        raise BundleError(version, f"its manifest names it {manifest.version!r}")
    return manifest


def _check_sums(manifest: Manifest, files: Mapping[str, bytes]) -> None:
    for name in _FILES:
        if name not in files:
            raise BundleError(manifest.version, f"{name} is missing")
        if sha256(files[name]) != manifest.sha256.get(name):
            raise BundleError(manifest.version, f"{name} does not have the checksum that {MANIFEST} states")


def _read_local(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BundleError(path.parent.name, f"{path}: {error.strerror}") from None
