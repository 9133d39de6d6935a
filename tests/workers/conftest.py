"""Fixtures of several files: engines whose caches have files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny import tiny_engine, tiny_loaded
from workers.cache import arena
from workers.engine.engine import Engine

LAYERS = 5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "blocks"


@pytest.fixture
def engines(folder: Path) -> Iterator[object]:
    """Makes engines with a disk tier, and stops them in the end."""
    made: list[Engine] = []

    def make(**settings: object) -> Engine:
        loaded = tiny_loaded(num_hidden_layers=LAYERS)
        defaults = {"disk_folder": folder, "disk_budget_bytes": 64 << 20}
        made.append(tiny_engine(loaded, **(defaults | settings)))
        return made[-1]

    yield make
    for engine in made:
        engine.stop(1.0)
    assert not list(folder.glob("worker-*"))


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fills arenas with numbers that are none, in every format: whoever reads what nobody wrote shows it."""
    plain = arena._memory
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arena, "_memory", lambda size, device: plain(size, device).fill_(0xFF))
        yield
