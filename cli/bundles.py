"""``kvpilot models``: what its commands do and print. Results go to stdout, progress to stderr."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.table import Table

from cli.errors import BadInputError, FailedError
from cli.settings import CliSettings, state_folder
from kvpilot.bus import Bus, BusError, BusSettings, BusUnavailableError, Pointer, PointerState
from models import bundle as bundles
from models import dataset, promotion
from models.bundle import BundleError
from models.calibration import CalibrationError
from models.dataset import DatasetError, Split
from models.evaluation import EvaluationError
from models.examples import Examples
from models.explain import ExplainError
from models.fitting import TrainingError
from models.manifest import Manifest, Provenance, SplitCount, file_hashes
from models.registry import SHIPPED, Registry, RegistryError
from models.store import cache_folder, stored_models

if TYPE_CHECKING:
    import pyarrow as pa

    from models.metrics import Ranking

SHIPPED_DATA = SHIPPED / "data"
"""What the shipped bundle was trained, calibrated and judged on."""
T = TypeVar("T")
_IMPATIENT = BusSettings(timeout_s=1.0, retries=0)


def train(
    data: Path | None, store: str | None, version: str | None, trials: int, alpha: float, folds: int, note: str
) -> None:
    """Trains a bundle, adds it to the store and prints its version on stdout."""
    from models.training import train as run

    with _said():
        registry = Registry(store)
        path, table = _read(data)
        trained = run(table, alpha=alpha, trials=trials, folds=folds, progress=_progress)
        validation = trained.validation
        metrics = _metrics(validation.ranking) | {
            "pinball": validation.pinball,
            "long_range_auc": validation.long_range_auc,
        }
        files = bundles.make(
            trained.models,
            trained.calibration,
            _provenance(path, table),
            trained.calibrating.rows,
            trained.calibrating.families,
            hyperparameters=asdict(trained.hyperparameters),
            metrics=metrics,
            version=version,
            note=note,
        )
        added = registry.put(files)
    _err().print(_figures("cross-validation", metrics))
    print(added)


def calibrate(
    version: str, data: Path | None, store: str | None, name: str | None, alpha: float, all_documents: bool
) -> None:
    """Adds a bundle with another one's models and new bounds, and prints its version on stdout."""
    from models.training import calibrate as run

    with _said():
        registry = Registry(store)
        bundle = registry.load(version)
        _, table = _read(data)
        examples = Examples.of(table if all_documents else dataset.only(table, Split.CALIBRATE))
        calibration = run(bundle.models, examples, alpha)
        manifest = bundle.manifest
        files = bundles.make(
            bundle.models,
            calibration,
            manifest.provenance,
            examples.rows,
            examples.families,
            hyperparameters=manifest.hyperparameters,
            metrics={key: float("nan") if value is None else value for key, value in manifest.metrics.items()},
            version=name,
            note=f"{version}, calibrated on {examples.documents} documents",
        )
        print(registry.put(files))


def evaluate(
    settings: CliSettings,
    report: Path,
    version: str | None,
    data: Path | None,
    store: str | None,
    all_documents: bool,
    steering_overhead: float | None,
    steering_rounds: int,
    tick: bool,
) -> None:
    """Evaluates a bundle, prints its targets and writes the report."""
    from bench.tick import tick_ms
    from models import evaluation
    from models.report import targets, write

    with _said():
        registry = Registry(store)
        bundle = registry.load(version or registry.newest())
        if data is not None and not dataset.holds(data):
            data, all_documents = measure_text(settings, data), True
        _, table = _read(data)
        if steering_rounds:
            steering_overhead = _measure_steering(bundle.manifest.provenance.models, steering_rounds)
        found = evaluation.evaluate(
            bundle,
            table,
            every_document=all_documents,
            tick_ms=tick_ms(bundle) if tick else None,
            steering_overhead=steering_overhead,
        )
        written = write(found, report)
    shown = Table("figure", "wanted", "found", "", title=f"bundle {found.bundle} on {found.documents} unseen documents")
    for one in targets(found):
        shown.add_row(one.name, one.wanted, one.value, {True: "pass", False: "[bold]fail[/]", None: "-"}[one.passed])
    Console().print(shown)
    print("\n".join(str(path) for path in written if path.suffix in (".html", ".json")))


def _measure_steering(models: Sequence[str], rounds: int) -> float | None:
    """What steering costs while the model of the bundle is served; None, and said, where that is not here."""
    from bench import steer

    here = [model for model in models if model in (folder.name for folder in stored_models())]
    if not here:
        _err().print(f"what steering costs is not measured: {', '.join(models)} not in the store", markup=False)
        return None
    return float(steer.measure(here[0], rounds, _err())["steering_overhead"])


def show_list(settings: CliSettings, store: str | None) -> None:
    """Prints one line per bundle."""
    with _said():
        entries = Registry(store).list()
        shown = {}
        if url := _job_store(settings):
            try:
                shown = asyncio.run(_pointers(url, _IMPATIENT))
            except BusUnavailableError:
                _err().print("the job store does not answer: active and shadow are not known", markup=False)
    for entry in entries:
        marks = ",".join(which.value for which, state in shown.items() if state.version == entry.version)
        made = f"{entry.manifest.created:%Y-%m-%d %H:%M}" if entry.manifest else "-"
        told = (
            f"Spearman within {_figure(entry.manifest, 'spearman_within')}, {entry.manifest.note or 'no note'}"
            if entry.manifest
            else entry.problem
        )
        print(f"{entry.version}\t{marks or '-'}\t{made}\t{entry.place}\t{told}")


def show(settings: CliSettings, version: str, store: str | None, json: bool) -> None:
    """Prints a bundle's manifest, once it has loaded, and what audits say of it, if a controller answers."""
    with _said():
        manifest = Registry(store).load(version).manifest
    if json:
        print(manifest.text(), end="")
        return
    out = Console()
    facts = Table("", "", show_header=False, title=f"bundle {manifest.version}")
    facts.add_row("made", f"{manifest.created:%Y-%m-%d %H:%M} UTC")
    facts.add_row("note", manifest.note or "-")
    facts.add_row("models replayed", ", ".join(manifest.provenance.models) or "-")
    for split, count in manifest.provenance.splits.items():
        facts.add_row(f"{split} split", f"{count.documents:,} documents, {count.rows:,} rows")
    facts.add_row("kinds of text", ", ".join(manifest.provenance.kinds) or "-")
    facts.add_row("pipelines", str(len(manifest.provenance.pipelines)))
    facts.add_row("feature schema", f"{manifest.schema_version}, {manifest.schema_hash}")
    facts.add_row("libraries", ", ".join(f"{name} {number}" for name, number in manifest.libraries.items()))
    facts.add_row("hyperparameters", ", ".join(f"{name} {value}" for name, value in manifest.hyperparameters.items()))
    out.print(facts)
    out.print(_figures("cross-validation", dict(manifest.metrics)))
    table = manifest.calibration
    bounds = Table(
        "family", "bound times", "prediction times", "windows", "documents", title=f"calibration, alpha {table.alpha:g}"
    )
    for name, shift in [*((family.value, shift) for family, shift in table.families.items()), ("others", table.pooled)]:
        factors = (f"{math.exp(value):.2f}" for value in (shift.bound, shift.point))
        bounds.add_row(name, *factors, f"{shift.windows:,}", f"{shift.documents:,}")
    out.print(bounds)
    _show_audits(settings.endpoint, version, out)


def _show_audits(endpoint: str, version: str, out: Console) -> None:
    import grpc

    from cli import text
    from cli.connection import operator_stub
    from kvpilot.v1 import operator_pb2

    try:
        with operator_stub(endpoint) as stub:
            known = stub.ListBundles(operator_pb2.ListBundlesRequest(), timeout=_IMPATIENT.timeout_s).bundles
    except grpc.RpcError:
        _err().print(f"no controller answers at {endpoint}: what audits say is not known", markup=False)
        return
    for bundle in known:
        if bundle.version == version:
            out.print(f"at {endpoint}: {text.bundle(bundle)}", markup=False, highlight=False)


def explain(
    version: str | None,
    data: Path | None,
    store: str | None,
    document: str | None,
    at_token: int | None,
    pipeline: str | None,
    top: int,
) -> None:
    """Prints permutation importance, or the contributions to one prediction."""
    from models import explain as explaining

    if (document is None) != (pipeline is None):
        raise BadInputError("--document and --pipeline: one prediction takes both")
    if document is None and at_token is not None:
        raise BadInputError("--at-token: takes --document and --pipeline beside it")
    with _said():
        registry = Registry(store)
        bundle = registry.load(version or registry.newest())
        _, table = _read(data)
        if document is None or pipeline is None:
            found = explaining.importance(bundle, Examples.of(dataset.only(table, Split.TEST)))
            shown = Table("feature", "error, log nats", "Spearman within", "meaning", title=f"bundle {bundle.version}")
            for one in found[:top]:
                shown.add_row(one.feature, f"{one.error:+.4f}", f"{-one.spearman_within:+.4f}", one.meaning)
        else:
            examples = Examples.of(table)
            row = explaining.find_row(examples, document, at_token, pipeline)
            training = Examples.of(dataset.only(table, Split.TRAIN))
            moved = explaining.contributions(bundle, examples.rows[row], training)
            said = bundle.predict(examples.rows[row : row + 1], [examples.families[row]])
            shown = Table(
                "feature",
                "value",
                "usual",
                "moves it by",
                "meaning",
                title=f"{pipeline} at token {examples.at_token[row]} of {document}: predicted "
                f"{said.divergence[0]:.4g}, bound {said.bound[0]:.4g}, measured {examples.divergence[row]:.4g} nats",
            )
            for part in moved[:top]:
                shown.add_row(
                    part.feature,
                    f"{part.value:.4g}",
                    f"{part.usual:.4g}",
                    f"x {math.exp(part.log_nats):.3f}",
                    part.meaning,
                )
    Console().print(shown)


def promote(settings: CliSettings, version: str, reason: str, store: str | None) -> None:
    """Moves the active pointer."""
    registry = _registry(store)
    state = _moved(settings, lambda bus: promotion.promote(bus, registry, version, reason or "promoted by an operator"))
    print(f"active: {state.version} (before: {state.below[0] if state.below else 'none'})")


def rollback(settings: CliSettings, reason: str, store: str | None) -> None:
    """Moves the active pointer back."""
    registry = _registry(store)

    def passed_over(version: str, error: Exception) -> None:
        _err().print(f"passed over {version}, which does not load: {error}", markup=False)

    state = _moved(
        settings,
        lambda bus: promotion.rollback(bus, registry, reason or "rolled back by an operator", passed_over=passed_over),
    )
    print(f"active: {state.version} (left: {state.history[0].version})")


def shadow(settings: CliSettings, version: str | None, none: bool, reason: str, store: str | None) -> None:
    """Shows or moves the shadow pointer."""
    if version is not None and none:
        raise BadInputError(f"--none: not together with a version, here {version!r}")
    registry = _registry(store)
    if version is None and not none:
        state = _moved(settings, lambda bus: bus.pointer(Pointer.SHADOW))
    else:
        state = _moved(settings, lambda bus: promotion.shadow(bus, registry, version, reason or "set by an operator"))
    print(f"shadow: {state.version or 'none'}")


def history(settings: CliSettings) -> None:
    """Prints what the pointers show and have shown, each newest first."""

    async def read(url: str) -> dict[Pointer, PointerState]:
        return await _pointers(url, BusSettings())

    for which, state in asked(settings, read).items():
        if state.revision:
            print(f"{which.value}\t{_when(state.since)}\t{state.version or 'none'}\t{state.reason}")
        for passed in state.history:
            how = "rolled back" if passed.rolled_back else "left"
            print(
                f"{which.value}\t{_when(passed.since)}\t{passed.version or 'none'}\t{passed.reason}; "
                f"{how}: {passed.left_reason}"
            )


def _when(since: float) -> str:
    return f"{datetime.fromtimestamp(since).astimezone():%Y-%m-%d %H:%M:%S}" if since else "-"


@contextmanager
def _said() -> Iterator[None]:
    """Errors of the learned side as the command line's."""
    try:
        yield
    except (DatasetError, TrainingError, CalibrationError, EvaluationError, ExplainError, RegistryError) as error:
        raise BadInputError(str(error)) from None
    except (BundleError, BusError) as error:
        raise FailedError(str(error)) from None


def _moved(settings: CliSettings, move: Callable[[Bus], Awaitable[PointerState]]) -> PointerState:
    async def run(url: str) -> PointerState:
        bus = await Bus.connect(url)
        try:
            return await move(bus)
        finally:
            await bus.close()

    return asked(settings, run)


def asked(settings: CliSettings, ask: Callable[[str], Coroutine[None, None, T]]) -> T:
    """What the job store of the settings answers.

    Raises:
        BadInputError: none is known.
        FailedError: it is out of reach, or refuses.
    """
    with _said():
        url = _job_store(settings)
        if not url:
            raise BadInputError("no job store is known: start one with `kvpilot up`, or name one with --redis-url")
        try:
            return asyncio.run(ask(url))
        except ValueError as error:
            raise BadInputError(f"redis_url: {error}") from None


async def _pointers(url: str, patience: BusSettings) -> dict[Pointer, PointerState]:
    bus = await Bus.connect(url, patience)
    try:
        return {which: await bus.pointer(which) for which in Pointer}
    finally:
        await bus.close()


def _job_store(settings: CliSettings) -> str:
    """URL of the job store of the settings, else of the one that ``kvpilot up`` last started here; empty for none."""
    if settings.redis_url:
        return settings.redis_url
    configuration = (settings.state or state_folder()) / "redis" / "server.conf"
    try:
        lines = [line.split(maxsplit=1) for line in configuration.read_text().splitlines()]
    except OSError:
        return ""
    values = {line[0]: line[1] for line in lines if len(line) == 2}
    if not {"port", "requirepass"} <= set(values):
        return ""
    return f"redis://:{values['requirepass']}@127.0.0.1:{values['port']}/0"


def _registry(store: str | None) -> Registry:
    with _said():
        return Registry(store)


def _read(data: Path | None) -> tuple[Path, pa.Table]:
    own = cache_folder() / "datasets"
    path = data or (own if dataset.holds(own) else SHIPPED_DATA)
    return path, dataset.read(path)


def measure_text(settings: CliSettings, text: Path) -> Path:
    """Replays a folder of text, or a file of prompts, that no bundle has seen; returns the dataset.

    A stack of our own is started if none answers at the settings' endpoint. What was measured before is not again.
    """
    from cli.collecting import Order, collect

    name = hashlib.sha256(str(text.resolve()).encode()).hexdigest()[:12]
    folder = cache_folder() / "measured" / f"{text.stem}-{name}"
    collect(settings, Order(source=text, out=folder, up=True))
    return folder


def _provenance(path: Path, table: pa.Table) -> Provenance:
    counts = {}
    for split in Split:
        rows = dataset.only(table, split)
        counts[split.value] = SplitCount(rows=rows.num_rows, documents=len(rows["document"].unique()))
    return Provenance(
        models=sorted(table["model"].unique().to_pylist()),
        files=file_hashes(path),
        splits=counts,
        kinds=sorted(table["kind"].unique().to_pylist()),
        pipelines=sorted(table["pipeline"].unique().to_pylist()),
    )


def _metrics(found: Ranking) -> dict[str, float]:
    return {
        "spearman_pooled": found.spearman_pooled,
        "spearman_within": found.spearman_within,
        "auc_within": found.auc_within,
    }


def _figures(title: str, values: dict[str, float | None] | dict[str, float]) -> Table:
    table = Table("figure", "value", title=title)
    for name, value in values.items():
        table.add_row(name, "-" if value is None or value != value else f"{value:.4f}")
    return table


def _figure(manifest: Manifest, name: str) -> str:
    value = manifest.metrics.get(name)
    return "-" if value is None else f"{value:.3f}"


def _progress(line: str) -> None:
    _err().print(f"  {datetime.now(UTC).astimezone():%H:%M:%S} {line}", markup=False)


def _err() -> Console:
    return Console(stderr=True, highlight=False)
