"""The steering client against a real controller, with an engine that is nothing but bookkeeping."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager

import grpc
import pytest
from structlog.testing import capture_logs

from controller.server import ControllerServer
from kvpilot.v1 import common_pb2, job_pb2, policy_pb2, policy_pb2_grpc
from tests.conftest import free_port
from tests.controller.scripted import controller, hello, request_state, until, worker_state
from workers.engine.api import Event
from workers.errors import FAILED_PRECONDITION, ProblemError
from workers.steering import ReportBox, SteeringClient, SteeringSettings

pytestmark = pytest.mark.anyio

QUICK = SteeringSettings(reconnect_min_ms=5, reconnect_max_ms=20)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module", autouse=True)
async def one_event_loop(anyio_backend: str) -> AsyncIterator[None]:
    """See tests/controller/conftest.py."""
    yield  # noqa: PT022  # keeps the loop alive until the last test


class BookkeepingEngine:
    """Implements EngineApi; requests exist because a test says so, switches take effect at once."""

    def __init__(self, *states: policy_pb2.RequestState) -> None:
        self.states = {state.request_id: state for state in states}
        self.directives: list[policy_pb2.Directive] = []
        self.attachments: list[bool] = []
        self.welcomes: list[policy_pb2.Welcome] = []
        self.refuse_with: Exception | None = None
        self._lock = threading.Lock()

    def start(
        self,
        on_events: Callable[[list[Event]], None],
        on_report: Callable[[policy_pb2.Report], None],
        on_death: Callable[[BaseException], None],
    ) -> None:
        self._on_report = on_report

    def stop(self, timeout_s: float) -> None: ...

    def submit(self, job: job_pb2.Job, emitted: Sequence[int] = ()) -> None:
        raise NotImplementedError

    def cancel(self, job_id: str) -> None:
        raise NotImplementedError

    def free_slots(self) -> int:
        return 0

    def live_jobs(self) -> list[str]:
        return list(self.states)

    def direct(self, directive: policy_pb2.Directive) -> Future[policy_pb2.Ack]:
        answer: Future[policy_pb2.Ack] = Future()
        threading.Thread(target=self._carry_out, args=(directive, answer)).start()
        return answer

    def _carry_out(self, directive: policy_pb2.Directive, answer: Future[policy_pb2.Ack]) -> None:
        with self._lock:
            self.directives.append(directive)
            state = self.states[directive.request_id]
            if self.refuse_with is not None:
                answer.set_exception(self.refuse_with)
                return
            if directive.epoch <= state.epoch:
                answer.set_exception(ProblemError(FAILED_PRECONDITION, f"epoch {directive.epoch} is stale"))
                return
            switch = common_pb2.Switch(
                at_token=state.generated_tokens,
                from_pipeline=state.pipeline,
                to_pipeline=directive.pipeline,
                reason=directive.reason,
                ordered_by=directive.ordered_by,
            )
            state.epoch, state.pipeline = directive.epoch, directive.pipeline
            state.last_switch.CopyFrom(switch)
            answer.set_result(policy_pb2.Ack(applied=switch, epoch=directive.epoch))

    def hello(self) -> policy_pb2.Hello:
        with self._lock:
            return hello(epochs={name: state.epoch for name, state in self.states.items()})

    def configure(self, welcome: policy_pb2.Welcome) -> None:
        self.welcomes.append(welcome)

    def steered(self, connected: bool) -> None:
        self.attachments.append(connected)

    def generate(self, tokens: int) -> None:
        """Moves every request on by some tokens and reports them, from another thread as a real engine does."""
        with self._lock:
            report = policy_pb2.Report(worker=worker_state())
            for state in self.states.values():
                state.generated_tokens += tokens
                report.requests.add().CopyFrom(state)
        self._report(report)

    def end(self, request_id: str) -> None:
        """Ends a request."""
        with self._lock:
            del self.states[request_id]
        self._report(policy_pb2.Report(worker=worker_state(), ended_request_ids=[request_id]))

    def _report(self, report: policy_pb2.Report) -> None:
        thread = threading.Thread(target=self._on_report, args=(report,))
        thread.start()
        thread.join()


@asynccontextmanager
async def attached(
    engine: BookkeepingEngine, targets: Sequence[str], settings: SteeringSettings = QUICK
) -> AsyncIterator[SteeringClient]:
    """A client at work."""
    client = SteeringClient(engine, targets, settings)
    engine.start(lambda events: None, client.on_report, lambda error: None)
    task = asyncio.create_task(client.run())
    try:
        yield client
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def state_at(server: ControllerServer, request_id: str = "job-1") -> policy_pb2.RequestState | None:
    assert server.steering is not None
    found = server.steering.state.find(request_id)
    return found[1].state if found else None


async def test_directives_are_carried_out_and_acknowledged() -> None:
    engine = BookkeepingEngine(request_state(generated_tokens=0))
    async with controller(report_interval_tokens=4) as server, attached(engine, [server.address]):
        await until(lambda: engine.attachments == [True])
        assert engine.welcomes[0].report_interval_tokens == 4
        engine.generate(16)
        await until(lambda: engine.states["job-1"].pipeline == "kivi(bits=4)")
        await until(lambda: (state := state_at(server)) is not None and state.pipeline == "kivi(bits=4)")
        assert server.steering is not None
        assert server.steering.live("job-1")[1].sent is None
    assert engine.attachments == [True, False]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ProblemError(8, "the device tier is full"), "the device tier is full"),
        (RuntimeError("a bug"), "the worker failed: RuntimeError('a bug')"),
    ],
)
async def test_refusals_and_failures_become_nacks(error: Exception, words: str) -> None:
    engine = BookkeepingEngine(request_state(generated_tokens=0))
    engine.refuse_with = error
    async with controller() as server, attached(engine, [server.address]):
        engine.generate(16)
        await until(lambda: state_at(server) is not None)
        assert server.steering is not None
        _, live = server.steering.live("job-1")
        await until(lambda: live.decision is not None and live.decision.refusal == words)
        assert live.state.pipeline == "full"


async def test_a_restarted_controller_is_found_again_and_goes_on_above_the_epochs() -> None:
    port = free_port()
    engine = BookkeepingEngine(request_state(generated_tokens=0))
    async with attached(engine, [f"127.0.0.1:{port}"]):
        async with controller(listen=f"127.0.0.1:{port}"):
            engine.generate(16)
            await until(lambda: engine.states["job-1"].epoch == 1)
        await until(lambda: engine.attachments == [True, False])
        engine.generate(16)  # with nobody there: kept, newest wins
        engine.generate(32)
        async with controller(listen=f"127.0.0.1:{port}") as second:
            await until(lambda: engine.attachments == [True, False, True])
            await until(lambda: (state := state_at(second)) is not None and state.generated_tokens == 64)
            engine.states["job-2"] = request_state("job-2", generated_tokens=0)
            engine.states["job-1"].pipeline = "full"  # so that there is something to order again
            engine.generate(32)
            await until(lambda: engine.states["job-2"].epoch == 1)
            await until(lambda: engine.states["job-1"].epoch == 2)
    assert [one.epoch for one in engine.directives if one.request_id == "job-1"] == [1, 2]
    assert len({one.nonce for one in engine.directives}) == 3


async def test_the_next_target_is_tried_when_one_is_down() -> None:
    engine = BookkeepingEngine()
    async with controller() as server, attached(engine, [f"127.0.0.1:{free_port()}", server.address]):
        await until(lambda: engine.attachments == [True])


async def test_a_silent_controller_is_given_up() -> None:
    class Silent(policy_pb2_grpc.SteeringServiceServicer):
        async def Steer(self, request_iterator: object, context: grpc.aio.ServicerContext) -> None:  # noqa: N802
            await asyncio.Event().wait()

    silent = grpc.aio.server()
    policy_pb2_grpc.add_SteeringServiceServicer_to_server(Silent(), silent)
    port = silent.add_insecure_port("127.0.0.1:0")
    await silent.start()
    engine = BookkeepingEngine()
    settings = SteeringSettings(reconnect_min_ms=1, reconnect_max_ms=1, welcome_timeout_ms=50)
    async with controller() as server, attached(engine, [f"127.0.0.1:{port}", server.address], settings):
        await until(lambda: engine.attachments == [True])
    await silent.stop(0)


async def test_a_second_worker_of_the_same_name_takes_over() -> None:
    older, newer = BookkeepingEngine(), BookkeepingEngine()
    async with controller() as server, attached(older, [server.address], SteeringSettings(reconnect_min_ms=60_000)):
        await until(lambda: older.attachments == [True])
        async with attached(newer, [server.address]):
            await until(lambda: older.attachments == [True, False])
            await until(lambda: newer.attachments == [True])


async def test_a_sender_that_fails_is_seen_and_the_stream_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    class FailsOnce(ReportBox):
        def take(self) -> policy_pb2.Report | None:
            if self._news and not failures:
                failures.append(True)
                raise RuntimeError("nobody foresaw this")
            return super().take()

    failures: list[bool] = []
    monkeypatch.setattr("workers.steering.ReportBox", FailsOnce)
    engine = BookkeepingEngine(request_state(generated_tokens=0))
    with capture_logs() as logs:
        async with controller() as server, attached(engine, [server.address]):
            await until(lambda: engine.attachments == [True])
            engine.generate(16)
            await until(lambda: engine.attachments == [True, False, True])
            await until(lambda: state_at(server) is not None)
    [seen] = [entry for entry in logs if entry.get("exc_info")]
    assert seen["event"] == "steering failed; the stream is made anew"


async def test_no_targets_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        SteeringClient(BookkeepingEngine(), [])


# --- the box ----------------------------------------------------------------------------------------------------------


def report(*states: policy_pb2.RequestState, ended: Sequence[str] = (), device: float = 0.1) -> policy_pb2.Report:
    return policy_pb2.Report(worker=worker_state(device), requests=states, ended_request_ids=ended)


def test_the_newest_state_of_a_request_wins() -> None:
    box = ReportBox()
    box.put(report(request_state(generated_tokens=16), request_state("job-2"), device=0.1))
    box.put(report(request_state(generated_tokens=32), device=0.2))
    taken = box.take()
    assert taken is not None
    assert {one.request_id: one.generated_tokens for one in taken.requests} == {"job-1": 32, "job-2": 16}
    assert taken.worker == worker_state(0.2)
    assert box.take() is None


def test_measured_signals_survive_a_report_without_any() -> None:
    box = ReportBox()
    silent = request_state(generated_tokens=16, far_mass=())
    box.put(report(request_state(generated_tokens=16)))
    box.put(report(silent))
    taken = box.take()
    assert taken is not None
    assert taken.requests[0].signals.steps == 16
    assert not silent.HasField("signals")  # the engine's own message is left as it was


def test_ended_requests_leave_no_state_behind() -> None:
    box = ReportBox()
    box.restart(hello())
    box.put(report(request_state()))
    box.put(report(ended=["job-1"]))
    taken = box.take()
    assert taken is not None
    assert (list(taken.requests), list(taken.ended_request_ids)) == ([], ["job-1"])


def test_a_new_stream_begins_with_what_is_alive_and_current() -> None:
    box = ReportBox()
    box.put(report(request_state("gone"), request_state("current", epoch=2), request_state("outdated", epoch=1)))
    box.take()
    box.restart(hello(epochs={"current": 2, "outdated": 3}))
    taken = box.take()
    assert taken is not None
    assert [state.request_id for state in taken.requests] == ["current"]
    assert not taken.ended_request_ids


def ended_in(box: ReportBox) -> list[str]:
    taken = box.take()
    return list(taken.ended_request_ids) if taken is not None else []


def test_what_ends_without_a_stream_is_not_kept() -> None:
    box = ReportBox()
    for number in range(3):
        box.put(report(ended=[f"before-{number}"]))
    assert ended_in(box) == []
    box.restart(hello())
    box.put(report(ended=["told"]))
    assert ended_in(box) == ["told"]
    box.put(report(ended=["as it was lost"]))
    box.stop()
    box.put(report(ended=["after"]))
    assert ended_in(box) == []


def test_what_ends_behind_hello_is_told_on_the_new_stream_whatever_the_old_one_was_told() -> None:
    box = ReportBox()
    box.restart(hello())
    box.offer(hello(epochs={"ends too early": 0}))  # of a stream that was not to be had
    box.put(report(ended=["ends too early"]))
    offered = hello(epochs={"ends": 1, "stays": 0, "comes back": 0})
    box.offer(offered)
    box.put(report(ended=["ends", "comes back", "unnamed"]))
    assert ended_in(box) == ["ends too early", "ends", "comes back", "unnamed"]
    box.put(report(request_state("comes back")))
    box.restart(offered)
    assert ended_in(box) == ["ends"]
    box.restart(offered)
    assert ended_in(box) == []
