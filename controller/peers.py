"""The other controllers of the job store: where they are, and what they say to an operator's call."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import grpc
import structlog

from kvpilot.bus import Bus, BusError
from kvpilot.process import split_address
from kvpilot.v1 import job_pb2, operator_pb2_grpc

log = structlog.get_logger()

RENEW_S = 2.0
LIFE_S = 8.0
"""A controller that has not renewed its card for this long is not asked any more."""
_EVERYWHERE = frozenset({"0.0.0.0", "[::]"})  # compared with, not bound


def reachable(advertise: str, listen: str) -> str:
    """Where others reach us: what the settings advertise, else where we listen."""
    if advertise:
        return advertise
    host, port = split_address(listen)
    return f"{socket.gethostname() if host in _EVERYWHERE else host}:{port}"


class Peers:
    """Publishes a controller and calls the others. Without a bus there are none."""

    def __init__(self, bus: Bus | None, name: str) -> None:
        self._bus = bus
        self._card = job_pb2.ControllerCard(name=name)
        self._task: asyncio.Task[None] | None = None

    def start(self, address: str) -> None:
        """Publishes the controller, again and again, until :meth:`stop`."""
        if self._bus is not None:
            self._card.address = address
            self._task = asyncio.create_task(self._publish(self._bus), name="peers")

    async def stop(self) -> None:
        """Takes it off the list."""
        if self._task is None or self._bus is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        try:
            await self._bus.withdraw_controller(self._card.name)
        except BusError as error:
            log.warning("the controller stays listed for a moment", error=str(error), listed_s=LIFE_S)

    async def _publish(self, bus: Bus) -> None:
        while True:
            try:
                await bus.show_controller(self._card, LIFE_S)
            except Exception as error:  # whatever it is, the next try may succeed
                unforeseen = not isinstance(error, BusError)
                log.warning("other controllers may not find this one", error=str(error), exc_info=unforeseen)
            await asyncio.sleep(RENEW_S)

    async def ask(self, method: str, request: Any, timeout_s: float) -> dict[str, Any]:
        """Calls a method of OperatorService on all others at once, for what they have themselves.

        Returns:
            By the name of the controller its response, or the ``AioRpcError`` that came instead.
        """
        if self._bus is None:
            return {}
        try:
            cards = [card for card in await self._bus.controllers() if card.name != self._card.name]
        except BusError as error:
            log.warning("other controllers are not asked", method=method, error=str(error))
            return {}
        asked = type(request)()
        asked.CopyFrom(request)
        asked.only_here = True
        answers = await asyncio.gather(*(self._call(card.address, method, asked, timeout_s) for card in cards))
        return {card.name: answer for card, answer in zip(cards, answers, strict=True)}

    async def _call(self, address: str, method: str, request: Any, timeout_s: float) -> Any:
        async with grpc.aio.insecure_channel(address) as channel:
            stub: Any = operator_pb2_grpc.OperatorServiceStub(channel)  # type: ignore[no-untyped-call]
            try:
                return await getattr(stub, method)(request, timeout=timeout_s)
            except grpc.aio.AioRpcError as error:
                return error
