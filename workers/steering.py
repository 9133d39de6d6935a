"""The worker's side of steering: reports out, directives in, always on a stream to one of the controllers."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from kvpilot.v1 import common_pb2, policy_pb2
from workers.controllers import Address, choose, rank, resolve
from workers.engine.api import EngineApi
from workers.errors import INTERNAL, ProblemError
from workers.report_box import ReportBox
from workers.steering_stream import SteeringStream, StreamError, Waits, ask_load

log = structlog.get_logger(__name__)

FALL_OVER_S = 0.1
"""Longest wait, by chance, before another controller is tried where a stream ended: not all workers at once."""
_LOAD_S = 1.0
_RESOLVE_S = 2.0
_UNFORESEEN = 8
"""An error that nobody foresaw is waited for as long as this many failures in a row: it may well come again."""


@dataclass(frozen=True)
class SteeringSettings:
    """How a worker looks for a controller.

    Attributes:
        reconnect_min_ms: first wait after no controller took us on; doubles with each failure in a row, plus or minus
            half of it by chance.
        reconnect_max_ms: longest such wait.
        connect_timeout_ms: a controller that has not accepted a connection by then is given up.
        welcome_timeout_ms: a controller that has not answered Hello by then is given up.
        balance_s: time, plus or minus half of it by chance, between two looks for a controller with fewer workers; 0:
            never.
    """

    reconnect_min_ms: float = 100.0
    reconnect_max_ms: float = 2000.0
    connect_timeout_ms: float = 1000.0
    welcome_timeout_ms: float = 5000.0
    balance_s: float = 5.0

    @property
    def waits(self) -> Waits:
        """For a stream."""
        return Waits(self.connect_timeout_ms / 1e3, self.welcome_timeout_ms / 1e3)


class SteeringClient:
    """Keeps a stream to one of the controllers for as long as :meth:`run` runs.

    When the stream ends, the other controllers are tried at once. When another one has fewer workers, a stream is
    opened there first and the old one ended once it is welcomed, so that the worker is never without.

    Args:
        targets: ``host:port`` of controllers; every address of a name counts as one, and names are looked up anew each
            time.
        answered: is told each directive and its answer, an Ack or a Nack.

    Construct it on the event loop that will run it, and hand :meth:`on_report` to the engine.
    """

    def __init__(
        self,
        engine: EngineApi,
        targets: Sequence[str],
        settings: SteeringSettings | None = None,
        answered: Callable[[policy_pb2.Directive, policy_pb2.SteerRequest], None] | None = None,
    ) -> None:
        if not targets:
            raise ValueError("targets: at least one controller's host:port is needed")
        self._engine = engine
        self._targets = tuple(targets)
        self._settings = settings or SteeringSettings()
        self._loop = asyncio.get_running_loop()
        self._box = ReportBox()
        self._answers: list[policy_pb2.SteerRequest] = []
        self._wake = asyncio.Event()
        self._chance = random.Random()
        self._known: list[Address] = []
        self._log = log
        self._answered = answered
        self.attached = False
        """Whether a controller has taken us on."""

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
        lost: Address | None = None
        wait_s = 0.0
        while True:
            stream: SteeringStream | None = await self._find(lost, wait_s)
            try:
                while stream is not None:
                    lost = stream.address
                    stream = await self._hold(stream)
            except StreamError as error:
                self._log.warning("controller lost", address=lost.target if lost else "", why=str(error))
                alone = error.replaced or len(self._known) < 2
                wait_s = self._back_off_s(1) if alone else self._chance.uniform(0, FALL_OVER_S)
            except Exception:  # whatever it is, a new stream may do without it
                self._log.exception("steering failed; the stream is made anew", address=lost.target if lost else "")
                wait_s = self._back_off_s(_UNFORESEEN)
            finally:
                self._box.stop()
                self.attached = False
                self._engine.steered(False)

    # --- finding one --------------------------------------------------------------------------------------------------

    async def _find(self, lost: Address | None, wait_s: float) -> SteeringStream:
        """A stream to the first controller that takes us on; the one that was lost is tried last."""
        failures = 0
        while True:
            await asyncio.sleep(wait_s)
            # What is known is tried before a look-up, which may take its time.
            addresses = self._known if lost and not failures else await self._ranked()
            why = "no address is known"
            for address in sorted(addresses, key=lambda one: one == lost):
                try:
                    return await self._open(address)
                except StreamError as error:
                    why = f"{address.target}: {error}"
            failures += 1
            if failures in (1, 10) or failures % 100 == 0:
                self._log.warning("no controller", tried=len(addresses), failures=failures, why=why)
            wait_s = self._back_off_s(failures)

    async def _open(self, address: Address) -> SteeringStream:
        """A stream to a controller that takes us on.

        Raises:
            StreamError: it does not.
        """
        hello = self._engine.hello()
        self._box.offer(hello)
        return await SteeringStream.open(address, hello, self._settings.waits)

    async def _ranked(self) -> list[Address]:
        """Where controllers may be now; as known before, where the names cannot be looked up."""
        try:
            async with asyncio.timeout(_RESOLVE_S):
                self._known = rank(self._engine.hello().worker, await resolve(self._targets))
        except OSError as error:  # TimeoutError is one
            why = str(error) or f"no answer within {_RESOLVE_S:g} s"
            self._log.warning("controllers' names cannot be looked up", why=why)
        return self._known

    def _back_off_s(self, failures: int) -> float:
        settings = self._settings
        wait_ms = min(settings.reconnect_max_ms, settings.reconnect_min_ms * 2.0 ** min(failures - 1, 16))
        return wait_ms / 1e3 * self._chance.uniform(0.5, 1.5)

    async def _find_better(self, stream: SteeringStream) -> SteeringStream:
        """A second stream, to a controller that has fewer workers, once there is one."""
        if stream.welcome.protocol_version < 1 or not self._settings.balance_s:
            await asyncio.Event().wait()  # that controller does not tell its load
        while True:
            await asyncio.sleep(self._settings.balance_s * self._chance.uniform(0.5, 1.5))
            addresses = await self._ranked()
            if len(addresses) < 2:
                continue
            answers = await asyncio.gather(*(ask_load(address, _LOAD_S) for address in addresses))
            better = choose(stream.welcome.controller, dict(filter(None, answers)), self._chance)
            if better is None:
                continue
            try:
                return await self._open(better)
            except StreamError as error:
                self._log.warning("cannot move to a controller", controller=better.target, why=str(error))

    # --- having one ---------------------------------------------------------------------------------------------------

    async def _hold(self, stream: SteeringStream) -> SteeringStream:
        """Steers by a stream; returns the one to go on with.

        Raises:
            StreamError: the stream's end.
        """
        self._log = log.bind(worker=stream.hello.worker)
        self._box.restart(stream.hello)
        self._answers.clear()
        self._engine.configure(stream.welcome)
        self._engine.steered(True)
        self.attached = True
        self._log.info(
            "controller attached",
            controller=stream.welcome.controller,
            address=stream.address.target,
            workers=stream.welcome.workers,
        )
        exchange = asyncio.create_task(self._exchange(stream), name="steering exchange")
        better = asyncio.create_task(self._find_better(stream), name="steering balance")
        kept = False
        try:
            await asyncio.wait({exchange, better}, return_when=asyncio.FIRST_COMPLETED)
            if not better.done():
                exchange.result()  # raises
            kept = True
            return better.result()
        finally:
            for task in (exchange, better):
                task.cancel()
            await asyncio.gather(exchange, better, return_exceptions=True)
            await stream.close()
            if not kept and not better.cancelled() and better.exception() is None:
                await better.result().close()

    async def _exchange(self, stream: SteeringStream) -> None:
        """Sends and receives until the stream ends, or either fails.

        Raises:
            StreamError: its end.
        """
        tasks = [
            asyncio.create_task(self._receive(stream), name="steering directives"),
            asyncio.create_task(self._send(stream), name="steering reports"),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in tasks:
                if task in done:
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _receive(self, stream: SteeringStream) -> None:
        """Has directives carried out as they come.

        Raises:
            StreamError: the stream has ended.
        """
        directives: set[asyncio.Task[None]] = set()
        try:
            while True:
                task = asyncio.create_task(self._carry_out(await stream.read()))
                directives.add(task)
                task.add_done_callback(directives.discard)
        finally:
            for task in directives:
                task.cancel()  # an unanswered directive is settled by the epochs of the next Hello
            await asyncio.gather(*directives, return_exceptions=True)

    async def _send(self, stream: SteeringStream) -> None:
        """Sends what there is until the stream ends; why it did, :meth:`_receive` is told."""
        with contextlib.suppress(StreamError):
            await self._send_news(stream)

    async def _send_news(self, stream: SteeringStream) -> None:
        """Writes answers and reports as they come; ``write`` waits where the stream is slow, and reports merge.

        Raises:
            StreamError: the stream has ended.
        """
        sequence_number = 0
        while True:
            self._wake.clear()
            while self._answers:
                await stream.write(self._answers.pop(0))
            report = self._box.take()
            if report is not None:
                sequence_number += 1
                report.sequence_number = sequence_number
                await stream.write(policy_pb2.SteerRequest(report=report))
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
            self._log.exception(
                "directive failed", request=directive.request_id, epoch=directive.epoch, pipeline=directive.pipeline
            )
            answer = self._nack(directive, common_pb2.Problem(code=INTERNAL, message=f"the worker failed: {error!r}"))
        self._answers.append(answer)
        if self._answered:
            self._answered(directive, answer)
        self._wake.set()

    def _nack(self, directive: policy_pb2.Directive, problem: common_pb2.Problem) -> policy_pb2.SteerRequest:
        return policy_pb2.SteerRequest(
            nack=policy_pb2.Nack(nonce=directive.nonce, request_id=directive.request_id, problem=problem)
        )
