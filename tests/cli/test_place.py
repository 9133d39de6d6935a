"""``kvpilot place``, from nothing but a model's folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from cli.main import app
from kernels.layout import CacheShape, Tier
from kvpilot.pipeline import parse_pipeline
from tests.cli.test_recipes import folder
from workers.expected import expected_use
from workers.placement import demand_of, pipeline_of, solve
from workers.stages.registry import build

SHAPE = CacheShape(layers=6, kv_heads=2, query_heads=4, head_dim=16, dtype=torch.float32)
SIZES = ("--device-bytes", "750KB", "--host-bytes", "400KB", "--disk-bytes", "10MB")
RATES = ("--device-rate", "100", "--host-rate", "10", "--disk-rate", "2")


def run(model: str, *words: str) -> Result:
    common = ("place", "--model", model, "--context", "3000")
    return CliRunner().invoke(app, [*common, *words], env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_the_pipeline_is_that_of_the_programme_and_fits(tmp_path: Path) -> None:
    model = folder(tmp_path, num_hidden_layers=6)
    result = run(model, *SIZES, *RATES)
    assert result.exit_code == 0, result.output
    pipeline = result.stdout.strip()
    codec = build("kivi(bits=4, shadow=false)", SHAPE).codec
    budget = {Tier.DEVICE: 750_000, Tier.HOST: 400_000, Tier.DISK: 10_000_000}
    found = solve(demand_of(codec, SHAPE, 3000, 1), budget, {Tier.DEVICE: 1e11, Tier.HOST: 1e10, Tier.DISK: 2e9})
    assert pipeline == pipeline_of(codec, found).text
    assert [stage.name for stage in parse_pipeline(pipeline)] == ["kivi", "spread"]
    use = expected_use(build(pipeline, SHAPE), SHAPE, 3000)
    assert use.device_bytes <= 750_000
    assert use.host_bytes <= 400_000
    assert use.disk_bytes > 0
    assert f"{found.disk:.1%}" in result.stderr
    said = json.loads(run(model, *SIZES, *RATES, "--json").stdout)
    assert (said["pipeline"], said["measured"]) == (pipeline, [])
    assert said["shares"] == {"device": found.device, "host": found.host, "disk": found.disk}
    assert said["step_seconds"] == found.seconds


def test_rates_that_are_not_given_are_measured(tmp_path: Path) -> None:
    said = json.loads(run(folder(tmp_path, num_hidden_layers=6), *SIZES, "--disk-rate", "2", "--json").stdout)
    assert said["measured"] == ["device", "host"]
    assert said["bytes_per_s"]["disk"] == 2e9
    assert said["bytes_per_s"]["device"] > 1e7


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--host-bytes", "1MB", "--device-bytes", "much"), "--device-bytes 'much': accepted: a number of bytes"),
        (("--host-bytes", "1KB", "--device-bytes", "100KB"), "--context 3000, --batch 1: "),
        (("--host-bytes", "1MB", "--device-bytes", "5MB", "--codec", "host"), "--codec 'host': accepted: one compress"),
        (("--host-bytes", "1MB", "--device-bytes", "5MB", "--codec", "aged"), "stage 'aged' has several formats"),
        (("--host-bytes", "1MB", "--device-bytes", "5MB", "--codec", "kivi(bits=3)"), "--codec: parameter 'bits'"),
        (("--host-bytes", "1MB", "--device-bytes", "5MB", "--host-rate", "-1"), "tier host: -1e+09 bytes/s given"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    result = run(
        folder(tmp_path, num_hidden_layers=6),
        "--device-rate",
        "1",
        *(() if "--host-rate" in words else ("--host-rate", "1")),
        *words,
    )
    assert result.exit_code == 2
    assert said in result.output
