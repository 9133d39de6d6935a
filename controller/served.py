"""Which models are served, as front doors know it from the workers' cards."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from kvpilot.bus import Bus
from kvpilot.v1 import generation_pb2, job_pb2


@dataclass(frozen=True)
class ServedModels:
    """Models by name.

    Attributes:
        live: models with a live worker; what all its workers can serve.
        known: all models that a worker has ever served, the live ones included.
    """

    live: Mapping[str, generation_pb2.Model] = field(default_factory=dict)
    known: Mapping[str, generation_pb2.Model] = field(default_factory=dict)


class ModelDirectory:
    """Reads the models from the job store, at most once per ``refresh_s``."""

    def __init__(self, bus: Bus, refresh_s: float) -> None:
        self._bus = bus
        self._refresh_s = refresh_s
        self._read_at = -refresh_s
        self._models = ServedModels()
        self._reading = asyncio.Lock()

    async def models(self, fresh: bool = False) -> ServedModels:
        """Returns the models.

        Raises:
            BusUnavailableError: Redis is out of reach.
        """
        async with self._reading:
            if fresh or time.monotonic() - self._read_at >= self._refresh_s:
                live = merge(await self._bus.cards())
                self._models = ServedModels(live, {**await self._bus.models(), **live})
                self._read_at = time.monotonic()
            return self._models


def merge(cards: Iterable[job_pb2.WorkerCard]) -> dict[str, generation_pb2.Model]:
    """Describes each model by what all of its workers can serve: their common stages, their smallest limits."""
    merged: dict[str, generation_pb2.Model] = {}
    for card in cards:
        model = card.hello.model
        held = merged.get(model.name)
        if held is None:
            held = merged[model.name] = generation_pb2.Model()
            held.CopyFrom(model)
            held.workers = 1
            continue
        held.workers += 1
        held.context_tokens = min(held.context_tokens, model.context_tokens)
        held.capacity_bytes = min(held.capacity_bytes, model.capacity_bytes)
        held.chat = held.chat and model.chat
        common = {stage.name: stage for stage in model.stages}
        kept = [stage for stage in held.stages if stage.name in common]
        for stage in kept:
            stage.unfit = stage.unfit or common[stage.name].unfit  # of one without the model's profile, say
        del held.stages[:]
        held.stages.extend(kept)
    return merged
