"""Ladders: the pipelines that suit a request, from the richest to the densest, by scenario, bound and far mass."""

from __future__ import annotations

from dataclasses import dataclass

from controller.planner import RequestView, WorkerView
from kvpilot.catalog import PipelineKey
from kvpilot.v1.common_pb2 import Scenario
from models.scenarios import effective_scenario, fill_objective

FULL = "full"
INT8 = "kivi(bits=8)"
INT4 = "kivi(bits=4)"


@dataclass(frozen=True)
class Thresholds:
    """Every number the rule decides by. Shares and masses are in [0, 1], losses in nats per token."""

    dwell_tokens: int = 32
    """Generated tokens between two switches of a request: one horizon, so that a switch shows its effect first."""
    min_remaining_tokens: int = 16
    """A request with fewer tokens left to generate is left alone: the switch would not pay back."""
    min_saving_bytes: int = 256 * 1024
    """A denser pipeline that saves less on the device is not worth a switch ..."""
    min_saving_share: float = 0.005
    """... and neither is, when memory is what it is for, one that saves less than this share of the device."""
    compress_from_tokens: int = 96
    """Context from which compressing pays: three blocks, of which two become denser."""
    long_context_tokens: int = 512
    """Context from which a long-context request is stored in 4 bits, whatever the pressure."""
    device_high: float = 0.75
    """Device use from which requests move to denser pipelines ..."""
    device_critical: float = 0.90
    """... one rung at a time, or several at once from this use on ..."""
    device_relief: float = 0.70
    """... until their estimated savings bring it down to this."""
    device_low: float = 0.55
    """Device use below which requests come back to richer pipelines ..."""
    device_refill: float = 0.65
    """... as long as the estimate stays below this. Between low and high nothing moves for memory's sake."""
    host_full: float = 0.90
    """Host use that offloading and shadows may not push the tier beyond."""
    far_mass_low: float = 0.10
    """Eviction may begin when the mass beyond the tokens it would keep is below this ..."""
    edge_mass_low: float = 0.25
    """... and the mass beyond the next shorter horizon, if it is at least half as long, is below this."""
    far_mass_high: float = 0.35
    """Eviction ends when the mass beyond a horizon of half to all of the kept tokens is above this. What was evicted
    gets no attention any more, so the far part of what was kept has to stand for it. Without a horizon in that range
    nothing speaks against what is in force."""
    windows: tuple[int, ...] = (128, 256, 512)
    """Sizes of a streaming window, in tokens; the smallest whose far mass is low is taken."""
    window_margin_tokens: int = 64
    """A window begins when the context is longer than it by this much: two blocks to evict."""
    keep: float = 0.5
    """Share of tokens that score-based eviction keeps."""
    recent_on_device: int = 256
    """Tokens that stay on the device when older blocks go to the host."""
    fast_host_ratio: float = 0.25
    """Host bandwidth over the device's from which a hardware-specific request prefers the host to compression."""
    int8_loss: float = 0.001
    """Typical loss of 8-bit storage; a request with a smaller bound is kept exact."""
    int4_loss: float = 0.0035
    """Typical (median) loss of 4-bit storage."""
    evict_loss_floor: float = 0.003
    """Typical loss of evicting tokens that get no attention."""
    evict_loss_per_mass: float = 0.85
    """Nats lost per share of attention on what is evicted: median over 29 switches of SmolLM2-135M to a window of 128
    or 256 tokens in technical text and code; quartiles 0.6 and 1.9; rank correlation of loss and far mass 0.73."""

    def evict_loss(self, far_mass: float) -> float:
        """Typical loss of evicting tokens that receive ``far_mass`` of the attention."""
        return self.evict_loss_floor + self.evict_loss_per_mass * far_mass


@dataclass(frozen=True)
class Ladder:
    """Pipelines of one request from rich to dense, and the rung where it stands without memory pressure."""

    rungs: tuple[str, ...]
    standing: int
    why: str
    """Why it stands there, with the numbers."""


@dataclass(frozen=True)
class FarMass:
    """Attention mass on tokens older than a horizon."""

    horizon_tokens: int
    mass: float

    def __str__(self) -> str:
        return f"far mass beyond {self.horizon_tokens} tokens {self.mass:.2f}"


def far_mass_beyond(request: RequestView, worker: WorkerView, tokens: int, at_least: float = 0) -> FarMass | None:
    """The measured mass beyond the longest horizon of ``at_least`` to ``tokens``; None if there is none."""
    signals = request.state.signals
    if not signals.steps:
        return None
    horizons = worker.hello.far_horizons_tokens
    inside = [
        FarMass(horizon, mass)
        for horizon, mass in zip(horizons, signals.far_mass, strict=False)
        if at_least <= horizon <= tokens
    ]
    return max(inside, key=lambda far: far.horizon_tokens, default=None)


class LadderBuilder:
    """Builds the ladder of a request."""

    def __init__(self, thresholds: Thresholds) -> None:
        self._limits = thresholds
        self._host = f"host(recent={thresholds.recent_on_device})"

    def build(self, request: RequestView, worker: WorkerView) -> Ladder:
        """The ladder, without pipelines that the worker does not know or has lately refused.

        Raises:
            ValueError: the request's scenario is not known.
            PipelineError: its pipeline names a stage that the worker did not describe.
        """
        ladder = self._by_scenario(request, worker)
        usable = [
            index == 0 or (worker.catalog.knows(rung) and rung not in request.refused)
            for index, rung in enumerate(ladder.rungs)
        ]
        rungs = tuple(rung for rung, good in zip(ladder.rungs, usable, strict=True) if good)
        lately = [rung for rung in ladder.rungs if rung in request.refused]
        why = f"{ladder.why}, but the worker refused {' and '.join(lately)}" if lately else ladder.why
        return Ladder(rungs, sum(usable[: ladder.standing + 1]) - 1, why)

    def _by_scenario(self, request: RequestView, worker: WorkerView) -> Ladder:
        limits = self._limits
        scenario = effective_scenario(request.state.scenario)
        objective = fill_objective(request.state.scenario, request.state.objective)
        bound = objective.max_divergence
        if scenario == Scenario.SCENARIO_ACCURACY_CRITICAL or bound < limits.int8_loss:
            return Ladder((FULL, self._host), 0, f"kept exact, its bound is {bound:g} nats per token")
        heavy = INT4 if bound >= limits.int4_loss else INT8
        spends_for_memory = objective.memory_weight > 0
        rungs: tuple[str, ...]
        match scenario:
            case Scenario.SCENARIO_LONG_CONTEXT:
                rungs = (FULL, heavy, f"{heavy} | {self._host}")
                return self._compressing(request, rungs, limits.long_context_tokens, spends_for_memory)
            case Scenario.SCENARIO_STREAMING:
                return self._streaming(request, worker, heavy, bound)
            case Scenario.SCENARIO_EDGE:
                dense = heavy.replace(")", ", shadow=false)")  # a shadow would take the host memory that is short too
                rungs = (FULL, dense, f"snapkv(keep={limits.keep}, shadow=false) | {dense}")
                if not self._may_keep_half(request, worker, bound)[0]:
                    rungs = rungs[:2]
                return self._compressing(request, rungs, limits.compress_from_tokens, spends_for_memory)
            case Scenario.SCENARIO_MULTI_TURN:
                rungs = _ladder_of(FULL, INT8, heavy, f"{heavy} | {self._host}")
                return self._compressing(request, rungs, limits.compress_from_tokens, spends_for_memory)
            case Scenario.SCENARIO_PREFILL_HEAVY:
                return Ladder(
                    _ladder_of(FULL, INT8, heavy, f"{heavy} | {self._host}"),
                    0,
                    "answers are short: switched under memory pressure only",
                )
            case Scenario.SCENARIO_HARDWARE_SPECIFIC if _bandwidth_ratio(worker) >= limits.fast_host_ratio:
                return Ladder(
                    (FULL, self._host, f"{heavy} | {self._host}"),
                    1 if request.seen_tokens > 2 * limits.recent_on_device else 0,
                    f"host reads at {_bandwidth_ratio(worker):.2f} of the device's bandwidth"
                    f" >= {limits.fast_host_ratio:.2f}: older blocks may live there",
                )
            case Scenario.SCENARIO_HIGH_THROUGHPUT:
                return self._by_far_mass(request, worker, f"h2o(keep={limits.keep})", heavy, bound, spends_for_memory)
            case _:
                stage = f"snapkv(keep={limits.keep})"
                return self._by_far_mass(request, worker, stage, heavy, bound, spends_for_memory)

    def _compressing(self, request: RequestView, rungs: tuple[str, ...], from_tokens: int, wanted: bool) -> Ladder:
        """A ladder that stands on its second rung once the context is long enough."""
        seen = request.seen_tokens
        if not wanted:
            return Ladder(rungs, 0, "its objective gives memory no weight")
        if seen < from_tokens:
            return Ladder(rungs, 0, f"{seen} tokens < {from_tokens}: too short to gain")
        return Ladder(rungs, 1, f"{seen} tokens >= {from_tokens}: older blocks need not be raw")

    def _by_far_mass(
        self, request: RequestView, worker: WorkerView, evict: str, heavy: str, bound: float, wanted: bool
    ) -> Ladder:
        """8 bits when memory is plentiful; under pressure 4 bits, then eviction if little looks far back, else host."""
        may_evict, evidence = self._may_keep_half(request, worker, bound)
        dense = f"{evict} | {heavy}" if may_evict else heavy
        ladder = self._compressing(
            request,
            _ladder_of(FULL, INT8, heavy, dense, f"{dense} | {self._host}"),
            self._limits.compress_from_tokens,
            wanted,
        )
        return Ladder(ladder.rungs, ladder.standing, f"{ladder.why}, {evidence}")

    def _streaming(self, request: RequestView, worker: WorkerView, heavy: str, bound: float) -> Ladder:
        """A window if little attention goes beyond it, else 4 bits; nothing before it is long enough to tell."""
        limits, seen = self._limits, request.seen_tokens
        in_force = _parameter(worker.catalog.key(request.state.pipeline), "window", "recent")
        sizes = self._measurable_windows(worker) if in_force is None else (int(in_force),)
        compressing = (FULL, heavy, f"{heavy} | {self._host}")
        if in_force is None and sizes:
            waiting = (FULL,) if request.state.pipeline == FULL else compressing
            shortest = sizes[0] + limits.window_margin_tokens
            if seen < shortest:
                return Ladder(waiting, 0, f"{seen} tokens < {shortest}: shorter than a window")
            if not request.state.signals.steps:
                return Ladder(waiting, 0, "no attention measured yet")
        evidence = "no far-mass horizon near the size of a window"
        for size in sizes:
            if in_force is None and seen < size + limits.window_margin_tokens:
                break
            may_evict, evidence = self._may_evict(request, worker, size, bound, evicting=in_force is not None)
            if may_evict:
                window = f"window(sinks=4, recent={size})"
                return Ladder((FULL, window, f"{window} | {heavy}"), 1, f"{evidence}: the last {size} tokens suffice")
        return Ladder(compressing, 1, f"{evidence}: nothing is dropped, older blocks are compressed")

    def _measurable_windows(self, worker: WorkerView) -> tuple[int, ...]:
        """The window sizes for which the worker measures the far mass at a horizon of 3/4 of the size or more."""
        horizons = worker.hello.far_horizons_tokens
        return tuple(
            size for size in self._limits.windows if any(0.75 * size <= horizon <= size for horizon in horizons)
        )

    def _may_keep_half(self, request: RequestView, worker: WorkerView, bound: float) -> tuple[bool, str]:
        key = worker.catalog.key(request.state.pipeline)
        evicting = any(name in ("snapkv", "h2o") for name, _ in key)
        return self._may_evict(request, worker, int(self._limits.keep * request.seen_tokens), bound, evicting)

    def _may_evict(
        self, request: RequestView, worker: WorkerView, kept_tokens: int, bound: float, evicting: bool
    ) -> tuple[bool, str]:
        """Whether eviction down to ``kept_tokens`` may begin or go on, and the numbers that say so."""
        limits = self._limits
        if evicting:
            edge = far_mass_beyond(request, worker, kept_tokens - 1, kept_tokens / 2)
            if edge is None:
                return True, f"no far mass measured within the last {kept_tokens} tokens"
            if edge.mass > limits.far_mass_high:
                return False, f"{edge} > {limits.far_mass_high:.2f}"
            return True, f"{edge} <= {limits.far_mass_high:.2f}"
        far = far_mass_beyond(request, worker, kept_tokens)
        if far is None:
            return False, f"no far mass measured within {kept_tokens} tokens"
        if far.mass >= limits.far_mass_low:
            return False, f"{far} >= {limits.far_mass_low:.2f}"
        loss = limits.evict_loss(far.mass)
        if loss > bound:
            return False, f"{far} suggests a loss of {loss:.3f} > {bound:g} nats"
        edge = far_mass_beyond(request, worker, far.horizon_tokens - 1, far.horizon_tokens / 2)
        if edge is not None and edge.mass >= limits.edge_mass_low:
            return False, f"{edge} >= {limits.edge_mass_low:.2f}"
        return True, f"{far} < {limits.far_mass_low:.2f}"


def _ladder_of(*rungs: str) -> tuple[str, ...]:
    """The rungs in order, each once."""
    return tuple(dict.fromkeys(rungs))


def _parameter(key: PipelineKey, stage: str, parameter: str) -> int | float | None:
    """A numeric parameter of a pipeline's stage; None where the pipeline has no such stage."""
    for name, parameters in key:
        if name == stage:
            value = dict(parameters)[parameter]
            return value if isinstance(value, int | float) else None
    return None


def _bandwidth_ratio(worker: WorkerView) -> float:
    """Measured host bandwidth over the device's; 0 where either was not measured."""
    speed = {tier.name: tier.bandwidth_bytes_per_s for tier in worker.hello.tiers}
    device, host = speed.get("device", 0.0), speed.get("host", 0.0)
    return host / device if device > 0 else 0.0
