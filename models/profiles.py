"""Where the profiles of models lie, and which model one is of. What is in them: ``workers.profile``. Imports no torch.

A profile is what ``kvpilot model profile`` finds out about a model once, by running it over text. It is a safetensors
file below ``profiles_folder()``, named by the hash of its model, so that a model of other weights never gets it.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from models.store import cache_folder

SCHEMA_VERSION = 2
"""Of the tensors in a profile; raised when one of them comes to mean something else, or another comes in."""
HEAD_BYTES = 4096
"""Of each tensor's data, as many enter the hash of a model."""
_MOST_HEADER_BYTES = 100_000_000


class ProfileError(ValueError):
    """A profile that cannot be made or used; ``str(error)`` says why."""


def profiles_folder() -> Path:
    """Where profiles lie."""
    return cache_folder() / "profiles"


def profile_path(model_hash: str) -> Path:
    """The file of a model's profile, whether there is one or not."""
    return profiles_folder() / f"{model_hash}.safetensors"


def hash_model(folder: Path) -> str:
    """Names a model by its content: SHA-256, in hex, of ``config.json`` and of each weights file.

    Of a weights file count its header (names, dtypes, shapes and places of all tensors) and the first 4 KiB of each
    tensor: a tenth of a second instead of reading gigabytes, and training changes every tensor it touches there.

    Raises:
        ProfileError: a weights file that is not in safetensors format.
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in _weights(folder):
        with path.open("rb") as file:
            header = _header(file, path)
            digest.update(f"{path.name}\0{json.dumps(header, sort_keys=True)}\0".encode())
            begin = file.tell()
            for place in sorted(tuple(entry["data_offsets"]) for name, entry in header.items() if name[:2] != "__"):
                file.seek(begin + place[0])
                digest.update(file.read(min(HEAD_BYTES, place[1] - place[0])))
    return digest.hexdigest()


def find_profile(folder: Path) -> Path | None:
    """The file of a model's profile; None where there is none of this schema.

    Raises:
        ProfileError: as :func:`hash_model`; also where the file there is not one.
        OSError: a file cannot be read.
    """
    model_hash = hash_model(folder)
    path = profile_path(model_hash)
    if not path.is_file():
        return None
    found = read_metadata(path)
    same = (found.get("schema"), found.get("model_hash")) == (str(SCHEMA_VERSION), model_hash)
    return path if same else None


def read_metadata(path: Path) -> dict[str, str]:
    """What a profile says of itself: ``schema``, ``model_hash``, ``model``, ``tokens``.

    Raises:
        ProfileError: it is not a safetensors file.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return dict(_header(file, path).get("__metadata__", {}))


def _weights(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    return [folder / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]


def _header(file: Any, path: Path) -> dict[str, Any]:
    """The header of a safetensors file; the tensors' data begin where the file then stands."""
    start = file.read(8)
    size = struct.unpack("<Q", start)[0] if len(start) == 8 else _MOST_HEADER_BYTES + 1
    try:
        header = json.loads(file.read(size)) if size <= _MOST_HEADER_BYTES else None
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise ProfileError(f"{path}: not a safetensors file")
    return header
