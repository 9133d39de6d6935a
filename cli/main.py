"""The ``kvpilot`` command: its options and help texts. What a command does is in the module it imports when called."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.errors import BadInputError, reported
from cli.models import STEERING_ROUNDS, models_app

if TYPE_CHECKING:
    from cli.settings import CliSettings

app = typer.Typer(
    name="kvpilot",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Serves LLM generation and steers every request's KV cache while its tokens are being generated.\n\n"
        "Start here:\n\n"
        "  kvpilot model fetch      bring a small model (90 MB)\n\n"
        "  kvpilot up               job store, controller and a worker, on this machine\n\n"
        '  kvpilot generate "..."   in another terminal, and `kvpilot top` beside it\n\n'
        "Settings come from kvpilot.toml (here, or in ~/.config/kvpilot, or named by --config), from KVPILOT_* "
        "environment variables, and from flags; later ones win. Exit codes: 0 well, 1 failed, 2 bad input."
    ),
)
model_app = typer.Typer(no_args_is_help=True, help="Bring models into the local store and list them.")
bench_app = typer.Typer(no_args_is_help=True, help="Measure kvpilot against its peers on this machine.")
app.add_typer(model_app, name="model", rich_help_panel="Set-up")
app.add_typer(models_app, name="models", rich_help_panel="Watch and steer")
app.add_typer(bench_app, name="bench", rich_help_panel="Set-up")

USE, OPERATE, SETUP = "Generate", "Watch and steer", "Set-up"


class ScenarioName(StrEnum):
    """Scenarios as flags spell them; see Scenario in common.proto."""

    LONG_CONTEXT = "long-context"
    HIGH_THROUGHPUT = "high-throughput"
    EDGE = "edge"
    MULTI_TURN = "multi-turn"
    ACCURACY_CRITICAL = "accuracy-critical"
    STREAMING = "streaming"
    MIXED = "mixed"
    PREFILL_HEAVY = "prefill-heavy"
    MINIMAL_MODIFICATION = "minimal-modification"
    HARDWARE_SPECIFIC = "hardware-specific"


class PriorityName(StrEnum):
    """Priorities as flags spell them; see Priority in generation.proto."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


class PlannerName(StrEnum):
    """Planners as flags spell them; see PlannerKind in controller/settings.py."""

    RULE = "rule"
    LEARNED = "learned"
    AUTO = "auto"


class LevelName(StrEnum):
    """What a process may log."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"
    CONFIGURED = "configured"


class ModeName(StrEnum):
    """Modes as flags spell them; see Mode in operator.proto."""

    OFF = "off"
    ADVISORY = "advisory"
    ACTIVE = "active"


class DtypeName(StrEnum):
    """What raw blocks may hold; see CacheShape in kernels/layout.py."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


Endpoint = Annotated[
    str | None,
    typer.Option("--endpoint", "-e", metavar="HOST:PORT", help="Where the API is served. Default: 127.0.0.1:7450."),
]
ModelOption = Annotated[
    str | None,
    typer.Option(help="A name from the store, or a folder written with a slash. Default: smollm2-135m-instruct."),
]
Pipeline = Annotated[
    str | None,
    typer.Option(
        metavar="STAGES",
        help="Start with this pipeline, or the recipe of this name (`kvpilot recipes`), and keep it, e.g. "
        "'snapkv(keep=0.5) | kivi(bits=4)'. "
        "Default: the planner decides.",
    ),
]
Scenario = Annotated[
    ScenarioName | None,
    typer.Option(help="What kind of work this is, for the planner. Default: mixed.", case_sensitive=False),
]
Priority = Annotated[
    PriorityName | None,
    typer.Option(help="Which waiting jobs are taken first. Default: normal.", case_sensitive=False),
]
MaxTokens = Annotated[int | None, typer.Option(metavar="N", help="Most tokens to generate. Default: 256.")]
Temperature = Annotated[float | None, typer.Option(metavar="T", help="0 is greedy. Default: 0.")]
Seed = Annotated[
    int | None, typer.Option(metavar="N", help="Seed of the random numbers. Default: drawn by the server.")
]
DeviceBudget = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Cache on the device tier, e.g. 256MiB, shared out to the workers."),
]
HostBudget = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Cache on the host tier, shared out to the workers.")
]
RATE_HELP = "Bytes read from the {} a second, in units of 1e9. Default: measured here."
Threads = Annotated[int | None, typer.Option(metavar="N", help="CPU threads of all workers. Default: one per core.")]


@app.callback()
def main(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Settings file. Default: ./kvpilot.toml, ~/.config/kvpilot/.")
    ] = None,
) -> None:
    """Takes the options that hold for all commands."""
    context.obj = config


def _settings(context: typer.Context, **flags: Any) -> CliSettings:
    from cli.settings import load_settings

    return load_settings(context.obj, **flags)


@app.command(rich_help_panel=SETUP)
def up(
    context: typer.Context,
    workers: Annotated[int | None, typer.Option(metavar="N", help="Worker processes. Default: 1.")] = None,
    model: ModelOption = None,
    device_budget: DeviceBudget = None,
    host_budget: HostBudget = None,
    threads: Threads = None,
    mode: Annotated[ModeName | None, typer.Option(help="How much is steered at the start. Default: active.")] = None,
    planner: Annotated[
        PlannerName | None,
        typer.Option(help="Who decides: the rule, the active bundle, or (auto) that if there is one. Default: auto."),
    ] = None,
    redis_url: Annotated[
        str | None, typer.Option(metavar="URL", help="Job store to use. Default: an embedded one is started.")
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="For the job store's data and the logs. Default: ~/.local/state/kvpilot."),
    ] = None,
    endpoint: Endpoint = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Logs to this terminal instead of files.")] = False,
) -> None:
    """Start everything on this machine: job store, controller, workers.

    Prints the endpoint on stdout once all of them serve, and stays until Ctrl-C or SIGTERM, which stops them all.
    A process that dies is started again, up to 5 times in 2 minutes. None outlives this command, however it ends.
    Accepted jobs are kept in the state folder and finish after the next start.
    """
    with reported():
        from rich.console import Console

        from cli.up import up as run_up

        settings = _settings(
            context,
            workers=workers,
            model=model,
            device_budget=device_budget,
            host_budget=host_budget,
            threads=threads,
            mode=mode.value if mode else None,
            planner=planner.value if planner else None,
            redis_url=redis_url,
            state=state,
            endpoint=endpoint,
        )
        err = Console(stderr=True, highlight=False)

        def served(stack: Any) -> None:
            err.print(f"serving {settings.model}; try: kvpilot generate --chat 'Hello!'", markup=False, soft_wrap=True)
            if stack.log_folder:
                err.print(f"logs in {stack.log_folder}; Ctrl-C stops everything", markup=False, soft_wrap=True)
            for name, address in stack.metrics.items():
                err.print(f"metrics of {name}: http://{address}/metrics", markup=False, soft_wrap=True)
            if stack.metrics:
                err.print(f"for Prometheus' file_sd_configs: {stack.targets_file}", markup=False, soft_wrap=True)
            print(stack.endpoint, flush=True)

        import asyncio

        asyncio.run(
            run_up(settings, lambda line: err.print(line, markup=False, soft_wrap=True), served, logs=not verbose)
        )


@app.command(rich_help_panel=USE)
def generate(
    context: typer.Context,
    prompt: Annotated[
        str | None, typer.Argument(help="Text to continue. Without it (and without --file): stdin.")
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the prompt from this file.")] = None,
    chat: Annotated[bool, typer.Option(help="The prompt is a user's turn: render it with the chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="System message; implies --chat.")] = None,
    model: Annotated[str | None, typer.Option(help="Which of several served models.")] = None,
    pipeline: Pipeline = None,
    scenario: Scenario = None,
    max_divergence: Annotated[
        float | None, typer.Option(metavar="NATS", help="Bound on the loss, nats per token; 0 admits exact only.")
    ] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: Annotated[float | None, typer.Option(metavar="P", help="Nucleus sampling. Default: 1.")] = None,
    top_k: Annotated[int | None, typer.Option(metavar="K", help="Most likely tokens kept. Default: all.")] = None,
    seed: Seed = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Stop before this text; may be given several times.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Go on after the model's end token.")] = False,
    logprobs: Annotated[
        int | None, typer.Option(metavar="N", help="With --json: log-probabilities of the N likeliest. Default: 5.")
    ] = None,
    session: Annotated[str | None, typer.Option(metavar="ID", help="Session whose cache to reuse.")] = None,
    key: Annotated[str | None, typer.Option(metavar="KEY", help="Idempotency key: the same call is one job.")] = None,
    priority: Priority = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document at the end instead of text.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No summary on stderr.")] = False,
    endpoint: Endpoint = None,
) -> None:
    """Generate text from a prompt and stream it.

    The text goes to stdout; a summary (speed, cache bytes, switches) to stderr. Ctrl-C cancels the job.

      kvpilot generate --chat "Name three rivers." --max-tokens 64

      kvpilot generate -f report.txt --scenario long-context

      kvpilot generate "Once" --pipeline "kivi(bits=4)" --json | jq .cache
    """
    with reported():
        settings = _settings(context, endpoint=endpoint)
    with reported(settings.endpoint):
        from cli import generate as command

        if logprobs is not None and not json:
            raise BadInputError("--logprobs: only --json prints them")
        said = command.read_prompt(prompt, file)
        talk = chat or system is not None
        command.generate(
            settings.endpoint,
            command.Order(
                prompt="" if talk else said,
                turns=command.conversation(system, said) if talk else (),
                model=model,
                pipeline=pipeline,
                scenario=scenario.value if scenario else None,
                max_divergence=max_divergence,
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                seed=seed,
                stop=tuple(stop or ()),
                ignore_eos=ignore_eos,
                top_logprobs=(5 if logprobs is None else logprobs) if json else 0,
                session_id=session,
                idempotency_key=key,
                priority=priority.value if priority else None,
            ),
            as_json=json,
            quiet=quiet,
        )


@app.command(rich_help_panel=USE)
def chat(
    context: typer.Context,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    pipeline: Pipeline = None,
    scenario: Scenario = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    priority: Priority = None,
    endpoint: Endpoint = None,
) -> None:
    """Talk to the model, turn by turn, in one session.

    Commands: /pipeline STAGES (without STAGES: back to the planner), /reset, /help, /quit. Ctrl-C cancels an answer.
    """
    with reported():
        settings = _settings(context, endpoint=endpoint)
    with reported(settings.endpoint):
        from cli import chat as command

        command.chat(
            settings.endpoint,
            system,
            command.Order(
                pipeline=pipeline,
                scenario=(scenario or ScenarioName.MULTI_TURN).value,
                max_tokens=max_tokens,
                temperature=temperature,
                seed=seed,
                priority=priority.value if priority else None,
            ),
        )


@app.command(rich_help_panel=OPERATE)
def top(
    context: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="Print the tables once and exit.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="Time between two looks.")] = 0.5,
    endpoint: Endpoint = None,
) -> None:
    """Watch the live requests: pipeline, tokens, bytes, signals, last switch and why, and the planner's decision.

    Bytes are shown per tier and against what pipeline `full` would take; shadows are the exact copies that let a
    switch be undone. Far mass ">128: 0.12" means that 12 % of the attention went to tokens more than 128 back. Blocks
    that steps ask of lower tiers are there in time if they had been brought before the step asked.
    """
    with reported():
        settings = _settings(context, endpoint=endpoint)
    with reported(settings.endpoint):
        from rich.console import Console

        from cli import top as command

        console = Console()
        if once:
            console.print(command.render(command.take_snapshot(settings.endpoint), settings.endpoint))
        elif not console.is_terminal:
            raise BadInputError("top needs a terminal; `kvpilot top --once` prints the tables once")
        else:
            command.watch(settings.endpoint, interval, console)


@app.command(rich_help_panel=OPERATE)
def inspect(
    pipeline: Annotated[
        str, typer.Argument(metavar="PIPELINE", help="What to look at, e.g. 'snapkv(keep=0.5) | kivi(bits=4)'.")
    ],
    prompt_file: Annotated[Path, typer.Option("--prompt-file", metavar="FILE", help="Text to compute, UTF-8.")],
    tokens: Annotated[int, typer.Option(min=0, metavar="N", help="Tokens to generate behind it, greedily.")] = 0,
    model: ModelOption = None,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write everything to this file.")] = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="Draw heads by positions into this PNG file.")
    ] = None,
) -> None:
    """Look at what a pipeline keeps of a text: which tokens each layer and KV head, in which format, on which tier.

    Runs in this process, without a stack, as a worker that serves nothing else would. Prints a map of what each layer
    keeps along the text, bytes and tokens against the full cache, and the pieces of the text that most and fewest
    heads keep. The document of --json has every head's blocks with their positions, the evictor's score of every
    token it last chose among, and bytes.

      kvpilot inspect "snapkv(keep=0.25) | kivi(bits=4)" --prompt-file report.txt --picture kept.png
    """
    with reported():
        from cli import inspect as command

        command.inspect(pipeline, prompt_file, tokens, model, json, picture)


@app.command(rich_help_panel=OPERATE)
def mode(
    context: typer.Context,
    mode: Annotated[ModeName | None, typer.Argument(help="The mode to set; without it the mode is shown.")] = None,
    endpoint: Endpoint = None,
) -> None:
    """Show or set how much is steered.

    off: plans nothing. advisory: decides and logs, sends nothing. active: decides and sends.
    """
    with reported():
        settings = _settings(context, endpoint=endpoint)
    with reported(settings.endpoint):
        from cli import operate

        print(operate.show_mode(settings.endpoint) if mode is None else operate.set_mode(settings.endpoint, mode.value))


@app.command("log-level", rich_help_panel=OPERATE)
def log_level(
    context: typer.Context,
    level: Annotated[
        LevelName | None, typer.Argument(help="The level to set; without it the orders that hold are shown.")
    ] = None,
    process: Annotated[
        str, typer.Option(metavar="NAME", help="Of this controller or worker alone. Default: all without their own.")
    ] = "",
    duration: Annotated[
        str, typer.Option("--for", metavar="TIME", help="For so long, e.g. 10m; then each goes back by itself.")
    ] = "",
    endpoint: Endpoint = None,
) -> None:
    """Show or set from which level on processes log, without restarting any.

    Reaches every process that shares the job store within a few seconds, front doors and other controllers' workers
    included, and those that start later. configured: takes an earlier order back.

      kvpilot log-level debug --process worker-0 --for 10m
    """
    with reported():
        settings = _settings(context, endpoint=endpoint)
    with reported(settings.endpoint):
        from cli import levels

        if level is None:
            print(levels.show_levels(settings.endpoint))
        else:
            print(levels.set_level(settings.endpoint, level.value, process, duration))


@app.command(rich_help_panel=OPERATE)
def override(
    context: typer.Context,
    request: Annotated[str, typer.Argument(help="Job id, or its end as `kvpilot top` shows it.")],
    pipeline: Annotated[str, typer.Argument(help="Pipeline or recipe to move to and stay with, e.g. 'kivi(bits=4)'.")],
    reason: Annotated[str, typer.Option(help="Kept with the switch.")] = "",
    endpoint: Endpoint = None,
) -> None:
    """Take a live request's pipeline into your own hands, until `kvpilot release`."""
    with reported():
        settings = _settings(context, endpoint=endpoint)
    with reported(settings.endpoint):
        from cli import operate

        print(operate.override(settings.endpoint, request, pipeline, reason))


@app.command(rich_help_panel=OPERATE)
def release(
    context: typer.Context,
    request: Annotated[str, typer.Argument(help="Job id, or its end as `kvpilot top` shows it.")],
    endpoint: Endpoint = None,
) -> None:
    """Give an overridden request back to the planner."""
    with reported():
        settings = _settings(context, endpoint=endpoint)
    with reported(settings.endpoint):
        from cli import operate

        print(operate.release(settings.endpoint, request))


@app.command(rich_help_panel=OPERATE)
def recipes(
    context: typer.Context,
    model: ModelOption = None,
    context_tokens: Annotated[
        int, typer.Option("--context", min=1, metavar="TOKENS", help="Tokens of the prompt that the bytes are for.")
    ] = 4096,
    dtype: Annotated[
        DtypeName, typer.Option(help="Of raw blocks: a CPU worker has float32, others bfloat16.")
    ] = DtypeName.FLOAT32,
    scenarios: Annotated[
        bool,
        typer.Option("--scenarios", help="Instead, the pipeline each scenario would have if nothing steered."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List the named pipelines: what they are, what they suit, and what their caches would take.

    A recipe's name is accepted wherever a pipeline is. Bytes are those right after a prompt of that many tokens, scales
    and tables counted; "16-bit" is the share of full as if raw blocks held 16-bit numbers; the exact copy on the host
    is what lets a switch be undone (shadow=false saves it). No server is needed, only the model's folder.

      kvpilot recipes --context 8192

      kvpilot generate -f report.txt --pipeline snapkv-int4
    """
    with reported():
        settings = _settings(context, model=model)
        from cli import recipes as command

        command.show(settings.model, context_tokens, dtype.value, scenarios, json)


@app.command(rich_help_panel=OPERATE)
def place(
    context: typer.Context,
    device_bytes: Annotated[str, typer.Option(metavar="SIZE", help="Room for caches on the device, e.g. 512MiB.")],
    host_bytes: Annotated[str, typer.Option(metavar="SIZE", help="Room for caches on the host.")],
    disk_bytes: Annotated[str, typer.Option(metavar="SIZE", help="Room for caches on disk.")] = "0",
    model: ModelOption = None,
    context_tokens: Annotated[
        int, typer.Option("--context", min=1, metavar="TOKENS", help="Tokens of each request.")
    ] = 4096,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Requests at once.")] = 1,
    codec: Annotated[
        str, typer.Option(metavar="STAGE", help="How older blocks are stored; an empty text: raw.")
    ] = "kivi(bits=4, shadow=false)",
    dtype: Annotated[
        DtypeName, typer.Option(help="Of raw blocks: a CPU worker has float32, others bfloat16.")
    ] = DtypeName.FLOAT32,
    device_rate: Annotated[float | None, typer.Option(metavar="GB/S", help=RATE_HELP.format("device"))] = None,
    host_rate: Annotated[float | None, typer.Option(metavar="GB/S", help=RATE_HELP.format("host"))] = None,
    disk_rate: Annotated[float | None, typer.Option(metavar="GB/S", help=RATE_HELP.format("disk"))] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Find the shares of device, host and disk at which a batch's caches are read soonest, as a pipeline.

    A linear program over where the caches are, FlexGen's; weights and activations stay where they are. The pipeline is
    on stdout. Without --codec's shadow=false the exact copy counts on the host. While a prompt is computed its rows are
    raw, and need the room that they need with any pipeline.

      kvpilot place --context 8192 --device-bytes 16MiB --host-bytes 32MiB --disk-bytes 1GiB
    """
    with reported():
        settings = _settings(context, model=model)
        from cli import place as command
        from cli.recipes import Setting
        from kernels.layout import Tier

        sizes = {Tier.DEVICE: device_bytes, Tier.HOST: host_bytes, Tier.DISK: disk_bytes}
        rates = {Tier.DEVICE: device_rate, Tier.HOST: host_rate, Tier.DISK: disk_rate}
        setting = Setting.of(settings.model, context_tokens, dtype.value)
        command.place(setting, codec, batch, sizes, rates, json)


@model_app.command("fetch")
def model_fetch(
    name: Annotated[str, typer.Argument(help="Model to fetch; `kvpilot model list` shows which.")] = "smollm2",
) -> None:
    """Download a model, convert it once and keep it in the store. Does nothing if it is there.

    The store is $KVPILOT_CACHE/models, else $XDG_CACHE_HOME/kvpilot/models, else ~/.cache/kvpilot/models.
    An interrupted fetch leaves nothing half done.
    """
    with reported():
        from cli import model as command

        command.fetch(name)


@model_app.command("list")
def model_list() -> None:
    """List the models in the store and those that can be fetched.

    A line each: name, folder or how to get it, what it is, and, of those in the store, whether it has a profile.
    """
    with reported():
        from cli import model as command

        command.show()


@model_app.command("profile")
def model_profile(
    model: Annotated[str, typer.Argument(help="A name from the store, or a folder written with a slash.")],
    tokens: Annotated[int, typer.Option(min=1024, metavar="N", help="Tokens of text to find it from.")] = 8192,
    force: Annotated[bool, typer.Option("--force", help="Find it anew although there is one.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the file's name.")] = False,
) -> None:
    """Find out once about a model what some stages need: how it asks, which heads retrieve, how its keys are spread.

    Runs the model over real text of this machine (licences, manuals, Python's library) in this process, and keeps
    the profile in $KVPILOT_CACHE/profiles under the hash of the model. Workers that start afterwards load it. Does
    nothing if it is there. `kvpilot model list` shows which models have one.

      kvpilot model profile smollm2
    """
    with reported():
        from cli import profile as command

        command.profile(model, tokens, force, json)


@app.command(rich_help_panel=SETUP)
def demo(
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the summary to this file.")] = None,
    model: ModelOption = None,
    device_budget: DeviceBudget = None,
    threads: Threads = None,
) -> None:
    """See it work: start a stack of its own, run real jobs at once, watch their caches being steered.

    A long document with a fact to find, a chat of three turns, a stream longer than its window, and code. The device
    budget is small, so that there is pressure. Ends with what each request took against the full cache; fails if the
    fact is missed or the controller switched no request in the middle of its generation.
    """
    with reported():
        from cli import demo as command

        command.demo(json, model, device_budget, threads)


@bench_app.command("steer")
def bench_steer(
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures to this file.")] = None,
    model: ModelOption = None,
    requests: Annotated[int, typer.Option(min=1, metavar="N", help="Requests at once.")] = 8,
    window_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of each between two changes.")] = 8,
    prompt_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of each prompt, about.")] = 256,
    rounds: Annotated[
        int, typer.Option(min=1, metavar="N", help="Windows of each mode; medians are given.")
    ] = STEERING_ROUNDS,
    threads: Threads = None,
) -> None:
    """What steering costs: planning is on (advisory) and off in turn while the same requests are decoded.

    Planning decides and logs but sends nothing, so both sides do the same work. What the worker's signals take is
    counted beside it.
    """
    with reported():
        from bench import steer as command

        command.bench(json, model, requests, window_tokens, prompt_tokens, rounds, threads)


@bench_app.command("serve")
def bench_serve(
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures to this file.")] = None,
    model: ModelOption = None,
    requests: Annotated[int, typer.Option(min=1, metavar="N", help="Requests at once.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens each of them generates.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of each prompt.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Times each side runs; medians are given.")] = 3,
    threads: Threads = None,
) -> None:
    """Eight requests at once through the whole stack, against the same eight one after another in transformers.

    Both sides run in turn on this machine with the same model, dtype, threads and greedy tokens. The ratio is what
    counts; the absolute speeds are this machine's.
    """
    with reported():
        from bench import serve as command

        command.bench(json, model, requests, max_tokens, prompt_tokens, rounds, threads)


@bench_app.command("latency")
def bench_latency(
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures to this file.")] = None,
    model: ModelOption = None,
    streams: Annotated[
        str, typer.Option(metavar="LIST", help="How many streams at once, one row of figures each.")
    ] = "1,4,8",
    tokens: Annotated[int, typer.Option(min=8, metavar="N", help="Tokens that each stream generates.")] = 128,
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="CPU threads of the worker. Default: one fewer than cores.")
    ] = None,
) -> None:
    """How long a token takes from the worker's choice of it to the client, beside the least that the hops can cost.

    More streams have lower rates each. The floor, an entry in the job store and a gRPC message, is measured at the same
    time, with as many streams at the same rate.
    """
    with reported():
        from bench import latency as command

        command.bench(json, model, streams, tokens, threads)


@bench_app.command("decode")
def bench_decode(
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures to this file.")] = None,
    model: ModelOption = None,
    pipelines: Annotated[
        str, typer.Option(metavar="LIST", help="Separated by semicolons; the first is what others are held against.")
    ] = "full; kivi(bits=4)",
    contexts: Annotated[
        str, typer.Option(metavar="LIST", help="Tokens of prompts; at the first one switches are measured.")
    ] = "4096,8000",
    tokens: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens of a window.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Windows of each pipeline; medians are given.")] = 7,
    switches: Annotated[
        int, typer.Option(min=0, metavar="N", help="Times to the last pipeline and back, live; 0: none.")
    ] = 5,
    threads: Threads = None,
) -> None:
    """Decoding with a long context: tokens/s of pipelines in turn, and how long a live switch keeps a request waiting.

    One engine in this process, one request at a time. Computing the prompts takes minutes on few cores.
    """
    with reported():
        from bench import decode as command

        command.bench(json, model, pipelines, contexts, tokens, rounds, switches, threads)


@bench_app.command("quality")
def bench_quality(
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures to this file.")] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with tables and pictures to this file.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the figures into this PNG file.")] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="One text of 1,024 tokens, needles at 1,024 and 2,048: about ten minutes."),
    ] = False,
    model: ModelOption = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A stage, recipe or combination, measured beside the full cache; may be given several times. "
            "Default: all.",
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Share the pipelines out to so many processes. Default: one a core, or OMP_NUM_THREADS.",
        ),
    ] = None,
) -> None:
    """What every stage and recipe costs in quality, at a half, a quarter and an eighth of the full cache's bytes.

    Four tables: the tokens behind real texts; needles in them, with the question in the prompt and behind the reduced
    cache; a conversation whose last turn needs the first; a long generation, with evictors at work. Device bytes count
    scales, zero points and tables, raw blocks as of 16 bits. Where a stage cannot reach a share or serve the model, its
    row says why; one that raises has its error there, and the exit code is 1 at the end.

    Some stages need the model's profile. Where there is none, it is found first, from 4,096 tokens of text, and stored
    for good, as `kvpilot model profile` does; workers that load the model from then on have it too.

      kvpilot bench quality --quick --json quality.json --html quality.html

      kvpilot bench quality --quick --only snapkv --only kivi-2bit
    """
    with reported():
        from bench import quality as command

        names, files = tuple(dict.fromkeys(only or ())), command.Files(json, html, plot)
        command.bench(quick, model, names, files, processes)


@bench_app.command("sessions")
def bench_sessions(
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures to this file.")] = None,
    model: ModelOption = None,
    prompt_tokens: Annotated[int, typer.Option(min=64, metavar="N", help="Tokens of the first turn.")] = 3000,
    question_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens that a later turn adds.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Later turns of each kind; medians are given.")] = 3,
    threads: Threads = None,
) -> None:
    """A session's next turn: time to its first token, resumed from the host tier, from disk, and cold.

    One engine in this process, one request at a time. Cold turns compute the whole conversation again.
    """
    with reported():
        from bench import sessions as command

        command.bench(json, model, prompt_tokens, question_tokens, rounds, threads)


@bench_app.command("kernels")
def bench_kernels(
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures to this file.")] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the tables to this file as Markdown; - prints them.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the figures into this PNG file.")] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Kernels to measure; may be given several times. Default: a worker's."),
    ] = None,
    formats: Annotated[
        str | None, typer.Option(metavar="LIST", help="Block formats, such as raw,int8. Default: all.")
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(
            min=64,
            metavar="TOKENS",
            help="Context length; may be given several times. Default: 2048 and 8192, on a GPU 8192 and 32768.",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Requests decoded at once.")] = 4,
    kv_heads: Annotated[int, typer.Option(min=1, metavar="N", help="KV heads of a layer.")] = 3,
    queries: Annotated[int, typer.Option(min=1, metavar="N", help="Query heads that share a KV head.")] = 3,
    head_dim: Annotated[int, typer.Option(min=2, metavar="N", help="Channels of a head.")] = 64,
    dtype: Annotated[DtypeName, typer.Option(help="Of raw blocks, and of what torch gets.")] = DtypeName.FLOAT32,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Rounds; medians are given.")] = 7,
    switch_tokens: Annotated[
        int, typer.Option(min=0, metavar="N", help="Tokens of the request that changes format; 0: none does.")
    ] = 4096,
    walk_mib: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Blocks that a pass walks over, at least. Default: four times the largest cache."
        ),
    ] = None,
    threads: Threads = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu or cuda. Default: cuda where torch finds a GPU.")
    ] = None,
) -> None:
    """Decode attention of every block format, beside the machine's memory bandwidth and beside torch.

    For each backend, format and context length: bytes of blocks read per second, torch's copy and sum over large
    buffers, and the speed against scaled_dot_product_attention on the same numbers, in the faster of its two forms
    (queries of a group packed as rows, and enable_gqa). All take turns in every round of one run, over more data than
    the caches hold. A second table says how long a request stands still when it changes format.

    Wants the machine for itself. Where other work runs, OMP_WAIT_POLICY=passive keeps OpenMP's threads from spinning.

      kvpilot bench kernels --json kernels.json --plot kernels.png

      kvpilot bench kernels --context 4096 --formats raw,int4 --markdown -
    """
    with reported():
        from bench import kernels as command

        settings = command.Settings(
            backends=tuple(dict.fromkeys(backend or ())),
            formats=command.formats_of(formats),
            contexts=tuple(dict.fromkeys(context or ())),
            batch=batch,
            kv_heads=kv_heads,
            queries_per_kv_head=queries,
            head_dim=head_dim,
            dtype=dtype.value,
            repeats=repeats,
            switch_tokens=switch_tokens,
            walk_bytes=walk_mib * 2**20 if walk_mib else None,
            threads=threads,
            device=device,
        )
        command.bench(settings, json, markdown, plot)
