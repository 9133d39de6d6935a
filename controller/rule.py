"""The first planner: a rule on far attention mass, memory pressure and the scenario.

Each request has a *ladder* (see :mod:`controller.ladders`): pipelines from ``full`` to the densest, made for its
scenario and cut to its bound on the divergence. One rung is the *standing* rung, where the request belongs while memory
is plentiful: a long context is stored in 4 bits because it is long, not because memory is short. Under pressure
requests move further down, those first that save most; when pressure falls they come back up to their standing rung.

Typical losses (nats per token over the next 32 tokens; SmolLM2-135M, 498 windows of real text): int8 under 0.001, int4
0.0035 (median), evicting the older half 0.03 with a 10-90 % spread of 18x, of which the attention mass beyond the kept
window is the best single predictor: little far mass, little loss.
"""

from __future__ import annotations

from dataclasses import dataclass

from controller.ladders import Ladder, LadderBuilder, Thresholds
from controller.planner import Decision, RequestView, WorkerView
from kvpilot.catalog import PipelineKey
from kvpilot.pipeline import PipelineError
from kvpilot.v1 import common_pb2
from models.footprint import Footprint, estimate
from models.scenarios import scenario_word


class RulePlanner:
    """The rule. Holds no state: the same view gives the same plan; hysteresis comes from the pipelines in force."""

    def __init__(self, thresholds: Thresholds | None = None) -> None:
        self.thresholds = thresholds or Thresholds()
        self._ladders = LadderBuilder(self.thresholds)

    def prepare(self, worker: WorkerView) -> None:
        """Nothing: the rule works its numbers out as it plans."""

    def plan(self, worker: WorkerView) -> list[Decision]:
        """Decides for every request that is neither pinned, overridden, prefilling nor awaiting an answer."""
        device, host = worker.tier("device"), worker.tier("host")
        room = _Room(device.used_bytes, device.budget_bytes, host.used_bytes, host.budget_bytes)
        seats: list[_Seat] = []
        decisions: list[Decision] = []
        for request in worker.requests:
            if request.outstanding is not None:
                _count_outstanding(request, request.outstanding, worker, room)
            elif not (request.state.pinned or request.overridden or request.state.prefilling):
                if hold := self._hold(request):
                    decisions.append(Decision(request.request_id, request.state.pipeline, hold))
                    continue
                try:
                    seats.append(_take_seat(request, self._ladders.build(request, worker), worker))
                except ValueError as error:  # PipelineError is one
                    decisions.append(Decision(request.request_id, request.state.pipeline, f"left alone: {error}"))
        device_use = room.device_share()
        for seat in seats:
            self._to_standing(seat, room)
        if worker.state.waiting or room.device_share() >= self.thresholds.device_high:
            self._relieve(seats, room, worker.state.waiting)
        elif device_use < self.thresholds.device_low:
            self._enrich(seats, room)
        return decisions + [_decide(seat, device_use) for seat in seats]

    def _hold(self, request: RequestView) -> str | None:
        """Why a request is left alone for now, whatever else is the case."""
        limits = self.thresholds
        if request.remaining_tokens < limits.min_remaining_tokens:
            return f"{request.remaining_tokens} tokens left to generate < {limits.min_remaining_tokens}: not worth it"
        since = request.tokens_since_switch
        if since is not None and since < limits.dwell_tokens:
            return f"switched {since} tokens ago < {limits.dwell_tokens}: let it show its effect"
        return None

    def _to_standing(self, seat: _Seat, room: _Room) -> None:
        """Moves a request that is richer than its standing rung, or whose losses its ladder does not admit."""
        standing = seat.ladder.standing
        if seat.admitted:
            worth_it = seat.level < standing and seat.saving(standing) >= self.thresholds.min_saving_bytes
            if worth_it and self._host_takes(seat, standing, room):
                seat.move(standing, room, common_pb2.CAUSE_COST, seat.ladder.why)
            return
        for rung in range(standing, len(seat.ladder.rungs)):
            extra_bytes = -seat.saving(rung)
            fits = extra_bytes <= 0 or room.device_share(extra_bytes) < self.thresholds.device_high
            if fits and self._host_takes(seat, rung, room):
                seat.move(rung, room, common_pb2.CAUSE_QUALITY, seat.ladder.why)
                return

    def _relieve(self, seats: list[_Seat], room: _Room, waiting: int) -> None:
        """Moves requests down their ladders, largest saving first, until the device is relieved.

        One rung each, but as many as it takes while the device is critically full.
        """
        limits = self.thresholds
        open_seats = list(seats)
        while open_seats and (waiting or room.device_share() > limits.device_relief):
            steps = [(saving, seat, rung) for seat in open_seats for saving, rung in self._next_down(seat, room)]
            if not steps:
                return
            saving, seat, rung = max(steps, key=lambda step: step[0])
            cause = f"requests wait for memory: {waiting}" if waiting else f"more than {limits.device_high:.0%}"
            if room.device_share() < limits.device_critical:
                open_seats.remove(seat)  # one rung each; the next reports tell whether that was enough
            seat.move(rung, room, common_pb2.CAUSE_PRESSURE, f"{cause}; saves about {size_text(saving)}")

    def _next_down(self, seat: _Seat, room: _Room) -> list[tuple[int, int]]:
        """The next denser rung that is worth it, as (bytes saved, rung); empty if there is none."""
        worth_bytes = max(
            self.thresholds.min_saving_bytes, round(self.thresholds.min_saving_share * room.device_budget_bytes)
        )
        for rung in range(seat.place + 1, len(seat.ladder.rungs)):
            saving = seat.planned.device_bytes - seat.prints[rung].device_bytes
            if saving >= worth_bytes and self._host_takes(seat, rung, room):
                return [(saving, rung)]
        return []

    def _enrich(self, seats: list[_Seat], room: _Room) -> None:
        """Brings requests that are denser than their standing rung back up, smallest first, while there is room."""
        limits = self.thresholds
        below = [seat for seat in seats if seat.target is None and seat.level > seat.ladder.standing]
        for seat in sorted(below, key=lambda seat: seat.request.seen_tokens):
            for rung in range(seat.ladder.standing, seat.level):
                before, after = room.device_share(), room.device_share(-seat.saving(rung))
                if after < limits.device_refill and self._host_takes(seat, rung, room):
                    why = f"less than {limits.device_low:.0%}, {before:.0%} -> {after:.0%} by this"
                    seat.move(rung, room, common_pb2.CAUSE_ROOM, why)
                    break

    def _host_takes(self, seat: _Seat, rung: int, room: _Room) -> bool:
        """Whether the host tier has room for what this rung puts there."""
        extra_bytes = seat.prints[rung].lower_tier_bytes - seat.planned.lower_tier_bytes
        return extra_bytes <= 0 or room.host_bytes + extra_bytes <= self.thresholds.host_full * room.host_budget_bytes


@dataclass
class _Room:
    """Bytes in use on the worker's tiers if everything planned so far were done."""

    device_bytes: int
    device_budget_bytes: int
    host_bytes: int
    host_budget_bytes: int

    def device_share(self, extra_bytes: int = 0) -> float:
        return (self.device_bytes + extra_bytes) / self.device_budget_bytes if self.device_budget_bytes else 1.0

    def replace(self, old: Footprint, new: Footprint) -> None:
        self.device_bytes += new.device_bytes - old.device_bytes
        self.host_bytes += new.lower_tier_bytes - old.lower_tier_bytes


@dataclass
class _Seat:
    """One request during a plan: where it is and where it goes."""

    request: RequestView
    ladder: Ladder
    prints: tuple[Footprint, ...]  # of the ladder's rungs
    now: Footprint
    level: int  # rung in force, or the densest that is not denser than a pipeline off the ladder
    admitted: bool  # whether the ladder has all lossy stages of the pipeline in force
    target: int | None = None  # rung to move to; None: stay
    reason: str = ""
    cause: common_pb2.Cause = common_pb2.CAUSE_UNSPECIFIED

    @property
    def place(self) -> int:
        return self.level if self.target is None else self.target

    @property
    def planned(self) -> Footprint:
        return self.now if self.target is None else self.prints[self.target]

    def saving(self, rung: int) -> int:
        return self.now.device_bytes - self.prints[rung].device_bytes

    def move(self, rung: int, room: _Room, cause: common_pb2.Cause, reason: str) -> None:
        room.replace(self.planned, self.prints[rung])
        self.cause = cause
        self.target = rung
        self.reason = f"{self.reason}; {reason}" if self.reason else reason


def _take_seat(request: RequestView, ladder: Ladder, worker: WorkerView) -> _Seat:
    prints = tuple(_footprint(rung, request, worker) for rung in ladder.rungs)
    now = _footprint(request.state.pipeline, request, worker)
    shape = _shape(worker.catalog.key(request.state.pipeline))
    shapes = [_shape(worker.catalog.key(rung)) for rung in ladder.rungs]
    if shape in shapes:
        return _Seat(request, ladder, prints, now, shapes.index(shape), admitted=True)
    lossy = {stage for stage in shape if stage[0] not in ("full", "host")}
    admitted = lossy <= {stage for rung in shapes for stage in rung}
    level = max((rung for rung, there in enumerate(prints) if there.device_bytes >= now.device_bytes), default=0)
    return _Seat(request, ladder, prints, now, level, admitted)


def _shape(key: PipelineKey) -> PipelineKey:
    """What a pipeline does to the device: its key without shadows, and ``int8`` spelled as what it is."""
    plain = tuple((name, tuple(pair for pair in given if pair[0] != "shadow")) for name, given in key)
    return tuple(("kivi", (("bits", 8),)) if name == "int8" else (name, given) for name, given in plain)


def _footprint(pipeline: str, request: RequestView, worker: WorkerView) -> Footprint:
    """Estimated bytes, or those in use where a stage is not known to the estimate."""
    cache = request.state.cache
    guess = estimate(worker.catalog.key(pipeline), request.seen_tokens, worker.layout)
    return guess or Footprint(cache.device_bytes, cache.host_bytes, cache.shadow_bytes)


def _count_outstanding(request: RequestView, pipeline: str, worker: WorkerView, room: _Room) -> None:
    """Counts a directive that is under way as if it were done."""
    try:
        room.replace(_footprint(request.state.pipeline, request, worker), _footprint(pipeline, request, worker))
    except PipelineError:
        return  # an operator's stage that the estimate cannot price; the next reports will show its bytes


def _decide(seat: _Seat, device_use: float) -> Decision:
    state = seat.request.state
    facts = f"{scenario_word(state.scenario)}, {seat.request.seen_tokens} tokens, device {device_use:.0%} full"
    if seat.target is None:
        stay = seat.ladder.why if seat.level == seat.ladder.standing else "nothing better fits for now"
        return Decision(state.request_id, state.pipeline, f"{facts}: {stay}")
    return Decision(state.request_id, seat.ladder.rungs[seat.target], f"{facts}: {seat.reason}", cause=seat.cause)


def size_text(count: int) -> str:
    """Bytes for a person."""
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"
