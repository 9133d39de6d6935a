"""Profiles in kvpilot's cache folder: safetensors files, read only for the model and the schema they are of."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import structlog
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kernels.layout import CacheShape
from models.profiles import SCHEMA_VERSION, ProfileError, hash_model, profile_path, read_metadata
from workers.profile.profile import ModelProfile
from workers.profile.rotary import Rope, rope_of

log = structlog.get_logger(__name__)


def save(profile: ModelProfile) -> Path:
    """Writes a profile to where :func:`load` looks for it, by one rename; gives the file.

    Raises:
        OSError: it cannot be written.
    """
    path = profile_path(profile.hash)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        "schema": str(SCHEMA_VERSION),
        "model_hash": profile.hash,
        "model": profile.model,
        "tokens": str(profile.tokens),
    }
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in profile.tensors.items()}, scratch, metadata)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    return path


def load(path: Path, model_hash: str, model: Any, shape: CacheShape) -> ModelProfile:
    """Reads a profile for a loaded transformers model, or, with None, for what goes by its tensors alone.

    Raises:
        ProfileError: a file of another schema or model, or a damaged one, saying what it holds and what is expected.
        OSError: it cannot be read.
    """
    found = read_metadata(path)
    for name, expected in (("schema", str(SCHEMA_VERSION)), ("model_hash", model_hash)):
        if found.get(name) != expected:
            raise ProfileError(f"{path}: {name} {found.get(name)!r}; expected {expected!r}")
    device = next(model.parameters()).device if model is not None else torch.device("cpu")
    rope = rope_of(model, shape.head_dim) if model is not None else Rope(None, shape.dtype)
    try:
        tensors = load_file(path, device=str(device))
    except SafetensorError as error:
        raise ProfileError(f"{path}: {error}") from None
    tokens = found.get("tokens", "")
    if not tokens.isdigit():
        raise ProfileError(f"{path}: tokens {tokens!r}; expected a number")
    return ModelProfile(found.get("model", ""), model_hash, shape, int(tokens), tensors, rope)


def load_if_there(folder: Path, name: str, model: Any, shape: CacheShape) -> ModelProfile | None:
    """The profile of a model, where there is one that can be used; the log says so either way.

    Args:
        folder: the model's.
        name: the model's, for the log.
        model: loaded from there.
        shape: its cache dimensions.
    """
    try:
        model_hash = hash_model(folder)
        path = profile_path(model_hash)
        if not path.is_file():
            log.info("no profile of this model: stages that need one are refused", model=name, file=str(path))
            return None
        profile = load(path, model_hash, model, shape)
    except (ProfileError, OSError) as error:
        log.error("profile left out: stages that need it are refused", model=name, why=str(error))
        return None
    log.info("profile loaded", model=name, file=str(path), tokens=profile.tokens)
    return profile
