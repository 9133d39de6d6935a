"""``kvpilot model profile``: find a model's profile and keep it."""

from __future__ import annotations

import json
import os
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from cli.errors import BadInputError, FailedError
from kvpilot.log import LogFormat, LogLevel, configure_logging
from models import profiles, store
from workers.engine.runner import LoadedModel, load_model
from workers.profile import files
from workers.profile.measure import measure
from workers.profile.profile import ModelProfile
from workers.profile.text import pieces

RETRIEVES = 0.25
"""Of a head's attention: one that pays more to a passage's first copy is counted as a retrieval head in the summary."""


def profile(model: str, tokens: int, force: bool, as_json: bool) -> None:
    """Finds a profile, unless there is one, and prints its file or a document on stdout.

    Raises:
        BadInputError: a model that profiles do not describe, or too little text.
        ModelNotFoundError: there is no such model.
    """
    configure_logging(LogLevel.WARNING, LogFormat.AUTO)
    folder = store.resolve(model)
    import_module("transformers.utils.logging").disable_progress_bar()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    console = Console(stderr=True, highlight=False)
    began = time.monotonic()
    try:
        there = None if force else profiles.find_profile(folder)
        with console.status("loading the model") as status:
            loaded = load_model(folder, store.model_name(folder), torch.device("cpu"), torch.float32)
            if there is not None and loaded.profile is None:
                raise FailedError(f"{there} cannot be used; --force finds the profile anew")
            found = loaded.profile if there else None
            if found is None:

                def progress(done: int, total: int) -> None:
                    status.update(f"{done} of {total} tokens computed")

                found = make(loaded, folder, tokens, progress)
                path = files.save(found)
            else:
                path = profiles.profile_path(found.hash)
    except profiles.ProfileError as error:
        raise BadInputError(str(error)) from None
    seconds = time.monotonic() - began
    if as_json:
        print(json.dumps(document(found, path, bool(there), seconds)))
        return
    said = "is there already" if there else f"found in {seconds:.0f} s"
    share = float((found.tensor("retrieval") > RETRIEVES).float().mean())
    console.print(
        f"profile of {found.model} {said}: {found.tokens} tokens of text; {share:.0%} of the KV heads retrieve",
        markup=False,
        soft_wrap=True,
    )
    print(path)


def make(loaded: LoadedModel, folder: Path, tokens: int, progress: Any = lambda done, total: None) -> ModelProfile:
    """The profile of a model that was loaded from a folder.

    Raises:
        ProfileError: it cannot be made, saying why.
    """
    if loaded.tokenizer is None:
        raise profiles.ProfileError(f"model {loaded.name!r} has no tokenizer; a profile needs one to read text")
    texts = pieces(loaded.tokenizer, tokens, loaded.context_tokens)
    return measure(loaded, texts, profiles.hash_model(folder), progress)


def document(found: ModelProfile, path: Path, was_there: bool, seconds: float) -> dict[str, Any]:
    """What ``--json`` prints."""
    retrieval = found.tensor("retrieval")
    return {
        "model": found.model,
        "hash": found.hash,
        "schema": profiles.SCHEMA_VERSION,
        "file": str(path),
        "was_there": was_there,
        "seconds": round(seconds, 1),
        "tokens": found.tokens,
        **_dimensions(found),
        "tensors": {name: list(tensor.shape) for name, tensor in sorted(found.tensors.items())},
        "retrieval": retrieval.tolist(),
        "retrieves_above": RETRIEVES,
        "retrieving_share": float((retrieval > RETRIEVES).float().mean()),
    }


def _dimensions(found: ModelProfile) -> dict[str, int]:
    shape = found.shape
    return {
        "layers": shape.layers,
        "kv_heads": shape.kv_heads,
        "query_heads": shape.query_heads,
        "head_dim": shape.head_dim,
    }
