"""SteeringService: the workers' streams, the planning tick, directives and what became of them."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version

import grpc
import structlog

from controller.bundles import BundleHolder
from controller.guard import Guard
from controller.journal import JoinedAudit, Journal
from controller.ledger import Ledger
from controller.planner import Decision, Forecast, Planner, RequestView, WorkerView
from controller.recording import SteeringRecorder
from controller.settings import ControllerSettings, SteeringMode
from controller.state import (
    Answer,
    AttachedWorker,
    BackOffPolicy,
    ControllerState,
    DecisionRecord,
    LiveRequest,
    Outcome,
    Override,
)
from kvpilot import metrics
from kvpilot.bus import Bus
from kvpilot.exposition import Instruments
from kvpilot.steering import common_version
from kvpilot.v1 import common_pb2, policy_pb2, policy_pb2_grpc
from kvpilot.v1.common_pb2 import Orderer
from models.footprint import CacheLayout

log = structlog.get_logger()

ANSWER_TIMEOUT_S = 30.0
"""A directive without an answer for this long counts as refused; the worker's late answer is then ignored."""
LAST_WRITE_S = 1.0
"""A stream that ends waits this long for a write that the worker does not read."""
DEADLINE_TOKENS = 64
"""A planner's directive is not worth carrying out this many generated tokens after the report that caused it."""

STOPPING = "this controller is stopping; another one may take the worker on"

QUIET_TICKS = 10
"""Ticks after which is planned for a worker that has no news."""


class RequestNotLiveError(Exception):
    """No attached worker has this request."""


class DirectiveRefusedError(Exception):
    """The worker refused an operator's directive; ``problem`` holds its words."""

    def __init__(self, problem: common_pb2.Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


class _ProtocolError(Exception):
    """The worker broke the protocol; the stream ends with ``code``."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class _Stream:
    """A worker's live stream."""

    def __init__(self, worker: AttachedWorker) -> None:
        self.worker = worker
        self.outbound: asyncio.Queue[policy_pb2.SteerResponse | None] = asyncio.Queue()
        self.ended: asyncio.Future[_ProtocolError | None] = asyncio.get_running_loop().create_future()
        self.dirty = True  # something to plan for
        self.quiet_ticks = 0  # since the last plan

    def end(self, code: grpc.StatusCode, message: str) -> None:
        """Ends the stream from our side."""
        if not self.ended.done():
            self.ended.set_result(_ProtocolError(code, message))


class SteeringService(policy_pb2_grpc.SteeringServiceServicer):
    """Holds the workers' streams and steers their requests. ``start`` and ``stop`` frame its planning task.

    Args:
        planner: decides; called from the event loop, once per worker and tick.
        bus: job store in which ``ledger`` keeps the overrides and the mode; its ``start`` goes before ours. None: they
            live as long as this object.
        bundles: the predictors that the planner may use, for the guard and the shadow's predictions.
        guard: watches the bounds of the active one; None: nobody does.
        recorder: takes what becomes metrics; None: nobody sees them.
    """

    def __init__(
        self,
        settings: ControllerSettings,
        planner: Planner,
        bus: Bus | None = None,
        bundles: BundleHolder | None = None,
        guard: Guard | None = None,
        recorder: SteeringRecorder | None = None,
    ) -> None:
        self.state = ControllerState()
        self.mode = settings.mode
        self.ledger = Ledger(bus, self)
        self.bundles = bundles
        self.guard = guard
        self.journal = Journal(bus, lambda: self.bundles.shadow if self.bundles is not None else None)
        self._recorder = recorder or SteeringRecorder()
        self._recorder.show_journal(self.journal)
        self._recorder.show_bundles(bundles, guard)
        self._show(self._recorder.instruments)
        self._settings = settings
        self._planner = planner
        self._back_off = BackOffPolicy(settings.nack_backoff_ms / 1e3, settings.nack_backoff_max_ms / 1e3)
        self._streams: dict[str, _Stream] = {}
        self._waiters: dict[str, asyncio.Future[policy_pb2.Ack]] = {}
        self._nonces = (f"{prefix}-{count}" for prefix in (secrets.token_hex(4),) for count in itertools.count(1))
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._stopping = False

    def _show(self, instruments: Instruments) -> None:
        instruments.show(metrics.STEERING_STREAMS, lambda: [((), len(self._streams))])
        instruments.show(metrics.STEERING_MODE, lambda: [((mode.value,), mode is self.mode) for mode in SteeringMode])
        instruments.show(metrics.OVERRIDES, lambda: [((), len(self.state.overrides))])

    # --- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts planning; needs a running event loop."""
        self._task = asyncio.create_task(self._plan_forever(), name="planning")
        self.journal.start()

    async def stop(self) -> None:
        """Stops planning and ends the streams with UNAVAILABLE, so that the workers look for another controller."""
        self._stopping = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for stream in self._streams.values():
            stream.end(grpc.StatusCode.UNAVAILABLE, STOPPING)
        await self.journal.stop()

    # --- the stream ---------------------------------------------------------------------------------------------------

    async def Steer(  # noqa: N802  # gRPC's spelling
        self,
        request_iterator: AsyncIterator[policy_pb2.SteerRequest],
        context: grpc.aio.ServicerContext,
    ) -> None:
        """See ``policy.proto``."""
        try:
            hello = await _read_hello(request_iterator)
        except _ProtocolError as error:
            await context.abort(error.code, str(error))
            return
        if self._stopping:
            await context.abort(grpc.StatusCode.UNAVAILABLE, STOPPING)
        stream = self._attach(hello)
        reading = asyncio.create_task(self._read(stream, request_iterator), name="steering read")
        writing = asyncio.create_task(self._write(stream, context), name="steering write")
        try:
            done, _ = await asyncio.wait({reading, writing, stream.ended}, return_when=asyncio.FIRST_COMPLETED)
            stream.outbound.put_nowait(None)
            await asyncio.wait({writing}, timeout=LAST_WRITE_S)  # a status may only follow a write that is complete
        finally:
            self._detach(stream)
            for task in (reading, writing, stream.ended):
                task.cancel()
            await asyncio.gather(reading, writing, return_exceptions=True)
        for ended in done:
            if violation := ended.result():
                await context.abort(violation.code, str(violation))

    async def GetLoad(  # noqa: N802
        self, request: policy_pb2.GetLoadRequest, context: grpc.aio.ServicerContext
    ) -> policy_pb2.GetLoadResponse:
        """See ``policy.proto``."""
        if self._stopping:
            await context.abort(grpc.StatusCode.UNAVAILABLE, STOPPING)
        return policy_pb2.GetLoadResponse(controller=self._settings.name, workers=len(self._streams))

    def _attach(self, hello: policy_pb2.Hello) -> _Stream:
        if older := self._streams.get(hello.worker):
            log.warning("worker attached twice", worker=hello.worker)
            older.end(grpc.StatusCode.ABORTED, f"a newer stream has taken the worker name {hello.worker!r}")
        stream = _Stream(self.state.attach(hello, _now()))
        self._streams[hello.worker] = stream
        welcome = policy_pb2.Welcome(
            controller=self._settings.name,
            report_interval_tokens=self._settings.report_interval_tokens,
            default_pipeline=stream.worker.catalog.expand(self._settings.default_pipeline),
            version=version("kvpilot"),
            protocol_version=common_version(hello.protocol_version),
            workers=len(self._streams),
        )
        stream.outbound.put_nowait(policy_pb2.SteerResponse(welcome=welcome))
        log.info("worker attached", worker=hello.worker, version=hello.version, requests=len(hello.epochs))
        return stream

    def _detach(self, stream: _Stream) -> None:
        if self._streams.get(stream.worker.name) is stream:
            del self._streams[stream.worker.name]
            self.journal.detached(stream.worker)
        self.state.detach(stream.worker)
        log.info("worker detached", worker=stream.worker.name)

    async def _write(self, stream: _Stream, context: grpc.aio.ServicerContext) -> _ProtocolError | None:
        """Writes what is queued, until None is."""
        while (message := await stream.outbound.get()) is not None:
            await context.write(message)
        return None

    async def _read(self, stream: _Stream, requests: AsyncIterator[policy_pb2.SteerRequest]) -> _ProtocolError | None:
        async for request in requests:
            match request.WhichOneof("message"):
                case "report":
                    self._heed(self.journal.measured(stream.worker, request.report.requests))
                    gone = self.state.report(stream.worker, request.report, _now())
                    self.journal.ended(stream.worker, request.report.ended_request_ids)
                    self._prepare(stream.worker, request.report)
                    for request_id in gone:
                        self._fail_waiter(request_id, RequestNotLiveError(f"request {request_id} has ended"))
                    if overridden := self.state.overrides.keys() & set(gone):
                        self.ledger.ask_after(overridden)
                case "ack":
                    self._settle(stream, stream.worker.take_ack(request.ack), request.ack.nonce)
                case "nack":
                    answer = stream.worker.take_nack(request.nack, self._back_off, time.monotonic())
                    self._settle(stream, answer, request.nack.nonce)
                case other:
                    return _ProtocolError(
                        grpc.StatusCode.FAILED_PRECONDITION,
                        f"message {other or 'without content'} after Hello: expected report, ack or nack",
                    )
            stream.dirty = True
            self._wake.set()
        return None

    def _prepare(self, worker: AttachedWorker, report: policy_pb2.Report) -> None:
        """Lets the planner work the reported requests out now, so that the next tick is short."""
        if self.mode is SteeringMode.OFF:
            return
        reported = (worker.requests.get(state.request_id) for state in report.requests)
        requests = tuple(RequestView(live.state) for live in reported if live is not None)
        try:
            self._planner.prepare(WorkerView(worker.hello, worker.state, requests, worker.catalog))
        except Exception:
            log.exception("preparing a plan failed", worker=worker.name)

    def _heed(self, audits: Collection[JoinedAudit]) -> None:
        """Shows the guard what was measured of the active bundle's decisions, and does as it says."""
        if self.guard is None or self.bundles is None:
            return
        for joined in audits:
            forecast, active = joined.decision.forecast, self.bundles.active
            if forecast is None or active is None or forecast.bundle != active.version:
                continue
            measured = joined.audit.divergence
            broken = self.guard.observe(
                active.version, active.alpha, forecast.family, forecast.divergence, forecast.bound, measured
            )
            if not broken:
                continue
            if not self._settings.guard_rollback:
                log.warning("bundle stays: automatic rollback is off", bundle=active.version, reason=broken)
            elif self.bundles.rollback(active.version, broken):
                self._replan_all()

    def _settle(self, stream: _Stream, answer: Answer | None, nonce: str, in_time: bool = True) -> None:
        """Logs an answer and tells the operator's call that waits for it."""
        if answer is None:
            log.warning("answer to no outstanding directive", worker=stream.worker.name, nonce=nonce)
            return
        self._recorder.answered(answer, in_time)
        self._log_decision(stream.worker, answer.live, answer.sent.from_pipeline)
        self.journal.answered(stream.worker, answer)
        if not answer.by_operator:
            return
        request_id = answer.sent.directive.request_id
        override, waiter = self.state.overrides.get(request_id), self._waiters.get(request_id)
        if override is None or override.epoch != answer.sent.directive.epoch or waiter is None:
            return  # an older override's answer, or nobody waits for it any more
        if answer.problem is not None:
            del self.state.overrides[request_id]  # a refused first try pins nothing
            self.ledger.unpin(request_id)
            self._fail_waiter(request_id, DirectiveRefusedError(answer.problem))
        elif answer.ack is not None and not waiter.done():
            waiter.set_result(answer.ack)

    def _fail_waiter(self, request_id: str, error: Exception) -> None:
        waiter = self._waiters.get(request_id)
        if waiter and not waiter.done():
            waiter.set_exception(error)

    # --- planning -----------------------------------------------------------------------------------------------------

    async def _plan_forever(self) -> None:
        """Plans at once when reports come (after a short wait for more of them), and now and then in any case."""
        while True:
            try:
                async with asyncio.timeout(self._settings.tick_ms / 1e3):
                    await self._wake.wait()
            except TimeoutError:
                for stream in self._streams.values():
                    stream.dirty |= self._worth_a_look(stream)  # news may have come in the same turn of the loop
            else:
                await asyncio.sleep(self._settings.coalesce_ms / 1e3)
            self._wake.clear()  # before the look, and nothing is awaited until all are seen: no news falls between
            for stream in list(self._streams.values()):
                if stream.dirty:
                    stream.dirty = False
                    try:
                        self.plan_worker(stream)
                    except Exception:
                        log.exception("planning failed", worker=stream.worker.name)

    def _worth_a_look(self, stream: _Stream) -> bool:
        """Whether to plan for a worker without news: each tick while something waits for time to pass, else seldom.

        On one machine every plan takes a core from the worker for a moment, and its other threads wait meanwhile.
        """
        stream.quiet_ticks += 1
        waiting = any(live.sent or live.back_offs for live in stream.worker.requests.values())
        if waiting or self.state.overrides or stream.quiet_ticks >= QUIET_TICKS:
            stream.quiet_ticks = 0
            return True
        return False

    def plan_worker(self, stream: _Stream) -> None:
        """One planning tick for one worker."""
        worker, now_s = stream.worker, time.monotonic()
        for answer in worker.give_up(self._back_off, now_s, ANSWER_TIMEOUT_S):
            self._settle(stream, answer, answer.sent.directive.nonce, in_time=False)
        for live in worker.requests.values():
            if override := self.state.override_due(worker, live, now_s):
                self._send_override(stream, live, override)
        if self.mode is SteeringMode.OFF:
            return
        with self._recorder.planning(len(worker.requests)):
            decisions = self._planner.plan(self.state.view(worker, now_s))
        for decision in decisions:
            self._act_on(stream, decision, now_s)

    def _act_on(self, stream: _Stream, decision: Decision, now_s: float) -> None:
        worker = stream.worker
        live = worker.requests[decision.request_id]
        if live.sent or live.state.pinned or decision.request_id in self.state.overrides:
            return
        in_force = live.state.pipeline
        if self.journal.due(worker, live):
            self._recorder.predicted(decision)
        if worker.catalog.same(decision.pipeline, in_force):
            last = live.decision
            if self.journal.due(worker, live):
                self.journal.decided(next(self._nonces), worker, live, decision, Outcome.KEEP)
            if last and last.outcome is Outcome.REFUSED and not live.may_try(last.pipeline, now_s):
                return  # the record keeps saying what was refused, and why
            self._recorder.decided(decision, "keep")
            self._note(worker, live, _record(decision, Outcome.KEEP, in_force))
        elif not live.may_try(decision.pipeline, now_s):
            self._recorder.decided(decision, "held")
        elif self.mode is SteeringMode.ADVISORY:
            if self.journal.due(worker, live):
                self.journal.decided(next(self._nonces), worker, live, decision, Outcome.ADVISED)
            self._recorder.decided(decision, "advised")
            self._note(worker, live, _record(decision, Outcome.ADVISED, decision.pipeline))
        else:
            nonce = next(self._nonces)
            self._recorder.decided(decision, "sent")
            self.journal.decided(nonce, worker, live, decision, Outcome.SENT)
            self._send(
                stream,
                live,
                policy_pb2.Directive(
                    nonce=nonce,
                    epoch=live.epoch + 1,
                    request_id=decision.request_id,
                    pipeline=decision.pipeline,
                    reason=decision.reason,
                    bundle=decision.forecast.bundle if decision.forecast is not None else "",
                    deadline_token=live.state.generated_tokens + DEADLINE_TOKENS,
                    ordered_by=Orderer.ORDERER_CONTROLLER,
                    cause=decision.cause,
                ),
                decision.forecast,
            )

    def _send_override(self, stream: _Stream, live: LiveRequest, override: Override) -> None:
        request_id, epoch = live.state.request_id, max(live.epoch, override.epoch) + 1
        self.state.overrides[request_id] = Override(override.pipeline, override.reason, epoch)
        self._send(
            stream,
            live,
            policy_pb2.Directive(
                nonce=next(self._nonces),
                epoch=epoch,
                request_id=request_id,
                pipeline=override.pipeline,
                reason=override.reason,
                ordered_by=Orderer.ORDERER_OPERATOR,
                cause=common_pb2.CAUSE_OPERATOR,
            ),
        )

    def _send(
        self, stream: _Stream, live: LiveRequest, directive: policy_pb2.Directive, forecast: Forecast | None = None
    ) -> None:
        stream.worker.send(directive, _now(), time.monotonic(), forecast)
        self._recorder.sent(directive)
        stream.outbound.put_nowait(policy_pb2.SteerResponse(directive=directive))
        self._log_decision(stream.worker, live, live.state.pipeline)

    def _note(self, worker: AttachedWorker, live: LiveRequest, record: DecisionRecord) -> None:
        """Keeps a decision that sends nothing; its time is that of the first of equal ones, its reason the latest."""
        before = live.decision
        unchanged = before and (before.pipeline, before.outcome) == (record.pipeline, record.outcome)
        if before and unchanged:
            record = replace(record, time=before.time)
        live.decision = record
        if not unchanged:
            self._log_decision(worker, live, live.state.pipeline)

    def _log_decision(self, worker: AttachedWorker, live: LiveRequest, from_pipeline: str) -> None:
        record = live.decision
        if record is None:
            return
        write = log.debug if record.outcome is Outcome.KEEP else log.info
        write(
            "decision",
            request=live.state.request_id,
            worker=worker.name,
            from_pipeline=from_pipeline,
            to_pipeline=record.pipeline,
            reason=record.reason,
            epoch=live.epoch,
            outcome=record.outcome.value,
            refusal=record.refusal,
            bundle=record.forecast.bundle if record.forecast is not None else "",
            **({"trace_id": live.state.trace_id} if live.state.trace_id else {}),
        )

    # --- for the operator ---------------------------------------------------------------------------------------------

    def live(self, request_id: str) -> tuple[AttachedWorker, LiveRequest]:
        """A live request and its worker.

        Raises:
            RequestNotLiveError: no attached worker has it.
        """
        found = self.state.find(request_id)
        if found is None:
            raise RequestNotLiveError(f"request {request_id!r} is not live on any attached worker")
        return found

    async def override(self, request_id: str, pipeline: str, reason: str) -> policy_pb2.Ack:
        """Pins a request to a pipeline and returns the worker's answer. Goes out in every mode, ``off`` included.

        Raises:
            RequestNotLiveError: it is not live, or ended before the answer.
            PipelineError: the pipeline does not parse or names what the request's worker does not know.
            DirectiveRefusedError: the worker refused; nothing is pinned.
            TimeoutError: no answer in time. The pin holds, and is carried out if the worker comes round to it.
        """
        worker, _ = self.live(request_id)
        worker.catalog.check(pipeline)
        pipeline = worker.catalog.expand(pipeline)
        if (older := self._waiters.pop(request_id, None)) and not older.done():
            older.set_exception(
                DirectiveRefusedError(common_pb2.Problem(code=10, message="replaced by a newer override"))
            )
        waiter: asyncio.Future[policy_pb2.Ack] = asyncio.get_running_loop().create_future()
        self._waiters[request_id] = waiter
        self.state.overrides[request_id] = override = Override(pipeline, reason)
        self.ledger.pin(request_id, override)
        for live in (live for _, live in self.state.all_requests() if live.state.request_id == request_id):
            live.back_offs.pop(pipeline, None)
        self._replan(worker.name)
        try:
            async with asyncio.timeout(self._settings.override_timeout_ms / 1e3):
                return await waiter
        finally:
            if self._waiters.get(request_id) is waiter:
                del self._waiters[request_id]

    def release(self, request_id: str) -> None:
        """Gives a request back to the planner.

        Raises:
            RequestNotLiveError: it is not live.
        """
        worker, _ = self.live(request_id)
        self.state.overrides.pop(request_id, None)
        self.ledger.unpin(request_id)
        self._replan(worker.name)

    def set_mode(self, mode: SteeringMode) -> None:
        """Sets how much is steered, from the next planning tick on."""
        log.info("mode", before=self.mode.value, now=mode.value)
        self.mode = mode
        self.ledger.set_mode(mode)
        self._replan_all()

    # --- for the ledger -----------------------------------------------------------------------------------------------

    def restore(self, mode: SteeringMode | None, overrides: Mapping[str, Override]) -> None:
        """Takes up what was kept; a mode of None leaves the present one."""
        if mode is not None:
            log.info(
                "the kept mode wins over the configured one", kept=mode.value, configured=self._settings.mode.value
            )
            self.mode = mode
        if overrides:
            log.info("overrides restored", requests=sorted(overrides))
            self.state.overrides |= overrides
        self._replan_all()

    def follow(self, mode: SteeringMode | None, overrides: Mapping[str, Override], settled: Collection[str]) -> None:
        """Takes up what another controller has set."""
        if mode is not None and mode is not self.mode:
            log.info("mode", before=self.mode.value, now=mode.value, by="another controller")
            self.mode = mode
            self._replan_all()
        for request_id in settled:
            ours, theirs = self.state.overrides.get(request_id), overrides.get(request_id)
            if theirs is None:
                self.state.overrides.pop(request_id, None)
            elif ours is None or (ours.pipeline, ours.reason) != (theirs.pipeline, theirs.reason):
                self.state.overrides[request_id] = theirs
            else:
                continue
            found = self.state.find(request_id)
            if found is not None:
                self._replan(found[0].name)

    def overridden(self) -> Collection[str]:
        """Ids of the requests with an override."""
        return self.state.overrides.keys()

    def drop_overrides(self, request_ids: Collection[str]) -> None:
        """Forgets the overrides of requests that the job store knows to have ended."""
        for request_id in request_ids:
            if self.state.overrides.pop(request_id, None) is not None:
                log.info("override dropped: its request has ended", request=request_id)
            self._fail_waiter(request_id, RequestNotLiveError(f"request {request_id} has ended"))

    def _replan_all(self) -> None:
        for worker in self._streams:
            self._replan(worker)

    def _replan(self, worker: str) -> None:
        if stream := self._streams.get(worker):
            stream.dirty = True
            self._wake.set()


async def _read_hello(requests: AsyncIterator[policy_pb2.SteerRequest]) -> policy_pb2.Hello:
    """The stream's first message.

    Raises:
        _ProtocolError: FAILED_PRECONDITION if it is not Hello, INVALID_ARGUMENT if Hello cannot be used.
    """
    async for request in requests:
        if not request.HasField("hello"):
            raise _ProtocolError(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"first message {request.WhichOneof('message') or 'without content'}: expected hello",
            )
        hello = request.hello
        if not hello.worker:
            raise _ProtocolError(grpc.StatusCode.INVALID_ARGUMENT, "hello.worker: a unique name is required")
        try:
            CacheLayout.of(hello.layers, hello.kv_heads, hello.head_dim, hello.raw_dtype)
        except ValueError as error:
            raise _ProtocolError(grpc.StatusCode.INVALID_ARGUMENT, f"hello.{error}") from None
        return hello
    raise _ProtocolError(grpc.StatusCode.FAILED_PRECONDITION, "the stream ended before hello")


def _record(decision: Decision, outcome: Outcome, pipeline: str) -> DecisionRecord:
    return DecisionRecord(pipeline, decision.reason, _now(), outcome, forecast=decision.forecast)


def _now() -> datetime:
    return datetime.now(UTC)
