"""What an orchestrator's probes see of each process."""

from __future__ import annotations

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvpilot.process import read_ready_file
from tests.e2e.serving import TIMEOUT_S, Running

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(2 * TIMEOUT_S)]
SERVING = health_pb2.HealthCheckResponse.SERVING
SERVICES = ("GenerationService", "SteeringService", "OperatorService")


async def _check(address: str, service: str) -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
    return int(answer.status)


@pytest.mark.parametrize("service", ["", *(f"kvpilot.v1.{name}" for name in SERVICES)])
async def test_each_role_of_the_controller_answers(shared: Running, service: str) -> None:
    assert await _check(shared.endpoint, service) == SERVING


@pytest.mark.parametrize("service", ["", "kvpilot.v1.Worker"])
async def test_the_worker_answers_at_its_own_address(shared: Running, service: str) -> None:
    ready = read_ready_file(shared.child("worker-0").ready_file)
    assert ready is not None
    address = ready.address
    assert await _check(address, service) == SERVING


async def test_a_service_that_is_not_there_is_unknown(shared: Running) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _check(shared.endpoint, "kvpilot.v1.Worker")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
