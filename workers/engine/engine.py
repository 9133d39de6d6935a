"""The engine: one thread that owns the device and runs the step loop for all requests of a worker."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Ids
from concurrent.futures import Future

import numba
import structlog
import torch

from kernels.layout import BLOCK_TOKENS, Format
from kvpilot.pipeline import PipelineError
from kvpilot.v1 import common_pb2, generation_pb2, job_pb2, policy_pb2
from models.features import FeatureBuilder
from workers.cache.disk import DiskCounts, DiskStore
from workers.cache.kvcache import KVCache
from workers.cache.sequence_cache import Occasion
from workers.cache.sessions import ParkedSessions
from workers.cache.staging import DamagedCacheError
from workers.engine import events
from workers.engine.api import Event
from workers.engine.attention import cache_shape
from workers.engine.audit import Auditor
from workers.engine.bandwidth import measure_bandwidths
from workers.engine.catalyst import catalyst
from workers.engine.description import describe_worker
from workers.engine.intake import Intake, Limits
from workers.engine.keeping import Keeper
from workers.engine.lending import SLOTS as LENDING_SLOTS
from workers.engine.lending import Lending, weights_to_lend
from workers.engine.memory import EngineMemory
from workers.engine.pace import Pace
from workers.engine.repeating import Repeater, Words, is_missing
from workers.engine.replay import SLOTS as REPLAY_SLOTS
from workers.engine.replay import Replay, Replayer
from workers.engine.reports import Reporter
from workers.engine.runner import LoadedModel, ModelRunner, load_model
from workers.engine.sampler import Choice, SampleRequest, sample
from workers.engine.scheduler import Scheduler
from workers.engine.sequence import Phase, Sequence
from workers.engine.switching import Switching
from workers.errors import (
    FAILED_PRECONDITION,
    RESOURCE_EXHAUSTED,
    ProblemError,
)
from workers.profile.profile import names_of
from workers.settings import ModelDtype, WorkerSettings
from workers.signals import warm_up as warm_up_signals
from workers.stages.base import Pipeline
from workers.stages.registry import build

IDLE_POLL_S = 0.5
PARKING_SLOTS = 1

log = structlog.get_logger(__name__)


class Engine:
    """A worker's engine; see ``workers.engine.api`` for what other threads may call.

    Args:
        settings: the worker's settings.
        loaded: a model already in memory, instead of ``settings.model``.

    Raises:
        ValueError: for a model or default pipeline that cannot be served.
        OSError: for a folder that holds no model.
    """

    def __init__(self, settings: WorkerSettings, loaded: LoadedModel | None = None) -> None:
        device = torch.device(settings.device)
        if settings.threads:
            torch.set_num_threads(settings.threads)
            numba.set_num_threads(min(settings.threads, numba.get_num_threads()))
        self._settings = settings
        self._loaded = loaded or load_model(settings.model, settings.served_name, device, _dtype(settings))
        self.shape = cache_shape(self._loaded.model.config, next(self._loaded.model.parameters()).dtype)
        self._context_tokens = min(
            self._loaded.context_tokens, settings.max_context_tokens or self._loaded.context_tokens
        )
        self._disk = _open_disk(settings)
        weights = weights_to_lend(self._loaded.model, settings.lendable_layers)
        self.cache = KVCache(
            self.shape,
            settings.device_budget_bytes,
            settings.host_budget_bytes,
            settings.max_running + REPLAY_SLOTS + PARKING_SLOTS + 1,  # one for what is fed again
            self._context_tokens,
            self._loaded.name,
            device,
            settings.kernel_backend.value,
            self._loaded.profile,
            self._disk,
            [layer.nbytes for layer in weights[LENDING_SLOTS:]],
        )
        self._lending = Lending(weights, self.cache)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.sessions = ParkedSessions(
            self.cache,
            self._disk,
            settings.session_host_s,
            settings.session_keep_s,
            lambda: self._commands.put(lambda: None),
        )
        if self.cache.disk:
            self.cache.disk.make_room = self.sessions.give_up_disk
        self._restoring: list[Sequence] = []
        self.cache.backend.warm_up()
        warm_up_signals(self.shape)
        self._runner = ModelRunner(self._loaded, self.cache)
        profiled = names_of(self._loaded.profile)
        default = build(settings.default_pipeline, self.shape, profiled)
        if reason := self.cache.refuses(default):
            raise ValueError(f"default_pipeline {default.text!r}: {reason}")
        self._intake = Intake(self._loaded, self.shape, self._limits(), default, self.cache.refuses)
        self._repeater = Repeater(self.cache, self._runner, Words.of(self._loaded), self._context_tokens)
        self.cache.catalyse = catalyst(self._runner, self._loaded, self._context_tokens)
        if reason := self._repeater.refusal(default, 1):
            raise ValueError(f"default_pipeline {settings.default_pipeline!r}: {reason}")
        self._memory = EngineMemory(
            self.cache,
            lambda: list(self._scheduler.running),
            lambda seq, pipeline, reason: self._switching.for_pressure(seq, pipeline, reason),
            lambda: self._replayer.give_way() or self._switching.hurry() or self._repeater.give_way(),
            self.sessions,
            self._lending,
        )
        self._scheduler = Scheduler(self._memory, settings.step_tokens, settings.max_running)
        self._bandwidths = measure_bandwidths(self.cache)
        self._reporter = Reporter(self.cache, settings.report_interval_tokens)
        self._reporter.sessions = self.sessions
        self._reporter.note_memory = self._note_memory
        self._pace = Pace(settings.switch_step_share, settings.switch_least_blocks, self.shape.block_bytes(Format.RAW))
        self._switching = Switching(
            self.cache,
            self._reporter,
            self._pace,
            self._repeater,
            lambda seq, switch: self._emit(seq, switch=switch),
        )
        self._keeper = Keeper(self.cache, self._memory, self._switching, self._repeater)
        self._auditor = Auditor(
            self.cache,
            self._runner,
            self._reporter,
            settings.audit_every_tokens,
            settings.audit_tokens,
            settings.audit_budget,
        )
        self._replayer = Replayer(
            self.cache,
            self._runner,
            FeatureBuilder.of(self._description()),
            settings.step_tokens,
            lambda replay, **event: self._emit(replay, **event),
            self._replayed,
            self._repeater.words,
            self._context_tokens,
        )
        self._live: dict[str, Sequence] = {}
        self._replays: dict[str, Replay] = {}
        self._lock = threading.Lock()  # guards _live, which other threads read
        self._events: list[Event] = []
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._on_events: Callable[[list[Event]], None] = lambda events: None
        self._on_report: Callable[[policy_pb2.Report], None] = lambda report: None

    def _note_memory(self, state: policy_pb2.WorkerState) -> None:
        """Adds to a report what relief of pressure has done."""
        state.evacuations, state.lent_layers = self._memory.evacuations, self._lending.lent

    def _limits(self) -> Limits:
        row_bytes = self.cache.worst_bytes(1)
        return Limits(
            context_tokens=self._context_tokens,
            capacity_bytes=self.cache.capacity_bytes(),
            bytes_per_token=row_bytes // BLOCK_TOKENS,
        )

    # -- called from other threads -------------------------------------------------------------------------------------

    def start(
        self,
        on_events: Callable[[list[Event]], None],
        on_report: Callable[[policy_pb2.Report], None],
        on_death: Callable[[BaseException], None],
    ) -> None:
        """See EngineApi."""
        self._on_events, self._on_report = on_events, on_report

        def run() -> None:
            try:
                self._run()
            except BaseException as error:
                log.exception("engine died")
                on_death(error)

        self._thread = threading.Thread(target=run, name="engine", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """See EngineApi."""
        self._stopping = True
        self._commands.put(lambda: None)
        if self._thread:
            self._thread.join(timeout_s)
        if self._disk and not (self._thread and self._thread.is_alive()):
            self._disk.close()
        if not (self._thread and self._thread.is_alive()):
            self._lending.close()
        log.info("blocks moved", **self.cache.recalls.summary())

    def submit(self, job: job_pb2.Job, emitted: Ids[int] = (), measured: int = 0) -> None:
        """See EngineApi."""
        if job.request.HasField("replay"):
            replay = self._intake.read_replay(job, measured)
            with self._lock:
                self._check_new(job.job_id)
                self._replays[job.job_id] = replay
            self._commands.put(lambda: self._add_replay(replay))
            return
        seq = self._intake.read(job, emitted)
        with self._lock:
            self._check_new(seq.job_id)
            self._live[seq.job_id] = seq
        self._commands.put(lambda: self._add(seq))

    def _check_new(self, job_id: str) -> None:
        if job_id in self._live or job_id in self._replays:
            raise ProblemError(FAILED_PRECONDITION, f"job {job_id} is already here")

    def cancel(self, job_id: str) -> None:
        """See EngineApi."""
        self._commands.put(lambda: self._cancel(job_id))

    def direct(self, directive: policy_pb2.Directive) -> Future[policy_pb2.Ack]:
        """See EngineApi."""
        answer: Future[policy_pb2.Ack] = Future()

        def carry_out() -> None:
            if not answer.set_running_or_notify_cancel():
                return  # nobody waits for it any more: the stream it came by is lost
            try:
                self._switching.direct(directive, self._live.get(directive.request_id), answer)
            except Exception as error:
                answer.set_exception(error)

        self._commands.put(carry_out)
        return answer

    def free_slots(self) -> int:
        """See EngineApi."""
        with self._lock:
            return self._settings.max_running - len(self._live) - len(self._replays)

    def live_jobs(self) -> list[str]:
        """See EngineApi."""
        with self._lock:
            return [*self._live, *self._replays]

    def hello(self) -> policy_pb2.Hello:
        """See EngineApi."""
        hello = self._description()
        with self._lock:
            for seq in self._live.values():
                hello.epochs.add(request_id=seq.job_id, epoch=seq.epoch)
        return hello

    def _description(self) -> policy_pb2.Hello:
        default, limits = self._intake.default_pipeline, self._limits()
        return describe_worker(self._settings.name, self._loaded, self.cache, limits, default, self._bandwidths)

    @property
    def disk_counts(self) -> DiskCounts | None:
        """What the disk tier has written and read so far; None: there is none."""
        return self._disk.counts if self._disk else None

    def forget_prefixes(self) -> None:
        """Drops published prefixes that nobody uses, before the next step: for measurements of what is without them."""

        def drop() -> None:
            self.cache.prefixes.drop(self.cache.device.budget_bytes)

        self._commands.put(drop)

    def configure(self, welcome: policy_pb2.Welcome) -> None:
        """See EngineApi. An unknown default pipeline is refused with a log line; the worker's own stays."""
        if welcome.report_interval_tokens:
            self._reporter.interval_tokens = welcome.report_interval_tokens
        if welcome.default_pipeline:
            try:
                default = build(welcome.default_pipeline, self.shape, names_of(self._loaded.profile))
                if reason := self.cache.refuses(default):
                    raise PipelineError(reason)
                self._intake.default_pipeline = default
            except PipelineError as error:
                log.error("controller's default pipeline refused", pipeline=welcome.default_pipeline, why=str(error))

    def steered(self, connected: bool) -> None:
        """See EngineApi."""
        self._memory.steered = connected

    # -- the step loop -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping:
            if not self.step():
                try:
                    self._commands.get(timeout=IDLE_POLL_S)()
                except queue.Empty:
                    continue

    def step(self) -> bool:
        """Carries out waiting commands, a slice of a switch and one step. False: there was nothing to compute."""
        self._drain_commands()
        self._restore()
        self._switching.advance()
        self._drop_damaged()
        self._memory.balance(self._scheduler.waiting_for_memory)
        began = time.monotonic()
        step = self._scheduler.schedule()
        for seq in step.preempted:
            self._repeater.drop(seq)
            self._reporter.preempted(seq)
        for seq in step.stuck:
            self._fail_stuck(seq)
        tokens = 0
        if step.decode:
            self._decode(step.decode)
            tokens = len(step.decode)
        for seq, count in step.repeat:
            self._repeat(seq, count)
        for seq, count in step.prefill:
            self._prefill(seq, count)
        if not step.empty:
            self._reporter.stepped(tokens, time.monotonic() - began)
        worked = not step.empty or bool(step.stuck) or self._replay() or self.sessions.parking
        self._flush()
        return worked

    def _drop_damaged(self) -> None:
        """Has requests whose blocks on disk are damaged beyond repair begin again from their tokens."""
        for seq in [seq for seq in self._scheduler.running if seq.cache and seq.cache.damaged]:
            log.warning("blocks on disk are damaged; computing the request's tokens again", **seq.ids)
            self._scheduler.preempt(seq)
            self._reporter.preempted(seq)

    def _restore(self) -> None:
        """Goes on with what sessions have under way, and queues the requests whose session is back from disk."""
        self.sessions.tick()
        for seq in [seq for seq in self._restoring if seq.session and not self.sessions.fetching(seq.session)]:
            self._restoring.remove(seq)
            self._scheduler.add(seq)

    def _replay(self) -> bool:
        """A piece of a replay, in a moment when no request can be served. False: there is nothing to do."""
        if self._scheduler.waiting:  # for memory that a replay may hold
            return self._replayer.give_way()
        return self._replayer.step()

    def _add_replay(self, replay: Replay) -> None:
        started = generation_pb2.Started(
            worker=self._settings.name, pipeline=Pipeline().text, prompt_tokens=len(replay.token_ids)
        )
        self._emit(replay, started=started)
        self._replayer.add(replay)

    def _replayed(self, replay: Replay) -> None:
        with self._lock:
            del self._replays[replay.job_id]

    def _drain_commands(self) -> None:
        while True:
            try:
                self._commands.get_nowait()()
            except queue.Empty:
                return

    def _decode(self, sequences: list[Sequence]) -> None:
        caches = [seq.cache for seq in sequences if seq.cache]
        rows = {seq.job_id: row for row, seq in enumerate(sequences)}
        began = time.monotonic()
        logits, plan = self._runner.decode(caches, [seq.token_ids[-1] for seq in sequences])
        decode_ms = (time.monotonic() - began) * 1e3
        self._reporter.decode_steps += 1
        self._reporter.decode_ms += decode_ms
        self._pace.stepped(decode_ms)
        sequences = [seq for seq in sequences if seq.cache and not seq.cache.damaged]
        if len(sequences) < len(caches):
            logits = logits[[row for row, cache in enumerate(caches) if not cache.damaged]]
        self._auditor.decoded(sequences, logits, decode_ms)
        for seq in sequences:
            seq.computed += 1
            self._reporter.decoded(seq, plan, rows[seq.job_id])
        for seq, choice in zip(sequences, self._sample(logits, sequences), strict=True):
            self._take_token(seq, choice)
        self._hand_out()
        for seq in sequences:
            if seq.cache and seq.cache.seen % BLOCK_TOKENS == 0 and not self._switching.prepares(seq):
                self._keeper.settle(seq)
        self._drop_damaged()

    def _prefill(self, seq: Sequence, count: int) -> None:
        assert seq.cache is not None
        evictor = seq.pipeline.evictor
        pot = evictor if evictor and evictor.evicts_while_prefilling else None
        all_queries = bool(evictor and evictor.needs_prompt_mass)
        end, rows_end = seq.computed + count, len(seq.token_ids) // BLOCK_TOKENS * BLOCK_TOKENS
        full = pot is not None and pot.next_eviction(seq.computed) == end
        self.cache.note_inputs(seq.cache, seq.pipeline)
        try:
            if all_queries and seq.session and seq.computed < rows_end <= end:
                chunk = seq.token_ids[seq.computed : rows_end]
                logits = self._runner.prefill(seq.cache, chunk, len(seq.token_ids), all_queries)
                self.cache.note_row_mass(seq.cache)
                seq.computed = rows_end
            if seq.computed < end:
                chunk = seq.token_ids[seq.computed : end]
                following = seq.token_ids[seq.computed + 1 : end + 1] if pot else ()
                logits = self._runner.prefill(seq.cache, chunk, len(seq.token_ids), all_queries, following)
                seq.computed = end
            if full:
                self._keeper.boil_down(seq)
        except DamagedCacheError:
            self._drop_damaged()
            return
        if seq.to_compute:
            if not (seq.pipeline.moves_nothing or pot):
                self._memory.evacuate(seq)
            return
        self.cache.publish(seq.cache, seq.token_ids[: seq.computed])
        if not (seq.pipeline.moves_nothing or pot):
            self._memory.evacuate(seq)
        if self._repeater.begin(seq, seq.pipeline):
            seq.phase = Phase.REPEAT
        else:
            self._begin_decoding(seq)
        self._take_token(seq, self._sample(logits, [seq])[0])
        self._hand_out()

    def _repeat(self, seq: Sequence, count: int) -> None:
        """Feeds the next tokens of a text that the model repeats; behind a prompt's last ones its pipeline follows."""
        waits = seq.phase is Phase.REPEAT
        assert seq.cache is not None
        if waits and not is_missing(seq.cache, seq.pipeline):  # another pipeline was ordered meanwhile
            self._repeater.drop(seq)
        else:
            self._repeater.step(seq, count)
        if waits and not seq.to_repeat:
            self._begin_decoding(seq)

    def _begin_decoding(self, seq: Sequence) -> None:
        seq.phase = Phase.DECODE
        seq.settled = self._keeper.apply(seq, Occasion.PROMPT)
        self._reporter.changed(seq)

    def _sample(self, logits: torch.Tensor, sequences: list[Sequence]) -> list[Choice]:
        requests = [SampleRequest(seq.sampling, seq.token_ids, seq.generated, seq.top_logprobs) for seq in sequences]
        return sample(logits, requests)

    def _take_token(self, seq: Sequence, choice: Choice) -> None:
        index = seq.generated
        seq.token_ids.append(choice.token_id)
        now_ns = time.time_ns()
        now = now_ns / 1e9
        seq.first_token_time_s = seq.first_token_time_s or now
        seq.last_token_time_s = now
        self._reporter.chose(seq, choice)
        if seq.cache:
            seq.cache.note_surprises(len(seq.token_ids) - 1, [choice.surprise])
        text = ""
        if seq.text and choice.token_id not in seq.stop_token_ids:
            text = seq.text.add(choice.token_id)
        reason = self._finish_reason(seq)
        if reason and seq.text:
            text += seq.text.finish()
        tokens = generation_pb2.Tokens(
            first_index=index, tokens=[events.token(choice)], text=text, sampled_unix_ns=now_ns
        )
        self._emit(seq, tokens=tokens)
        if reason:
            self._finish(seq, reason)

    def _finish_reason(self, seq: Sequence) -> generation_pb2.FinishReason:
        if seq.generated and seq.token_ids[-1] in seq.stop_token_ids:
            return generation_pb2.FINISH_REASON_STOP_TOKEN
        if seq.text and seq.text.stopped:
            return generation_pb2.FINISH_REASON_STOP_STRING
        if seq.generated >= seq.max_tokens:
            return generation_pb2.FINISH_REASON_LENGTH
        return generation_pb2.FINISH_REASON_UNSPECIFIED

    # -- life of a request ---------------------------------------------------------------------------------------------

    def _add(self, seq: Sequence) -> None:
        seq.admit_time_s = time.time()
        self._reporter.started(seq)
        self._emit(
            seq,
            started=generation_pb2.Started(
                worker=self._settings.name, pipeline=seq.pipeline.text, prompt_tokens=seq.prompt_tokens
            ),
        )
        if reason := self._finish_reason(seq):  # an earlier worker delivered the last token, but not the end
            self._finish(seq, reason)
        elif self._memory.fetch(seq):
            self._restoring.append(seq)
        else:
            self._scheduler.add(seq)

    def _cancel(self, job_id: str) -> None:
        seq = self._live.get(job_id)
        if seq:
            self._finish(seq, generation_pb2.FINISH_REASON_CANCELLED)
        else:
            self._replayer.cancel(job_id)

    def _fail_stuck(self, seq: Sequence) -> None:
        seq.problem = common_pb2.Problem(
            code=RESOURCE_EXHAUSTED,
            message=f"at {len(seq.token_ids)} tokens neither the device nor the host tier has room for more, though no"
            " other request runs",
        )
        self._finish(seq, generation_pb2.FINISH_REASON_FAILED)

    def _finish(self, seq: Sequence, reason: generation_pb2.FinishReason) -> None:
        self._switching.ended(seq)
        self._repeater.drop(seq)
        cache_bytes = self._reporter.cache_bytes(seq)
        if seq.cache:
            self.cache.publish(seq.cache, seq.token_ids[: seq.computed])
            if seq.session and reason != generation_pb2.FINISH_REASON_FAILED and self._settings.session_keep_s:
                self.sessions.park(seq.session, seq.token_ids, seq.cache)
            else:
                self.cache.close(seq.cache)
            seq.cache = None
        if seq in self._restoring:
            self._restoring.remove(seq)
        self._scheduler.remove(seq)
        self._reporter.ended(seq)
        if seq.text and (rest := seq.text.finish()):
            self._emit(seq, tokens=generation_pb2.Tokens(first_index=seq.generated, text=rest))
        self._emit(seq, finished=events.finished(seq, reason, cache_bytes))
        with self._lock:
            del self._live[seq.job_id]

    def _emit(self, seq: Sequence | Replay, **event: object) -> None:
        self._events.append((seq.job_id, generation_pb2.GenerationEvent(**event)))  # type: ignore[arg-type]

    def _hand_out(self) -> None:
        """Gives events out before the step is over: what else it has to do, prompts and upkeep, may take long.

        Those of requests that have ended wait for the step's report, which their outcome keeps.
        """
        ended = {job_id for job_id, event in self._events if event.HasField("finished")}
        ready = [one for one in self._events if one[0] not in ended]
        if ready:
            self._events = [one for one in self._events if one[0] in ended]
            self._on_events(ready)

    def _flush(self) -> None:
        if self._events:
            events, self._events = self._events, []
            self._on_events(events)
        with self._lock:
            live = dict(self._live)
        scheduler = self._scheduler
        if report := self._reporter.take(live, len(scheduler.running), scheduler.waiting_for_memory):
            self._on_report(report)


def _open_disk(settings: WorkerSettings) -> DiskStore | None:
    if not settings.disk_budget_bytes:
        return None
    try:
        return DiskStore(settings.disk_folder, settings.disk_budget_bytes)
    except OSError as error:
        raise ValueError(
            f"disk_folder {str(settings.disk_folder)!r}: {error.strerror or error}; a folder that can be written to is"
            " needed, or disk_budget_bytes = 0 for no disk tier"
        ) from error


def _dtype(settings: WorkerSettings) -> torch.dtype:
    if settings.dtype is not ModelDtype.AUTO:
        return getattr(torch, settings.dtype.value)  # type: ignore[no-any-return]
    return torch.float32 if settings.device == "cpu" else torch.bfloat16
