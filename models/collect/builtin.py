"""Real text that lies on a Debian-like machine: licences, Python's library, Perl's manual, packages' documentation."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from models.collect.corpus import Found
from models.collect.document import CODE, PROSE, Document, safe_name

_SHARE = Path("/usr/share")
_LEAST_BYTES = 2_000
_LEAST_DOCSTRINGS_CHARACTERS = 2_000
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3", "encodings"}
_DOCUMENTATION = ("readme", "news", "faq", "todo", "history")
_CHANGES = ("changelog", "changes")
_GNU = ("GPL", "LGPL", "GFDL")


def find_builtin(share: Path = _SHARE, library: Path | None = None) -> list[Found]:
    """What of it there is here."""
    library = library or Path(sysconfig.get_path("stdlib"))
    return [*_licences(share), *_manual(share), *_documentation(share), *_code(library)]


def _licences(share: Path) -> Iterator[Found]:
    for path in _files(share / "common-licenses", "*"):
        if not path.is_symlink():
            family = path.name.partition("-")[0]  # versions of a licence share text, and so do GNU's
            family = "GNU" if family in _GNU else family
            yield Found(f"licences/{safe_name(family)}#{safe_name(path.name)}", path, "licences", PROSE)


def _manual(share: Path) -> Iterator[Found]:
    taken: set[str] = set()
    for path in [*_files(share, "perl/*/pod/*.pod"), *_files(share, "perl*/**/*.pod")]:
        if path.name not in taken:
            taken.add(path.name)
            yield Found(safe_name(f"perl/{path.name}"), path, "manual", PROSE)


def _documentation(share: Path) -> Iterator[Found]:
    for path in _files(share / "doc", "*/*"):
        for group, names in (("documentation", _DOCUMENTATION), ("changes", _CHANGES)):
            if path.name.lower().startswith(names):
                yield Found(safe_name(f"doc/{path.parent.name}/{path.name}"), path, group, PROSE)


def _code(library: Path) -> Iterator[Found]:
    for path in _files(library, "**/*.py"):
        inside = path.relative_to(library)
        if not _LEFT_OUT & set(inside.parts):
            group = "modules" if len(inside.parts) == 1 else "packages"
            yield Found(safe_name(f"python/{inside.as_posix()}"), path, group, CODE)


def _files(folder: Path, pattern: str) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in sorted(folder.glob(pattern)) if path.is_file() and path.stat().st_size >= _LEAST_BYTES]


def docstrings_of(document: Document) -> Document | None:
    """A Python module's documentation as prose, as pydoc would print it; None where there is little of it.

    It has the module as its source, for the module's text holds it.
    """
    if document.kind != CODE or not document.name.endswith(".py") or not isinstance(document.text, str):
        return None
    try:
        tree = ast.parse(document.text)
    except (SyntaxError, ValueError, RecursionError):
        return None
    parts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            said = ast.get_docstring(node)
            if said and len(said) > 80:
                parts.append(said if isinstance(node, ast.Module) else f"{node.name}\n{said}")
    text = "\n\n".join(parts)
    return Document(f"{document.name}#docstrings", PROSE, text) if len(text) >= _LEAST_DOCSTRINGS_CHARACTERS else None
