"""Reports to the controller: which requests have news, and the worker's load."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator

from kernels.api import DecodePlan
from kernels.layout import Tier
from kvpilot.v1 import common_pb2, policy_pb2
from workers.cache.kvcache import KVCache
from workers.cache.sessions import ParkedSessions
from workers.engine.sampler import Choice
from workers.engine.sequence import Phase, Sequence
from workers.signals import SignalMeter
from workers.stages.registry import loss_class_proto

RATE_WINDOW_S = 1.0
FORMATS_EVERY_S = 1.0


class Reporter:
    """Collects signals and says when a report is due.

    Args:
        cache: the worker's cache.
        interval_tokens: tokens a request generates between two reports.
    """

    def __init__(self, cache: KVCache, interval_tokens: int) -> None:
        self._cache = cache
        self.interval_tokens = interval_tokens
        self._meters: dict[str, SignalMeter] = {}
        self._reported: dict[str, int] = {}  # generated tokens at a request's last report
        self._audits: dict[str, list[policy_pb2.Audit]] = {}  # since a request's last report
        self._news: set[str] = set()
        self._ended: list[str] = []
        self._sequence_number = 0
        self._token_times: deque[tuple[float, int]] = deque()
        self.step_ms = 0.0
        self.preemptions = self.decode_steps = 0
        self.audits = self.audits_skipped = 0
        self.audit_ms = self.signal_ms = self.decode_ms = 0.0
        self.sessions: ParkedSessions | None = None
        self.note_memory: Callable[[policy_pb2.WorkerState], None] = lambda state: None
        """Adds what relief of pressure has done."""
        self._preempted: list[str] = []
        self._formats: list[policy_pb2.FormatUse] = []
        self._formats_due_s = 0.0

    def started(self, seq: Sequence) -> None:
        """A request was admitted."""
        self._meters[seq.job_id] = SignalMeter(seq.token_ids)
        self._reported[seq.job_id] = seq.generated
        self._news.add(seq.job_id)

    def ended(self, seq: Sequence) -> None:
        """A request is over."""
        self._meters.pop(seq.job_id, None)
        self._reported.pop(seq.job_id, None)
        self._audits.pop(seq.job_id, None)
        self._news.discard(seq.job_id)
        self._ended.append(seq.job_id)

    def preempted(self, seq: Sequence) -> None:
        """A request lost its memory."""
        self.preemptions += 1
        self._preempted.append(seq.job_id)

    def changed(self, seq: Sequence) -> None:
        """A request has news that should not wait for the interval."""
        self._news.add(seq.job_id)

    def decoded(self, seq: Sequence, plan: DecodePlan, row: int) -> None:
        """A request took part in a decode step."""
        with self._measured():
            self._meters[seq.job_id].note_attention(plan, row, self._cache.tables)

    def chose(self, seq: Sequence, choice: Choice) -> None:
        """A request got its next token."""
        with self._measured():
            meter = self._meters[seq.job_id]
            meter.note_choice(choice.token_id, choice.entropy, choice.top1_probability, choice.surprise)

    def audited(self, seq: Sequence, audit: policy_pb2.Audit) -> None:
        """A step of a request was audited; its next report tells."""
        self._audits.setdefault(seq.job_id, []).append(audit)
        self.audits += 1
        self.audit_ms += audit.cost_ms

    @contextlib.contextmanager
    def _measured(self) -> Iterator[None]:
        """Counts what is done within as time spent on signals."""
        began = time.perf_counter()
        yield
        self.signal_ms += (time.perf_counter() - began) * 1e3

    def stepped(self, tokens: int, duration_s: float) -> None:
        """A step is over."""
        now = time.monotonic()
        self.step_ms = duration_s * 1e3
        self._token_times.append((now, tokens))
        while self._token_times and self._token_times[0][0] < now - RATE_WINDOW_S:
            self._token_times.popleft()

    def take(self, live: dict[str, Sequence], running: int, waiting: int) -> policy_pb2.Report | None:
        """A report of everything new, or None where nothing is.

        A request for which half an interval has passed is told of with one that is due. So requests that decode
        together come to be reported together, and a controller plans once for all of them.
        """
        passed = {job_id: seq.generated - self._reported.get(job_id, seq.generated) for job_id, seq in live.items()}
        if any(tokens >= self.interval_tokens for tokens in passed.values()):
            self._news |= {job_id for job_id, tokens in passed.items() if tokens >= max(1, self.interval_tokens // 2)}
        has_news = self._news or self._ended or self._preempted or (self.sessions and self.sessions.has_news())
        if not has_news:
            return None
        self._sequence_number += 1
        report = policy_pb2.Report(
            sequence_number=self._sequence_number,
            worker=self.worker_state(running, waiting),
            requests=[self._request_state(live[job_id]) for job_id in sorted(self._news) if job_id in live],
            ended_request_ids=self._ended,
            preempted_request_ids=self._preempted,
        )
        report.time.GetCurrentTime()
        self._news, self._ended, self._preempted = set(), [], []
        return report

    def worker_state(self, running: int, waiting: int) -> policy_pb2.WorkerState:
        """The worker's load now."""
        idle = {  # what gives way at once
            Tier.DEVICE: self._cache.prefixes.unused_bytes(),
            Tier.HOST: self._cache.host.guest_bytes,
            Tier.DISK: self.sessions.disk_bytes if self.sessions else 0,
        }
        state = policy_pb2.WorkerState(
            running=running,
            waiting=waiting,
            tiers=[
                policy_pb2.TierUse(
                    name=tier.tier.name.lower(),
                    used_bytes=tier.used_bytes - idle[tier.tier],
                    budget_bytes=tier.budget_bytes,
                )
                for tier in self._cache.tiers
            ],
            step_ms=self.step_ms,
            tokens_per_s=sum(tokens for _, tokens in self._token_times) / RATE_WINDOW_S,
            preemptions=self.preemptions,
            audits=self.audits,
            audits_skipped=self.audits_skipped,
            audit_ms=self.audit_ms,
            signal_ms=self.signal_ms,
            decode_ms=self.decode_ms,
            sessions=self.sessions.to_proto() if self.sessions else None,
            recalls=self._cache.recalls.to_proto(),
            decode_steps=self.decode_steps,
            disk=self._disk_use(),
            formats=self._format_use(),
        )
        self.note_memory(state)
        return state

    def _disk_use(self) -> policy_pb2.DiskUse | None:
        if self._cache.disk is None:
            return None
        counts = self._cache.disk.store.counts
        return policy_pb2.DiskUse(
            written_bytes=counts.written_bytes,
            read_bytes=counts.read_bytes,
            write_ms=counts.write_s * 1e3,
            read_ms=counts.read_s * 1e3,
            damaged_blocks=counts.corrupt_blocks,
        )

    def _format_use(self) -> list[policy_pb2.FormatUse]:
        """Bytes by tier and format, looked at once a second at most: there may be thousands of lots."""
        now = time.monotonic()
        if now >= self._formats_due_s:
            self._formats_due_s = now + FORMATS_EVERY_S
            self._formats = [
                policy_pb2.FormatUse(tier=tier.tier.name.lower(), format=name, bytes=nbytes)
                for tier in self._cache.tiers
                for name, nbytes in sorted(tier.bytes_by_format().items())
            ]
        return self._formats

    def _request_state(self, seq: Sequence) -> policy_pb2.RequestState:
        self._reported[seq.job_id] = seq.generated
        meter = self._meters[seq.job_id]
        if seq.cache and seq.phase is Phase.DECODE:
            with self._measured():
                self._cache.settle(seq.cache)
                meter.note_votes(self._cache.tables, seq.cache.slot, seq.cache.seen)
        state = policy_pb2.RequestState(
            request_id=seq.job_id,
            epoch=seq.epoch,
            session_id=seq.session_id,
            scenario=seq.scenario,
            objective=seq.objective,
            pinned=seq.pinned is not None,
            pipeline=seq.pipeline.text,
            prompt_tokens=seq.prompt_tokens,
            generated_tokens=seq.generated,
            max_tokens=seq.max_tokens,
            signals=meter.take(),
            last_switch=seq.switches[-1] if seq.switches else None,
            prefilling=seq.phase is not Phase.DECODE,
            loss_class=loss_class_proto(seq.pipeline.loss_class),
            prompt=seq.prompt,
            audits=self._audits.pop(seq.job_id, ()),
            trace_id=seq.trace_id,
        )
        if seq.cache:
            lengths = self._cache.tables.length[seq.cache.slot]
            state.kept_tokens = float(lengths.mean())
            state.cache.CopyFrom(self.cache_bytes(seq))
            state.recalls.CopyFrom(seq.cache.recalls.to_proto())
            state.loss_class = loss_class_proto(self._cache.loss_class(seq.cache, seq.pipeline))
        return state

    def cache_bytes(self, seq: Sequence) -> common_pb2.CacheBytes:
        """A request's cache bytes in the API's form."""
        return self._cache.use(seq.cache).to_proto() if seq.cache else common_pb2.CacheBytes()
