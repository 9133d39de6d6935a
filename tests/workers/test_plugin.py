"""The template of a package with stages, ``tests/plugin``: installed as its users would, listed, built, conforming."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from workers.stages.registry import ENTRY_POINT_GROUP

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "tests" / "plugin"
STAGES = ("vnorm", "nibble", "spill")
PIPELINE = "vnorm(keep=0.25) | nibble | spill(blocks=2)"


def install(source: Path, into: Path, copy: Path) -> None:
    """Builds and installs a package without a network, from a copy: builds leave files behind."""
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--no-compile"]
    done = subprocess.run([*pip, *offline, "--target", into, copy], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages that holds the template's."""
    folder = tmp_path_factory.mktemp("installed")
    install(TEMPLATE, folder / "packages", folder / "copy")
    return folder / "packages"


def python(*words: str, packages: list[Path]) -> subprocess.CompletedProcess[str]:
    """Runs Python where these folders of packages are."""
    path = os.pathsep.join(map(str, [*packages, ROOT / "protos", ROOT]))
    return subprocess.run(
        [sys.executable, "-P", *words],
        env=os.environ | {"PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


LOOK = f"""
import torch
from kernels.layout import CacheShape
from workers.stages.registry import build, describe, stages
print([name for name, stage in stages().items() if stage.__module__.startswith("kvpilot_plugin_example")])
shape = CacheShape(2, 2, 4, 16, torch.float32)
print(build({PIPELINE!r}, shape).text)
print([info.summary for info in describe(shape) if info.name == "vnorm"])
try:
    build("vnorm(keep=2)", shape)
except ValueError as error:
    print(error)
"""


def test_its_stages_are_listed_and_built_and_a_broken_neighbour_is_left_out(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "kvpilot_broken.py").write_text("import torch_of_nobody\n")
    info = tmp_path / "kvpilot_broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvpilot-broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kvpilot.stages]\nbroken = kvpilot_broken:Broken\n")
    answer = python("-c", LOOK, packages=[installed, tmp_path])
    assert answer.returncode == 0, answer.stderr
    *log, names, text, summary, refusal = answer.stdout.splitlines()
    assert names == str(sorted(STAGES))
    assert text == PIPELINE
    assert summary == "['Tokens with the longest values, and the first four.']"
    assert refusal == (
        "parameter 'keep' of stage 'vnorm': 2.0 given; accepted: more than 0, at most 1 (share of all tokens seen)"
    )
    (line,) = (line for line in log if "stage left out" in line)
    assert "kvpilot_broken:Broken" in line
    assert "No module named 'torch_of_nobody'" in line


def test_the_suite_of_all_stages_runs_over_its_stages(installed: Path) -> None:
    """Every check takes them up by itself, as it does built-in ones, and they pass."""
    suite = ("-m", "pytest", "tests/workers/test_conformance.py", "-vv", "-p", "no:cacheprovider")
    answer = python(*suite, "-k", " or ".join([*STAGES, "knorm", "fp8"]), packages=[installed])
    assert answer.returncode == 0, answer.stdout
    results = re.findall(r"::(\w+)\[(.*)\] (\w+)", answer.stdout)
    assert {result for *_, result in results} == {"PASSED"}

    def checks(stage: str) -> Counter[str]:
        return Counter(check for check, case, _ in results if stage in case)

    assert checks("vnorm") == checks("knorm")
    assert checks("nibble") == checks("fp8")
    assert 10 < len(checks("spill")) < len(checks("nibble"))  # it loses nothing, which saves it some


def test_contributing_shows_its_files_as_they_are() -> None:
    shown = re.findall(r"^```python\n(.*?)^```$", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE)
    assert shown == [(TEMPLATE / "kvpilot_plugin_example" / f"{name}.py").read_text() for name in STAGES]


def test_contributing_shows_a_line_of_its_entry_points() -> None:
    (shown,) = re.findall(r"^```toml\n(.*?)^```$", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE)
    (group, points), *others = tomllib.loads(shown)["project"]["entry-points"].items()
    settings = tomllib.loads((TEMPLATE / "pyproject.toml").read_text())["project"]["entry-points"]
    assert not others
    assert points.items() <= settings[group].items()
    assert set(settings) == {ENTRY_POINT_GROUP}
    assert set(settings[group]) == set(STAGES)
