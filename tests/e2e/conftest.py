"""Shared by the tests of this folder: the tiny model on disk, and one stack that serves it, which no test may harm."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from cli import tether
from kvpilot.client import AsyncClient
from tests.e2e.serving import CONTEXT, Operator, Running, operator_of, serving
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as any model lies on disk."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model(attention="sdpa", max_position_embeddings=CONTEXT).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def transformers_model(tiny_folder: Path) -> Any:
    """The same model as transformers runs it; its ``generate`` never ends early."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="session")
async def shared(
    anyio_backend: str, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Running]:
    """One stack: job store, controller in mode active, one worker. Also for tests that are no coroutines."""
    if not tether.SUPPORTED:
        pytest.skip("needs Linux")
    async with serving(tiny_folder, tmp_path_factory.mktemp("shared")) as running:
        yield running


@pytest.fixture
async def client(shared: Running) -> AsyncIterator[AsyncClient]:
    """A client of the shared stack; afterwards nothing runs there."""
    async with AsyncClient(shared.endpoint) as connected, operator_of(shared) as operator:
        yield connected
        for job_id in await operator.live():
            await connected.cancel(job_id)


@pytest.fixture
async def operator(shared: Running) -> AsyncIterator[Operator]:
    """The operator of the shared stack."""
    async with operator_of(shared) as connected:
        yield connected
