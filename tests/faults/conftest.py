"""Shared by the tests of this folder: the tiny model on disk, and the same as transformers runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.serving import CONTEXT
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as any model lies on disk."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model(attention="sdpa", max_position_embeddings=CONTEXT).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def transformers_model(tiny_folder: Path) -> Any:
    """The same model as transformers runs it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
