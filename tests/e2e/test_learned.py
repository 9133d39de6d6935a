"""Steering by a bundle, with real processes: promoted, shadowed, refused, rolled back, while requests stream."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli import tether
from cli.main import app
from kvpilot import AsyncClient
from kvpilot.bus import Bus, Pointer, PointerState
from kvpilot.v1.operator_pb2 import Mode
from models import bundle as bundles
from models.calibration import Calibration
from models.decisions import Decided, join
from models.features import NAMES
from models.manifest import PREDICTOR, Provenance
from models.registry import Registry
from tests.e2e.serving import ENDLESS, TIMEOUT_S, Following, Operator, Running, assert_greedy, operator_of, serving
from tests.models.fitted import trained
from tests.tiny import prompt

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.timeout(3 * TIMEOUT_S),
    pytest.mark.slow,
    pytest.mark.skipif(not tether.SUPPORTED, reason="needs Linux"),
]
ADMITTED = 1000.0
"""Nats per token that requests here admit: the random model loses much, and the bounds are to hold for it."""
AUDIT = {"audit_every_tokens": 32, "audit_tokens": 8, "audit_budget": 100.0}
_seeds = itertools.count(300)


def made(version: str, bound: float) -> dict[str, bytes]:
    """A bundle whose bounds are its upper model's times ``exp(bound)``."""
    model = trained()
    calibration = Calibration(model.calibration.alpha, replace(model.calibration.pooled, bound=bound), {})
    return bundles.make(
        model.models,
        calibration,
        Provenance(models=["made-up"], files={}, splits={}, kinds=[], pipelines=[]),
        model.calibrating.rows,
        model.calibrating.families,
        hyperparameters=asdict(model.hyperparameters),
        metrics={},
        version=version,
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Bundles that differ in what they promise: what ``usual`` says holds for the tiny model, ``timid`` admits
    nothing lossy, ``boastful`` says that nothing is ever lost."""
    registry = Registry(tmp_path_factory.mktemp("bundles"))
    for version, bound in (("usual", 6.0), ("timid", 30.0), ("boastful", -30.0), ("broken", 6.0)):
        registry.put(made(version, bound))
    return registry


@asynccontextmanager
async def steered(model: Path, folder: Path, store: Registry) -> AsyncIterator[Running]:
    """A stack that looks for bundles in ``store``, and decides on paper until it is told otherwise."""
    controller = {"bundle_store": store.url, "dwell_tokens": 32, "bundle_poll_s": 1.0}
    async with serving(
        model, folder, mode="advisory", planner="auto", host_budget=16 << 20, controller=controller, worker=AUDIT
    ) as running:
        yield running


@pytest.fixture
async def running(tiny_folder: Path, tmp_path: Path, store: Registry) -> AsyncIterator[Running]:
    async with steered(tiny_folder, tmp_path / "state", store) as running:
        yield running


@pytest.fixture
async def client(running: Running) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(running.endpoint) as connected:
        yield connected


@pytest.fixture
async def operator(running: Running) -> AsyncIterator[Operator]:
    async with operator_of(running) as connected:
        yield connected


@pytest.fixture
async def bus(running: Running) -> AsyncIterator[Bus]:
    connected = await Bus.connect(running.redis_url)
    yield connected
    await connected.close()


class Commands:
    """``kvpilot models`` on a stack, as a person types it. In this process, which has everything imported: requests go
    on meanwhile, and end some time."""

    def __init__(self, running: Running, store: Registry) -> None:
        self._redis = ("--redis-url", running.redis_url)
        self._environment = {"KVPILOT_CONTROLLER_BUNDLE_STORE": store.url, "COLUMNS": "250"}

    async def __call__(self, *words: str, code: int = 0) -> str:
        """What it says."""
        line = ["models", *words, *self._redis]
        done = await asyncio.to_thread(CliRunner().invoke, app, line, env=self._environment)
        assert done.exit_code == code, done.output
        return done.output


@pytest.fixture
def kvpilot_models(running: Running, store: Registry) -> Commands:
    return Commands(running, store)


def streaming(client: AsyncClient) -> tuple[Following, list[int]]:
    """A generation that no test sees the end of, and its prompt."""
    ids = prompt(700, seed=next(_seeds))
    job = Following(
        client.generate(
            token_ids=ids, max_tokens=ENDLESS, ignore_eos=True, scenario="long-context", max_divergence=ADMITTED
        )
    )
    return job, ids


async def decided_by(job: Following, operator: Operator, bundle: str) -> None:
    """Goes on with a job until the controller's last decision on it is a bundle's."""
    while True:
        live = await operator.find(job.job_id)
        if live is not None and live.decision.bundle == bundle:
            return
        await job.more(1)


async def switched_by(job: Following, bundle: str) -> None:
    """Goes on with a job until a bundle has switched it."""
    await job.until(lambda: any(switch.reason.endswith(f"bundle {bundle}") for switch in job.result.switches))


async def logged(job: Following, bus: Bus, condition: Callable[[Decided], bool]) -> Decided:
    """Goes on with a job until the log of decisions has one of it that meets the condition."""
    while True:
        for one in join(await bus.all_decisions()):
            if one.request_id == job.job_id and condition(one):
                return one
        await job.more(8)


async def pointed(job: Following, bus: Bus, condition: Callable[[PointerState], bool]) -> PointerState:
    """Goes on with a job until the active pointer meets the condition."""
    while not condition(state := await bus.pointer(Pointer.ACTIVE)):
        await job.more(8)
    return state


async def test_promoted_while_a_request_streams_then_another_then_back(
    client: AsyncClient,
    operator: Operator,
    kvpilot_models: Commands,
    transformers_model: object,
) -> None:
    job, ids = streaming(client)
    await job.until(lambda: job.tokens >= 40)
    assert not job.result.switches  # on paper only, so far

    assert (await kvpilot_models("promote", "usual")).startswith("active: usual")
    await decided_by(job, operator, "usual")
    exact = job.tokens  # all of them were made with the full cache
    await operator.set_mode(Mode.MODE_ACTIVE)
    await switched_by(job, "usual")
    first = job.result.switches[0]
    assert (first.from_pipeline, first.reason.endswith("bundle usual")) == ("full", True)
    assert first.to_pipeline != "full"
    assert "runner-up" in first.reason
    live = await operator.find(job.job_id)
    assert live is not None
    assert live.decision.predicted_divergence <= live.decision.bound <= ADMITTED

    before = job.tokens
    assert await kvpilot_models("promote", "timid") == "active: timid (before: usual)\n"
    await switched_by(job, "timid")
    last = job.result.switches[-1]
    assert "exact" in last.reason
    assert "leaves a bound of" in last.reason
    assert last.at_token >= before

    assert await kvpilot_models("rollback") == "active: usual (left: timid)\n"
    count = len(job.result.switches)
    await job.until(lambda: len(job.result.switches) > count)
    assert job.result.switches[-1].reason.endswith("bundle usual")

    result = await job.cancel(client)  # Following saw every token once and in order
    assert job.workers == ["worker-0"]
    assert list(result.finished.switches) == result.switches
    assert_greedy(transformers_model, ids, result.token_ids[:exact])


async def test_a_shadow_is_scored_beside_it_and_audits_join(
    client: AsyncClient, operator: Operator, kvpilot_models: Commands, bus: Bus
) -> None:
    await kvpilot_models("promote", "usual")
    assert await kvpilot_models("shadow", "timid") == "shadow: timid\n"
    await operator.set_mode(Mode.MODE_ACTIVE)
    job, _ = streaming(client)
    one = await logged(
        job, bus, lambda one: one.decided.shadow_bundle == "timid" and bool(one.audits) and one.decided.bound > 0
    )
    decided = one.decided
    assert (decided.bundle, one.worker) == ("usual", "worker-0")
    assert list(one.features()) == list(NAMES)
    assert one.features()["log2_seen"] is not None
    assert decided.shadow_divergence == pytest.approx(decided.predicted_divergence)
    assert decided.shadow_bound > 1e3 * decided.bound
    for audit in one.audits.values():
        assert audit.at_token >= decided.at_token
        assert audit.tokens == AUDIT["audit_tokens"]
        assert 0 <= audit.divergence <= audit.divergence_max

    lines = await kvpilot_models("decisions", "--json", "--audited", "--limit", "999")
    [shown] = [line for line in map(json.loads, lines.splitlines()) if line["decision_id"] == one.decision_id]
    assert shown["shadow"]["bundle"] == "timid"
    assert shown["features"] == one.features()
    scores = (await kvpilot_models("decisions")).rpartition("how bundles did")[2]
    assert "active" in scores
    assert "shadow" in scores
    await job.cancel(client)


async def test_a_bundle_that_was_tampered_with_is_refused_and_the_active_one_stays(
    client: AsyncClient, operator: Operator, kvpilot_models: Commands, bus: Bus, store: Registry, running: Running
) -> None:
    await kvpilot_models("promote", "usual")
    job, _ = streaming(client)
    await decided_by(job, operator, "usual")  # the controller has it, or what came along would stay active below
    (Path(store.url) / "broken" / PREDICTOR).write_bytes(b"something else")
    why = f"bundle broken: {PREDICTOR} does not have the checksum"
    assert why in await kvpilot_models("promote", "broken", code=1)
    assert (await bus.pointer(Pointer.ACTIVE)).version == "usual"

    await bus.move_pointer(Pointer.ACTIVE, "broken", "past the command that checks")
    log = running.folder / "logs" / "controller.log"
    await job.until(lambda: why in log.read_text())
    await operator.set_mode(Mode.MODE_ACTIVE)
    await switched_by(job, "usual")
    await job.cancel(client)


async def test_a_bundle_that_breaks_its_promise_is_rolled_back_by_itself(
    client: AsyncClient, operator: Operator, kvpilot_models: Commands, bus: Bus
) -> None:
    await kvpilot_models("promote", "usual")
    await kvpilot_models("promote", "boastful")
    await operator.set_mode(Mode.MODE_ACTIVE)
    others = [streaming(client)[0] for _ in range(3)]
    job, _ = streaming(client)
    for other in others:
        await other.until(lambda other=other: other.tokens > 0)
    await logged(job, bus, lambda one: one.decided.bundle == "boastful")
    state = await pointed(job, bus, lambda state: state.version != "boastful")
    assert state.version == "usual"
    assert (state.history[0].version, state.history[0].rolled_back) == ("boastful", True)
    assert "audits exceeded their bound" in state.reason
    assert "boastful\tpromoted by an operator; rolled back: " in await kvpilot_models("history")
    now = job.tokens
    await logged(job, bus, lambda one: one.decided.bundle == "usual" and one.decided.at_token > now)
    for one in (job, *others):
        await one.cancel(client)
