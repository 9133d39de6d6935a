"""What ``kvpilot models collect`` does: finds the service or starts one, plans, measures, shows how far it is."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cli.errors import BadInputError, FailedError
from cli.jobs import AT_ONCE
from cli.redis_server import free_port
from cli.settings import CliSettings
from cli.up import make_stack, until_signal, wait_attached
from controller.settings import SteeringMode
from kvpilot.bus import Bus, BusError
from kvpilot.catalog import StageCatalog
from kvpilot.client import AsyncClient
from kvpilot.errors import Unavailable
from kvpilot.v1 import generation_pb2
from models import store
from models.candidates import CANDIDATES, CandidatesError, check_candidates, read_candidates, recoverable
from models.collect.audits import read_audits
from models.collect.collecting import Collected, Collector, HopelessError, pick_model, remaining
from models.collect.corpus import CorpusError, Skipped
from models.collect.document import Document
from models.collect.folder import Folder, FolderError
from models.collect.outcomes import read_outcomes
from models.collect.plan import Asked, Options, Plan
from models.collect.rows import MeasureError
from models.collect.sources import Wanted, plan_all
from models.collect.vocabulary import StoredVocabulary, VocabularyError


@dataclass(frozen=True)
class Order:
    """The command line."""

    source: Path | None = None
    builtin: bool = False
    outcomes: bool = False
    audits: bool = False
    tasks: int = 0
    out: Path | None = None
    limit: int | None = None
    candidates: Path | None = None
    model: str | None = None
    up: bool = False
    options: Options = field(default_factory=Options)

    @property
    def replays(self) -> bool:
        """Whether anything is to be replayed."""
        return bool(self.source or self.builtin or self.outcomes or self.tasks)

    def document(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {
            "source": str(self.source) if self.source else None,
            "builtin": self.builtin,
            "outcomes": self.outcomes,
            "audits": self.audits,
            "tasks": self.tasks,
            "limit": self.limit,
            **asdict(self.options),
        }


def collect(settings: CliSettings, order: Order) -> None:
    """Collects, and prints the folder on stdout.

    Raises:
        BadInputError: something named on the command line cannot be used.
        FailedError: documents failed, or all would.
        KeyboardInterrupt: it was stopped; the same command goes on.
        KvpilotError: the service stayed out of reach.
    """
    console = Console(stderr=True, highlight=False)

    async def run() -> None:
        async with service(settings, order.up, console) as endpoint:
            await _collect(endpoint, settings, order, console)

    try:
        if asyncio.run(until_signal(run())):
            console.print("interrupted; the same command goes on from here", markup=False)
            raise KeyboardInterrupt
    except (CorpusError, CandidatesError, FolderError, VocabularyError) as error:
        raise BadInputError(str(error)) from None
    except (MeasureError, HopelessError, BusError) as error:
        raise FailedError(str(error)) from None


@contextlib.asynccontextmanager
async def service(settings: CliSettings, up: bool, console: Console) -> AsyncIterator[str]:
    """Where the API is served; a stack of our own, gone afterwards, if nothing answers and one is wanted.

    Raises:
        Unavailable: nothing answers, and none is wanted.
        StackError: it could not start, or a process kept dying.
    """
    try:
        async with AsyncClient(settings.endpoint, AT_ONCE) as probe:
            await probe.models()
    except Unavailable:
        if not up:
            raise
    else:
        yield settings.endpoint
        return
    with tempfile.TemporaryDirectory(prefix="kvpilot-collect-") as folder:
        own = settings.model_copy(
            update={
                "endpoint": f"127.0.0.1:{free_port()}",
                "state": Path(folder),
                "redis_url": "",
                "mode": SteeringMode.OFF,
            }
        )
        own = CliSettings.model_validate(own.model_dump())
        async with make_stack(own, lambda line: console.print(line, markup=False)) as stack:
            await wait_attached(stack.endpoint, own.workers)
            user = asyncio.current_task()
            assert user is not None
            watching = asyncio.create_task(stack.watch())
            watching.add_done_callback(lambda task: None if task.cancelled() else user.cancel())
            try:
                yield stack.endpoint
            except asyncio.CancelledError:
                if watching.done():
                    watching.result()  # why it gave up
                raise
            finally:
                watching.cancel()


async def _collect(endpoint: str, settings: CliSettings, order: Order, console: Console) -> None:
    async with AsyncClient(endpoint) as client:
        model = _pick(await client.models(), order.model)
        catalog = StageCatalog(model.stages)
        given = _default(catalog, console) if order.candidates is None else read_candidates(order.candidates)
        asked = Asked(model.name, check_candidates(given, catalog), order.options.horizon_tokens)
        folder = Folder(order.out or store.cache_folder() / "datasets" / model.name, asked)
        skipped = Skipped()
        if order.audits:
            await _take_audits(settings, model.name, folder, order.options.horizon_tokens, skipped, console)
        if not order.replays:
            folder.write_manifest(order.document(), skipped.reasons)
            print(folder.path)
            return
        console.print("reading texts and choosing places", markup=False)
        plans = await _plan(settings, order, model, recoverable(asked.pipelines, catalog), skipped)
        left, there = remaining(plans, folder)
        places = sum(plan.places for plan in left)
        console.print(
            f"{len(left)} documents with {places} places to measure under {len(asked.pipelines)} pipelines, "
            f"{there} there already; skipped: {skipped}",
            markup=False,
        )
        folder.write_manifest(order.document(), skipped.reasons)
        try:
            with Shown(console, len(left), places) as shown:
                collector = Collector(client, asked, catalog, folder, shown)
                await collector.run(left, model.workers + 1)
        finally:
            folder.write_manifest(order.document(), skipped.reasons)
        print(folder.path)
        _judge(collector.collected)


def _default(catalog: StageCatalog, console: Console) -> tuple[str, ...]:
    """Those the planner chooses from, which leaves out what a model cannot be served with, too."""
    known = tuple(text for text in CANDIDATES if catalog.knows(text))
    if left_out := [text for text in CANDIDATES if text not in known]:
        console.print(f"not measured, the model is not served with them: {', '.join(left_out)}", markup=False)
    return known


def _pick(models: list[generation_pb2.Model], wanted: str | None) -> generation_pb2.Model:
    model = pick_model(models, wanted and Path(wanted).name) or pick_model(models, _stored_name(wanted))
    if model is None:
        served = ", ".join(model.name for model in models) or "none"
        raise BadInputError(f"--model: {wanted or 'none'} given; served: {served}")
    return model


def _stored_name(wanted: str | None) -> str | None:
    try:
        return wanted and store.model_name(store.resolve(wanted))
    except store.ModelNotFoundError:
        return wanted


async def _take_audits(
    settings: CliSettings, model: str, folder: Folder, horizon_tokens: int, skipped: Skipped, console: Console
) -> None:
    requests = count = 0
    bus = await Bus.connect(settings.redis_url)
    try:
        async for document, rows in read_audits(bus, model, horizon_tokens, skipped):
            folder.write_served(document, rows)
            requests, count = requests + 1, count + len(rows)
    finally:
        await bus.close()
    console.print(f"{count} audits of {requests} requests taken over; skipped: {skipped}", markup=False)


async def _plan(
    settings: CliSettings, order: Order, model: generation_pb2.Model, others: tuple[str, ...], skipped: Skipped
) -> list[Plan]:
    vocabulary = StoredVocabulary(_folder_of(settings.model, model.name))
    past: list[Document] = []
    if order.outcomes:
        bus = await Bus.connect(settings.redis_url)
        try:
            past = [document async for document in read_outcomes(bus, model.name, skipped)]
        finally:
            await bus.close()
    wanted = Wanted(order.source, order.builtin, tuple(past), order.tasks, order.limit)
    options = replace(order.options, context_tokens=model.context_tokens)
    return await asyncio.to_thread(plan_all, wanted, vocabulary, others, options, skipped)


def _folder_of(setting: str, served: str) -> Path:
    """The local folder of the served model: the configured one if it goes by this name, else the store's."""
    with contextlib.suppress(store.ModelNotFoundError):
        folder = store.resolve(setting)
        if store.model_name(folder) == served:
            return folder
    return store.resolve(served)


def _judge(collected: Collected) -> None:
    if collected.failed:
        said = "\n".join(f"  {name}: {reason}" for name, reason in collected.failed.items())
        raise FailedError(
            f"{len(collected.failed)} documents failed, {len(collected.done)} are measured; the next run tries them "
            f"again:\n{said}"
        )


class Shown:
    """How far a run is: a bar on a terminal, else a line per document."""

    def __init__(self, console: Console, documents: int, places: int) -> None:
        self._console = console
        self._documents = documents
        self._places = places
        self._done = self._failed = self._measured = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("places,"),
            TimeElapsedColumn(),
            TextColumn("of which left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=600,
        )
        self._task = self._bar.add_task(self._said(), total=places)

    def _said(self) -> str:
        failed = f" ({self._failed} failed)" if self._failed else ""
        return f"{self._done} of {self._documents} documents{failed}"

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def place(self) -> None:
        """A place was measured."""
        self._measured += 1
        self._bar.advance(self._task)

    def document(self, plan: Plan, reason: str) -> None:
        """A document is done."""
        self._done += 1
        self._failed += bool(reason)
        self._bar.update(self._task, description=self._said())
        if reason:
            self._console.print(f"failed: {plan.document}: {reason}", markup=False)
        elif not self._console.is_terminal:
            self._console.print(
                f"{self._said()}, {self._measured} of {self._places} places: {plan.document}",
                markup=False,
                soft_wrap=True,
            )
