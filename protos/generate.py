"""Generates the Python stubs beside the .proto files: ``python protos/generate.py``; ``--check`` only compares."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent
PACKAGE = Path("kvpilot/v1")
PATTERNS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py")


def generate(into: Path) -> None:
    """Writes the stubs of every .proto file below ``into``."""
    protos = [str(path) for path in sorted((ROOT / PACKAGE).glob("*.proto"))]
    include = Path(protoc.__file__).parent / "_proto"
    outputs = [f"--{kind}_out={into}" for kind in ("python", "pyi", "grpc_python")]
    if protoc.main(["protoc", f"-I{ROOT}", f"-I{include}", *outputs, *protos]) != 0:
        raise SystemExit("protoc failed")
    for stub in (into / PACKAGE).glob("*_pb2_grpc.py"):
        if stub.with_suffix("").name.removesuffix("_pb2_grpc") not in _with_services():
            stub.unlink()


def _with_services() -> set[str]:
    return {path.stem for path in (ROOT / PACKAGE).glob("*.proto") if "\nservice " in path.read_text()}


def _stubs(base: Path) -> dict[str, str]:
    found = (path for pattern in PATTERNS for path in (base / PACKAGE).glob(pattern))
    return {path.name: path.read_text() for path in found}


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the checked-in stubs are stale")
    if not parser.parse_args().check:
        generate(ROOT)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh, kept = _stubs(Path(folder)), _stubs(ROOT)
    stale = sorted(name for name in fresh.keys() | kept.keys() if fresh.get(name) != kept.get(name))
    if stale:
        print(f"stale stubs: {', '.join(stale)}; run `python protos/generate.py`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
