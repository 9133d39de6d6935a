"""Recipes: named pipelines, read from ``recipes.toml`` beside this module.

Front door, worker, planner and command line read pipeline text through :mod:`kvpilot.catalog`, which asks here what a
name stands for. The names are therefore where the grammar is, and not with the worker's stages, which a controller
does not import.
"""

from __future__ import annotations

import tomllib
from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kvpilot.pipeline import PipelineError, parse_pipeline
from kvpilot.request import SCENARIOS

FILE = Path(__file__).with_name("recipes.toml")
_FIELDS = ("pipeline", "summary", "source", "scenarios")


class RecipesError(ValueError):
    """A file of recipes that cannot be used; names the file, each bad recipe, field and value, and what is accepted."""


@dataclass(frozen=True)
class Recipe:
    """A pipeline with a name."""

    name: str
    pipeline: str
    """Pipeline text of stages only."""
    summary: str
    """A sentence."""
    source: str
    """The paper it is from."""
    scenarios: tuple[str, ...]
    """Those it suits, in the words of :data:`kvpilot.request.SCENARIOS`."""


@cache
def recipes() -> Mapping[str, Recipe]:
    """All recipes by name, in the file's order.

    Raises:
        RecipesError: as :func:`read_recipes`.
    """
    return read_recipes(FILE)


def read_recipes(file: Path) -> Mapping[str, Recipe]:
    """Reads a file of recipes. Whether their stages exist is the catalog's business, which knows stages.

    Raises:
        RecipesError: everything that is wrong with it.
        OSError: it cannot be read.
    """
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipesError(f"{file}: not TOML: {error}") from None
    wrong = [
        f"recipe {name!r}: {complaint}"
        for name, table in tables.items()
        for complaint in _complaints(name, table, tables)
    ]
    if wrong:
        raise RecipesError("\n  ".join([f"{file}: recipes not accepted:", *wrong]))
    found = (
        Recipe(name, table["pipeline"], table["summary"], table["source"], tuple(table["scenarios"]))
        for name, table in tables.items()
    )
    return MappingProxyType({recipe.name: recipe for recipe in found})


def _complaints(name: str, table: Any, names: Container[str]) -> list[str]:
    """What is wrong with one entry of a file that has entries of these names."""
    if not _is_name(name):
        return ["accepted as a name: what pipeline text takes for a stage's, letters, digits, _ and -"]
    if not isinstance(table, dict):
        return [f"{table!r} given; accepted: a table with {', '.join(_FIELDS)}"]
    wrong = [f"unknown field {field!r}; accepted: {', '.join(_FIELDS)}" for field in table if field not in _FIELDS]
    for field in ("pipeline", "summary", "source"):
        value = table.get(field)
        if not isinstance(value, str) or not value.strip():
            wrong.append(f"field {field!r}: {_given(table, field)}; accepted: a text that is not empty")
        elif field == "pipeline" and value.strip() in names:
            wrong.append(f"field 'pipeline': {value!r} given; accepted: stages, not the name of a recipe")
        elif field == "pipeline":
            try:
                parse_pipeline(value)
            except PipelineError as error:
                wrong.append(f"field 'pipeline': {value!r} given; accepted: pipeline text: {error}")
    scenarios = table.get("scenarios")
    if not isinstance(scenarios, list) or not scenarios or not all(word in SCENARIOS for word in map(str, scenarios)):
        wrong.append(f"field 'scenarios': {_given(table, 'scenarios')}; accepted: a list out of {', '.join(SCENARIOS)}")
    return wrong


def _given(table: dict[str, Any], field: str) -> str:
    return f"{table[field]!r} given" if field in table else "not set"


def _is_name(name: str) -> bool:
    try:
        (stage,) = parse_pipeline(name)
    except ValueError:
        return False
    return stage.name == name
