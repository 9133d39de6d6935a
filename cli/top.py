"""``kvpilot top``: what runs where, what its cache takes, what the signals say, and what was decided and why."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cli import text
from cli.connection import operator_stub
from cli.errors import describe_call_error
from kvpilot.errors import error_of_rpc
from kvpilot.v1 import operator_pb2, policy_pb2
from models.scenarios import scenario_word

CALL_TIMEOUT_S = 5.0
_UP = (("host", "device"), ("disk", "host"))
"""From and to of what is brought nearer."""
_STYLES = {"refused": "red", "applied": "green", "sent": "yellow", "advised": "cyan"}


@dataclass(frozen=True)
class Snapshot:
    """One look at a controller."""

    mode: operator_pb2.Mode = operator_pb2.MODE_UNSPECIFIED
    workers: list[operator_pb2.Worker] = field(default_factory=list)
    requests: list[operator_pb2.LiveRequest] = field(default_factory=list)
    bundles: list[operator_pb2.Bundle] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    """Names of controllers that the one asked got no answer from: what they have is missing."""


def take_snapshot(endpoint: str) -> Snapshot:
    """Asks the controller.

    Raises:
        grpc.RpcError: it does not answer, or refuses.
    """
    with operator_stub(endpoint) as stub:
        listed = stub.ListWorkers(operator_pb2.ListWorkersRequest(), timeout=CALL_TIMEOUT_S)
        return Snapshot(
            mode=stub.GetMode(operator_pb2.GetModeRequest(), timeout=CALL_TIMEOUT_S).mode,
            workers=list(listed.workers),
            silent=list(listed.silent_controllers),
            requests=list(stub.ListRequests(operator_pb2.ListRequestsRequest(), timeout=CALL_TIMEOUT_S).requests),
            bundles=list(stub.ListBundles(operator_pb2.ListBundlesRequest(), timeout=CALL_TIMEOUT_S).bundles),
        )


def watch(endpoint: str, interval_s: float, console: Console, look: Callable[[str], Snapshot] = take_snapshot) -> None:
    """Shows live tables until interrupted; a controller that does not answer is said so and asked again."""
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            try:
                shown = render(look(endpoint), endpoint)
            except grpc.RpcError as error:
                shown = Text(f"{describe_call_error(error_of_rpc(error), endpoint)}\nasking again ...", style="yellow")
            live.update(shown, refresh=True)
            time.sleep(interval_s)


def render(snapshot: Snapshot, endpoint: str) -> RenderableType:
    """The whole picture."""
    head = Text.assemble(
        ("kvpilot ", "bold"),
        endpoint,
        "  mode ",
        (text.mode(snapshot.mode), "bold green" if snapshot.mode == operator_pb2.MODE_ACTIVE else "bold yellow"),
        f"  {text.count(len(snapshot.workers), 'worker')}, {text.count(len(snapshot.requests), 'live request')}",
        f", {sum(worker.state.tokens_per_s for worker in snapshot.workers):.1f} tokens/s",
    )
    if snapshot.silent:
        head.append(f"\nno answer from {', '.join(snapshot.silent)}: what they steer is missing here", style="yellow")
    workers = sorted(snapshot.workers, key=lambda worker: str(worker.hello.worker))
    sessions = [_sessions(worker) for worker in workers if worker.state.sessions.parked]
    took = [(worker.hello.worker, text.recalls(worker.state.recalls)) for worker in workers]
    recalls = [Text(f"{name}: {said}") for name, said in took if said]
    return Group(head, *map(_bundle, snapshot.bundles), _Workers(workers), *sessions, *recalls, _Requests(snapshot))


def _bundle(bundle: operator_pb2.Bundle) -> Text:
    broken = bool(bundle.alarms or bundle.refusal)
    return Text(text.bundle(bundle), style="red" if broken else "yellow" if bundle.drifts else "")


@dataclass(frozen=True)
class _Workers:
    """The workers: a table where the terminal is wide enough, else a line for each."""

    workers: list[operator_pb2.Worker]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        headings = (
            "worker",
            "model",
            "running",
            "waiting",
            "device",
            "host",
            "disk",
            "tokens/s",
            "step ms",
            "preempted",
        )
        rows = [_worker_row(worker) for worker in self.workers]
        if options.max_width < WIDE:
            for name, model, *rest in rows:
                cells = ", ".join(f"{heading} {cell}" for heading, cell in zip(headings[2:], rest, strict=True))
                yield Text(f"{name} ({model}): {cells}")
            return
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=False)
        for heading in headings:
            table.add_column(heading, justify="left" if heading in ("worker", "model") else "right")
        for row in rows:
            table.add_row(*row)
        yield table


def _worker_row(worker: operator_pb2.Worker) -> list[str]:
    state = worker.state
    return [
        worker.hello.worker,
        worker.hello.model.name,
        str(state.running),
        str(state.waiting),
        _tier(worker, "device"),
        _tier(worker, "host"),
        _tier(worker, "disk"),
        f"{state.tokens_per_s:.1f}",
        f"{state.step_ms:.1f}",
        str(state.preemptions),
    ]


def _sessions(worker: operator_pb2.Worker) -> Text:
    """What a worker keeps of sessions between their turns."""
    kept = worker.state.sessions
    damaged = f", {kept.corrupt_pieces} damaged on disk" if kept.corrupt_pieces else ""
    return Text(
        f"{worker.hello.worker}: {text.count(kept.parked, 'session')} parked, {text.size(kept.host_bytes)} on the host,"
        f" {text.size(kept.disk_bytes)} on disk; {text.count(kept.restored_turns, 'turn')} resumed,"
        f" {text.count(kept.restored_tokens, 'token')} not computed again{damaged}"
    )


def _tier(worker: operator_pb2.Worker, name: str) -> str:
    budgets = {tier.name: tier.budget_bytes for tier in worker.hello.tiers}
    uses = {tier.name: tier for tier in worker.state.tiers}
    if name not in budgets and name not in uses:
        return "-"
    used = uses[name].used_bytes if name in uses else 0
    budget = uses[name].budget_bytes if name in uses else budgets[name]
    return f"{text.size(used)} of {text.size(budget)} ({text.share(used, budget)})"


@dataclass(frozen=True)
class _Requests:
    """The live requests: a table where the terminal is wide enough, else a paragraph for each."""

    snapshot: Snapshot

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rows = [_row(request, self.snapshot) for request in self.snapshot.requests]
        if options.max_width < WIDE:
            for row in rows:
                for heading, cell in zip(_HEADINGS, row, strict=True):
                    indent = "" if heading == _HEADINGS[0] else "  "
                    yield Text.assemble(f"{indent}{heading}: ".replace("\n", " "), Text("; ").join(cell.split()))
            return
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
        for heading, ratio in zip(_HEADINGS, _RATIOS, strict=True):
            numbers = heading.startswith(("tokens", "device", "host", "disk"))
            table.add_column(heading, ratio=ratio, no_wrap=ratio is None, justify="right" if numbers else "left")
        for row in rows:
            table.add_row(*row)
        yield table


WIDE = 120
"""Columns from which the requests are a table."""
_HEADINGS = (
    *("request", "pipeline", "tokens", "device\nof full", "host\n+ shadow", "signals"),
    *("last switch", "latest decision"),
)
_RATIOS = (None, 3, None, None, None, 3, 4, 4)


def _row(request: operator_pb2.LiveRequest, snapshot: Snapshot) -> list[Text]:
    hellos = [worker.hello for worker in snapshot.workers if worker.hello.worker == request.worker]
    return [
        Text(f"{text.short_id(request.state.request_id)}\n{request.worker}"),
        _pipeline(request),
        Text(_tokens(request.state)),
        Text(_device(request.state)),
        Text(_lower_tiers(request.state)),
        Text(_signals(request.state, [horizon for hello in hellos for horizon in hello.far_horizons_tokens])),
        _last_switch(request.state),
        _decision(request),
    ]


def _pipeline(request: operator_pb2.LiveRequest) -> Text:
    state = request.state
    marks = [scenario_word(state.scenario)]
    marks += [text.loss_class(state.loss_class)] if state.loss_class else []
    marks += ["pinned by its client"] if state.pinned else []
    marks += ["overridden"] if request.overridden else []
    return Text.assemble((state.pipeline, "bold"), "\n", (", ".join(marks), "dim"))


def _tokens(state: policy_pb2.RequestState) -> str:
    now = "prefilling" if state.prefilling else f"{state.generated_tokens}/{state.max_tokens}"
    return f"{now}\n+ {state.prompt_tokens} prompt"


def _device(state: policy_pb2.RequestState) -> str:
    cache = state.cache
    part = text.share(cache.device_bytes, cache.full_cache_bytes)
    return f"{text.size(cache.device_bytes)}, {part}\nof {text.size(cache.full_cache_bytes)}"


def _lower_tiers(state: policy_pb2.RequestState) -> str:
    cache = state.cache
    lines = [text.size(cache.host_bytes), f"+ {text.size(cache.shadow_bytes)}"]
    if cache.disk_bytes:
        lines.append(f"{text.size(cache.disk_bytes)} on disk")
    if state.recalls.tiers:
        lines.append(f"{text.in_time(state.recalls)} there in time")
    if brought := sum(pair.bytes for pair in state.recalls.moved if (pair.from_tier, pair.to_tier) in _UP):
        lines.append(f"{text.size(brought)} brought")
    return "\n".join(lines)


def _signals(state: policy_pb2.RequestState, horizons: list[int]) -> str:
    signals = state.signals
    if not signals.steps:
        return "-"
    far = " ".join(
        f">{horizon}: {mass:.2f}" for horizon, mass in zip(horizons, signals.far_mass, strict=False) if mass >= 0.005
    )
    return (
        f"far mass {far or 'none'}\nentropy {signals.attention_entropy:.2f}, next {signals.next_token_entropy:.2f} nats"
    )


def _last_switch(state: policy_pb2.RequestState) -> Text:
    if not state.HasField("last_switch"):
        return Text("-")
    switch = state.last_switch
    return Text.assemble(
        f"@{switch.at_token} by {text.orderer(switch.ordered_by)}: {switch.from_pipeline} → {switch.to_pipeline}\n",
        (switch.reason, "dim"),
    )


def _decision(request: operator_pb2.LiveRequest) -> Text:
    if not request.HasField("decision"):
        return Text("-")
    decision = request.decision
    word = text.outcome(decision.outcome)
    what = "" if word == "keep" else f" {decision.pipeline}"
    said = f" ({decision.refusal})" if decision.refusal else ""
    return Text.assemble(
        (word, _STYLES.get(word, "")), f"{what}{said}\n", _forecast(decision), (decision.reason, "dim")
    )


def _forecast(decision: operator_pb2.Decision) -> str:
    """What the bundle promises; nothing for the rule, which promises nothing."""
    if not decision.bundle:
        return ""
    predicted, bound = text.nats(decision.predicted_divergence), text.nats(decision.bound)
    return f"bundle {decision.bundle}: predicted {predicted}, bound {bound} nats\n"
