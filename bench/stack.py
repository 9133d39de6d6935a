"""What benchmarks that go through the whole stack share: its settings, and a request whose tokens are timed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from cli.redis_server import free_port
from cli.settings import CliSettings, load_settings
from kvpilot.client import AsyncClient

Timed = tuple[list[float], list[int]]
"""When each token came, seconds by ``time.perf_counter``; and the tokens."""


def bench_settings(
    state: Path, model: str | None, threads: int, requests: int, mode: str, **worker: Any
) -> CliSettings:
    """One worker and a job store of their own, on free ports, with room for ``requests`` at once."""
    return load_settings(
        None,
        endpoint=f"127.0.0.1:{free_port()}",
        model=model,
        workers=1,
        threads=threads,
        state=state,
        redis_url="",
        mode=mode,
        worker={"default_pipeline": "full", "max_running": max(8, requests), **worker},
    )


async def generate_timed(endpoint: str, **request: Any) -> Timed:
    """Generates to the last token asked for, end tokens or not."""
    times: list[float] = []
    ids: list[int] = []
    async with AsyncClient(endpoint) as client:
        async for event in client.generate(ignore_eos=True, **request):
            ids += event.token_ids
            times += [time.perf_counter()] * len(event.token_ids)
    return times, ids
