"""The learned side needs neither torch nor, for predicting, what only training and reports need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import models

NAMES = sorted(f"models.{path.stem}" for path in Path(models.__file__).parent.glob("*.py") if path.stem != "__init__")
SERVING = ("models.bundle", "models.registry", "models.promotion", "models.online")


def loaded_by(*names: str) -> set[str]:
    program = f"import sys, {', '.join(names)}; print(*sorted(sys.modules))"
    return set(
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    )


def test_no_torch() -> None:
    assert len(NAMES) > 20
    assert "torch" not in loaded_by(*NAMES)


def test_predicting_needs_no_training() -> None:
    assert not {"matplotlib", "optuna", "torch", "models.training"} & loaded_by(*SERVING)
