"""Stacks of real processes around a tiny random model, and what the tests of this folder say to them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import torch

from cli.child import Child
from cli.plan import plan_stack
from cli.settings import CliSettings
from cli.stack import Stack
from cli.up import wait_attached
from kvpilot.client import AsyncClient
from kvpilot.event import Event
from kvpilot.result import Result
from kvpilot.v1 import operator_pb2, operator_pb2_grpc

CONTEXT = 16_384
DEVICE_BYTES = 4 << 20
HOST_BYTES = 3 << 20
"""Together 14,336 raw tokens of the tiny model: less than its context, so that a job can be too large to ever fit."""
RUNNING = 8
"""Requests a worker decodes at once."""
ENDLESS = 13_000
"""Tokens of a generation that no test waits for the end of: about half a minute."""
TIMEOUT_S = 60.0
READY_S = 120.0


class Running:
    """A stack that serves the tiny model."""

    def __init__(self, stack: Stack, model: Path, folder: Path) -> None:
        self.stack = stack
        self.endpoint = stack.endpoint
        self.model = model
        self.folder = folder

    @property
    def redis_url(self) -> str:
        return self.child("controller").environment["KVPILOT_CONTROLLER_REDIS_URL"]

    def child(self, name: str) -> Child:
        return next(child for child in self.stack.children if child.name == name)

    def logged(self, name: str) -> list[dict[str, Any]]:
        """What a process has logged as JSON; its last line may be under way, and is left out then."""
        text = (self.folder / "logs" / f"{name}.log").read_text()
        return [json.loads(line) for line in text.splitlines(keepends=True) if line[0] == "{" and line[-1] == "\n"]

    async def kill(self, name: str) -> None:
        """SIGKILL; nothing brings the process back but :meth:`restart`."""
        child = self.child(name)
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        await child.wait()

    async def restart(self, name: str) -> None:
        """Starts a process again and waits until it serves, at its old address."""
        await self.child(name).start()
        await self.child(name).ready(READY_S)


@asynccontextmanager
async def serving(model: Path, folder: Path, workers: int = 1, **settings: Any) -> AsyncIterator[Running]:
    """A stack, ready to serve; settings are those of ``kvpilot.toml``."""
    # The rule decides unless a test is about bundles: what the shipped one says of random models is anybody's guess.
    defaults = {"device_budget": workers * DEVICE_BYTES, "host_budget": workers * HOST_BYTES, "planner": "rule"}
    asked = CliSettings(
        model=str(model), endpoint="127.0.0.1:0", workers=workers, threads=workers, **(defaults | settings)
    )
    async with Stack(plan_stack(asked), folder, "", lambda line: None) as stack:
        await wait_attached(stack.endpoint, workers)
        yield Running(stack, model, folder)


@asynccontextmanager
async def operator_of(running: Running) -> AsyncIterator[Operator]:
    """The operator's calls on a stack."""
    async with grpc.aio.insecure_channel(running.endpoint) as channel:
        yield Operator(operator_pb2_grpc.OperatorServiceStub(channel))


class Operator:
    """OperatorService in as many words as the tests need."""

    def __init__(self, stub: Any) -> None:
        self.stub = stub

    async def live(self) -> dict[str, operator_pb2.LiveRequest]:
        """The live requests as the controller knows them, by job id."""
        listed = await self.stub.ListRequests(operator_pb2.ListRequestsRequest())
        return {live.state.request_id: live for live in listed.requests}

    async def find(self, job_id: str) -> operator_pb2.LiveRequest | None:
        """One of them; None: the controller does not know it, or no more."""
        return (await self.live()).get(job_id)

    async def override(self, job_id: str, pipeline: str, reason: str = "") -> Any:
        """The worker's Ack."""
        request = operator_pb2.OverridePipelineRequest(request_id=job_id, pipeline=pipeline, reason=reason)
        return (await self.stub.OverridePipeline(request)).ack

    async def set_mode(self, mode: operator_pb2.Mode) -> None:
        await self.stub.SetMode(operator_pb2.SetModeRequest(mode=mode))


class Following:
    """A job whose events are taken in one by one; any gap or repeat fails.

    >>> job = Following(client.generate("Hello"))  # doctest: +SKIP
    >>> await job.until(lambda: job.tokens >= 10)  # doctest: +SKIP
    """

    def __init__(self, events: AsyncGenerator[Event, None]) -> None:
        self.result = Result()
        self.workers: list[str] = []
        self._events = events

    @property
    def job_id(self) -> str:
        return self.result.job_id

    @property
    def tokens(self) -> int:
        return len(self.result.token_ids)

    async def next(self) -> Event | None:
        """The next event; None: it was over."""
        event = await anext(self._events, None)
        if event is None:
            return None
        if event.kind == "tokens":
            assert event.message.tokens.first_index == self.tokens, "tokens are missing or repeated"
        elif event.kind == "started":
            self.workers.append(event.message.started.worker)
        self.result.add(event.message)
        return event

    async def until(self, condition: Callable[[], bool]) -> None:
        """Takes events until the condition holds; fails if the job is over before."""
        while not condition():
            assert await self.next() is not None, "the job was over first"

    async def more(self, tokens: int) -> None:
        """Takes events until so many more tokens have come."""
        wanted = self.tokens + tokens
        await self.until(lambda: self.tokens >= wanted)

    async def rest(self) -> Result:
        """Takes all the events there are."""
        while await self.next() is not None:
            pass
        return self.result

    async def leave(self) -> None:
        """Ends the call; the job goes on."""
        await self._events.aclose()

    async def cancel(self, client: AsyncClient) -> Result:
        """Cancels the job and takes its last events."""
        await client.cancel(self.job_id)
        return await self.rest()


def assert_greedy(model: Any, prompt: list[int], answer: list[int]) -> None:
    """Fails unless each token is the model's most likely one after all before it (ties aside).

    Computed in one pass over prompt and answer, without any cache.
    """
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]  # [N, V]
    chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    behind = logits.max(dim=1).values - chosen
    assert behind.max() < 1e-3, f"token {int(behind.argmax())} of {len(answer)} is not the model's choice"
