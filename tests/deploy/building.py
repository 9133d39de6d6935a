"""The images' build files, read and carried out without a builder: their own lines, with other folders."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.deploy.rendering import ROOT

IMAGES = ROOT / "deploy" / "images"
FILES = sorted(IMAGES.glob("*.Containerfile"))


@dataclass
class Stage:
    """A stage of a build file: its base, and its instructions in order."""

    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def of(self, instruction: str) -> list[str]:
        """What follows this instruction, each time."""
        return [rest for name, rest in self.steps if name == instruction]

    def environment(self) -> dict[str, str]:
        """Variables that it sets."""
        words = (word for rest in self.of("ENV") for word in shlex.split(rest))
        return dict(word.split("=", 1) for word in words)


@dataclass
class BuildFile:
    """A build file: arguments before its first stage, and the stages."""

    arguments: dict[str, str]
    stages: list[Stage]

    @classmethod
    def read(cls, path: Path) -> BuildFile:
        """Raises AssertionError for what not every builder understands."""
        text = re.sub(r"(?m)^#.*\n", "", path.read_text())
        assert "<<" not in text, "here-documents need BuildKit"
        found = cls({}, [])
        for line in re.sub(r"\\\n\s*", "", text).splitlines():
            if not line.strip():
                continue
            instruction, _, rest = line.partition(" ")
            assert not rest.lstrip().startswith("--") or rest.lstrip().startswith("--from="), f"not everywhere: {line}"
            if instruction == "FROM":
                base, _, name = rest.partition(" AS ")
                found.stages.append(Stage(base, name))
            elif not found.stages:
                assert instruction == "ARG"
                name, _, value = rest.partition("=")
                found.arguments[name] = value
            else:
                found.stages[-1].steps.append((instruction, rest))
        return found


def context(folder: Path) -> None:
    """Copies what a builder would be sent of the checkout: what .dockerignore lets through."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    for line in lines[1:]:
        if line.startswith("!"):
            source = ROOT / line[1:]
            target = folder / line[1:]
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
            else:
                shutil.copy2(source, target)
        elif not line.startswith("**"):
            shutil.rmtree(folder / line, ignore_errors=True)


def carry_out(stage: Stage, folders: Mapping[str, Path], environment: Mapping[str, str]) -> None:
    """Runs a stage's COPY and RUN lines with these folders in place of the image's.

    Args:
        folders: path in the image -> path here; ``.`` is the build's context.
        environment: of the commands, beside the stage's ARG defaults.
    """
    variables = dict(environment)
    for instruction, rest in stage.steps:
        if instruction == "ARG":
            name, _, value = rest.partition("=")
            variables.setdefault(name, value)
        elif instruction == "COPY":
            *sources, target = rest.split()
            _copy([folders["."] / source for source in sources], elsewhere(target, folders))
        elif instruction == "RUN":
            command = elsewhere(rest, folders)
            done = subprocess.run(["sh", "-c", command], env=variables, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def _copy(sources: list[Path], target: str) -> None:
    for source in sources:
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            Path(target).mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


def elsewhere(text: str, folders: Mapping[str, Path]) -> str:
    """A text of the image with paths of this machine."""
    known = "|".join(re.escape(image) for image in folders if image != ".")
    return re.sub(rf"(?<![\w./-])({known})(?=[/\s:\"',]|$)", lambda found: str(folders[found[1]]), text)
