"""Jobs from asynchronous code: submit an order and follow its events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from cli.order import Order
from kvpilot.client import AsyncClient, Settings
from kvpilot.event import Event

AT_ONCE = Settings(timeout_s=10.0, retries=0)


async def follow(endpoint: str, order: Order) -> AsyncIterator[Event]:
    """Submits a job and gives its events until Finished; survives a restart of the controller on the way.

    Cancels the job if the caller is cancelled.

    Raises:
        KvpilotError: nothing answers, or the job was refused, or it failed.
        BadInputError: see ``Order.options``.
    """
    options = order.options()
    async with AsyncClient(endpoint, AT_ONCE) as probe:  # without it a wrong endpoint would be tried for long
        await probe.models()
    job_id = ""
    async with AsyncClient(endpoint) as client:
        try:
            if order.turns:
                events = client.generate(messages=order.turns, **options)
            else:
                events = client.generate(order.prompt, **options)
            async for event in events:
                if event.kind == "accepted":
                    job_id = event.message.accepted.job_id
                yield event
        except asyncio.CancelledError:
            if job_id:
                await client.cancel(job_id)
            raise
