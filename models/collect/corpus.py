"""Documents from a folder of real text or from a file of prompts."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from models.collect.document import (
    CHAT,
    CODE,
    PROSE,
    Document,
    Turn,
    fingerprint,
    name_by_beginning,
    name_of_chat,
    rng_of,
    safe_name,
)


def _suffixes(names: str) -> frozenset[str]:
    return frozenset(f".{name}" for name in names.split())


CODE_SUFFIXES = _suffixes(
    """
    bash c cc cmake cpp cs el go h hpp hs java jl js jsx kt lua m mk ml php pl pm proto py pyi r rb rs scala sh
    sql swift ts tsx zig
    """
)
PROSE_SUFFIXES = _suffixes(
    """
    adoc htm html md org pod rst tex txt xml
    """
)
MOST_CHARACTERS = 400_000
"""As much of a file is read."""
_ROLES = ("system", "user", "assistant")
_FIELDS = ("prompt", "completion", "messages", "kind", "id")


class CorpusError(ValueError):
    """A source that cannot be read; names every bad line."""


@dataclass(frozen=True)
class Found:
    """A file that may become a document; not read yet.

    Attributes:
        name: the document's name.
        path: the file; ``.gz`` is unpacked.
        group: files of a group are taken in turn with those of the others.
        kind: empty: to be told from suffix and content.
    """

    name: str
    path: Path
    group: str = ""
    kind: str = ""


@dataclass
class Skipped:
    """What was found and not taken, counted by reason."""

    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, reason: str) -> None:
        """Counts one."""
        self.reasons[reason] += 1

    def __str__(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.reasons.items())) or "none"


def find_files(folder: Path) -> list[Found]:
    """All files below a folder, hidden ones aside. Names begin with the folder's own.

    Raises:
        CorpusError: it is no folder.
    """
    if not folder.is_dir():
        raise CorpusError(f"{folder}: no folder")
    root = folder.resolve()
    found = []
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root)
        if path.is_file() and not any(part.startswith(".") for part in inside.parts):
            found.append(Found(safe_name(f"{root.name}/{inside.as_posix()}"), path, _group(path)))
    return found


def _group(path: Path) -> str:
    return CODE if path.suffix.lower() in CODE_SUFFIXES else PROSE


def interleave(found: Iterable[Found], seed: int) -> list[Found]:
    """An order in which any beginning holds the groups in equal numbers, as long as they last."""
    groups: dict[str, list[Found]] = {}
    for file in found:
        groups.setdefault(file.group, []).append(file)
    placed = []
    for group, files in groups.items():
        rng_of(seed, group).shuffle(files)
        placed += [((place, group), file) for place, file in enumerate(files)]
    return [file for _, file in sorted(placed, key=lambda pair: pair[0])]


def read_files(found: Iterable[Found], skipped: Skipped) -> Iterator[Document]:
    """Reads files one by one as documents are asked for; the same text is taken once."""
    known: set[str] = set()
    for file in found:
        text = _read(file.path, skipped)
        if text is None:
            continue
        mark = fingerprint(text)
        if mark in known:
            skipped.add("same text as another")
            continue
        known.add(mark)
        yield Document(file.name, file.kind or kind_of(file.path, text), text)


def _read(path: Path, skipped: Skipped) -> str | None:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(4 * MOST_CHARACTERS)
    except (OSError, EOFError) as error:
        skipped.add(f"unreadable ({type(error).__name__})")
        return None
    if b"\0" in data:
        skipped.add("not text")
        return None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.end < len(data) - 4 or len(data) < 4 * MOST_CHARACTERS:  # else only the cut is to blame
            skipped.add("not UTF-8")
            return None
        text = data[: error.start].decode("utf-8")
    if not text.strip():
        skipped.add("empty")
        return None
    return text[:MOST_CHARACTERS].replace("\r\n", "\n")


def kind_of(path: Path, text: str) -> str:
    """``code`` or ``prose``, by the file's suffix, and where that says nothing by its lines."""
    suffix = (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()
    if suffix in CODE_SUFFIXES:
        return CODE
    if suffix in PROSE_SUFFIXES:
        return PROSE
    if text.startswith("#!"):
        return CODE
    lines = [line.strip() for line in text[:20_000].splitlines() if line.strip()]
    codelike = [
        line
        for line in lines
        if line.endswith((";", "{", "}", "){", "):")) or line.startswith(("#include", "import ", "def ", "return "))
    ]
    return CODE if len(codelike) > 0.25 * len(lines) else PROSE


def read_prompts(path: Path) -> list[Document]:
    """Reads JSON Lines: ``{"prompt": ..., "completion"?: ..., "kind"?: ..., "id"?: ...}`` or
    ``{"messages": [{"role": ..., "content": ...}, ...], ...}``, where a last assistant's turn is the continuation.

    Lines without an id are named by how they begin, so that prompts about one text share a split; the same line is
    taken once.

    Raises:
        CorpusError: naming every bad line by its number, and why.
        OSError: it cannot be read.
    """
    bad: list[str] = []
    documents: list[Document] = []
    names: dict[str, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            document, named = _prompt(line, path.stem)
            first = names.setdefault(document.name, number)
            if first == number:
                documents.append(document)
            elif named:
                raise CorpusError(f"id: that of line {first} again")
        except CorpusError as error:
            bad.append(f"  line {number}: {error}")
    if bad:
        raise CorpusError(f"{path}: {len(bad)} lines not accepted:\n" + "\n".join(bad))
    if not documents:
        raise CorpusError(f"{path}: no prompt in it")
    return documents


def _prompt(line: bytes, source: str) -> tuple[Document, bool]:
    """The document of a line, and whether the line names it."""
    try:
        entry = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise CorpusError(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise CorpusError(f"not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(entry, dict):
        raise CorpusError(f"{type(entry).__name__} given; expected an object")
    if unknown := sorted(set(entry) - set(_FIELDS)):
        raise CorpusError(f"unknown field {unknown[0]!r}; known: {', '.join(_FIELDS)}")
    if ("prompt" in entry) == ("messages" in entry):
        raise CorpusError("exactly one of prompt and messages is expected")
    for name in ("prompt", "completion", "kind", "id"):
        if name in entry and not (isinstance(entry[name], str) and entry[name].strip()):
            raise CorpusError(f"{name}: {entry[name]!r} given; expected text")
    turns = _turns(entry["messages"]) if "messages" in entry else ()
    continuation = entry.get("completion", "")
    if turns and turns[-1][0] == "assistant":
        if continuation:
            raise CorpusError("completion: given although the last message is the assistant's")
        turns, continuation = turns[:-1], turns[-1][1]
    if "id" in entry:
        name = safe_name(entry["id"])
    else:
        begins = name_of_chat(turns) if turns else name_by_beginning(entry["prompt"])
        name = f"{begins}#{hashlib.sha256(line).hexdigest()[:12]}"
    document = Document(
        name=f"{safe_name(source)}/{name}",
        kind=entry.get("kind") or (CHAT if turns else PROSE),
        text=entry.get("prompt", ""),
        continuation=continuation,
        turns=turns,
    )
    return document, "id" in entry


def _turns(messages: object) -> tuple[Turn, ...]:
    if not isinstance(messages, list) or not messages:
        raise CorpusError("messages: expected a list of turns")
    turns = []
    for place, message in enumerate(messages):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise CorpusError(f"messages[{place}]: expected an object with role and content")
        role, content = message["role"], message["content"]
        if role not in _ROLES:
            raise CorpusError(f"messages[{place}].role: {role!r} given; accepted: {', '.join(_ROLES)}")
        if not isinstance(content, str):
            raise CorpusError(f"messages[{place}].content: {type(content).__name__} given; expected text")
        turns.append((role, content))
    if len(turns) == 1 and turns[0][0] == "assistant":
        raise CorpusError("messages: an assistant's turn alone")
    return tuple(turns)


def is_prompts_file(path: Path) -> bool:
    """Whether a source is read as JSON Lines."""
    return path.is_file() or os.fspath(path).endswith((".jsonl", ".ndjson"))
