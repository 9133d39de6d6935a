"""OperatorService: what runs where, overrides, and how much is steered."""

from __future__ import annotations

import time
from typing import Any

import grpc
import structlog

from controller.journal import OUTCOMES
from controller.known_bundles import bundles_of, merged
from controller.ledger import MODES, STEERING_MODES
from controller.peers import Peers
from controller.refusals import abort, bad_fields, problem_of
from controller.state import DecisionRecord
from controller.steering import DirectiveRefusedError, RequestNotLiveError, SteeringService
from kvpilot.bus import Bus, BusError
from kvpilot.pipeline import PipelineError
from kvpilot.v1 import operator_pb2, operator_pb2_grpc

log = structlog.get_logger(__name__)

MAX_LOG_LEVEL_MS = 30 * 24 * 3_600_000
"""Thirty days: what is to hold longer is a setting."""
LIST_S = 1.0
"""How long another controller may take to list what it has."""
_SILENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.DEADLINE_EXCEEDED)


class OperatorService(operator_pb2_grpc.OperatorServiceServicer):
    """Acts on the streams of the SteeringService in the same process, and asks the other controllers for theirs."""

    def __init__(
        self, steering: SteeringService, peers: Peers, name: str, override_s: float, bus: Bus | None = None
    ) -> None:
        self._steering = steering
        self._peers = peers
        self._name = name
        self._override_s = override_s
        self._bus = bus

    async def ListWorkers(  # noqa: N802  # gRPC's spelling, as below
        self, request: operator_pb2.ListWorkersRequest, context: grpc.aio.ServicerContext
    ) -> operator_pb2.ListWorkersResponse:
        """See ``operator.proto``."""
        response = operator_pb2.ListWorkersResponse()
        for worker in self._steering.state.workers.values():
            entry = response.workers.add(hello=worker.hello, state=worker.state, controller=self._name)
            entry.attach_time.FromDatetime(worker.attach_time)
            if worker.report_time is not None:
                entry.report_time.FromDatetime(worker.report_time)
        if not request.only_here:
            for answer in await self._lists("ListWorkers", request, response):
                response.workers.extend(answer.workers)
            newest = {entry.hello.worker: entry for entry in sorted(response.workers, key=_attached_at)}
            if len(newest) < len(response.workers):  # one is on its way from a controller to another
                kept = list(newest.values())
                del response.workers[:]
                response.workers.extend(kept)
        return response

    async def ListRequests(  # noqa: N802
        self, request: operator_pb2.ListRequestsRequest, context: grpc.aio.ServicerContext
    ) -> operator_pb2.ListRequestsResponse:
        """See ``operator.proto``."""
        state = self._steering.state
        response = operator_pb2.ListRequestsResponse()
        for worker, live in state.all_requests():
            if request.worker in ("", worker.name):
                response.requests.add(
                    worker=worker.name,
                    state=live.state,
                    decision=_decision(live.decision),
                    overridden=live.state.request_id in state.overrides,
                )
        if not request.only_here:
            known = {(live.worker, live.state.request_id) for live in response.requests}
            for answer in await self._lists("ListRequests", request, response):
                response.requests.extend(
                    live for live in answer.requests if (live.worker, live.state.request_id) not in known
                )
        return response

    async def ListBundles(  # noqa: N802
        self, request: operator_pb2.ListBundlesRequest, context: grpc.aio.ServicerContext
    ) -> operator_pb2.ListBundlesResponse:
        """See ``operator.proto``."""
        own = bundles_of(self._steering.bundles, self._steering.guard)
        response = operator_pb2.ListBundlesResponse(bundles=own)
        if not request.only_here:
            answers = await self._peers.ask("ListBundles", request, LIST_S)
            others = {name: answer.bundles for name, answer in self._answered(answers, response).items()}
            del response.bundles[:]
            response.bundles.extend(merged(own, others))
        return response

    async def OverridePipeline(  # noqa: N802
        self, request: operator_pb2.OverridePipelineRequest, context: grpc.aio.ServicerContext
    ) -> operator_pb2.OverridePipelineResponse:
        """See ``operator.proto``."""
        try:
            ack = await self._steering.override(
                request.request_id, request.pipeline, request.reason or "operator override"
            )
        except RequestNotLiveError as error:
            elsewhere: operator_pb2.OverridePipelineResponse = await self._elsewhere(
                "OverridePipeline", request, context, error
            )
            return elsewhere
        except PipelineError as error:
            await abort(context, bad_fields({"pipeline": str(error)}).problem)
        except DirectiveRefusedError as error:
            await abort(context, error.problem)
        except TimeoutError:
            await context.abort(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                "the worker has not answered in time; the override holds until ReleasePipeline",
            )
        await self._steering.ledger.settle()
        return operator_pb2.OverridePipelineResponse(ack=ack)

    async def ReleasePipeline(  # noqa: N802
        self, request: operator_pb2.ReleasePipelineRequest, context: grpc.aio.ServicerContext
    ) -> operator_pb2.ReleasePipelineResponse:
        """See ``operator.proto``."""
        try:
            self._steering.release(request.request_id)
        except RequestNotLiveError as error:
            there: operator_pb2.ReleasePipelineResponse = await self._elsewhere(
                "ReleasePipeline", request, context, error
            )
            return there
        await self._steering.ledger.settle()
        return operator_pb2.ReleasePipelineResponse()

    async def GetMode(  # noqa: N802
        self, request: operator_pb2.GetModeRequest, context: grpc.aio.ServicerContext
    ) -> operator_pb2.GetModeResponse:
        """See ``operator.proto``."""
        return operator_pb2.GetModeResponse(mode=MODES[self._steering.mode])

    async def SetMode(  # noqa: N802
        self, request: operator_pb2.SetModeRequest, context: grpc.aio.ServicerContext
    ) -> operator_pb2.SetModeResponse:
        """See ``operator.proto``."""
        wanted = STEERING_MODES.get(request.mode)
        if wanted is None:
            expected = f"{request.mode}: expected MODE_OFF, MODE_ADVISORY or MODE_ACTIVE"
            await abort(context, bad_fields({"mode": expected}).problem)
        previous = MODES[self._steering.mode]
        self._steering.set_mode(wanted)
        await self._steering.ledger.settle()
        return operator_pb2.SetModeResponse(previous=previous)

    async def SetLogLevel(  # noqa: N802
        self, request: operator_pb2.SetLogLevelRequest, context: grpc.aio.ServicerContext
    ) -> operator_pb2.SetLogLevelResponse:
        """See ``operator.proto``."""
        levels = {name: number for name, number in operator_pb2.LogLevel.items() if number}
        bad = {}
        if request.level not in levels.values():
            bad["level"] = f"{request.level}: expected one of {', '.join(levels)}"
        if not 0 <= request.duration_ms <= MAX_LOG_LEVEL_MS:
            bad["duration_ms"] = f"{request.duration_ms}: expected 0 to {MAX_LOG_LEVEL_MS}"
        if bad:
            await abort(context, bad_fields(bad).problem)
        order = operator_pb2.LogLevelOrder(process=request.process, level=request.level)
        if request.duration_ms:
            order.until.FromMilliseconds(time.time_ns() // 1_000_000 + request.duration_ms)
        bus = await self._store(context)
        try:
            await bus.order_log_level(order)
        except BusError as error:
            await abort(context, problem_of(error))
        log.info("log level ordered", of=request.process or "all", level=operator_pb2.LogLevel.Name(request.level))
        return operator_pb2.SetLogLevelResponse()

    async def ListLogLevels(  # noqa: N802
        self, request: operator_pb2.ListLogLevelsRequest, context: grpc.aio.ServicerContext
    ) -> operator_pb2.ListLogLevelsResponse:
        """See ``operator.proto``."""
        bus = await self._store(context)
        try:
            orders = await bus.log_levels()
        except BusError as error:
            await abort(context, problem_of(error))
        return operator_pb2.ListLogLevelsResponse(orders=[orders[process] for process in sorted(orders)])

    async def _store(self, context: grpc.aio.ServicerContext) -> Bus:
        if self._bus is None:
            why = "this controller runs without a job store, by which processes learn of log levels"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, why)
        assert self._bus is not None
        return self._bus

    async def _lists(self, method: str, request: Any, response: Any) -> list[Any]:
        """What the other controllers list; those that do not answer are named in the response."""
        return list(self._answered(await self._peers.ask(method, request, LIST_S), response).values())

    def _answered(self, answers: dict[str, Any], response: Any) -> dict[str, Any]:
        failed = {name for name, answer in answers.items() if isinstance(answer, grpc.aio.AioRpcError)}
        response.silent_controllers.extend(sorted(failed))
        return {name: answer for name, answer in answers.items() if name not in failed}

    async def _elsewhere(self, method: str, request: Any, context: Any, not_live: RequestNotLiveError) -> Any:
        """The answer of the controller that has the request."""
        if request.only_here:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(not_live))
        answers = await self._peers.ask(method, request, self._override_s + LIST_S)
        silent = []
        for name, answer in answers.items():
            if not isinstance(answer, grpc.aio.AioRpcError):
                return answer
            if answer.code() in _SILENT:
                silent.append(f"{name} ({answer.code().name})")
            elif answer.code() is not grpc.StatusCode.NOT_FOUND:
                details = f"controller {name}: {answer.details()}"
                await context.abort(answer.code(), details, tuple(answer.trailing_metadata() or ()))
        if silent:
            others = ", ".join(silent)
            message = f"{not_live} of controller {self._name}; others that may have it do not answer: {others}"
            await context.abort(grpc.StatusCode.UNAVAILABLE, message)
        await context.abort(grpc.StatusCode.NOT_FOUND, str(not_live))


def _attached_at(worker: operator_pb2.Worker) -> tuple[int, int]:
    return worker.attach_time.seconds, worker.attach_time.nanos


def _decision(record: DecisionRecord | None) -> operator_pb2.Decision | None:
    if record is None:
        return None
    decision = operator_pb2.Decision(
        pipeline=record.pipeline, reason=record.reason, outcome=OUTCOMES[record.outcome], refusal=record.refusal
    )
    if (forecast := record.forecast) is not None:
        decision.bundle, decision.runner_up = forecast.bundle, forecast.runner_up
        decision.predicted_divergence, decision.bound = forecast.divergence, forecast.bound
    decision.time.FromDatetime(record.time)
    return decision
