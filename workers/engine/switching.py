"""Switches: who may order one, and how it is carried out between decode steps without keeping them waiting.

One that takes no longer than a small share of a decode step (``pace.py``) is made at once. A longer one is prepared, a
slice before each step, and committed when little is left to do; its directive is answered then. Until then the request
keeps its pipeline and epoch, and nothing is lost if the preparation ends otherwise:

- a newer directive replaces it, and the older one is refused with FAILED_PRECONDITION, as one of a stale epoch;
- a deadline_token that passes before the commit refuses it with DEADLINE_EXCEEDED: the work done so far is given up;
- a request that ends takes it along (NOT_FOUND); one that loses its memory begins again with the new pipeline, as one
  does whose prompt is not complete;
- where the evictor asks for a text that the model has repeated (``repeating.py``), that comes first, in pieces of the
  step's token budget; without room for it the directive is refused with RESOURCE_EXHAUSTED;
- one whose blocks turn out to be damaged on disk begins again with the pipeline it had (ABORTED);
- where a tier has no room beside the blocks in force, or where others need memory, the rest is done at once, on the
  memory that it gives back; where even that does not fit, it is refused with RESOURCE_EXHAUSTED.

Directives are prepared one at a time, in the order in which they came, so that a step carries one slice at most.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import structlog

from kvpilot.pipeline import PipelineError
from kvpilot.v1 import common_pb2, policy_pb2
from workers.cache.arena import TierFullError
from workers.cache.kvcache import KVCache
from workers.cache.sequence_cache import Occasion
from workers.cache.staging import DamagedCacheError
from workers.engine.pace import Pace
from workers.engine.repeating import Repeater, is_behind, is_missing
from workers.engine.reports import Reporter
from workers.engine.sequence import Phase, Sequence
from workers.errors import (
    ABORTED,
    DEADLINE_EXCEEDED,
    FAILED_PRECONDITION,
    INVALID_ARGUMENT,
    NOT_FOUND,
    RESOURCE_EXHAUSTED,
    ProblemError,
)
from workers.profile.profile import names_of
from workers.stages.base import LossClass, Pipeline
from workers.stages.registry import build

log = structlog.get_logger(__name__)


@dataclass
class Order:
    """A directive that was accepted and is not carried out yet."""

    directive: policy_pb2.Directive
    seq: Sequence
    pipeline: Pipeline
    answer: Future[policy_pb2.Ack]
    before: common_pb2.CacheBytes
    slices: int = 0
    repeated: int = -1
    """Tokens whose reconstruction was there when the model was last asked to repeat the text."""
    pause_ms: float = 0.0
    """What it has delayed the next step by."""
    longest_pause_ms: float = 0.0

    def stepped(self) -> None:
        """The next step begins."""
        self.longest_pause_ms = max(self.longest_pause_ms, self.pause_ms)
        self.pause_ms = 0.0


@dataclass(frozen=True)
class _Why:
    """Why a switch is made, and by whom."""

    reason: str
    orderer: common_pb2.Orderer
    cause: common_pb2.Cause


class Switching:
    """Changes the pipelines of one worker's requests.

    Args:
        cache: the worker's cache.
        reporter: is told each change.
        pace: how much may be done between two steps.
        repeater: has the model repeat texts for evictors that ask for it.
        emit: sends a request's client an event.
    """

    def __init__(
        self,
        cache: KVCache,
        reporter: Reporter,
        pace: Pace,
        repeater: Repeater,
        emit: Callable[[Sequence, common_pb2.Switch], None],
    ) -> None:
        self._cache = cache
        self._reporter = reporter
        self._pace = pace
        self._repeater = repeater
        self._emit = emit
        self._orders: dict[str, Order] = {}  # by job, in the order in which they came; the first is being prepared

    # -- directives ----------------------------------------------------------------------------------------------------

    def direct(self, directive: policy_pb2.Directive, seq: Sequence | None, answer: Future[policy_pb2.Ack]) -> None:
        """Carries out a directive for ``seq``, now or over the next steps; ``answer`` is set when it is.

        Raises:
            ProblemError: it is refused; nothing has changed, and ``answer`` is not set.
        """
        if seq is None:
            raise ProblemError(NOT_FOUND, f"request {directive.request_id!r} is not live on this worker")
        older = self._orders.get(seq.job_id)
        epoch = older.directive.epoch if older else seq.epoch
        if directive.epoch <= epoch:
            raise ProblemError(
                FAILED_PRECONDITION, f"epoch {directive.epoch} is stale; the request is at epoch {epoch}"
            )
        _check_deadline(directive, seq)
        pipeline = self._directed_pipeline(seq, directive)
        order = Order(directive, seq, pipeline, answer, older.before if older else self._reporter.cache_bytes(seq))
        if older:
            why = f"superseded by epoch {directive.epoch} while it was prepared"
            self._fail(older, ProblemError(FAILED_PRECONDITION, why))
        if seq.phase is Phase.DECODE and (self._is_behind(order) or not self._fits(order)):
            self._orders[seq.job_id] = order
        else:
            self._conclude(order)

    def _directed_pipeline(self, seq: Sequence, directive: policy_pb2.Directive) -> Pipeline:
        by_operator = directive.ordered_by == common_pb2.ORDERER_OPERATOR
        try:
            pipeline = build(directive.pipeline, self._cache.shape, names_of(self._cache.profile))
        except PipelineError as error:
            raise ProblemError(INVALID_ARGUMENT, str(error), {"pipeline": str(error)}) from None
        if reason := self._cache.refuses(pipeline):
            raise ProblemError(INVALID_ARGUMENT, reason, {"pipeline": reason})
        if not by_operator and seq.pinned:
            raise ProblemError(FAILED_PRECONDITION, f"the client pinned this request to {seq.pinned.text!r}")
        if not by_operator and seq.objective.max_divergence == 0 and pipeline.loss_class is not LossClass.EXACT:
            raise ProblemError(
                FAILED_PRECONDITION,
                f"{pipeline.text!r} is {pipeline.loss_class.name.lower()}; this request is exact only",
            )
        if reason := self._repeater.refusal(pipeline, len(seq.token_ids)):
            raise ProblemError(FAILED_PRECONDITION, reason)
        return pipeline

    def _is_behind(self, order: Order) -> bool:
        """Whether the model must repeat the request's text, or what came since it did, before the switch."""
        return order.seq.cache is not None and is_behind(order.seq.cache, order.pipeline)

    def _repeat(self, order: Order) -> None:
        """Has the text repeated, over the next steps; later again what came meanwhile, if it is much."""
        cache = order.seq.cache
        assert cache is not None
        known = 0 if cache.reconstruction is None else cache.reconstruction.shape[2]
        if known == order.repeated or not self._repeater.begin(order.seq, order.pipeline):
            raise self._no_room_to_repeat(order)
        order.repeated = known

    def _no_room_to_repeat(self, order: Order) -> ProblemError:
        tokens = len(order.seq.token_ids)
        return ProblemError(
            RESOURCE_EXHAUSTED, f"no room to have {tokens} tokens repeated, which {order.pipeline.text!r} asks for"
        )

    def _fits(self, order: Order) -> bool:
        """Whether an order can be carried out before the next step."""
        assert order.seq.cache is not None
        began = time.monotonic()
        self._cache.begin(order.seq.cache, order.pipeline)
        fits = self._pace.fits(self._cache.left_to_prepare(order.seq.cache))
        order.pause_ms += (time.monotonic() - began) * 1e3
        return fits

    # -- between two steps ---------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """Prepares a slice of the first directive under way, or commits it where all is prepared."""
        order = next(iter(self._orders.values()), None)
        if order is None:
            return
        try:
            done = order.seq.phase is not Phase.DECODE or not self._prepare(order)
        except Exception as error:
            self._fail(order, error)
            return
        if done:
            self._conclude(order)

    def _prepare(self, order: Order) -> bool:
        """Builds a slice. False: nothing is left to build ahead, or there is no room to do so."""
        cache = order.seq.cache
        assert cache is not None
        _check_deadline(order.directive, order.seq)
        if order.seq.to_repeat:
            return True
        if self._is_behind(order):
            self._repeat(order)
            return True
        order.longest_pause_ms = max(order.longest_pause_ms, self._repeater.take_pause_ms(order.seq))
        began = time.monotonic()
        self._cache.begin(cache, order.pipeline)
        planned = time.monotonic()
        try:
            piece = self._cache.prepare(cache, self._pace.most)
        except TierFullError:
            piece = None
        ended = time.monotonic()
        order.pause_ms += (ended - began) * 1e3
        if piece is None:
            return False
        self._pace.built(piece, (ended - planned) * 1e3)
        order.slices += 1
        order.stepped()
        return True

    def prepares(self, seq: Sequence) -> bool:
        """Whether a switch of this request is being prepared, so that its blocks should stay where they are."""
        return seq.job_id == next(iter(self._orders), None)

    def hurry(self) -> bool:
        """Ends the preparation under way, whose memory others need, by doing the rest at once. False: there is none."""
        order = next(iter(self._orders.values()), None)
        if order:
            self._conclude(order)
        return order is not None

    def ended(self, seq: Sequence) -> None:
        """A request is over; its cache is about to be closed."""
        if order := self._orders.get(seq.job_id):
            why = f"request {seq.job_id!r} ended while the switch was prepared"
            self._fail(order, ProblemError(NOT_FOUND, why))

    # -- switches ------------------------------------------------------------------------------------------------------

    def for_pressure(
        self,
        seq: Sequence,
        pipeline: Pipeline,
        reason: str,
        cause: common_pb2.Cause = common_pb2.CAUSE_PRESSURE,
    ) -> bool:
        """Moves a decoding request to another pipeline, now, by the worker's own rule. False: there is no room, or the
        model would first have to repeat its text."""
        assert seq.cache is not None
        if is_missing(seq.cache, pipeline):
            return False
        before = self._reporter.cache_bytes(seq)
        try:
            self._apply(seq, pipeline, _Why(reason, common_pb2.ORDERER_WORKER, cause), before)
            return True
        except (TierFullError, DamagedCacheError):
            return False

    def _conclude(self, order: Order) -> None:
        """Carries out what is left of an order and answers it."""
        seq, directive = order.seq, order.directive
        self._orders.pop(seq.job_id, None)
        orderer = directive.ordered_by or common_pb2.ORDERER_CONTROLLER
        why = _Why(directive.reason, orderer, directive.cause)
        try:
            if seq.phase is Phase.DECODE and self._is_behind(order):  # others need the memory that it takes
                raise self._no_room_to_repeat(order)
            if seq.phase is Phase.DECODE:
                switch = self._apply(seq, order.pipeline, why, order.before, order)
            else:
                switch = self._note(seq, order.pipeline, why)
        except TierFullError as full:
            self._fail(order, ProblemError(RESOURCE_EXHAUSTED, f"no room for {order.pipeline.text!r}: {full}"))
            return
        except Exception as error:
            self._fail(order, error)
            return
        if orderer == common_pb2.ORDERER_OPERATOR and seq.pinned:
            seq.pinned = order.pipeline
        seq.epoch = directive.epoch
        ack = policy_pb2.Ack(nonce=directive.nonce, request_id=seq.job_id, applied=switch, epoch=seq.epoch)
        order.answer.set_result(ack)

    def _fail(self, order: Order, error: Exception) -> None:
        """Answers an order with an error: what was prepared is given back, the request keeps its pipeline."""
        self._orders.pop(order.seq.job_id, None)
        self._repeater.drop(order.seq)
        if order.seq.cache:
            self._cache.abandon(order.seq.cache)
        if isinstance(error, DamagedCacheError):
            error = ProblemError(ABORTED, f"{error}; the request begins again")
        order.answer.set_exception(error)

    def _note(self, seq: Sequence, pipeline: Pipeline, why: _Why) -> common_pb2.Switch:
        """Has a request begin with another pipeline: it takes effect when its prompt is complete."""
        switch = common_pb2.Switch(
            from_pipeline=seq.pipeline.text,
            to_pipeline=pipeline.text,
            reason=why.reason,
            ordered_by=why.orderer,
            cause=why.cause,
            at_token=seq.generated,
        )
        seq.pipeline = pipeline
        seq.switches.append(switch)
        self._emit(seq, switch)
        return switch

    def _apply(
        self,
        seq: Sequence,
        pipeline: Pipeline,
        why: _Why,
        before: common_pb2.CacheBytes,
        order: Order | None = None,
    ) -> common_pb2.Switch:
        """Moves a decoding request to another pipeline, now. TierFullError: there is no room, and nothing changed."""
        assert seq.cache is not None
        began = time.monotonic()
        self._cache.apply(seq.cache, pipeline, Occasion.SWITCH)
        after = self._reporter.cache_bytes(seq)
        pause_ms = (time.monotonic() - began) * 1e3
        if order:
            order.pause_ms += pause_ms
            order.stepped()
        switch = common_pb2.Switch(
            at_token=seq.generated,
            from_pipeline=seq.pipeline.text,
            to_pipeline=pipeline.text,
            reason=why.reason,
            ordered_by=why.orderer,
            cause=why.cause,
            before=before,
            after=after,
            stall_ms=order.longest_pause_ms if order else pause_ms,
        )
        seq.pipeline, seq.settled = pipeline, True
        seq.switches.append(switch)
        self._emit(seq, switch)
        self._reporter.changed(seq)
        log.info(
            "switched",
            **seq.ids | ({"epoch": order.directive.epoch} if order else {}),
            at_token=switch.at_token,
            from_pipeline=switch.from_pipeline,
            to_pipeline=switch.to_pipeline,
            reason=why.reason,
            stall_ms=round(switch.stall_ms, 1),
            slices=order.slices if order else 0,
        )
        return switch


def _check_deadline(directive: policy_pb2.Directive, seq: Sequence) -> None:
    if directive.deadline_token and seq.generated > directive.deadline_token:
        raise ProblemError(
            DEADLINE_EXCEEDED, f"deadline was token {directive.deadline_token}; the request is at {seq.generated}"
        )
