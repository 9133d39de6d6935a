"""``python -m workers``: one worker process until SIGTERM or SIGINT. Exit code 1 if its engine dies."""

from __future__ import annotations

import asyncio
import sys

import structlog
from pydantic import ValidationError

from kvpilot.log import configure_logging
from kvpilot.tracing import configure_tracing
from workers.process import run_worker
from workers.settings import WorkerSettings

SWITCH_INTERVAL_S = 0.0005
"""How long the engine's thread may keep the interpreter from the event loop's: with Python's 5 ms each turn of the
loop, of which a token's delivery takes several, may wait that long beside a busy engine."""


def main() -> int:
    """Reads settings and works; returns the exit code."""
    try:
        settings = WorkerSettings.from_command_line(sys.argv[1:], "python -m workers")
    except (ValidationError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    configure_logging(settings.log_level, settings.log_format, process=settings.name, worker=settings.name)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    end_tracing = configure_tracing("kvpilot-worker", settings.name)
    try:
        asyncio.run(run_worker(settings))
    except Exception:
        structlog.get_logger().exception("worker failed")
        return 1
    finally:
        end_tracing()
    return 0


if __name__ == "__main__":
    sys.exit(main())
