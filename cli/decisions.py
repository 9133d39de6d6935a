"""``kvpilot models decisions``: reads the log of decisions from the job store, joined, and says how bundles did."""

from __future__ import annotations

import json
from collections import deque
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from cli import text
from cli.bundles import asked
from cli.settings import CliSettings
from kvpilot.bus import Bus
from kvpilot.v1 import job_pb2
from models.decisions import Decided, join, scores

_WIDE = 160
_NARROW = 110
_HEADINGS = (
    *("time", "request", "token", "pipeline", "outcome", "bundle"),
    *("predicted", "bound", "shadow's", "measured"),
)


def show(
    settings: CliSettings, request: str | None, bundle: str | None, audited: bool, limit: int, as_json: bool
) -> None:
    """Prints the newest decisions: a table with a bundle's scores below, or one JSON document a line.

    Raises:
        BadInputError: no job store is known.
        FailedError: it does not answer, or refuses.
    """
    joined = join(asked(settings, _read))
    wanted = [one for one in joined if _meant(one, request, bundle)]
    listed = [one for one in wanted if one.audits or not audited]
    shown = list(deque(listed, limit))
    if as_json:
        for one in shown:
            print(json.dumps(_document(one), ensure_ascii=False, allow_nan=False))
        return
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, _WIDE)  # a pipe has no width: nothing need be cut
    console.print(_table(shown, console.width))
    if len(listed) > len(shown):
        console.print(f"{len(listed) - len(shown)} older ones are not shown; --limit shows more", markup=False)
    console.print(_scores(wanted))


def _meant(one: Decided, request: str | None, bundle: str | None) -> bool:
    of_request = request is None or one.request_id.endswith(request.removeprefix("…"))
    return of_request and (bundle is None or bundle in (one.decided.bundle, one.decided.shadow_bundle))


async def _read(url: str) -> list[job_pb2.DecisionEvent]:
    bus = await Bus.connect(url)
    try:
        return await bus.all_decisions()
    finally:
        await bus.close()


def _table(decisions: list[Decided], width: int) -> Table:
    table = Table(title="decisions, oldest first; nats per token", box=box.SIMPLE_HEAD)
    left_out = ("time", "shadow's") if width < _NARROW else ()  # --json has them
    for heading in _HEADINGS:
        if heading not in left_out:
            table.add_column(
                heading,
                justify="left" if heading in ("time", "request", "pipeline", "outcome", "bundle") else "right",
                no_wrap=heading not in ("pipeline", "bundle"),
                overflow="fold",
            )
    for one in decisions:
        cells = zip(_HEADINGS, _cells(one), strict=True)
        table.add_row(*(cell for heading, cell in cells if heading not in left_out))
    return table


def _cells(one: Decided) -> tuple[str, ...]:
    decided, measured = one.decided, one.measured
    moved = decided.from_pipeline != decided.pipeline
    shadows = f"{text.nats(decided.shadow_divergence)}, {text.nats(decided.shadow_bound)}"
    return (
        f"{one.time.astimezone():%H:%M:%S}",
        text.short_id(one.request_id),
        str(decided.at_token),
        f"{decided.from_pipeline} → {decided.pipeline}" if moved else decided.pipeline,
        text.outcome(one.outcome),
        decided.bundle or "the rule",
        text.nats(decided.predicted_divergence) if decided.bundle else "-",
        text.nats(decided.bound) if decided.bundle else "-",
        shadows if decided.shadow_bundle else "-",
        "-" if measured is None else f"{text.nats(measured)} ({len(one.audits)})",
    )


def _scores(decisions: list[Decided]) -> Table:
    table = Table(title="how bundles did, by audits of what was chosen; means, nats per token", box=box.SIMPLE_HEAD)
    for heading in ("bundle", "role", "decisions", "audits", "predicted", "bound", "measured", "bound exceeded"):
        table.add_column(heading, justify="left" if heading in ("bundle", "role") else "right")
    for (role, bundle), score in scores(decisions).items():
        means = (score.predicted, score.bound, score.measured)
        table.add_row(
            bundle,
            role,
            f"{score.decisions:,}",
            f"{score.audits:,}",
            *((text.nats(mean) for mean in means) if score.audits else "---"),
            text.share(score.exceeded, score.audits),
        )
    return table


def _document(one: Decided) -> dict[str, Any]:
    """A decision as JSON: every part by name; what is not known is null or left out."""
    decided, answered = one.decided, one.answered
    content: dict[str, Any] = {
        "decision_id": one.decision_id,
        "request_id": one.request_id,
        "worker": one.worker,
        "time": one.time.isoformat(),
        "at_token": decided.at_token,
        "from_pipeline": decided.from_pipeline,
        "pipeline": decided.pipeline,
        "outcome": text.outcome(one.outcome),
        "reason": decided.reason,
    }
    if decided.bundle:
        content |= {
            "bundle": decided.bundle,
            "predicted_divergence": decided.predicted_divergence,
            "bound": decided.bound,
            "family": decided.family,
            "runner_up": decided.runner_up,
            "feature_schema_hash": decided.feature_schema_hash,
            "features": one.features(),
        }
    if decided.shadow_bundle:
        content["shadow"] = {
            "bundle": decided.shadow_bundle,
            "predicted_divergence": decided.shadow_divergence,
            "bound": decided.shadow_bound,
        }
    if answered is not None:
        if answered.refusal:
            content["refusal"] = answered.refusal
        if answered.HasField("applied"):
            applied = answered.applied
            content["switch"] = {
                "at_token": applied.at_token,
                "device_bytes": [applied.before.device_bytes, applied.after.device_bytes],
                "stall_ms": applied.stall_ms,
            }
    content["audits"] = [
        {
            "at_token": audit.at_token,
            "tokens": audit.tokens,
            "divergence": audit.divergence,
            "divergence_max": audit.divergence_max,
            "top1_agreement": audit.top1_agreement,
            "cost_ms": audit.cost_ms,
        }
        for audit in one.audits.values()
    ]
    return content
