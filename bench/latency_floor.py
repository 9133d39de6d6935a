"""The least that a token's way can cost: XADD, a blocking XREAD, one message of a gRPC stream; nothing else.

Two processes, as a worker and a front door are two: ``python -m bench.latency_floor serve REDIS_URL`` follows streams
for gRPC clients and prints its address; ``... produce REDIS_URL`` reads lines ``key rate count`` and appends ``count``
entries of the time, ``rate`` a second, to each stream named.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
from redis.asyncio import Redis

SERVICE, METHOD = "kvpilot.bench.Echo", "Follow"


async def serve(url: str) -> None:
    """Serves ``Follow``: a stream's name in, its entries out, until the caller leaves."""
    client: Any = Redis.from_url(url, protocol=2)

    async def follow(name: bytes, context: Any) -> AsyncIterator[bytes]:
        after: Any = b"0-0"
        while True:
            for _, entries in await client.xread({name: after}, block=1000) or ():
                for after, fields in entries:  # noqa: B007  # the last one is where to go on
                    yield fields[b"time"]

    server = grpc.aio.server()
    handler = grpc.method_handlers_generic_handler(SERVICE, {METHOD: grpc.unary_stream_rpc_method_handler(follow)})
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()


async def produce(url: str) -> None:
    """Appends as asked for on stdin, an empty line ends it."""
    client: Any = Redis.from_url(url, protocol=2)
    loop = asyncio.get_running_loop()
    tasks = set()
    while line := (await loop.run_in_executor(None, sys.stdin.readline)).strip():
        key, rate, count = line.split()
        tasks.add(asyncio.create_task(_append(client, key, float(rate), int(count))))
    await asyncio.gather(*tasks)
    await client.aclose()


async def _append(client: Any, key: str, rate: float, count: int) -> None:
    begun = time.perf_counter()
    for number in range(count):
        await asyncio.sleep(begun + number / rate - time.perf_counter())
        await client.xadd(key, {"time": time.time_ns()})
    await client.expire(key, 60)


async def follow(channel: grpc.aio.Channel, key: str, count: int) -> list[float]:
    """Milliseconds from before each XADD to the entry's arrival here."""
    call = channel.unary_stream(f"/{SERVICE}/{METHOD}")(key.encode())
    took: list[float] = []
    async for sent in call:
        took.append((time.time_ns() - int(sent)) / 1e6)
        if len(took) == count:
            call.cancel()
            return took
    raise RuntimeError(f"the echo of {key} ended after {len(took)} of {count} messages")


if __name__ == "__main__":
    asyncio.run({"serve": serve, "produce": produce}[sys.argv[1]](sys.argv[2]))
