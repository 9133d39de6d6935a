"""``kvpilot recipes``: named pipelines and the scenarios' static ones, and what their caches would take."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from cli import text
from cli.errors import BadInputError
from kernels.layout import CacheShape
from kvpilot.pipeline import PipelineError
from kvpilot.recipes import recipes
from models import profiles, store
from models.scenarios import PRESETS, scenario_word
from workers.cache.accounting import CacheUse
from workers.engine.attention import cache_shape, check_servable
from workers.expected import expected_use
from workers.profile import files
from workers.profile.profile import ModelProfile, names_of
from workers.stages.base import Pipeline
from workers.stages.registry import build


@dataclass(frozen=True)
class Setting:
    """What the bytes are for."""

    model: str
    shape: CacheShape
    context_tokens: int
    profile: ModelProfile | None = None

    @classmethod
    def of(cls, model: str, context_tokens: int, dtype: str) -> Setting:
        """Reads the configuration in the model's folder, and its profile if there is one; its weights are not read.

        Raises:
            ModelNotFoundError: there is no such model here.
            BadInputError: kvpilot does not serve it, or its context is shorter.
        """
        from transformers import AutoConfig

        folder = store.resolve(model)
        try:
            config = AutoConfig.from_pretrained(folder)
            check_servable(config)
            shape = cache_shape(config, getattr(torch, dtype))
        except ValueError as error:
            raise BadInputError(f"--model {model}: {error}") from None
        if context_tokens > config.max_position_embeddings:
            raise BadInputError(
                f"--context {context_tokens}: {store.model_name(folder)} takes 1 to {config.max_position_embeddings}"
            )
        return cls(store.model_name(folder), shape, context_tokens, _profile(folder, shape))

    def document(self) -> dict[str, Any]:
        """For ``--json``."""
        full = expected_use(Pipeline(), self.shape, self.context_tokens)
        return {
            "model": self.model,
            "context_tokens": self.context_tokens,
            "dtype": str(self.shape.dtype).removeprefix("torch."),
            "full_bytes": full.full_bytes,
            "full_bytes_16bit": full.full_bytes_16bit,
        }


@dataclass(frozen=True)
class Taken:
    """What one pipeline would take, or why it cannot serve the model."""

    loss: str = ""
    use: CacheUse | None = None
    unfit: str = ""

    @classmethod
    def by(cls, pipeline: str, setting: Setting) -> Taken:
        """Of a pipeline's text."""
        try:
            built = build(pipeline, setting.shape, names_of(setting.profile))
        except PipelineError as error:
            return cls(unfit=str(error))
        use = expected_use(built, setting.shape, setting.context_tokens, setting.profile)
        return cls(built.loss_class.name.lower(), use)

    def cells(self) -> list[str]:
        """Loss, device, its shares of full as stored and in a 16-bit reckoning, host, disk, exact copy."""
        if self.use is None:
            return ["-"] * 7
        use = self.use
        return [
            self.loss,
            text.size(use.device_bytes),
            text.share(use.device_bytes, use.full_bytes),
            text.share(use.device_bytes_16bit, use.full_bytes_16bit),
            text.size(use.host_bytes),
            text.size(use.disk_bytes),
            text.size(use.shadow_bytes),
        ]

    def document(self) -> dict[str, Any]:
        """For ``--json``; the figures are null where the model cannot be served."""
        use = self.use
        return {
            "unfit": self.unfit,
            "loss_class": self.loss or None,
            "device_bytes": use and use.device_bytes,
            "device_share": use and use.device_bytes / use.full_bytes,
            "device_bytes_16bit": use and use.device_bytes_16bit,
            "device_share_16bit": use and use.device_bytes_16bit / use.full_bytes_16bit,
            "host_bytes": use and use.host_bytes,
            "disk_bytes": use and use.disk_bytes,
            "shadow_bytes": use and use.shadow_bytes,
        }


def _profile(folder: Path, shape: CacheShape) -> ModelProfile | None:
    try:
        found = profiles.find_profile(folder)
        return files.load(found, profiles.hash_model(folder), None, shape) if found else None
    except (profiles.ProfileError, OSError):  # a worker's log says more
        return None


def show(model: str, context_tokens: int, dtype: str, scenarios: bool, as_json: bool) -> None:
    """Prints the recipes, or the scenarios' static pipelines.

    Raises:
        ModelNotFoundError, BadInputError: as :meth:`Setting.of`.
    """
    setting = Setting.of(model, context_tokens, dtype)
    if scenarios:
        _show_scenarios(setting, as_json)
    else:
        _show_recipes(setting, as_json)


def _show_recipes(setting: Setting, as_json: bool) -> None:
    rows = [(recipe, Taken.by(recipe.pipeline, setting)) for recipe in recipes().values()]
    if as_json:
        entries = [
            {
                "name": recipe.name,
                "pipeline": recipe.pipeline,
                **taken.document(),
                "scenarios": list(recipe.scenarios),
                "summary": recipe.summary,
                "source": recipe.source,
            }
            for recipe, taken in rows
        ]
        print(json.dumps(setting.document() | {"recipes": entries}))
        return
    _print_bytes("recipe", [(recipe.name, recipe.pipeline, taken) for recipe, taken in rows], setting)
    about = Table("recipe", "suits", "what it is", "source", box=box.SIMPLE_HEAD, pad_edge=False)
    for recipe, taken in rows:
        about.add_row(recipe.name, ", ".join(recipe.scenarios), taken.unfit or recipe.summary, recipe.source)
    Console().print(about)


def _show_scenarios(setting: Setting, as_json: bool) -> None:
    rows = [(scenario_word(scenario), preset, Taken.by(preset.static, setting)) for scenario, preset in PRESETS.items()]
    if as_json:
        entries = [
            {"scenario": word, "pipeline": preset.static, "max_divergence": preset.max_divergence, **taken.document()}
            for word, preset, taken in rows
        ]
        print(json.dumps(setting.document() | {"scenarios": entries}))
        return
    _print_bytes("scenario", [(word, preset.static, taken) for word, preset, taken in rows], setting)
    for word, _, taken in rows:
        if taken.unfit:
            print(f"{word}: {taken.unfit}")


def _print_bytes(what: str, rows: Iterable[tuple[str, str, Taken]], setting: Setting) -> None:
    said = setting.document()
    full = text.size(said["full_bytes"])
    title = f"{said['model']}, {said['context_tokens']} tokens, {said['dtype']}: full takes {full}"
    table = Table(what, "pipeline", "loss", title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("device", "of full", "16-bit", "host", "disk", "exact copy"):
        table.add_column(column, justify="right")
    for name, pipeline, taken in rows:
        table.add_row(name, pipeline, *taken.cells())
    Console().print(table)
