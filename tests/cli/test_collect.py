"""``kvpilot models collect`` as it is called, against a service that measures by rule."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner, Result

from cli.main import app
from models import dataset
from models.collect.vocabulary import StoredVocabulary, VocabularyError
from tests.measuring import CANDIDATES, MODEL, Measurer, RefusalError, Served, serve

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "[{{ message.role }}]{{ message.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def served() -> Iterator[Served]:
    running = serve(Measurer())
    yield running
    running.server.stop(0)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache folder whose model store holds a tokenizer of one token per byte."""
    folder = tmp_path / "cache" / "models" / MODEL
    folder.mkdir(parents=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    return tmp_path / "cache"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"text {number} says nothing in particular. " * 30)
    (folder / "short.txt").write_text("too short")
    return folder


def candidates(folder: Path, *pipelines: str) -> str:
    file = folder / "candidates.txt"
    file.write_text("\n".join(pipelines or CANDIDATES))
    return str(file)


def run(served: Served, cache: Path, *words: str, with_candidates: bool = True) -> Result:
    given = ("--candidates", candidates(cache.parent)) if with_candidates else ()
    command = ["models", "collect", "-e", served.target, "--max-tokens", "400", "--min-tokens", "200", *given, *words]
    return CliRunner().invoke(app, command, env={"KVPILOT_CACHE": str(cache), "COLUMNS": "200", "NO_COLOR": "1"})


def test_a_folder_of_texts_and_tasks(served: Served, cache: Path, texts: Path) -> None:
    served.measurer.described.context_tokens = 4096
    result = run(served, cache, str(texts), "--tasks", "7")
    assert result.exit_code == 0, result.output
    folder = cache / "datasets" / MODEL
    assert result.stdout.strip().splitlines()[-1] == str(folder)
    assert "11 documents with" in result.stderr
    assert "skipped: 1 too short" in result.stderr
    table = dataset.read(folder)
    kinds = set(table["kind"].unique().to_pylist())
    assert {"prose", "needle-single", "variable-tracking", "chat-recall", "common-words"} <= kinds
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["options"]["tasks"] == 7
    assert manifest["options"]["source"] == str(texts)
    assert sum(count for splits in manifest["documents"].values() for count in splits.values()) == 11
    assert manifest["skipped"] == {"too short": 1}
    again = run(served, cache, str(texts), "--tasks", "7")
    assert again.exit_code == 0
    assert "0 documents with 0 places" in again.stderr
    assert "11 there already" in again.stderr


def test_prompts_with_a_limit_into_a_folder(served: Served, cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    talk = [{"role": "user", "content": "Hi! " * 40}, {"role": "assistant", "content": "Hello! " * 10}]
    lines = [{"messages": talk, "id": "talk"}, {"prompt": "word " * 60, "completion": " end" * 9, "id": "exam"}]
    file.write_text("\n".join(map(json.dumps, lines)))
    assert run(served, cache, str(file), "--out", str(tmp_path / "out"), "--places", "1").exit_code == 0
    table = dataset.read(tmp_path / "out")
    at = dict(zip(table["document"].to_pylist(), table["at_token"].to_pylist(), strict=True))
    assert at == {"prompts/talk": len("[user]" + "Hi! " * 40 + "[assistant]"), "prompts/exam": 300}
    assert run(served, cache, str(file), "--out", str(tmp_path / "one"), "--limit", "1").exit_code == 0
    assert len(dataset.read(tmp_path / "one")["document"].unique()) == 1


def test_failed_documents_are_named_at_the_end(served: Served, cache: Path, texts: Path) -> None:
    def refuse(request: Any, number: int) -> None:
        if request == next(iter(served.measurer.jobs.values())):
            raise RefusalError(grpc.StatusCode.RESOURCE_EXHAUSTED, "can never fit")

    served.measurer.step = refuse
    result = run(served, cache, str(texts))
    assert result.exit_code == 1
    assert "1 documents failed, 3 are measured; the next run tries them again:\n  texts/" in result.stderr
    assert result.stderr.endswith(".txt: can never fit\n")


def test_a_stop_signal_leaves_a_folder_to_go_on_with(served: Served, cache: Path, texts: Path) -> None:
    go = threading.Event()

    def hold(request: Any, number: int) -> None:
        if len(served.measurer.jobs) >= 3:
            if not go.is_set():
                os.kill(os.getpid(), signal.SIGINT)
            go.wait(20)

    served.measurer.step = hold
    result = run(served, cache, str(texts))
    go.set()
    assert result.exit_code == 130
    assert "the same command goes on from here" in result.stderr
    result = run(served, cache, str(texts))
    assert result.exit_code == 0, result.output
    assert len(dataset.read(cache / "datasets" / MODEL)["document"].unique()) == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "nothing to measure: give SOURCE, --builtin, --outcomes, --audits or --tasks"),
        (("nowhere",), "nowhere: no folder"),
        (("nowhere.jsonl",), "nowhere.jsonl: No such file"),
        (("--tasks", "1", "--min-tokens", "500"), "--min-tokens: 500 given; at most --max-tokens, 400"),
        (("--tasks", "1", "--model", "other"), "--model: other given; served: scripted"),
        (("--outcomes",), "--outcomes: name the job store with --redis-url"),
        (("--audits",), "--audits: name the job store with --redis-url"),
        (("--tasks", "1", "--horizon", "300"), "--horizon"),
    ],
)
def test_bad_command_lines_are_refused(served: Served, cache: Path, words: tuple[str, ...], said: str) -> None:
    result = run(served, cache, *words)
    assert result.exit_code == 2
    assert said in result.output


def test_candidates_that_the_model_does_not_know_are_refused(served: Served, cache: Path) -> None:
    candidates(cache.parent, "h3o(keep=0.5)")
    file = str(cache.parent / "candidates.txt")
    result = run(served, cache, "--tasks", "1", "--candidates", file, with_candidates=False)
    assert result.exit_code == 2
    assert "'h3o(keep=0.5)': unknown stage 'h3o'; known are" in result.output


def test_nothing_answers(served: Served, cache: Path) -> None:
    served.server.stop(0).wait()
    result = run(served, cache, "--tasks", "1")
    assert result.exit_code == 1
    assert "nothing answers at" in result.output


def test_a_vocabulary_needs_its_files(cache: Path, tmp_path: Path) -> None:
    vocabulary = StoredVocabulary(cache / "models" / MODEL)
    assert vocabulary.render([("user", "x")], answer=True) == "[user]x[assistant]"
    assert len(vocabulary.encode("äb")) == vocabulary.count("äb") == 3
    with pytest.raises(VocabularyError, match="the chat template refuses: no system turns"):
        vocabulary.render([("system", "x")], answer=False)
    with pytest.raises(VocabularyError, match=r"tokenizer.json: not there"):
        StoredVocabulary(tmp_path)
    (cache / "models" / MODEL / "chat_template.jinja").unlink()
    with pytest.raises(VocabularyError, match="has no chat template"):
        StoredVocabulary(cache / "models" / MODEL).render([("user", "x")], answer=True)
