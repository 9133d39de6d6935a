"""``kvpilot inspect``: what a pipeline keeps of a text, in this process, as a document, a map and a picture."""

from __future__ import annotations

import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoTokenizer

from cli.document import fields, recalls_document
from cli.errors import BadInputError
from cli.inspect_run import Choice, Head, Inspection, inspect_request
from cli.inspect_view import show
from kernels.layout import CacheShape
from kvpilot.log import LogFormat, LogLevel, configure_logging
from kvpilot.pipeline import PipelineError
from models import profiles, store
from workers.engine.attention import cache_shape
from workers.engine.runner import load_config, load_model
from workers.profile.profile import KINDS
from workers.stages.base import Pipeline
from workers.stages.registry import build

DTYPE = torch.float32
EXACT_DIGITS = 9
"""Decimal digits that tell every float32 from its neighbours."""


def inspect(
    pipeline: str,
    prompt_file: Path,
    tokens: int,
    model: str | None,
    json_file: Path | None,
    picture: Path | None,
) -> None:
    """Runs the prompt with the pipeline and shows what is kept.

    Raises:
        BadInputError: naming what is wrong, its value and what is accepted.
        ModelNotFoundError: there is no such model.
        OSError: a file cannot be read or written.
    """
    configure_logging(LogLevel.WARNING, LogFormat.AUTO)
    text = read_text(prompt_file)
    for field, file in (("--json", json_file), ("--picture", picture)):
        _check_writable(field, file)
    folder = store.resolve(model or store.DEFAULT_MODEL)
    import_module("transformers.utils.logging").disable_progress_bar()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    console = Console(highlight=False)
    with Console(stderr=True).status("loading the model") as status:
        config = load_config(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        built, prompt = read_order(config, tokenizer, _profiled(folder), pipeline, text, tokens, str(prompt_file))
        loaded = load_model(folder, store.model_name(folder), torch.device("cpu"), DTYPE)

        def progress(seen: int) -> None:
            status.update(f"{seen} of {len(prompt) + tokens} tokens computed")

        found = inspect_request(loaded, built, prompt, tokens, progress)
    show(found, console)
    if json_file is not None:
        json_file.write_text(json.dumps(document(found), ensure_ascii=False) + "\n", encoding="utf-8")
    if picture is not None:
        from cli.inspect_picture import draw

        picture.write_bytes(draw(found))


def read_order(
    config: Any, tokenizer: Any, profiled: frozenset[str], pipeline: str, text: str, tokens: int, source: str
) -> tuple[Pipeline, list[int]]:
    """The pipeline and the prompt's tokens, if the model can serve them and so many tokens more.

    Args:
        config: the model's, of transformers.
        tokenizer: the model's.
        profiled: the tensors that the model's profile has.
        pipeline: as text.
        text: the prompt.
        tokens: to generate.
        source: where the prompt comes from, for errors.

    Raises:
        BadInputError: naming what is wrong, its value and what is accepted.
    """
    built = build_pipeline(pipeline, cache_shape(config, DTYPE), profiled)
    prompt = list(tokenizer(text)["input_ids"])
    check_length(prompt, tokens, config.max_position_embeddings, source)
    return built, prompt


def _profiled(folder: Path) -> frozenset[str]:
    """The tensors of the profile that the model will be loaded with."""
    try:
        return frozenset(KINDS if profiles.find_profile(folder) else ())
    except (profiles.ProfileError, OSError):  # the weights' own error says more
        return frozenset()


def read_text(file: Path) -> str:
    """The prompt's text, as it is.

    Raises:
        BadInputError: it is not UTF-8, or empty.
        OSError: the file cannot be read.
    """
    data = file.read_bytes()
    if not data:
        raise BadInputError(f"--prompt-file: {str(file)!r} is empty; accepted: text of at least one token")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInputError(
            f"--prompt-file: {str(file)!r} has byte {data[error.start]:#04x} at offset {error.start};"
            " accepted: UTF-8 text"
        ) from None


def build_pipeline(text: str, shape: CacheShape, profiled: frozenset[str] = frozenset()) -> Pipeline:
    """The pipeline, refused in the words in which a submitted one is.

    Raises:
        BadInputError: it names what does not exist, or cannot serve the model.
    """
    try:
        return build(text, shape, profiled)
    except PipelineError as error:
        raise BadInputError(f"pipeline: {error}") from None


def check_length(prompt: list[int], tokens: int, context: int, source: str) -> None:
    """Refuses what the model's context does not hold.

    Raises:
        BadInputError: the prompt has no token or too many, or leaves too few for those to come.
    """
    field, count = "--prompt-file", f"{source!r} has {len(prompt)} tokens"
    if not prompt:
        raise BadInputError(f"{field}: {count}; accepted: at least one")
    if len(prompt) > context:
        raise BadInputError(f"{field}: {count}; accepted: at most {context}, the model's context")
    if len(prompt) + tokens > context:
        room = context - len(prompt)
        raise BadInputError(f"--tokens: {tokens}; accepted: at most {room}, what the prompt leaves of {context} tokens")


def _check_writable(field: str, file: Path | None) -> None:
    """Refuses a file that cannot be there before the work is done rather than behind it."""
    if file is not None and not file.parent.is_dir():
        raise BadInputError(f"{field}: {str(file)!r}; accepted: a file in a folder that exists")


# -- the document ------------------------------------------------------------------------------------------------------


def document(found: Inspection) -> dict[str, Any]:
    """Everything known, numbers as numbers, formats and tiers as words; positions count from 0."""
    kept = [len(head.kept) for head in found.heads]
    return {
        "model": found.model,
        "pipeline": found.pipeline,
        "loss_class": found.loss_class.name.lower(),
        "layers": found.shape.layers,
        "kv_heads": found.shape.kv_heads,
        "prompt_tokens": found.prompt_tokens,
        "generated_tokens": found.seen - found.prompt_tokens,
        "seen_tokens": found.seen,
        "token_ids": list(found.token_ids),
        "tokens": list(found.tokens),
        "choice": _choice(found.choice),
        "cache": fields(found.use.to_proto()),
        "recalls": recalls_document(found.recalls.to_proto()),
        "totals": {
            "kept_tokens": sum(kept),
            "full_tokens": found.seen * len(found.heads),
            "kinds": [
                {
                    "format": kind.format.name.lower(),
                    "tier": kind.tier.name.lower(),
                    "blocks": kind.blocks,
                    "tokens": kind.tokens,
                }
                for kind in found.kinds
            ],
        },
        "heads": [_head(head) for head in found.heads],
    }


def _choice(choice: Choice | None) -> dict[str, int] | None:
    if choice is None:
        return None
    return {
        "seen_tokens": choice.seen,
        "budget_tokens": choice.budget,
        "protected_first_tokens": choice.first,
        "protected_recent_tokens": choice.recent,
    }


def _head(head: Head) -> dict[str, Any]:
    scores = head.scores
    return {
        "layer": head.layer,
        "head": head.head,
        "kept": head.kept.tolist(),
        "scored": None if scores is None else scores.position.tolist(),
        "scores": None if scores is None else [float(f"{value:.{EXACT_DIGITS}g}") for value in scores.score],
        "blocks": [
            {
                "format": block.format.name.lower(),
                "tier": block.tier.name.lower(),
                "positions": block.position.tolist(),
            }
            for block in head.blocks
        ],
        "device_bytes": head.use.device_bytes,
        "host_bytes": head.use.host_bytes,
        "disk_bytes": head.use.disk_bytes,
        "shadow_bytes": head.use.shadow_bytes,
    }
