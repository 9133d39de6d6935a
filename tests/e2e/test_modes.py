"""How much is steered: nothing, on paper only, or really; and a person's word against the planner's."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator

import pytest

from kvpilot import AsyncClient
from kvpilot.v1 import operator_pb2
from kvpilot.v1.common_pb2 import Orderer
from kvpilot.v1.operator_pb2 import DecisionOutcome, Mode
from tests.e2e.serving import ENDLESS, TIMEOUT_S, Following, Operator
from tests.tiny import prompt

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(2 * TIMEOUT_S)]
INT4 = "kivi(bits=4)"
"""What the rule wants for a long context, because it is long."""
_seeds = itertools.count(100)


@pytest.fixture(autouse=True)
async def mode_as_before(operator: Operator) -> AsyncIterator[None]:
    yield
    await operator.set_mode(Mode.MODE_ACTIVE)


def long_context(client: AsyncClient, **options: str) -> Following:
    """A generation that the rule wants in 4 bits, and that no test sees the end of."""
    ids = prompt(1000, seed=next(_seeds))
    return Following(
        client.generate(token_ids=ids, max_tokens=ENDLESS, ignore_eos=True, scenario="long-context", **options)
    )


async def decided(job: Following, operator: Operator, outcome: DecisionOutcome) -> operator_pb2.LiveRequest:
    """Goes on with a job until this has become of the controller's last decision on it."""
    while True:
        live = await operator.find(job.job_id)
        if live is not None and live.decision.outcome == outcome:
            return live
        await job.more(1)


async def test_off_then_advisory_then_active(client: AsyncClient, operator: Operator) -> None:
    await operator.set_mode(Mode.MODE_OFF)
    job = long_context(client)
    await job.until(lambda: job.tokens >= 200)
    live = await operator.find(job.job_id)
    assert live is not None
    assert live.state.generated_tokens >= 64  # it was reported, and nothing was made of it
    assert not live.HasField("decision")
    assert not job.result.switches

    await operator.set_mode(Mode.MODE_ADVISORY)
    live = await decided(job, operator, DecisionOutcome.DECISION_OUTCOME_ADVISED)
    assert live.decision.pipeline == INT4
    assert "long-context" in live.decision.reason
    assert live.state.pipeline == "full"
    await job.more(200)
    assert not job.result.switches

    before = job.tokens
    await operator.set_mode(Mode.MODE_ACTIVE)
    await job.until(lambda: bool(job.result.switches))
    switch = job.result.switches[0]
    assert switch.ordered_by == Orderer.ORDERER_CONTROLLER
    assert (switch.from_pipeline, switch.to_pipeline) == ("full", INT4)
    assert before <= switch.at_token == job.tokens
    assert "long-context" in switch.reason
    assert "tokens >= 512" in switch.reason
    assert switch.after.device_bytes < 0.4 * switch.before.device_bytes

    await job.more(100)
    live = await decided(job, operator, DecisionOutcome.DECISION_OUTCOME_KEEP)
    assert live.state.pipeline == live.decision.pipeline == live.state.last_switch.to_pipeline == INT4
    result = await job.cancel(client)
    assert result.pipeline == INT4
    assert [switch.at_token for switch in result.finished.switches] == [switch.at_token]


async def test_active_switches_in_the_middle_of_a_generation(client: AsyncClient) -> None:
    job = long_context(client)
    await job.until(lambda: bool(job.result.switches))
    await job.more(50)
    result = await job.cancel(client)
    assert [switch.ordered_by for switch in result.switches] == [Orderer.ORDERER_CONTROLLER]
    assert 0 < result.switches[0].at_token < len(result.token_ids)
    assert list(result.finished.switches) == result.switches


async def test_a_pipeline_that_the_client_named_is_left_alone(client: AsyncClient, operator: Operator) -> None:
    job = long_context(client, pipeline="full")
    await job.until(lambda: job.tokens >= 300)
    live = await operator.find(job.job_id)
    assert live is not None
    assert live.state.pinned
    result = await job.cancel(client)
    assert (result.pipeline, result.switches) == ("full", [])


async def test_a_persons_word_goes_before_the_planners(client: AsyncClient, operator: Operator) -> None:
    job = long_context(client)
    await job.until(lambda: bool(job.result.switches))  # by the planner, to 4 bits
    ack = await operator.override(job.job_id, "full", "I want to see it")
    assert ack.applied.to_pipeline == "full"
    await job.more(200)
    live = await operator.find(job.job_id)
    assert live is not None
    assert live.overridden
    assert live.state.pipeline == "full"

    await operator.stub.ReleasePipeline(operator_pb2.ReleasePipelineRequest(request_id=job.job_id))
    await job.until(lambda: len(job.result.switches) >= 3)
    result = await job.cancel(client)
    assert [(switch.ordered_by, switch.to_pipeline) for switch in result.switches[:3]] == [
        (Orderer.ORDERER_CONTROLLER, INT4),
        (Orderer.ORDERER_OPERATOR, "full"),
        (Orderer.ORDERER_CONTROLLER, INT4),
    ]
    assert result.switches[1].reason == "I want to see it"
