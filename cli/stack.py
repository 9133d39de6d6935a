"""The processes of one machine: job store, controller, workers; started in order, watched, stopped in order."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from cli import tether
from cli.child import Child, ChildError
from cli.plan import CONTROLLER_PREFIX, WORKER_PREFIX, StackPlan
from cli.redis_server import RedisServer

READY_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 15.0
RESTARTS = 5
"""Restarts of one process that are tolerated within ``RESTART_WINDOW_S``."""
RESTART_WINDOW_S = 120.0
RESTART_WAIT_S = 0.5
"""Wait before the second restart within the window; doubles with each further one. The first is at once."""


class StackError(Exception):
    """The stack cannot go on; ``str(error)`` says which process and shows its last log lines."""


class Stack:
    """One machine's processes. ``async with`` starts and stops them; :meth:`watch` keeps them alive in between.

    Use it from the main thread: the children are tied to the thread that starts them.

    Args:
        plan: what to run.
        state: folder for the embedded job store and the logs.
        redis_url: job store to use; empty: an embedded one is started.
        say: told what happens, one line each.
        logs: False: the processes write to our own output instead of files below ``state``.
    """

    def __init__(
        self, plan: StackPlan, state: Path, redis_url: str, say: Callable[[str], None], logs: bool = True
    ) -> None:
        self.endpoint = ""
        self.log_folder = state / "logs" if logs else None
        self.children: list[Child] = []
        self.targets_file = state / "targets.json"
        """Where the processes serve their metrics, as Prometheus' file-based discovery reads it."""
        self._plan = plan
        self._ready_folder = state / "ready"
        self._redis = None if redis_url else RedisServer(state / "redis", self.log_folder)
        self._redis_url = redis_url
        self._say = say
        self._stopping = False

    async def __aenter__(self) -> Stack:
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _start(self) -> None:
        for folder in (self._ready_folder, self.log_folder):
            if folder is not None:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not tether.SUPPORTED:
            self._say("this system cannot tie children to their parent: a kill -9 of this process leaves them behind")
        if self._redis is not None:
            self._say("starting the job store")
            await self._launch(self._redis.child())
            self._redis_url = self._redis.url
        self._say("starting the controller")
        controller = self._child("controller", "controller", dict(self._plan.controller), CONTROLLER_PREFIX)
        self.endpoint = await self._launch(controller)
        controller.environment[f"{CONTROLLER_PREFIX}LISTEN"] = self.endpoint  # a restart has to come back there
        count = len(self._plan.workers)
        self._say(f"starting {count} worker{'s' if count > 1 else ''}: loading the model")
        workers = []
        for environment in self._plan.workers:
            complete = {f"{WORKER_PREFIX}CONTROLLERS": self.endpoint} | environment
            workers.append(self._child(environment[f"{WORKER_PREFIX}NAME"], "workers", complete, WORKER_PREFIX))
        await asyncio.gather(*(self._launch(worker) for worker in workers))
        self._write_targets()

    @property
    def metrics(self) -> dict[str, str]:
        """``host:port`` of the processes' metrics, by name; of those that serve any."""
        return {child.name: child.metrics for child in self.children if child.metrics}

    def _write_targets(self) -> None:
        """Tells Prometheus where to look. A restarted process may be at another port."""
        targets = [{"targets": [address], "labels": {"name": name}} for name, address in self.metrics.items()]
        partial = self.targets_file.with_suffix(".partial")
        partial.write_text(json.dumps(targets, indent=2) + "\n", encoding="utf-8")
        partial.replace(self.targets_file)

    def _child(self, name: str, module: str, environment: dict[str, str], prefix: str) -> Child:
        ready_file = self._ready_folder / name
        environment |= {f"{prefix}REDIS_URL": self._redis_url, f"{prefix}READY_FILE": str(ready_file)}
        log = self.log_folder / f"{name}.log" if self.log_folder else None
        return Child(name, (sys.executable, "-P", "-m", module), log, environment, ready_file)

    async def _launch(self, child: Child) -> str:
        self.children.append(child)
        await child.start()
        try:
            return await child.ready(READY_TIMEOUT_S)
        except ChildError as error:
            raise StackError(str(error)) from None

    async def watch(self) -> None:
        """Restarts whatever dies, until cancelled.

        Raises:
            StackError: a process died more than ``RESTARTS`` times within ``RESTART_WINDOW_S``.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for child in self.children:
                    group.create_task(self._keep(child))
        except* StackError as errors:
            raise errors.exceptions[0] from None

    async def _keep(self, child: Child) -> None:
        deaths: deque[float] = deque()
        while True:
            await child.wait()
            if self._stopping:
                return
            now = time.monotonic()
            deaths.append(now)
            while now - deaths[0] > RESTART_WINDOW_S:
                deaths.popleft()
            if len(deaths) > RESTARTS:
                raise StackError(
                    f"{child.name} {child.describe_exit()}; given up after {RESTARTS} restarts within "
                    f"{RESTART_WINDOW_S:.0f} s{child.log_tail()}"
                )
            self._say(f"{child.name} {child.describe_exit()}; restarting it ({len(deaths)} of {RESTARTS})")
            if len(deaths) > 1:
                await asyncio.sleep(RESTART_WAIT_S * 2 ** (len(deaths) - 2))
            await child.start()
            try:
                await child.ready(READY_TIMEOUT_S)
            except ChildError:
                await child.stop(STOP_TIMEOUT_S)  # counted as one more death in the next round
            else:
                self._write_targets()
                self._say(f"{child.name} is back")

    async def stop(self) -> None:
        """Stops the workers, then the controller, then the job store. May be called again."""
        self._stopping = True
        workers = [child for child in self.children if child.name.startswith("worker-")]
        drain_s = max(float(worker.get(f"{WORKER_PREFIX}DRAIN_TIMEOUT_S", 0)) for worker in self._plan.workers)
        await asyncio.gather(*(child.stop(drain_s + STOP_TIMEOUT_S) for child in workers))
        for child in reversed(self.children):
            await child.stop(STOP_TIMEOUT_S)
        if self._redis is not None:
            self._redis.release()
