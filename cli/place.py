"""``kvpilot place``: the shares of device, host and disk that read a batch's caches soonest."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich import box
from rich.console import Console
from rich.table import Table

from cli import text
from cli.errors import BadInputError
from cli.recipes import Setting
from kernels.layout import Tier
from kvpilot.pipeline import PipelineError
from workers.cache.disk import DiskStore
from workers.engine.bandwidth import copy_rate
from workers.placement import DoesNotFitError, Placement, demand_of, pipeline_of, solve
from workers.stages.base import Codec
from workers.stages.registry import build

COPIED_BYTES = 16 << 20
"""What is copied to measure a rate; of files a budget of four times as many is open."""
GB = 1e9


def place(
    setting: Setting,
    codec: str,
    batch: int,
    sizes: Mapping[Tier, str],
    rates: Mapping[Tier, float | None],
    as_json: bool,
) -> None:
    """Prints the pipeline on stdout and what it means on stderr, or a document of both on stdout.

    Args:
        setting: the model, and the tokens of each request.
        codec: text of a compress stage; empty: blocks stay raw.
        batch: requests at once.
        sizes: budget of each tier, e.g. ``512MiB``.
        rates: of each tier, GB/s; None: measured here.
        as_json: whether the document is wanted.

    Raises:
        BadInputError: a size that is none, a stage that is no codec of one format, or tiers too small, saying which.
    """
    chosen = _codec(codec, setting)
    budget = {tier: _bytes(f"--{tier.name.lower()}-bytes", size) for tier, size in sizes.items()}
    measured = {tier: rate for tier, rate in _measured().items() if rates[tier] is None and budget[tier]}
    bytes_per_s = {tier: (rates[tier] or 0) * GB or measured.get(tier, 0.0) for tier in Tier}
    try:
        demand = demand_of(chosen, setting.shape, setting.context_tokens, batch)
        found = solve(demand, budget, bytes_per_s)
    except DoesNotFitError as error:
        raise BadInputError(f"--context {setting.context_tokens}, --batch {batch}: {error}") from None
    except ValueError as error:
        raise BadInputError(str(error)) from None
    pipeline = pipeline_of(chosen, found).text
    if as_json:
        shares = {tier.name.lower(): _share(found, tier) for tier in Tier}
        print(
            json.dumps(
                {
                    "model": setting.model,
                    "context_tokens": setting.context_tokens,
                    "batch": batch,
                    "pipeline": pipeline,
                    "shares": shares,
                    "bytes": {name: round(share * demand.blocks) for name, share in shares.items()},
                    "bytes_per_s": {tier.name.lower(): bytes_per_s[tier] for tier in Tier},
                    "measured": sorted(tier.name.lower() for tier in measured),
                    "step_seconds": found.seconds,
                }
            )
        )
        return
    table = Table("tier", title=f"{setting.model}, {batch} x {setting.context_tokens} tokens", box=box.SIMPLE_HEAD)
    for column in ("share", "blocks", "budget", "GB/s"):
        table.add_column(column, justify="right")
    for tier in Tier:
        share, rate = _share(found, tier), f"{bytes_per_s[tier] / GB:.1f}" + " (measured)" * (tier in measured)
        sizes_ = text.size(share * demand.blocks), text.size(budget[tier])
        table.add_row(tier.name.lower(), f"{share:.1%}", *sizes_, rate if budget[tier] else "-")
    said = Console(stderr=True, highlight=False)
    said.print(table)
    said.print(f"reading all of it once, as a decode step does: {found.seconds * 1e3:.2f} ms")
    print(pipeline)


def _codec(given: str, setting: Setting) -> Codec | None:
    if not given:
        return None
    try:
        built = build(given, setting.shape)
    except PipelineError as error:
        raise BadInputError(f"--codec: {error}") from None
    if built.codec is None or len(built.stages) > 1:
        raise BadInputError(f"--codec {given!r}: accepted: one compress stage, or an empty text for raw blocks")
    return built.codec


def _bytes(option: str, size: str) -> int:
    try:
        return int(TypeAdapter(ByteSize).validate_python(size))
    except ValidationError:
        raise BadInputError(
            f"{option} {size!r}: accepted: a number of bytes, or one with a unit, e.g. 512MiB"
        ) from None


def _share(found: Placement, tier: Tier) -> float:
    return {Tier.DEVICE: found.device, Tier.HOST: found.host, Tier.DISK: found.disk}[tier]


def _measured() -> dict[Tier, float]:
    """Rates as a worker with this machine's device would report them; of a CPU, device and host are one memory."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    here, there = (torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    host = torch.zeros(COPIED_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    with tempfile.TemporaryDirectory(prefix="kvpilot-") as folder:
        store = DiskStore(Path(folder), 4 * COPIED_BYTES)
        try:
            disk = store.measure()
        finally:
            store.close()
    within = copy_rate(here, there)
    return {Tier.DEVICE: within, Tier.HOST: copy_rate(host, here) if here.is_cuda else within, Tier.DISK: disk}
