"""How a worker makes room: the order in which pressure is relieved before a request is preempted.

Sessions between two turns have their rows on the host tier on sufferance: whenever a request wants room there, they go
to disk, or are dropped, before anything of a running request is touched (``workers/cache/sessions.py``). On the device:
copy the rest of a turn that is being parked; drop published prefixes that nobody uses; interrupt a replay, or do the
rest of a switch that is being prepared at once, since it holds blocks twice; give up pools of recalled blocks, the
largest first, which only save the way from the host; have layers of the model lend their memory
(``workers/engine/lending.py``); without a controller, compress requests whose objective allows it (the static rule);
move older blocks to the host tier, which changes no logits, as far as it has room; where the host is full too, give up
the exact copies of requests that are lossy already. Only then does the scheduler preempt.

Layers get their memory back one between two steps, when no request waits for memory or is elsewhere than its client
wants it, and two watermarks would stay free without it: use must fall by that much before what was lent last goes back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

import structlog

from kernels.layout import BLOCK_TOKENS
from workers.cache.arena import TierFullError
from workers.cache.kvcache import KVCache
from workers.cache.sequence_cache import Occasion
from workers.cache.sessions import ParkedSessions
from workers.cache.staging import DamagedCacheError
from workers.cache.style import device_tokens, largest_format
from workers.engine.lending import Lending
from workers.engine.sequence import Phase, Sequence
from workers.stages.base import Pipeline, Placer
from workers.stages.compress.kivi import Kivi
from workers.stages.evict.snapkv import OBSERVATION_WINDOW
from workers.stages.offload.host import Host

log = structlog.get_logger(__name__)

DENSER_DIVERGENCE = 0.02
"""Nats per token; a request whose objective allows this much may be compressed to 4 bits by the static rule."""
PRESSURE_RECENT_TOKENS = 4 * BLOCK_TOKENS
"""What stays on the device of a request that pressure moves to the host."""
WATERMARK_SHARE = 0.05
"""Share of the device tier left free when a request is admitted."""

Switcher = Callable[[Sequence, Pipeline, str], bool]
"""Moves a request to a pipeline for a reason; False where that fails, and then nothing has changed."""


class EngineMemory:
    """The scheduler's view of the cache, with relief of pressure.

    Args:
        cache: the worker's cache.
        running: the requests that hold cache now.
        switch: carries out a pipeline change, for pressure's sake.
        interrupt: ends work that holds memory it could do without; False where there is none.
        sessions: what earlier turns have left; None: nothing.
        lending: layers that may lend their memory; None: there are none.
    """

    def __init__(
        self,
        cache: KVCache,
        running: Callable[[], list[Sequence]],
        switch: Switcher,
        interrupt: Callable[[], bool] = lambda: False,
        sessions: ParkedSessions | None = None,
        lending: Lending | None = None,
    ) -> None:
        self._sessions = sessions
        self._lending = lending or Lending((), cache)
        self._takes_back = True
        self._cache = cache
        self._running = running
        self._switch = switch
        self._interrupt = interrupt
        self.evacuations = 0
        """Times that rows of a prompt left the device."""
        self.steered = False
        """Whether a controller is attached; it then decides on lossy pipelines."""

    def free_bytes(self) -> int:
        """Device bytes free now, unused prefixes and pools of recalled blocks counted as free."""
        return self._cache.device.free_bytes + self._cache.prefixes.unused_bytes() + self._cache.pool_bytes()

    def room_bytes(self) -> int:
        """Those, and what layers can lend."""
        return self.free_bytes() + self._lending.lendable_bytes

    def watermark_bytes(self) -> int:
        """Device bytes to leave free when a request is admitted."""
        return int(WATERMARK_SHARE * self._cache.device.budget_bytes)

    def prompt_bytes(self, tokens: int) -> int:
        """Device bytes that so many prompt tokens take."""
        return self._cache.worst_bytes(tokens)

    def admit(self, seq: Sequence) -> None:
        """Opens a request's cache and reuses what an earlier turn or prefixes have of it: the longer of both."""
        seq.cache = self._cache.open(seq.most_tokens)
        token_ids, with_mass = _reusable(seq)
        seq.computed = self._resume(seq, token_ids, with_mass)
        if not (seq.computed or with_mass):
            seq.computed = self._cache.reuse_prefix(seq.cache, token_ids)
        if seq.computed and not seq.pipeline.moves_nothing:
            self.evacuate(seq)
        seq.reused_prompt_tokens = min(seq.computed, seq.prompt_tokens)

    def fetch(self, seq: Sequence) -> bool:
        """Starts to bring back from disk what a request can reuse of its session. False: nothing to wait for."""
        if self._sessions is None or seq.session is None:
            return False
        token_ids, with_mass = _reusable(seq)
        published = (
            0 if with_mass else len(self._cache.prefixes.match(token_ids, max(0, len(token_ids) - 1) // BLOCK_TOKENS))
        )
        return self._sessions.fetch(seq.session, token_ids, with_mass, published)

    def _resume(self, seq: Sequence, token_ids: list[int], with_mass: bool) -> int:
        """Starts a request with its session's rows, if published prefixes have fewer. Returns tokens."""
        assert seq.cache is not None
        if self._sessions is None or seq.session is None:
            return 0
        ready = self._sessions.ready_rows(seq.session, token_ids, with_mass)
        if ready <= (0 if with_mass else len(self._cache.prefixes.match(token_ids, ready))):
            return 0
        shadow, row_mass = self._sessions.take(seq.session, token_ids, seq.most_tokens, with_mass)
        tokens = self._cache.resume(seq.cache, shadow, row_mass)
        needed = self._cache.worst_bytes(tokens) + self.watermark_bytes()
        if seq.pipeline.moves_nothing and self.free_bytes() >= needed:
            # Chunks of the prompt read them again and again. Otherwise it is done when the prompt is complete.
            with contextlib.suppress(TierFullError):
                self._cache.apply(seq.cache, Pipeline(), Occasion.SWITCH)
        return tokens

    def evict(self, seq: Sequence) -> None:
        """Takes all memory of a request."""
        if seq.cache:
            self._cache.close(seq.cache)
            seq.cache = None

    def evacuate(self, seq: Sequence, every_layer: bool = False) -> bool:
        """Moves what is computed of a prompt off the device, as far as there is room, or only those layers that its
        pipeline will have elsewhere. False: nothing was moved."""
        assert seq.cache is not None
        try:
            moved = self._cache.evacuate(seq.cache, None if every_layer else seq.pipeline) > 0
        except DamagedCacheError:
            return False  # it is about to begin again
        self.evacuations += moved
        return moved

    def grow(self, seq: Sequence, tokens: int) -> bool:
        """Makes room for so many more tokens of a request, relieving pressure as far as that goes."""
        assert seq.cache is not None
        while True:
            try:
                self._cache.reserve(seq.cache, tokens)
                return True
            except TierFullError as full:
                if not self._relieve(full.needed_bytes - full.free_bytes):
                    return False

    def balance(self, waiting: int) -> None:
        """Between two steps: as many layers lend their memory as stages ask for; one that need not gets it back.

        Args:
            waiting: requests that were not admitted for want of memory.
        """
        lending, running = self._lending, self._running()
        wanted = max((seq.pipeline.lent_layers for seq in running), default=0)
        while lending.lent < wanted and lending.lend():
            pass
        calm = not waiting and all(seq.home in (None, seq.pipeline) for seq in running)
        if lending.lent <= wanted or not calm or not self._takes_back:
            return
        idle = self._cache.prefixes.unused_bytes()
        if self._cache.device.free_bytes + idle < lending.last_bytes + 2 * self.watermark_bytes():
            return
        self._cache.prefixes.drop(lending.last_bytes - self._cache.device.free_bytes)
        try:
            lending.take_back()
        except RuntimeError:
            log.exception("weights cannot be copied back; layers that lend their memory go on doing so")
            self._takes_back = False

    def _lend(self, missing_bytes: int) -> bool:
        """Has layers lend so much memory. False: they have lent all they can."""
        lent = 0
        while lent < missing_bytes and (more := self._lending.lend()):
            lent += more
        return lent > 0

    def _relieve(self, missing_bytes: int) -> bool:
        """Frees some device memory by the mildest means there is. False: there is none."""
        if self._sessions and self._sessions.conclude():
            return True
        if self._cache.prefixes.drop(missing_bytes) or self._interrupt() or self._cache.give_up_pools(missing_bytes):
            return True
        if self._lend(missing_bytes):
            return True
        holders = sorted(self._running(), key=self._device_bytes, reverse=True)
        measures = (self._compress, self._move_to_host) if not self.steered else (self._move_to_host,)
        for measure in measures:
            for seq in holders:
                free = self.free_bytes()
                if measure(seq) and self.free_bytes() > free:
                    return True
        return any(self._give_up_shadow(seq) for seq in sorted(self._running(), key=self._shadow_bytes, reverse=True))

    def _device_bytes(self, seq: Sequence) -> int:
        return self._cache.use(seq.cache).device_bytes if seq.cache else 0

    def _shadow_bytes(self, seq: Sequence) -> int:
        return self._cache.use(seq.cache).shadow_bytes if seq.cache else 0

    def _compress(self, seq: Sequence) -> bool:
        allowed = not seq.pinned and seq.objective.max_divergence >= DENSER_DIVERGENCE
        if seq.phase is not Phase.DECODE or not allowed or seq.pipeline.codec:
            return False
        stages = [stage for stage in (seq.pipeline.evictor, Kivi(bits=4), seq.pipeline.placer) if stage]
        return self._switch(seq, Pipeline(tuple(stages)), "device tier is full and no controller is attached")

    def _move_to_host(self, seq: Sequence) -> bool:
        if seq.phase in (Phase.PREFILL, Phase.REPEAT):
            return self.evacuate(seq) or self.evacuate(seq, every_layer=True)
        if seq.phase is not Phase.DECODE or not seq.cache:
            return False
        least = self._cache.device_tokens_at_least(seq.cache, largest_format(seq.pipeline, self._cache.shape))
        less = with_less_on_device(seq.pipeline, max(PRESSURE_RECENT_TOKENS, least), seq.cache.seen)
        if self._stays(seq, less) >= self._stays(seq, seq.pipeline):
            return False
        return self._switch(seq, less, "device tier is full")

    def _stays(self, seq: Sequence, pipeline: Pipeline) -> int:
        """Last tokens that a pipeline has on the device, in the layer that has most there."""
        assert seq.cache is not None
        stays = device_tokens(self._cache.styles(seq.cache, pipeline))
        return len(seq.token_ids) if stays is None else stays

    def _give_up_shadow(self, seq: Sequence) -> bool:
        """Makes a lossy request's loss permanent, for the host bytes of its exact copy."""
        if seq.phase is not Phase.DECODE or not seq.cache or not seq.pipeline.wants_shadow or seq.cache.lost:
            return False
        reason = "device and host tiers are full: the exact copy is given up, what was lost stays lost"
        return self._switch(seq, seq.pipeline.without_shadow(), reason)


def _reusable(seq: Sequence) -> tuple[list[int], bool]:
    """The tokens whose rows a request may take from elsewhere, and whether it needs the masses of all their queries.

    An evictor goes by the attention of the prompt's last queries. They are computed in any case, or what it keeps would
    depend on what others have published. One that goes by all queries can start from a session's rows alone, which come
    with what their queries paid. One that works while the prompt is computed takes none.
    """
    evictor = seq.pipeline.evictor
    if evictor and evictor.evicts_while_prefilling:
        return [], evictor.needs_prompt_mass
    end = len(seq.token_ids) - (OBSERVATION_WINDOW - 1 if evictor else 0)
    return seq.token_ids[: max(0, end)], bool(evictor and evictor.needs_prompt_mass)


def with_less_on_device(pipeline: Pipeline, recent: int, seen: int) -> Pipeline:
    """The same pipeline with all but about the last ``recent`` tokens' blocks on disk, if they go there, else on the
    host. ``seen`` is how many tokens there are."""
    less = (pipeline.placer and pipeline.placer.with_device_tokens(recent, seen)) or Host(recent=recent)
    return replace(pipeline, stages=(*(stage for stage in pipeline.stages if not isinstance(stage, Placer)), less))
