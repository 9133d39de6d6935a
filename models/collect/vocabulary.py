"""A model's tokenizer and chat template, from its folder in the store; without transformers, and so without torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from models.collect.document import Turn


class VocabularyError(ValueError):
    """The folder has no tokenizer that can be used, or no chat template where one is needed."""


class Vocabulary(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str, first: bool = False) -> list[int]:
        """Token ids of a text; ``first``: it begins the sequence, with what the model puts before."""
        ...

    def render(self, turns: Sequence[Turn], answer: bool) -> str:
        """A conversation as text; ``answer``: the assistant's turn opened behind it.

        Raises:
            VocabularyError: the model is not made for conversations.
        """
        ...


class StoredVocabulary:
    """That of a model in the local store.

    Raises:
        VocabularyError: ``folder`` holds no ``tokenizer.json``.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        file = folder / "tokenizer.json"
        if not file.is_file():
            raise VocabularyError(f"{file}: not there; texts are cut by the tokens of the model that measures them")
        self._tokenizer: Any = Tokenizer.from_file(str(file))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._folder = folder
        self._settings = _read_json(folder / "tokenizer_config.json")
        self._template: Any = None

    def encode(self, text: str, first: bool = False) -> list[int]:
        """Token ids of a text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=first).ids
        return ids

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.encode(text))

    def render(self, turns: Sequence[Turn], answer: bool) -> str:
        """A conversation as text."""
        if self._template is None:
            self._template = self._read_template()
        messages = [{"role": role, "content": content} for role, content in turns]
        named = {
            name: value["content"] if isinstance(value, dict) else value
            for name, value in self._settings.items()
            if name.endswith("_token")
        }
        text: str = self._template.render(messages=messages, add_generation_prompt=answer, **named)
        return text

    def _read_template(self) -> Any:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        file = self._folder / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.is_file() else self._settings.get("chat_template")
        if not isinstance(source, str):
            raise VocabularyError(f"{self._folder.name} has no chat template")

        def refuse(message: str) -> None:
            raise VocabularyError(f"the chat template refuses: {message}")

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        return environment.from_string(source)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document
