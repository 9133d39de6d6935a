"""The journal: entries in a real job store that join by the decision's id."""

from __future__ import annotations

import pytest

from kvpilot.bus import Bus
from kvpilot.v1 import job_pb2, policy_pb2
from kvpilot.v1.operator_pb2 import DecisionOutcome
from models.features import NAMES, SCHEMA_HASH
from tests.controller.predictors import FakePredictor, FakeSource
from tests.controller.scripted import ScriptedWorker, request_state, until
from tests.controller.test_bundles import controller, learning
from tests.jobs_help import BusSettings, connected

pytestmark = pytest.mark.anyio


async def entries(bus: Bus) -> list[job_pb2.DecisionEvent]:
    return await bus.all_decisions()


async def test_a_decision_is_joined_to_its_answer_its_audits_and_the_shadows_word(bus: Bus) -> None:
    shadow = FakePredictor("v2", caution=3.0)
    source = FakeSource("v1", "v2", v1=FakePredictor("v1"), v2=shadow)
    async with (
        controller(source, bus) as server,
        ScriptedWorker.attach(server.address, learning()) as worker,
    ):
        await worker.report(request_state())
        directive = await worker.directive()
        await worker.ack(directive)
        audits = [
            policy_pb2.Audit(at_token=20, pipeline=directive.pipeline, divergence=0.007),
            policy_pb2.Audit(at_token=21, pipeline="h2o(keep=0.1)", divergence=0.5),  # not what was chosen
            policy_pb2.Audit(at_token=3, pipeline=directive.pipeline, divergence=0.5),  # from before
        ]
        await worker.report(
            request_state(generated_tokens=32, pipeline=directive.pipeline, epoch=directive.epoch, audits=audits)
        )
        assert server.steering is not None
        steering = server.steering
        await until(lambda: any(live.state.generated_tokens == 32 for _, live in steering.state.all_requests()))
        await steering.journal.settle()
        joined = [entry for entry in await entries(bus) if entry.decision_id == directive.nonce]
    assert [entry.WhichOneof("event") for entry in joined] == ["decided", "answered", "measured"]
    assert {(entry.request_id, entry.worker) for entry in joined} == {("job-1", "w0")}
    decided, answered, measured = joined[0].decided, joined[1].answered, joined[2].measured
    assert (decided.at_token, decided.from_pipeline, decided.pipeline) == (16, "full", directive.pipeline)
    assert (decided.bundle, decided.feature_schema_hash, decided.reason) == ("v1", SCHEMA_HASH, directive.reason)
    assert decided.outcome == DecisionOutcome.DECISION_OUTCOME_SENT
    assert len(decided.features) == len(NAMES)
    assert decided.bound == pytest.approx(2 * decided.predicted_divergence)
    assert decided.shadow_bundle == "v2"
    assert decided.shadow_divergence == pytest.approx(decided.predicted_divergence)
    assert decided.shadow_bound == pytest.approx(3 * decided.bound)
    assert decided.runner_up
    assert answered.outcome == DecisionOutcome.DECISION_OUTCOME_APPLIED
    assert answered.applied.to_pipeline == directive.pipeline
    assert measured.audit == audits[0]
    assert measured.bound == decided.bound


async def test_a_refusal_is_noted_and_measures_nothing(bus: Bus) -> None:
    source = FakeSource("v1", v1=FakePredictor("v1"))
    async with (
        controller(source, bus) as server,
        ScriptedWorker.attach(server.address, learning()) as worker,
    ):
        await worker.report(request_state())
        directive = await worker.directive()
        await worker.nack(directive, message="no room")
        await worker.report(request_state("job-2"))
        await worker.directive()
        await server.steering.journal.settle()
        joined = [entry for entry in await entries(bus) if entry.decision_id == directive.nonce]
    assert joined[1].answered.refusal == "no room"
    assert joined[1].answered.outcome == DecisionOutcome.DECISION_OUTCOME_REFUSED


async def test_what_stays_is_noted_once_per_report(bus: Bus) -> None:
    source = FakeSource("v1", v1=FakePredictor("v1"))
    async with (
        controller(source, bus) as server,
        ScriptedWorker.attach(server.address, learning()) as worker,
    ):
        for generated in (390, 395):  # too near the end to be moved
            await worker.report(request_state(generated_tokens=generated))
            await worker.report(request_state(f"other-{generated}"))
            await worker.directive()  # so that the first was planned for, in several ticks
        await server.steering.journal.settle()
        stays = [entry for entry in await entries(bus) if entry.request_id == "job-1"]
    assert [entry.decided.at_token for entry in stays] == [390, 395]
    assert {entry.decided.outcome for entry in stays} == {DecisionOutcome.DECISION_OUTCOME_KEEP}


async def test_the_log_is_bounded(redis_url: str) -> None:
    async with connected(redis_url, BusSettings(decisions=100)) as bus:
        for _ in range(10):
            await bus.log_decisions([job_pb2.DecisionEvent(decision_id=str(number)) for number in range(100)])
        kept = await bus.decisions(count=2000)
        assert 100 <= len(kept) < 400
        assert kept[-1][1].decision_id == "99"
        assert (await bus.decisions(after=kept[-2][0])) == kept[-1:]
        assert await bus.decisions_before(count=2000) == kept[::-1]
        assert await bus.decisions_before(kept[-2][0], count=2) == kept[-3:-5:-1]
        assert await bus.decisions_before(kept[0][0]) == []
        await bus.log_decisions([])
        assert len(await bus.decisions(count=2000)) == len(kept)
