"""``kvpilot recipes``, from nothing but a model's folder."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from cli.main import app
from kernels.layout import CacheShape
from kvpilot import recipes as module
from kvpilot.recipes import RecipesError, recipes
from kvpilot.request import SCENARIOS
from models.profiles import hash_model
from models.scenarios import PRESETS
from tests.tiny import CONTEXT, tiny_config, tiny_model, tiny_profile
from workers.expected import expected_use
from workers.profile.files import save
from workers.stages.registry import build

SHAPE = CacheShape(layers=2, kv_heads=2, query_heads=4, head_dim=16, dtype=torch.float32)
"""That of the tiny model."""


def folder(base: Path, **changes: object) -> str:
    """A model's folder with a configuration; the weights in it are nothing."""
    tiny_config(**changes).save_pretrained(base)
    (base / "model.safetensors").touch()
    return f"{base}/"


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["recipes", *words], env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_the_table_names_every_recipe_and_what_it_takes(tmp_path: Path) -> None:
    result = run("--model", folder(tmp_path), "--context", "1500")
    assert result.exit_code == 0, result.output
    assert f"{tmp_path.name}, 1500 tokens, float32: full takes" in result.output
    for recipe in recipes().values():
        assert recipe.name in result.output
        assert recipe.pipeline in result.output
        assert recipe.scenarios[0] in result.output
    row = next(line for line in result.output.splitlines() if "kivi(bits=2)" in line)
    use = expected_use(build("kivi-2bit", SHAPE), SHAPE, 1500)
    assert "recoverable" in row
    assert f"{use.device_bytes / 1024:.1f} KiB" in row
    assert f"{use.device_bytes / use.full_bytes:.0%}" in row
    assert f"{use.shadow_bytes / 1024:.1f} KiB" in row


def test_json_has_the_same_to_the_byte(tmp_path: Path) -> None:
    result = run("--model", folder(tmp_path), "--context", "1500", "--dtype", "float16", "--json")
    said = json.loads(result.output)
    shape = CacheShape(2, 2, 4, 16, torch.float16)
    assert (said["model"], said["context_tokens"], said["dtype"]) == (tmp_path.name, 1500, "float16")
    assert [entry["name"] for entry in said["recipes"]] == list(recipes())
    unfit = {entry["name"]: entry["unfit"] for entry in said["recipes"] if entry["unfit"]}
    assert list(unfit) == ["tailorkv"]
    assert "needs the model's concentration of attention; `kvpilot model profile NAME` finds them" in unfit["tailorkv"]
    for entry in said["recipes"]:
        if entry["unfit"]:
            continue
        recipe, use = recipes()[entry["name"]], expected_use(build(entry["pipeline"], shape), shape, 1500)
        assert (entry["device_bytes"], entry["host_bytes"]) == (use.device_bytes, use.host_bytes)
        assert entry["shadow_bytes"] == use.shadow_bytes
        assert entry["device_share"] == use.device_bytes / said["full_bytes"]
        assert entry["device_share_16bit"] == use.device_bytes_16bit / said["full_bytes_16bit"]
        assert entry["loss_class"] == "recoverable"
        assert (entry["source"], entry["scenarios"]) == (recipe.source, list(recipe.scenarios))


def test_scenarios_have_a_static_pipeline_each(tmp_path: Path) -> None:
    model = folder(tmp_path)
    said = json.loads(run("--model", model, "--scenarios", "--json").output)
    assert [entry["scenario"] for entry in said["scenarios"]] == list(SCENARIOS)
    assert [entry["pipeline"] for entry in said["scenarios"]] == [preset.static for preset in PRESETS.values()]
    assert [entry["scenario"] for entry in said["scenarios"] if entry["loss_class"] == "exact"] == ["accuracy-critical"]
    shown = run("--model", model, "--scenarios").output
    assert all(word in shown for word in SCENARIOS)


def test_a_stage_that_cannot_serve_the_model_says_so_in_its_row(tmp_path: Path) -> None:
    model = folder(tmp_path, hidden_size=32, head_dim=8)
    said = {entry["name"]: entry for entry in json.loads(run("--model", model, "--json").output)["recipes"]}
    assert "stage 'kivi' cannot serve this model: head_dim 8 is below 16" in said["kivi-2bit"]["unfit"]
    assert said["kivi-2bit"]["device_bytes"] is None
    assert said["streaming-llm"]["device_bytes"] > 0
    shown = run("--model", model)
    assert shown.exit_code == 0
    assert "cannot serve this model" in shown.output
    assert "cannot serve this model" in run("--model", model, "--scenarios").output


def test_a_profile_lets_its_recipes_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVPILOT_CACHE", str(tmp_path / "cache"))
    tiny_model(attention="sdpa").save_pretrained(tmp_path / "tiny")
    profile = replace(tiny_profile(SHAPE), hash=hash_model(tmp_path / "tiny"))
    save(profile)
    said = json.loads(run("--model", f"{tmp_path / 'tiny'}/", "--context", "1500", "--json").output)
    entry = next(entry for entry in said["recipes"] if entry["name"] == "tailorkv")
    use = expected_use(build("tailorkv", SHAPE, profile.names), SHAPE, 1500, profile)
    assert entry["unfit"] == ""
    assert (entry["device_bytes"], entry["host_bytes"]) == (use.device_bytes, use.host_bytes)


def test_bad_input_is_refused(tmp_path: Path) -> None:
    result = run("--model", folder(tmp_path / "tiny"), "--context", str(CONTEXT + 1))
    assert result.exit_code == 2
    assert f"--context {CONTEXT + 1}: tiny takes 1 to {CONTEXT}" in result.output
    result = run("--model", folder(tmp_path / "sliding", model_type="mistral", sliding_window=64))
    assert result.exit_code == 2
    assert "sliding window of 64" in result.output


def test_a_bad_file_of_recipes_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RecipesError("recipes.toml: recipe 'x': field 'pipeline': 4 given")

    monkeypatch.setattr("cli.recipes.recipes", broken)
    result = run("--model", folder(tmp_path))
    assert result.exit_code == 1
    assert "recipe 'x': field 'pipeline': 4 given" in result.output


def test_importing_the_command_line_brings_no_torch() -> None:
    program = "import sys, cli.main; assert not {'torch', 'transformers', 'kvpilot.recipes'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_file_is_one_of_the_package() -> None:
    assert module.FILE.is_file()
