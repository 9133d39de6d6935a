"""The worker's side of the steering stream: reports out, directives in, and back again after any loss."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import structlog

from kvpilot.v1 import common_pb2, policy_pb2, policy_pb2_grpc
from workers.engine.api import EngineApi
from workers.errors import INTERNAL, ProblemError

log = structlog.get_logger(__name__)

_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),  # or a new channel would inherit the back-off of the last one
    ("grpc.enable_retries", 0),
)


@dataclass(frozen=True)
class SteeringSettings:
    """How a worker looks for a controller.

    Attributes:
        reconnect_min_ms: first wait after a lost or refused stream; doubles with each failure in a row, plus or minus
            half of it by chance.
        reconnect_max_ms: longest such wait.
        welcome_timeout_ms: a controller that has not answered Hello by then is given up.
    """

    reconnect_min_ms: float = 100.0
    reconnect_max_ms: float = 2000.0
    welcome_timeout_ms: float = 5000.0


class ReportBox:
    """Reports not sent yet, newest state of each request only, so that a slow or lost stream costs bounded memory."""

    def __init__(self) -> None:
        self._worker: policy_pb2.WorkerState | None = None
        self._newest: policy_pb2.Report | None = None  # the last report put in, until its news are taken
        self._news: dict[str, policy_pb2.RequestState] = {}
        self._ended: dict[str, None] = {}
        self._latest: dict[str, policy_pb2.RequestState] = {}

    def put(self, report: policy_pb2.Report) -> None:
        """Adds a report of the engine."""
        self._newest = report
        if report.HasField("worker"):
            self._worker = report.worker
        for state in report.requests:
            before = self._news.get(state.request_id)
            if before is not None and before.signals.steps and not state.signals.steps:
                measured, state = before.signals, _copy(state)  # nothing was decoded since: what was measured holds
                state.signals.CopyFrom(measured)
            self._news[state.request_id] = self._latest[state.request_id] = state
            self._ended.pop(state.request_id, None)
        for request_id in report.ended_request_ids:
            self._news.pop(request_id, None)
            self._latest.pop(request_id, None)
            self._ended[request_id] = None

    def restart(self, hello: policy_pb2.Hello) -> None:
        """Prepares for a new stream: the last known state of all that Hello names as alive is news again.

        A state from before the epoch that Hello gives is left out; the engine's next report brings the present one.
        """
        epochs = {entry.request_id: entry.epoch for entry in hello.epochs}
        self._ended.clear()
        self._latest = {request_id: state for request_id, state in self._latest.items() if request_id in epochs}
        self._news = {
            request_id: state for request_id, state in self._latest.items() if state.epoch == epochs[request_id]
        }

    def take(self) -> policy_pb2.Report | None:
        """All news as one report, without its number; None if there are none."""
        if self._newest is None and not self._news and not self._ended:
            return None
        report = policy_pb2.Report(
            worker=self._worker, requests=self._news.values(), ended_request_ids=self._ended.keys()
        )
        if self._newest is not None and self._newest.HasField("time"):
            report.time.CopyFrom(self._newest.time)
        else:
            report.time.GetCurrentTime()
        self._newest = None
        self._news.clear()
        self._ended.clear()
        return report


class SteeringClient:
    """Keeps a stream to one of the controllers for as long as :meth:`run` runs.

    Args:
        targets: ``host:port`` of controllers, tried in turn.

    Construct it on the event loop that will run it, and hand :meth:`on_report` to the engine.
    """

    def __init__(self, engine: EngineApi, targets: Sequence[str], settings: SteeringSettings | None = None) -> None:
        if not targets:
            raise ValueError("targets: at least one controller's host:port is needed")
        self._engine = engine
        self._targets = tuple(targets)
        self._settings = settings or SteeringSettings()
        self._loop = asyncio.get_running_loop()
        self._box = ReportBox()
        self._answers: list[policy_pb2.SteerRequest] = []
        self._wake = asyncio.Event()
        self._log = log

    def on_report(self, report: policy_pb2.Report) -> None:
        """Takes a report from any thread and returns at once."""
        try:
            self._loop.call_soon_threadsafe(self._take_report, report)
        except RuntimeError:  # the loop is closed: the process is ending
            return

    def _take_report(self, report: policy_pb2.Report) -> None:
        self._box.put(report)
        self._wake.set()

    async def run(self) -> None:
        """Connects, and connects again whenever the stream ends; until cancelled."""
        failures = 0
        for target in itertools.cycle(self._targets):
            welcomed, why = await self._hold_stream(target)
            failures = 1 if welcomed else failures + 1
            wait_ms = min(
                self._settings.reconnect_max_ms, self._settings.reconnect_min_ms * 2.0 ** min(failures - 1, 16)
            ) * random.uniform(0.5, 1.5)
            if welcomed or failures in (1, 10) or failures % 100 == 0:
                self._log.warning("no controller", controller=target, failures=failures, why=why)
            await asyncio.sleep(wait_ms / 1e3)

    async def _hold_stream(self, target: str) -> tuple[bool, str]:
        """One stream from connecting to its end: whether the controller took us on, and why it ended."""
        welcomed = False
        async with grpc.aio.insecure_channel(target, options=_CHANNEL_OPTIONS) as channel:
            call = policy_pb2_grpc.SteeringServiceStub(channel).Steer()  # type: ignore[no-untyped-call]
            try:
                hello = self._engine.hello()
                self._log = log.bind(worker=hello.worker)
                async with asyncio.timeout(self._settings.welcome_timeout_ms / 1e3):
                    await call.write(policy_pb2.SteerRequest(hello=hello))
                    first = await call.read()
                if first is grpc.aio.EOF or not first.HasField("welcome"):
                    return False, "the controller's first message was not Welcome"
                welcomed = True
                self._box.restart(hello)
                self._answers.clear()
                self._engine.configure(first.welcome)
                self._engine.steered(True)
                self._log.info("controller attached", controller=first.welcome.controller, address=target)
                await self._exchange(call)
                return True, "the controller ended the stream"
            except grpc.aio.AioRpcError as error:
                return welcomed, f"{error.code().name}: {error.details()}"
            except TimeoutError:
                return False, f"no Welcome within {self._settings.welcome_timeout_ms:g} ms"
            finally:
                call.cancel()
                if welcomed:
                    self._engine.steered(False)

    async def _exchange(self, call: grpc.aio.StreamStreamCall) -> None:
        """Sends and receives until the stream ends.

        Raises:
            grpc.aio.AioRpcError: its end, where it was not an orderly one.
        """
        directives: set[asyncio.Task[None]] = set()
        sending = asyncio.create_task(self._send(call), name="steering reports")
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                if message.HasField("directive"):
                    task = asyncio.create_task(self._carry_out(message.directive))
                    directives.add(task)
                    task.add_done_callback(directives.discard)
        finally:
            for task in (sending, *directives):
                task.cancel()  # an unanswered directive is settled by the epochs of the next Hello
            await asyncio.gather(sending, *directives, return_exceptions=True)
        code = await call.code()
        if code is not grpc.StatusCode.OK:
            raise grpc.aio.AioRpcError(
                code, await call.initial_metadata(), await call.trailing_metadata(), await call.details()
            )

    async def _send(self, call: grpc.aio.StreamStreamCall) -> None:
        """Writes answers and reports as they come; ``write`` waits where the stream is slow, and reports merge."""
        sequence_number = 0
        while True:
            self._wake.clear()
            while self._answers:
                await call.write(self._answers.pop(0))
            report = self._box.take()
            if report is not None:
                sequence_number += 1
                report.sequence_number = sequence_number
                await call.write(policy_pb2.SteerRequest(report=report))
            await self._wake.wait()

    async def _carry_out(self, directive: policy_pb2.Directive) -> None:
        """Hands a directive to the engine and queues its answer."""
        try:
            ack = policy_pb2.Ack()
            ack.CopyFrom(await asyncio.wrap_future(self._engine.direct(directive)))
            ack.nonce, ack.request_id = directive.nonce, directive.request_id
            answer = policy_pb2.SteerRequest(ack=ack)
        except ProblemError as error:
            answer = self._nack(directive, error.problem)
        except Exception as error:
            self._log.exception("directive failed", request=directive.request_id, pipeline=directive.pipeline)
            answer = self._nack(directive, common_pb2.Problem(code=INTERNAL, message=f"the worker failed: {error!r}"))
        self._answers.append(answer)
        self._wake.set()

    def _nack(self, directive: policy_pb2.Directive, problem: common_pb2.Problem) -> policy_pb2.SteerRequest:
        return policy_pb2.SteerRequest(
            nack=policy_pb2.Nack(nonce=directive.nonce, request_id=directive.request_id, problem=problem)
        )


def _copy(state: policy_pb2.RequestState) -> policy_pb2.RequestState:
    """A copy that may be changed; the original belongs to the engine's report."""
    copy = policy_pb2.RequestState()
    copy.CopyFrom(state)
    return copy
