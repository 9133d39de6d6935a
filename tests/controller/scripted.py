"""A worker made of messages: what it says of itself, its requests, and its end of a real steering stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import grpc

from controller.planner import RequestView, WorkerView
from controller.server import ControllerServer
from controller.settings import ControllerSettings, Role
from kvpilot.bus import Bus
from kvpilot.catalog import StageCatalog
from kvpilot.v1 import common_pb2, generation_pb2, policy_pb2, policy_pb2_grpc
from kvpilot.v1.common_pb2 import LossClass, Scenario

MIB = 1 << 20
HORIZONS = (32, 64, 128, 256, 512, 1024)
QUIET = (0.30, 0.15, 0.05, 0.03, 0.02, 0.01)
"""Far masses per horizon of a request that looks at recent tokens."""
LOUD = (0.70, 0.60, 0.50, 0.45, 0.40, 0.30)
"""Far masses of one that looks far back."""
WAIT_S = 10.0
SHARES = (
    "expected_attention",
    "hashevict",
    "keydiff",
    "knorm",
    "kvzip",
    "merge",
    "nacl",
    "qhitter",
    "scissorhands",
)
"""Evictors that keep a share, beside those with parameters of their own."""


def stages() -> list[generation_pb2.StageInfo]:
    """The built-in stages as a worker describes them."""

    def stage(name: str, kind: str, loss: LossClass, **parameters: tuple[str, str]) -> generation_pb2.StageInfo:
        info = generation_pb2.StageInfo(name=name, kind=kind, loss_class=loss)
        for key, (type_name, default) in parameters.items():
            info.parameters.add(name=key, type=type_name, default_value=default, accepts="whatever is sensible")
        return info

    exact, recoverable = LossClass.LOSS_CLASS_EXACT, LossClass.LOSS_CLASS_RECOVERABLE
    shadow = ("bool", "true")
    return [
        stage("full", "full", exact),
        stage("window", "evict", recoverable, sinks=("int", "4"), recent=("int", "512"), shadow=shadow),
        stage("h2o", "evict", recoverable, keep=("float", "0.5"), shadow=shadow),
        stage("snapkv", "evict", recoverable, keep=("float", "0.5"), pool=("int", "5"), shadow=shadow),
        *(stage(name, "evict", recoverable, keep=("float", "0.5"), shadow=shadow) for name in SHARES),
        *(stage(name, "evict", recoverable, size=("int", "512"), shadow=shadow) for name in ("morphkv", "tova")),
        stage("int8", "compress", recoverable, shadow=shadow),
        stage("fp8", "compress", recoverable, shadow=shadow),
        stage("turboquant", "compress", recoverable, bits=("int", "4"), shadow=shadow),
        stage("kivi", "compress", recoverable, bits=("int", "4"), shadow=shadow),
        stage("host", "offload", exact, recent=("int", "256")),
    ]


CATALOG = StageCatalog(stages())


def hello(worker: str = "w0", epochs: dict[str, int] | None = None) -> policy_pb2.Hello:
    """SmolLM2-135M's cache on a worker with 512 MiB of device and 1 GiB of host memory."""
    return policy_pb2.Hello(
        worker=worker,
        version="0.1.0",
        model=generation_pb2.Model(name="smollm2-135m", stages=stages(), default_pipeline="full"),
        layers=30,
        kv_heads=3,
        query_heads=9,
        head_dim=64,
        raw_dtype="float32",
        far_horizons_tokens=HORIZONS,
        tiers=[
            policy_pb2.Tier(name="device", budget_bytes=512 * MIB),
            policy_pb2.Tier(name="host", budget_bytes=1024 * MIB),
        ],
        epochs=[policy_pb2.RequestEpoch(request_id=name, epoch=epoch) for name, epoch in (epochs or {}).items()],
    )


def request_state(
    request_id: str = "job-1",
    scenario: Scenario = Scenario.SCENARIO_LONG_CONTEXT,
    pipeline: str = "full",
    prompt_tokens: int = 2000,
    generated_tokens: int = 16,
    max_tokens: int = 400,
    far_mass: Sequence[float] = QUIET,
    **fields: object,
) -> policy_pb2.RequestState:
    """A request as a report describes it."""
    state = policy_pb2.RequestState(
        request_id=request_id,
        scenario=scenario,
        pipeline=pipeline,
        prompt_tokens=prompt_tokens,
        generated_tokens=generated_tokens,
        max_tokens=max_tokens,
        signals=policy_pb2.Signals(steps=16, far_mass=far_mass) if far_mass else None,
        **fields,
    )
    return state


def worker_state(device: float = 0.1, host: float = 0.0, waiting: int = 0) -> policy_pb2.WorkerState:
    """Load of the worker; ``device`` and ``host`` are shares of the budgets."""
    return policy_pb2.WorkerState(
        running=1,
        waiting=waiting,
        tiers=[
            policy_pb2.TierUse(name="device", used_bytes=int(device * 512 * MIB), budget_bytes=512 * MIB),
            policy_pb2.TierUse(name="host", used_bytes=int(host * 1024 * MIB), budget_bytes=1024 * MIB),
        ],
    )


def worker_view(
    *requests: policy_pb2.RequestState | RequestView, device: float = 0.1, host: float = 0.0, waiting: int = 0
) -> WorkerView:
    """What a planner would see of such a worker."""
    return WorkerView(
        hello=hello(),
        state=worker_state(device, host, waiting),
        requests=tuple(one if isinstance(one, RequestView) else RequestView(one) for one in requests),
        catalog=CATALOG,
    )


@asynccontextmanager
async def controller(bus: Bus | None = None, **settings: object) -> AsyncIterator[ControllerServer]:
    """A real server on a free port, without a job store unless given."""
    server = ControllerServer(
        ControllerSettings.load(
            **{
                "listen": "127.0.0.1:0",
                "name": "test-controller",
                "roles": frozenset({Role.STEERING, Role.OPERATOR}),
                "coalesce_ms": 0.0,
                **settings,
            }
        ),
        bus,
    )
    await server.start()
    try:
        yield server
    finally:
        await server.stop(0)


class ScriptedWorker:
    """The worker's end of a stream, one message at a time."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.call = policy_pb2_grpc.SteeringServiceStub(channel).Steer()
        self._numbers = 0

    @classmethod
    @asynccontextmanager
    async def attach(cls, address: str, said: policy_pb2.Hello | None = None) -> AsyncIterator[ScriptedWorker]:
        """Says Hello and takes the Welcome."""
        async with grpc.aio.insecure_channel(address, options=(("grpc.use_local_subchannel_pool", 1),)) as channel:
            worker = cls(channel)
            await worker.send(hello=said or hello())
            assert (await worker.receive()).HasField("welcome")
            yield worker
            worker.call.cancel()

    async def send(self, **message: object) -> None:
        await self.call.write(policy_pb2.SteerRequest(**message))

    async def receive(self) -> policy_pb2.SteerResponse:
        async with asyncio.timeout(WAIT_S):
            message = await self.call.read()
        if message is grpc.aio.EOF:
            raise EOFError(f"{await self.call.code()}: {await self.call.details()}")
        return message

    async def directive(self) -> policy_pb2.Directive:
        message = await self.receive()
        assert message.HasField("directive"), message
        return message.directive

    async def ended_with(self) -> grpc.StatusCode:
        """Waits for the controller to end the stream."""
        async with asyncio.timeout(WAIT_S):
            return await self.call.code()

    async def report(self, *states: policy_pb2.RequestState, ended: Sequence[str] = (), device: float = 0.1) -> None:
        self._numbers += 1
        await self.send(
            report=policy_pb2.Report(
                sequence_number=self._numbers,
                worker=worker_state(device),
                requests=states,
                ended_request_ids=ended,
            )
        )

    async def ack(self, directive: policy_pb2.Directive, at_token: int = 16, from_pipeline: str = "full") -> None:
        switch = common_pb2.Switch(
            at_token=at_token,
            from_pipeline=from_pipeline,
            to_pipeline=directive.pipeline,
            reason=directive.reason,
            ordered_by=directive.ordered_by,
        )
        await self.send(
            ack=policy_pb2.Ack(
                nonce=directive.nonce, request_id=directive.request_id, epoch=directive.epoch, applied=switch
            )
        )

    async def nack(self, directive: policy_pb2.Directive, code: int = 8, message: str = "no room") -> None:
        problem = common_pb2.Problem(code=code, message=message)
        await self.send(nack=policy_pb2.Nack(nonce=directive.nonce, request_id=directive.request_id, problem=problem))


async def until(condition: object, timeout_s: float = WAIT_S) -> None:
    """Lets the event loop run until ``condition()`` holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.001)
