"""Renders the chart, and with it the plain manifests of deploy/manifests.

``python deploy/tools/render.py`` writes them anew; ``--check`` says which are stale.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

DEPLOY = Path(__file__).parent.parent
CHART = DEPLOY / "helm" / "kvpilot"
MANIFESTS = DEPLOY / "manifests"
SETS = {"cpu": "ci/cpu-values.yaml", "gpu": "ci/gpu-values.yaml"}
"""Manifests by name, and the values that each is rendered from."""
NAMESPACE = "kvpilot"
RELEASE = "kvpilot"


def helm(*arguments: str) -> str:
    """What helm prints.

    Raises:
        ValueError: it fails; with what it says.
    """
    path = [str(Path(__file__).parent / "binaries.py"), "helm"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(DEPLOY.parent), os.environ.get("PYTHONPATH", "")])}
    binary = subprocess.run([sys.executable, *path], env=environment, check=True, capture_output=True, text=True)
    with tempfile.TemporaryDirectory() as home:
        homes = {f"HELM_{kind}_HOME": home for kind in ("CACHE", "CONFIG", "DATA")}
        done = subprocess.run(
            [binary.stdout.strip(), *arguments], env=os.environ | homes, capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise ValueError(f"helm {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def template(*values: Path | str, release: str = RELEASE, namespace: str = NAMESPACE) -> str:
    """The chart's objects with the defaults and these files of values, as YAML."""
    files = [word for path in values for word in ("--values", str(path))]
    return helm("template", release, str(CHART), "--namespace", namespace, *files)


def manifests() -> dict[Path, str]:
    """The plain manifests as they should be."""
    found = {}
    for name, values in SETS.items():
        head = (
            f"# kvpilot without Helm, {name}: deploy/README.md says what to change in it and how to apply it."
            f"\n# Made by deploy/tools/render.py from deploy/helm/kvpilot/{values}: do not edit.\n"
            f"apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {NAMESPACE}\n"
            "  labels: {pod-security.kubernetes.io/enforce: restricted}\n"
        )
        found[MANIFESTS / f"{name}.yaml"] = head + template(CHART / values)
    return found


def main() -> int:
    """Writes or checks; returns the exit code."""
    wanted = manifests()
    if "--check" in sys.argv[1:]:
        stale = [str(path) for path, text in wanted.items() if not path.exists() or path.read_text() != text]
        if stale:
            print(f"stale: {', '.join(stale)}; make them anew: python deploy/tools/render.py", file=sys.stderr)
        return 1 if stale else 0
    MANIFESTS.mkdir(exist_ok=True)
    for path, text in wanted.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
