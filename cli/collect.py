"""``kvpilot models collect``: its options and help text; what it does is in ``cli.collecting``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.errors import BadInputError, reported


def collect(
    context: typer.Context,
    source: Annotated[
        Path | None,
        typer.Argument(help="A folder of text (read with all below it), or a file of prompts (JSON Lines)."),
    ] = None,
    builtin: Annotated[
        bool,
        typer.Option("--builtin", help="Text of this machine: licences, manuals, package documentation, Python code."),
    ] = False,
    outcomes: Annotated[
        bool, typer.Option("--outcomes", help="Past requests that the job store still has; needs --redis-url.")
    ] = False,
    audits: Annotated[
        bool,
        typer.Option("--audits", help="What audits of served requests measured, from the decision log; likewise."),
    ] = False,
    tasks: Annotated[
        int, typer.Option(min=0, metavar="N", help="Generated tasks: needles, variables, words, chats, code.")
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where the data goes. Default: datasets/MODEL in kvpilot's cache folder."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Most documents, tasks not counted. Default: all.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=160, metavar="N", help="Longest window of a text, in tokens; of a task, about.")
    ] = 2500,
    min_tokens: Annotated[
        int, typer.Option(min=160, metavar="N", help="Shortest window of a longer text, and shortest task.")
    ] = 512,
    windows: Annotated[
        int, typer.Option(min=1, metavar="N", help="Most windows of one text; they do not overlap.")
    ] = 1,
    places: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Places measured in each. Default: 2 to 4, by its length."),
    ] = None,
    horizon: Annotated[int, typer.Option(min=1, max=256, metavar="N", help="Tokens compared at each place.")] = 32,
    seed: Annotated[int, typer.Option(metavar="N", help="Of all choices: windows, places, tasks.")] = 0,
    candidates: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Pipelines to measure, one a line. Default: those the planner chooses from."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Which of several served models; with --up the one to serve.")
    ] = None,
    up: Annotated[
        bool, typer.Option("--up", help="Start a stack for the duration if nothing answers at the endpoint.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Worker processes of that stack. Default: 1.")
    ] = None,
    redis_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Job store, for --outcomes and --audits."),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option("--endpoint", "-e", metavar="HOST:PORT", help="Where the API is served. Default: 127.0.0.1:7450."),
    ] = None,
) -> None:
    """Measure what each pipeline does to real text, as data to learn from.

    At several places of each text the cache is put under every candidate pipeline, the text's next tokens are read, and
    the next-token distributions are compared with those of the full cache. Workers do it when they have nothing else to
    do; all live workers share the work. Texts are never generated, only read.

      kvpilot models collect ~/texts --limit 200

      kvpilot models collect prompts.jsonl --tasks 50 --out data/

      kvpilot models collect --builtin --tasks 200 --limit 400 --up

    A line of a prompts file: {"prompt": "...", "completion": "..."} or {"messages": [{"role": "user", "content":
    "..."}, ...]}; "kind", "id" and "completion" may be left out. With a completion, or an assistant's turn at the end,
    the place before it is among those measured.

    The folder gets a Parquet file per document and manifest.json. Interrupt it at any time: the same command goes on
    where it stopped. Documents that fail are named at the end, and tried again by the next run.
    """
    with reported():
        from cli.settings import load_settings

        url = redis_url if outcomes or audits else None
        settings = load_settings(context.obj, endpoint=endpoint, model=model, workers=workers, redis_url=url)
        if source is None and not builtin and not outcomes and not audits and not tasks:
            raise BadInputError("nothing to measure: give SOURCE, --builtin, --outcomes, --audits or --tasks")
        if min_tokens > max_tokens:
            raise BadInputError(f"--min-tokens: {min_tokens} given; at most --max-tokens, {max_tokens}, is accepted")
        for given, option in ((outcomes, "--outcomes"), (audits, "--audits")):
            if given and not settings.redis_url:
                raise BadInputError(f"{option}: name the job store with --redis-url, e.g. redis://127.0.0.1:6379/0")
    with reported(settings.endpoint):
        from cli import collecting
        from models.collect.plan import Options

        collecting.collect(
            settings,
            collecting.Order(
                source=source,
                builtin=builtin,
                outcomes=outcomes,
                audits=audits,
                tasks=tasks,
                out=out,
                limit=limit,
                candidates=candidates,
                model=model,
                up=up,
                options=Options(
                    seed=seed,
                    least_tokens=min_tokens,
                    most_tokens=max_tokens,
                    windows=windows,
                    places=places or 0,
                    horizon_tokens=horizon,
                ),
            ),
        )
