"""``kvpilot up``: one machine's whole stack in the foreground."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable

import grpc

from cli.plan import plan_stack
from cli.settings import CliSettings, state_folder
from cli.stack import Stack, StackError
from kvpilot.v1 import generation_pb2, generation_pb2_grpc, operator_pb2, operator_pb2_grpc

ATTACH_TIMEOUT_S = 60.0
_POLL_S = 0.1
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def make_stack(settings: CliSettings, say: Callable[[str], None], logs: bool = True) -> Stack:
    """The stack that the settings describe, not started.

    Raises:
        ModelNotFoundError, pydantic.ValidationError: see ``plan_stack``.
    """
    return Stack(plan_stack(settings), settings.state or state_folder(), settings.redis_url, say, logs)


async def up(settings: CliSettings, say: Callable[[str], None], served: Callable[[Stack], None], logs: bool) -> None:
    """Starts the stack, tells when it serves, keeps it alive until a stop signal, stops it.

    Raises:
        StackError: it could not start, or a process kept dying.
    """

    async def serve() -> None:
        async with make_stack(settings, say, logs) as stack:
            try:
                await wait_attached(stack.endpoint, settings.workers)
                served(stack)
                await stack.watch()
            finally:
                say("stopping")

    await until_signal(serve())


async def until_signal(work: Awaitable[None]) -> bool:
    """Runs ``work`` and cancels it on the first stop signal; True if one came. Further ones do nothing: the end is
    under way, and bounded."""
    task = asyncio.ensure_future(work)
    stopped = False

    def stop() -> None:
        nonlocal stopped
        if not stopped:
            stopped = True
            task.cancel()

    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, stop)
    try:
        with contextlib.suppress(asyncio.CancelledError):
            await task
    finally:
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)
    return stopped


async def wait_attached(endpoint: str, workers: int) -> None:
    """Waits until the controller steers all workers and the front door sees their model.

    Raises:
        StackError: they are not there after ``ATTACH_TIMEOUT_S``.
    """
    steered = served = 0
    try:
        async with asyncio.timeout(ATTACH_TIMEOUT_S), grpc.aio.insecure_channel(endpoint) as channel:
            operator = operator_pb2_grpc.OperatorServiceStub(channel)  # type: ignore[no-untyped-call]
            generation = generation_pb2_grpc.GenerationServiceStub(channel)  # type: ignore[no-untyped-call]
            while steered < workers or served < workers:
                await asyncio.sleep(_POLL_S)
                attached = await operator.ListWorkers(operator_pb2.ListWorkersRequest(), wait_for_ready=True)
                models = await generation.ListModels(generation_pb2.ListModelsRequest(), wait_for_ready=True)
                steered = len(attached.workers)
                served = sum(model.workers for model in models.models)
    except TimeoutError:
        raise StackError(
            f"of {workers} workers {steered} attached to the controller and {served} to the job store within "
            f"{ATTACH_TIMEOUT_S:.0f} s"
        ) from None
