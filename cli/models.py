"""``kvpilot models``: options and help texts; the work is in :mod:`cli.bundles`, imported when a command is called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.collect import collect
from cli.errors import reported

if TYPE_CHECKING:
    from cli.settings import CliSettings

STEERING_ROUNDS = 48
"""Windows in which planning is on, and as many in which it is off: fewer tell noise rather than a cost."""

models_app = typer.Typer(
    no_args_is_help=True,
    help=(
        "Learn to steer: measure text, train predictors on it, compare them, put them in charge.\n\n"
        "A bundle is a trained and calibrated predictor with its provenance; it has a version and never changes. "
        "Bundles lie in a store, a folder or any URL that fsspec knows (s3://bucket/prefix); those that come with "
        "kvpilot are always there. The active bundle decides, the shadow bundle is scored beside it.\n\n"
        "  kvpilot models collect ~/texts --up\n\n"
        "  kvpilot models train\n\n"
        "  kvpilot models evaluate --report report/\n\n"
        "  kvpilot models shadow VERSION, then kvpilot models decisions, and when it does well: kvpilot models promote "
        "VERSION"
    ),
)

models_app.command("collect")(collect)

Data = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="Dataset: a Parquet file of `kvpilot models collect`, or a folder of them. "
        "Default: datasets in kvpilot's cache folder, else the one that comes with kvpilot.",
    ),
]
Store = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        envvar="KVPILOT_CONTROLLER_BUNDLE_STORE",
        help="Store of bundles: a folder or an fsspec URL. Default: bundle_store in the settings' [controller] table, "
        "as for the controller, else bundles in the cache.",
    ),
]
Version = Annotated[str, typer.Argument(help="Version of a bundle; `kvpilot models list` shows them.")]
Name = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Version of the new bundle. Default: date, time and 8 digits of its hash."),
]
Reason = Annotated[str, typer.Option(help="Kept in the pointer's history.")]
RedisUrl = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Job store with the pointers. Default: that of the settings, else of `up`'s."),
]
Alpha = Annotated[float, typer.Option(metavar="SHARE", help="Share of windows that may exceed their bound.")]


@models_app.command("train")
def train(
    context: typer.Context,
    data: Data = None,
    store: Store = None,
    version: Name = None,
    trials: Annotated[
        int, typer.Option(min=0, metavar="N", help="Hyperparameter sets to try with Optuna; 0: the documented ones.")
    ] = 0,
    alpha: Alpha = 0.1,
    folds: Annotated[int, typer.Option(min=2, metavar="N", help="Folds of the cross-validation.")] = 5,
    note: Annotated[str, typer.Option(help="A line for people, shown by `kvpilot models show`.")] = "",
) -> None:
    """Train a bundle on a dataset and add it to the store.

    60 % of the documents are trained on, with cross-validation that never divides a document; 20 % calibrate the
    bounds; 20 % are left for `evaluate`. Which document is where depends on its name alone. The same data and options
    give the same models. Prints the version on stdout.
    """
    with reported():
        from cli import bundles as command

        command.train(data, _store(context, store), version, trials, alpha, folds, note)


@models_app.command("evaluate")
def evaluate(
    context: typer.Context,
    report: Annotated[Path, typer.Option(metavar="DIR", help="Folder for report.html, report.json and pictures.")],
    bundle: Annotated[str | None, typer.Option(metavar="VERSION", help="Which bundle. Default: the newest.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="A dataset, or text of your own, a folder or a file of prompts and tasks (JSON Lines), which is "
            "measured first. Default: datasets in kvpilot's cache folder, else the one that comes with it.",
        ),
    ] = None,
    store: Store = None,
    all_documents: Annotated[
        bool,
        typer.Option("--all-documents", help="Use all documents of the data, not its test split; so for own text."),
    ] = False,
    steering_rounds: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Rounds in which to measure what steering costs, as `kvpilot bench steer` does, a few seconds each "
            "on two cores; 0: leave it out.",
        ),
    ] = STEERING_ROUNDS,
    steering_overhead: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Share of tokens/s that steering costs, measured before, to report."),
    ] = None,
    tick: Annotated[bool, typer.Option(help="Time a planning tick of 256 requests, 16 candidates each.")] = True,
) -> None:
    """Judge a bundle on documents that it has not seen.

    Ranks over all pipelines and within each one, how often bounds were exceeded, and device bytes at equal divergence
    against static pipelines, a rule, chance and an oracle. Exact pipelines and rows that cannot lose anything are
    counted nowhere. Prints a table of targets and writes the report.
    """
    with reported():
        from cli import bundles as command

        settings, place = _settings(context, None), _store(context, store)
        rounds = steering_rounds if steering_overhead is None else 0
        command.evaluate(settings, report, bundle, data, place, all_documents, steering_overhead, rounds, tick)


@models_app.command("calibrate")
def calibrate(
    context: typer.Context,
    bundle: Version,
    data: Data = None,
    store: Store = None,
    version: Name = None,
    alpha: Alpha = 0.1,
    all_documents: Annotated[
        bool, typer.Option("--all-documents", help="Calibrate on all documents of the data: for data of your own.")
    ] = False,
) -> None:
    """Make a new bundle with the models of another one and bounds calibrated on this dataset.

    For text unlike that of the training: predictions stay, bounds are moved until they hold on it.
    """
    with reported():
        from cli import bundles as command

        command.calibrate(bundle, data, _store(context, store), version, alpha, all_documents)


@models_app.command("list")
def list_(context: typer.Context, store: Store = None, redis_url: RedisUrl = None) -> None:
    """List the bundles, newest first, and which of them are active and shadow, if the job store answers."""
    with reported():
        from cli import bundles as command

        command.show_list(_settings(context, redis_url), _store(context, store))


@models_app.command("show")
def show(
    context: typer.Context,
    bundle: Version,
    store: Store = None,
    json: Annotated[bool, typer.Option("--json", help="Print the manifest as it is.")] = False,
) -> None:
    """Show where a bundle comes from, its metrics and its calibration; and check that it loads.

    If a controller answers at the settings' endpoint: also what it has measured of the bundle since it started.
    """
    with reported():
        from cli import bundles as command

        command.show(_settings(context, None), bundle, _store(context, store), json)


@models_app.command("explain")
def explain(
    context: typer.Context,
    bundle: Annotated[str | None, typer.Argument(help="Version of a bundle. Default: the newest.")] = None,
    data: Data = None,
    store: Store = None,
    document: Annotated[
        str | None, typer.Option(metavar="NAME", help="Explain one prediction, for this document.")
    ] = None,
    at_token: Annotated[
        int | None, typer.Option(metavar="N", help="With --document: the place. Default: its first one.")
    ] = None,
    pipeline: Annotated[
        str | None, typer.Option(metavar="STAGES", help="With --document: the candidate, as it stands in the dataset.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, metavar="N", help="Features to show.")] = 15,
) -> None:
    """Show what a bundle looks at: over a dataset's test split, or for one prediction.

    Over a dataset: how much worse predictions get when a feature's values are dealt out anew. For one prediction: how
    far each value moves it from what the usual value, the training median, would give.
    """
    with reported():
        from cli import bundles as command

        command.explain(bundle, data, _store(context, store), document, at_token, pipeline, top)


@models_app.command("promote")
def promote(
    context: typer.Context, bundle: Version, reason: Reason = "", store: Store = None, redis_url: RedisUrl = None
) -> None:
    """Put a bundle in charge. It is loaded and checked first; if that fails the active one stays.

    Controllers change over between two ticks, without dropping a stream.
    """
    with reported():
        from cli import bundles as command

        command.promote(_settings(context, redis_url), bundle, reason, _store(context, store))


@models_app.command("rollback")
def rollback(context: typer.Context, reason: Reason = "", store: Store = None, redis_url: RedisUrl = None) -> None:
    """Go back to the bundle that was active before; once more: to the one before that."""
    with reported():
        from cli import bundles as command

        command.rollback(_settings(context, redis_url), reason, _store(context, store))


@models_app.command("shadow")
def shadow(
    context: typer.Context,
    bundle: Annotated[str | None, typer.Argument(help="Version of a bundle; without it, what is set is shown.")] = None,
    none: Annotated[bool, typer.Option("--none", help="Score no bundle beside the active one.")] = False,
    reason: Reason = "",
    store: Store = None,
    redis_url: RedisUrl = None,
) -> None:
    """Score a bundle beside the active one, on live requests, without letting it decide."""
    with reported():
        from cli import bundles as command

        command.shadow(_settings(context, redis_url), bundle, none, reason, _store(context, store))


@models_app.command("history")
def history(context: typer.Context, redis_url: RedisUrl = None) -> None:
    """Show which bundles were active and shadow, since when and why; also rollbacks made by controllers."""
    with reported():
        from cli import bundles as command

        command.history(_settings(context, redis_url))


@models_app.command("decisions")
def decisions(
    context: typer.Context,
    request: Annotated[
        str | None, typer.Option(metavar="ID", help="Only this job's, or those whose id ends so, as `top` shows it.")
    ] = None,
    bundle: Annotated[
        str | None, typer.Option(metavar="VERSION", help="Only those that it made, or looked at as the shadow.")
    ] = None,
    audited: Annotated[bool, typer.Option("--audited", help="Only those under which something was measured.")] = False,
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="The newest so many.")] = 40,
    json: Annotated[
        bool, typer.Option("--json", help="One JSON document a line, with features, answer and all audits.")
    ] = False,
    redis_url: RedisUrl = None,
) -> None:
    """Show what was decided on live requests, what was predicted, and what audits then measured.

    Below the decisions: how the active and the shadow bundle did, the share of audits above their bounds foremost. A
    shadow is judged on what the active bundle chose. The job store keeps about the last 200,000 entries of the log.
    """
    with reported():
        from cli import decisions as command

        command.show(_settings(context, redis_url), request, bundle, audited, limit, json)


def _settings(context: typer.Context, redis_url: str | None) -> CliSettings:
    from cli.settings import load_settings

    return load_settings(context.obj, redis_url=redis_url)


def _store(context: typer.Context, given: str | None) -> str | None:
    """The store given, by flag or environment, else that of the settings' ``[controller]``; None: the default one.

    Raises:
        pydantic.ValidationError: the table is not one that the controller would accept.
    """
    from controller.settings import ControllerSettings

    return given or ControllerSettings.model_validate(_settings(context, None).controller).bundle_store or None
