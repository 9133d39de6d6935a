"""How the demo looks: a live board on a terminal, one line per happening elsewhere, a table at the end."""

from __future__ import annotations

import time

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cli import text
from cli.demo_run import Run
from kvpilot.v1 import generation_pb2, operator_pb2


class Board:
    """Shows the runs while they go. On a terminal: a table that changes; elsewhere: a line for each happening.

    Switches are lines in both cases, so that they stay readable afterwards.
    """

    def __init__(self, console: Console, runs: list[Run]) -> None:
        self._console = console
        self._runs = runs
        self._states: dict[str, operator_pb2.LiveRequest] = {}
        self._started = time.monotonic()
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> Board:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def look(self, requests: list[operator_pb2.LiveRequest]) -> None:
        """Takes in the controller's view of the live requests."""
        self._states.update({request.state.request_id: request for request in requests})
        if self._live is not None:
            self._live.update(self._table(), refresh=True)

    def note(self, run: Run, event: generation_pb2.GenerationEvent) -> None:
        """Takes in what just happened to a run; ``run.result`` has it already."""
        kind = event.WhichOneof("event")
        if kind == "switch":
            self._say(run, _switch_line(run), "bold yellow")
        elif kind == "started" and self._live is None:
            self._say(run, f"started with {event.started.prompt_tokens} prompt tokens, {event.started.pipeline}")
        elif kind == "finished":
            cache = event.finished.cache
            self._say(
                run,
                f"finished after {len(run.result.token_ids)} tokens; peak {text.size(cache.peak_device_bytes)} on the "
                f"device, {text.share(cache.peak_device_bytes, cache.full_cache_bytes)} of the full cache",
                "green",
            )

    def _say(self, run: Run, line: str, style: str = "") -> None:
        clock = f"{time.monotonic() - self._started:6.1f} s  "
        self._console.print(Text.assemble((clock, "dim"), (f"{run.name:<9} ", "bold"), (line, style)), soft_wrap=True)

    def _table(self) -> Group:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("request", "tokens", "tokens/s", "pipeline", "device now", "of full", "text"):
            table.add_column(column, justify="right" if column in ("tokens", "tokens/s", "of full") else "left")
        for run in self._runs:
            if run.result.finished is not None:
                continue
            state = self._states[run.result.job_id].state if run.result.job_id in self._states else None
            cache = state.cache if state is not None else None
            tokens = len(run.result.token_ids)
            elapsed = time.monotonic() - run.first_token_at if run.first_token_at else 0.0
            prefilling = state is not None and state.prefilling
            table.add_row(
                run.name,
                str(tokens) if tokens else ("prefill" if prefilling else "queued"),
                f"{tokens / elapsed:.1f}" if elapsed else "",
                state.pipeline if state is not None else "",
                text.size(cache.device_bytes) if cache is not None else "",
                text.share(cache.device_bytes, cache.full_cache_bytes) if cache is not None else "",
                Text(" ".join(run.result.text.split())[-40:], style="dim", no_wrap=True),
            )
        return Group(Text(""), table)


def _switch_line(run: Run) -> str:
    switch = run.result.switches[-1]
    before, after = text.size(switch.before.device_bytes), text.size(switch.after.device_bytes)
    return (
        f"switched at token {switch.at_token} by the {text.orderer(switch.ordered_by)}: {switch.from_pipeline} → "
        f"{switch.to_pipeline}, device {before} → {after}, {switch.stall_ms:.0f} ms. Why: {switch.reason}"
    )


def summary(runs: list[Run]) -> RenderableType:
    """What each request took, and below it what was done to it and why."""
    table = Table(
        title="What steering did",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title_justify="left",
        caption="cache: bytes on the device at their peak, at the end, and as pipeline full would have it",
        caption_justify="left",
    )
    for column in ("request", "tokens", "tokens/s", "peak", "at end", "full cache", "switches", "fact"):
        table.add_column(column, justify="left" if column in ("request", "fact") else "right", no_wrap=True)
    lines: list[Text] = []
    for run in runs:
        document = run.document()
        table.add_row(
            run.name,
            f"{document['prompt_tokens']} + {document['tokens']}",
            f"{document['tokens_per_s']:.1f}",
            text.size(document["peak_device_bytes"]),
            text.size(document["end_device_bytes"]),
            text.size(document["full_cache_bytes"]),
            str(len(document["switches"])),
            {None: "", True: "[green]found[/green]", False: "[red]missed[/red]"}[run.fact_found],
        )
        for switch in document["switches"]:
            head = f"{run.name} @{switch['at_token']} by the {switch['ordered_by']}: {switch['from']} → {switch['to']}"
            lines.append(Text.assemble(head, (f"\n    {switch['reason']}", "dim")))
    return Group(table, *lines, Text())
