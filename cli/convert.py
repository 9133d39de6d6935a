"""One GGUF file to a folder in transformers' format: float32 safetensors, tokenizer, generation config.

What a GGUF file does not carry over is put right here, once, so that nobody who loads the folder has to know.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # both are read at import: the progress shown is ours
os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import transformers
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

_SINGLE_DIGITS = ("smollm",)
"""Values of ``tokenizer.ggml.pre`` whose tokenizers split numbers into digits before anything else."""


def convert_gguf(gguf: Path, target: Path, phase: Callable[[str], None]) -> None:
    """Converts ``gguf`` into the existing, empty folder ``target``.

    Raises:
        ValueError: if the file lacks what serving needs: a tokenizer with an end token that the model knows too.
    """
    fields = GGUFReader(gguf).fields
    phase("converting the tokenizer")
    tokenizer: Any = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    if "tokenizer.ggml.pre" in fields and fields["tokenizer.ggml.pre"].contents() in _SINGLE_DIGITS:
        _split_digits(tokenizer)
    phase("converting the weights")
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, **_dequantised()
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    if tokenizer.eos_token_id is None or tokenizer.eos_token_id != model.config.eos_token_id:
        raise ValueError(
            f"{gguf.name}: end token {tokenizer.eos_token_id} of the tokenizer is not the model's "
            f"{model.config.eos_token_id}"
        )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    phase("saving")
    tokenizer.save_pretrained(target)
    model.save_pretrained(target)


def _dequantised() -> dict[str, Any]:
    """Keywords that make this release of transformers load plain float weights, which can be saved."""
    if hasattr(transformers, "GgufConfig"):
        return {"quantization_config": transformers.GgufConfig(dequantize=True)}
    return {}  # releases before GgufConfig always dequantise


def _split_digits(tokenizer: Any) -> None:
    """Adds the digit split that the GGUF file names but transformers' conversion leaves out.

    Without it a number after several spaces takes other tokens than those the model was trained with.
    """
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
