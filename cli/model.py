"""``kvpilot model``: fetch with a progress bar, list."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from cli import fetch as fetching
from cli import text
from cli.errors import FailedError
from models import profiles, store


def fetch(name: str) -> None:
    """Fetches a model and prints its folder on stdout."""
    source = store.find_source(name)
    console = Console(stderr=True, highlight=False)
    folder = store.models_folder() / source.name
    if store.is_model_folder(folder):
        console.print(f"{source.name} is there already", markup=False)
        print(folder)
        return
    console.print(f"fetching {source.summary}", markup=False)
    try:
        if console.is_terminal:
            with Progress(
                SpinnerColumn(),
                TextColumn("{task.description:<26}"),
                BarColumn(),
                TextColumn("{task.fields[amount]:>22}"),
                TimeElapsedColumn(),
                console=console,
            ) as bars:
                shown = _Bars(bars)
                fetching.fetch(source, shown)
                shown.finish()
        else:
            fetching.fetch(source, _Lines(console))
    except fetching.FetchError as error:
        raise FailedError(str(error)) from None
    print(folder)


class _Bars:
    """One bar per phase; finished ones stay."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._phase = ""
        self._task: TaskID | None = None

    def __call__(self, phase: str, done: int | None, total: int | None) -> None:
        if phase != self._phase:
            self.finish()
            self._phase = phase
            self._task = self._bars.add_task(phase, total=total, amount="")
        if self._task is not None and done is not None and total is not None:
            amount = f"{text.size(done)} of {text.size(total)}"
            self._bars.update(self._task, completed=done, total=total, amount=amount)

    def finish(self) -> None:
        """Fills the bar of the phase at hand."""
        if self._task is not None:
            total = self._bars.tasks[self._task].total or 1
            self._bars.update(self._task, completed=total, total=total)
            self._bars.stop_task(self._task)


class _Lines:
    """One line per phase, for logs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._phase = ""

    def __call__(self, phase: str, done: int | None, total: int | None) -> None:
        if phase != self._phase:
            self._phase = phase
            self._console.print(f"  {phase} ...", markup=False)


def show() -> None:
    """Prints one line per model: name, where it is or how to get it, what it is, whether it has a profile."""
    stored = {folder.name: folder for folder in store.stored_models()}
    for source in store.SOURCES:
        folder = stored.pop(source.name, None)
        place = folder or f"to fetch: kvpilot model fetch {source.alias}"
        print(f"{source.name}\t{place}\t{source.summary}\t{_profiled(folder) if folder else ''}")
    for name, folder in stored.items():
        print(f"{name}\t{folder}\t\t{_profiled(folder)}")


def _profiled(folder: Path) -> str:
    try:
        return "profiled" if profiles.find_profile(folder) else "no profile"
    except (profiles.ProfileError, OSError) as error:
        return f"no profile: {error}"
