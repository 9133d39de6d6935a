"""One steering stream, from connecting to its end."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Any

import grpc

from kvpilot.steering import STEERING_VERSION
from kvpilot.v1 import policy_pb2, policy_pb2_grpc
from workers.controllers import Address, Load

_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),  # or a new channel would inherit the back-off of the last one
    ("grpc.enable_retries", 0),
)


class StreamError(Exception):
    """There is no stream, or no longer.

    Attributes:
        replaced: another worker has taken our name; to come back at once would take it away again.
    """

    def __init__(self, why: str, *, replaced: bool = False) -> None:
        super().__init__(why)
        self.replaced = replaced


@dataclass(frozen=True)
class Waits:
    """How long things may take.

    Attributes:
        connect_s: a connection; a controller that is alive accepts it within a round trip.
        welcome_s: the answer to Hello.
    """

    connect_s: float
    welcome_s: float


class SteeringStream:
    """A stream that a controller has welcomed. Make it with :meth:`open`; whoever has it closes it.

    Attributes:
        address: where the controller is.
        hello: what it was told.
        welcome: what it said.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self.hello = policy_pb2.Hello()
        self.welcome = policy_pb2.Welcome()
        self._channel = _channel(address)
        self._call: Any = None

    @classmethod
    async def open(cls, address: Address, hello: policy_pb2.Hello, waits: Waits) -> SteeringStream:
        """Connects, says Hello and waits for Welcome.

        Raises:
            StreamError: any of it failed, or took too long.
        """
        stream = cls(address)
        try:
            await stream._open(hello, waits)
        except BaseException:
            await stream.close()
            raise
        return stream

    async def _open(self, hello: policy_pb2.Hello, waits: Waits) -> None:
        try:
            async with asyncio.timeout(waits.connect_s):
                await self._connect()
        except TimeoutError:
            raise StreamError(f"no connection within {1e3 * waits.connect_s:g} ms") from None
        self.hello.CopyFrom(hello)
        self.hello.protocol_version = STEERING_VERSION
        self._call = policy_pb2_grpc.SteeringServiceStub(self._channel).Steer()  # type: ignore[no-untyped-call]
        try:
            async with asyncio.timeout(waits.welcome_s):
                await self._call.write(policy_pb2.SteerRequest(hello=self.hello))
                first = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise _stream_error(error) from None
        except TimeoutError:
            raise StreamError(f"no Welcome within {1e3 * waits.welcome_s:g} ms") from None
        if first is grpc.aio.EOF or not first.HasField("welcome"):
            raise StreamError("the controller's first message was not Welcome")
        self.welcome.CopyFrom(first.welcome)

    async def _connect(self) -> None:
        """Connects, once: a refused connection is an answer, for which ``channel_ready`` would wait on."""
        state = self._channel.get_state(try_to_connect=True)
        while state is not grpc.ChannelConnectivity.READY:
            if state in (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN):
                raise StreamError("no connection: refused, or lost at once")
            await self._channel.wait_for_state_change(state)
            state = self._channel.get_state(try_to_connect=True)

    async def read(self) -> policy_pb2.Directive:
        """The next directive. Messages of other kinds, from newer controllers, are passed over.

        Raises:
            StreamError: the stream has ended.
        """
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                if message.HasField("directive"):
                    directive: policy_pb2.Directive = message.directive
                    return directive
            code = await self._call.code()
            details = await self._call.details()
        except grpc.aio.AioRpcError as error:
            raise _stream_error(error) from None
        if code is grpc.StatusCode.OK:
            raise StreamError("the controller ended the stream")
        raise StreamError(f"{code.name}: {details}", replaced=code is grpc.StatusCode.ABORTED)

    async def write(self, message: policy_pb2.SteerRequest) -> None:
        """Sends a message; waits where the controller is slow.

        Raises:
            StreamError: the stream has ended.
        """
        try:
            await self._call.write(message)
        except grpc.aio.AioRpcError as error:
            raise _stream_error(error) from None
        except asyncio.InvalidStateError:
            raise StreamError("the stream has ended") from None

    async def close(self) -> None:
        """Ends it, if it has not ended."""
        if self._call is not None:
            self._call.cancel()
        await self._channel.close()


async def ask_load(address: Address, timeout_s: float) -> tuple[str, Load] | None:
    """The name of the controller at an address and its load; None where it does not say."""
    async with _channel(address) as channel:
        stub: Any = policy_pb2_grpc.SteeringServiceStub(channel)  # type: ignore[no-untyped-call]
        with contextlib.suppress(grpc.aio.AioRpcError):
            said = await stub.GetLoad(policy_pb2.GetLoadRequest(), timeout=timeout_s)
            return said.controller, Load(said.workers, address)
    return None


def _channel(address: Address) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(
        address.target, options=(*_CHANNEL_OPTIONS, ("grpc.default_authority", address.name))
    )


def _stream_error(error: grpc.aio.AioRpcError) -> StreamError:
    return StreamError(f"{error.code().name}: {error.details()}", replaced=error.code() is grpc.StatusCode.ABORTED)
