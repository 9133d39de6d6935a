"""The run: replays in flight, rows into files, failures kept, any interruption resumable."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from kvpilot.catalog import StageCatalog
from kvpilot.client import AsyncClient
from kvpilot.errors import KvpilotError, Unavailable
from kvpilot.v1 import generation_pb2
from models.collect.folder import Folder
from models.collect.plan import Asked, Plan, Replay
from models.collect.rows import MeasureError, rows_of

HOPELESS = 5
"""Documents that fail before any succeeds, after which a run is given up."""


class HopelessError(Exception):
    """Nothing can be measured; says why the first documents failed."""


class Progress(Protocol):
    """Told how far a run is."""

    def place(self) -> None:
        """A place was measured."""
        ...

    def document(self, plan: Plan, reason: str) -> None:
        """A document is done; ``reason``: why it failed, empty if it did not."""
        ...


@dataclass
class Collected:
    """What came of a run."""

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


class Collector:
    """Measures documents.

    Args:
        client: calls the service.
        asked: model, pipelines and horizon.
        catalog: the model's stages.
        folder: takes the results.
        progress: told how far it is.
    """

    def __init__(
        self, client: AsyncClient, asked: Asked, catalog: StageCatalog, folder: Folder, progress: Progress
    ) -> None:
        self._client = client
        self._asked = asked
        self._catalog = catalog
        self._folder = folder
        self._progress = progress
        self.collected = Collected()

    async def run(self, plans: Iterable[Plan], at_once: int) -> Collected:
        """Measures documents, ``at_once`` at a time, each as one job per window.

        Cancelled, it leaves whole files only; its jobs go on, and a next run attaches to them.

        Raises:
            Unavailable: the service stayed out of reach.
            MeasureError: the service measures something else.
            HopelessError: the first documents all failed.
        """
        waiting = iter(plans)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(at_once):
                    group.create_task(self._work(waiting))
        except* (Unavailable, MeasureError, HopelessError) as errors:
            raise errors.exceptions[0] from None
        return self.collected

    async def _work(self, waiting: Iterator[Plan]) -> None:
        for plan in waiting:
            reason = ""
            try:
                rows: list[dict[str, Any]] = []
                for number, replay in enumerate(plan.replays):
                    rows += await self._measure(plan, replay, self._folder.key(plan, number))
                await asyncio.to_thread(self._folder.write, plan, rows)
                self.collected.done.append(plan.document)
            except Unavailable:
                raise
            except KvpilotError as error:
                reason = "; ".join([str(error), *(f"{name}: {said}" for name, said in error.violations.items())])
                self._folder.fail(plan, reason)
                self.collected.failed[plan.document] = reason
            self._progress.document(plan, reason)
            if not self.collected.done and len(self.collected.failed) >= HOPELESS:
                said = "\n".join(f"  {name}: {why}" for name, why in self.collected.failed.items())
                raise HopelessError(f"the first {len(self.collected.failed)} documents failed:\n{said}")

    async def _measure(self, plan: Plan, replay: Replay, key: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        measured: list[int] = []
        places = self._client.replay(
            token_ids=replay.token_ids,
            at_tokens=replay.at_tokens,
            pipelines=self._asked.pipelines,
            horizon_tokens=self._asked.horizon_tokens,
            measured_under=replay.measured_under,
            turns=replay.turns,
            prompt_tokens=replay.prompt_tokens,
            model=self._asked.model,
            idempotency_key=key,
        )
        async with contextlib.aclosing(places):
            async for place in places:
                rows += rows_of(place, plan, self._asked, self._catalog)
                measured.append(place.at_token)
                self._progress.place()
        if measured != list(replay.at_tokens):
            raise MeasureError(f"{plan.document}: asked for places {list(replay.at_tokens)}; measured were {measured}")
        return rows


def remaining(plans: Iterable[Plan], folder: Folder) -> tuple[list[Plan], int]:
    """Plans whose results are not there yet, and how many are."""
    every = list(plans)
    left = [plan for plan in every if not folder.has(plan)]
    return left, len(every) - len(left)


def pick_model(models: Iterable[generation_pb2.Model], wanted: str | None) -> generation_pb2.Model | None:
    """The model served under this name, or the only one; None where there is none or several."""
    served = [model for model in models if wanted in (None, model.name)]
    return served[0] if len(served) == 1 else None
