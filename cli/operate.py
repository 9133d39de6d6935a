"""The operator's commands: mode, override, release."""

from __future__ import annotations

from cli import text
from cli.connection import operator_stub
from cli.errors import BadInputError
from kvpilot.v1 import operator_pb2, operator_pb2_grpc

CALL_TIMEOUT_S = 30.0


def show_mode(endpoint: str) -> str:
    """The mode in force."""
    with operator_stub(endpoint) as stub:
        return text.mode(stub.GetMode(operator_pb2.GetModeRequest(), timeout=CALL_TIMEOUT_S).mode)


def set_mode(endpoint: str, word: str) -> str:
    """Sets the mode; says what changed."""
    mode = operator_pb2.Mode.Value(f"MODE_{word.upper()}")
    with operator_stub(endpoint) as stub:
        answer = stub.SetMode(operator_pb2.SetModeRequest(mode=mode), timeout=CALL_TIMEOUT_S)
    return f"{text.mode(answer.previous)} -> {word}"


def override(endpoint: str, request: str, pipeline: str, reason: str) -> str:
    """Moves a request to a pipeline; says what the worker did."""
    with operator_stub(endpoint) as stub:
        request_id = find_request(stub, request)
        ack = stub.OverridePipeline(
            operator_pb2.OverridePipelineRequest(request_id=request_id, pipeline=pipeline, reason=reason),
            timeout=CALL_TIMEOUT_S,
        ).ack
    switch = ack.applied
    before, after = switch.before.device_bytes, switch.after.device_bytes
    return (
        f"{request_id}: {switch.from_pipeline} -> {switch.to_pipeline} at token {switch.at_token}, "
        f"device {text.size(before)} -> {text.size(after)}, stalled {switch.stall_ms:.1f} ms"
    )


def release(endpoint: str, request: str) -> str:
    """Gives a request back to the planner."""
    with operator_stub(endpoint) as stub:
        request_id = find_request(stub, request)
        stub.ReleasePipeline(operator_pb2.ReleasePipelineRequest(request_id=request_id), timeout=CALL_TIMEOUT_S)
    return f"{request_id}: the planner decides again"


def find_request(stub: operator_pb2_grpc.OperatorServiceStub, named: str) -> str:
    """The id of the live request with this id, or whose id ends so.

    Raises:
        BadInputError: none does, or several do.
    """
    end = named.removeprefix("…")
    live = stub.ListRequests(operator_pb2.ListRequestsRequest(), timeout=CALL_TIMEOUT_S).requests
    ids = [str(request.state.request_id) for request in live]
    if end in ids:
        return end
    found = [request_id for request_id in ids if end and request_id.endswith(end)]
    if len(found) != 1:
        what = "no live request's id ends" if not found else f"{len(found)} live requests' ids end"
        raise BadInputError(f"{what} with {named!r}; live: {', '.join(ids) or 'none'}")
    return found[0]
