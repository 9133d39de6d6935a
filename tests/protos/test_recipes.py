"""Recipes: what the file may hold, what is said of a bad one, and how a catalog reads their names."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvpilot.catalog import StageCatalog
from kvpilot.pipeline import PipelineError, format_pipeline, parse_pipeline
from kvpilot.recipes import Recipe, RecipesError, read_recipes, recipes
from kvpilot.request import SCENARIOS
from kvpilot.v1 import generation_pb2
from tests.controller.scripted import CATALOG, stages

GOOD = """
[fast-and-small]
pipeline = "kivi(bits=4)"
summary = "Four bits."
source = "A paper"
scenarios = ["edge", "mixed"]
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "recipes.toml"
    file.write_text(text)
    return file


def test_a_file_is_read_in_its_order(tmp_path: Path) -> None:
    found = read_recipes(write(tmp_path, GOOD + GOOD.replace("fast-and-small", "another")))
    assert list(found) == ["fast-and-small", "another"]
    assert found["another"] == Recipe("another", "kivi(bits=4)", "Four bits.", "A paper", ("edge", "mixed"))


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('"kivi(bits=4)"', '"kivi(bits="', "recipe 'fast-and-small': field 'pipeline': 'kivi(bits=' given; accepted"),
        ('"kivi(bits=4)"', "4", "field 'pipeline': 4 given; accepted: a text that is not empty"),
        ('"kivi(bits=4)"', '"fast-and-small"', "'fast-and-small' given; accepted: stages, not the name of a recipe"),
        ('"Four bits."', '" "', "field 'summary': ' ' given; accepted: a text that is not empty"),
        ('source = "A paper"', "", "field 'source': not set; accepted: a text that is not empty"),
        ('"mixed"', '"fast"', "field 'scenarios': ['edge', 'fast'] given; accepted: a list out of long-context"),
        ('["edge", "mixed"]', '"edge"', "field 'scenarios': 'edge' given; accepted: a list"),
        ('["edge", "mixed"]', "[]", "field 'scenarios': [] given"),
        ("summary", "sumary", "unknown field 'sumary'; accepted: pipeline, summary, source, scenarios"),
        ("[fast-and-small]", '["fast | small"]', "recipe 'fast | small': accepted as a name"),
        ("[fast-and-small]", '["kivi()"]', "recipe 'kivi()': accepted as a name"),
        ("[fast-and-small]", "version = 1\n[other]", "recipe 'version': 1 given; accepted: a table with pipeline"),
        ("[fast-and-small]", "[fast-and-small", "not TOML"),
    ],
)
def test_a_bad_file_is_refused_with_file_recipe_field_value_and_what_is_accepted(
    tmp_path: Path, before: str, after: str, said: str
) -> None:
    file = write(tmp_path, GOOD.replace(before, after))
    with pytest.raises(RecipesError) as caught:
        read_recipes(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert said in str(caught.value)


def test_a_name_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipesError, match="not TOML"):
        read_recipes(write(tmp_path, GOOD + GOOD))


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecipesError) as caught:
        read_recipes(write(tmp_path, GOOD.replace("4", "?").replace("edge", "edgy")))
    assert "field 'pipeline'" in str(caught.value)
    assert "field 'scenarios'" in str(caught.value)


@pytest.mark.parametrize("recipe", recipes().values(), ids=recipes())
def test_what_comes_with_kvpilot(recipe: Recipe) -> None:
    assert format_pipeline(parse_pipeline(recipe.pipeline)) == recipe.pipeline
    assert recipe.summary.endswith(".")
    assert "arXiv " in recipe.source
    assert set(recipe.scenarios) <= set(SCENARIOS)


@pytest.mark.parametrize("text", ["kivi-2bit", " kivi-2bit "])
def test_a_catalog_reads_a_name_as_its_pipeline(text: str) -> None:
    assert CATALOG.expand(text) == "kivi(bits=2)"
    assert CATALOG.check(text) == parse_pipeline("kivi(bits=2)")
    assert CATALOG.same(text, "kivi(bits=2)")
    assert CATALOG.knows(text)


@pytest.mark.parametrize("text", ["", "full", "kivi(bits=2)", "h2o", "telepathy", "kivi-2bit | host", "kivi-2bit()"])
def test_other_text_stays_as_it_is(text: str) -> None:
    assert CATALOG.expand(text) == text


def test_a_stage_goes_before_a_recipe_of_its_name() -> None:
    """A package's stage may have had the name first."""
    own = generation_pb2.StageInfo(name="adakv", kind="evict")
    catalog = StageCatalog([*stages(), own])
    assert catalog.expand("adakv") == "adakv"
    assert catalog.key("adakv") == (("adakv", ()),)
    assert recipes()["adakv"].pipeline != "adakv"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "kivi-2bit | host",
            "'kivi-2bit' is a recipe: accepted alone and without parameters, or as stages: kivi(bits=2)",
        ),
        ("kivi-2bit(bits=4)", "'kivi-2bit' is a recipe: accepted alone"),
        (
            "kivi-3bit",
            f"unknown stage 'kivi-3bit'; known are {', '.join(sorted(one.name for one in stages()))}; recipes: adakv,",
        ),
        (
            "pyramidkv",
            "recipe 'pyramidkv', which is 'snapkv(keep=0.12, budgets=\"pyramid\")': unknown parameter 'budgets'",
        ),
    ],
)
def test_what_a_worker_does_not_take_is_said(text: str, said: str) -> None:
    with pytest.raises(PipelineError) as caught:
        CATALOG.check(text)
    assert str(caught.value).startswith(said)
