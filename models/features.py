"""What a predictor eats: one schema, used by the worker that measures, the controller that predicts, and training.

A row describes a request, what it showed lately, and one candidate pipeline. The request's part is the same for all of
its candidates and computed once. A value that is not known is NaN, never a guess; predictors take NaN.

Two processes with the same :data:`SCHEMA_HASH` mean the same by every number of a row. Whoever changes what a feature
means changes :data:`SCHEMA_VERSION`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kvpilot.catalog import PipelineKey, StageCatalog
from kvpilot.v1 import policy_pb2
from kvpilot.v1.common_pb2 import Scenario
from models.footprint import (
    BLOCK_TOKENS,
    CODECS,
    FIXED_EVICTORS,
    HEAVY_HITTERS,
    I64,
    SHARE_EVICTORS,
    CacheLayout,
    code_bits,
    estimate_many,
)
from models.scenarios import PRESETS, effective_scenario, scenario_word

F64: TypeAlias = npt.NDArray[np.float64]

SCHEMA_VERSION = 3
HORIZONS_TOKENS = (32, 64, 128, 256, 512, 1024)
"""Horizons of ``Signals.far_mass`` that the schema knows; a worker that measures others gives NaN here."""
DEPTHS = 4
"""Parts of the layers for ``Signals.far_mass_by_depth`` and its like."""
KEPT_SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4)
"""Shares of ``Signals.dropped_votes`` and ``missed_votes``, rising."""
_PERCENT = tuple(int(100 * share) for share in KEPT_SHARES)
_RAW_BITS = 16
METHODS = (*SHARE_EVICTORS, *FIXED_EVICTORS, "turboquant")
"""Stages that lose otherwise than their family's others with the same figures."""
AUDIT_FLOOR = 1e-6
"""Nats; audits below it count as this much."""


class Part(Enum):
    """What a feature describes."""

    REQUEST = "request"
    SIGNAL = "signal"
    CANDIDATE = "candidate"


class Family(Enum):
    """Pipelines that fail alike: bounds are calibrated for each."""

    EXACT = "exact"
    QUANTISE = "quantise"
    WINDOW = "window"
    SCORED = "scored"
    WINDOW_QUANTISE = "window+quantise"
    SCORED_QUANTISE = "scored+quantise"
    OTHER = "other"


@dataclass(frozen=True)
class Feature:
    """One column of a row."""

    name: str
    part: Part
    unit: str
    low: float
    high: float
    meaning: str


def _request(name: str, unit: str, low: float, high: float, meaning: str) -> Feature:
    return Feature(name, Part.REQUEST, unit, low, high, meaning)


def _signal(name: str, unit: str, low: float, high: float, meaning: str) -> Feature:
    return Feature(name, Part.SIGNAL, unit, low, high, meaning)


def _candidate(name: str, unit: str, low: float, high: float, meaning: str) -> Feature:
    return Feature(name, Part.CANDIDATE, unit, low, high, meaning)


_INF = math.inf

REQUEST_FEATURES: tuple[Feature, ...] = (
    _request("log2_seen", "log2 tokens", 0, 32, "tokens so far, prompt and generated"),
    _request("generated_share", "share", 0, 1, "generated tokens over tokens so far"),
    _request("turns", "count", 1, _INF, "user turns"),
    _request("prompt_distinct_share", "share", 0, 1, "different tokens over tokens of the prompt"),
    _request("prompt_repeated_share", "share", 0, 1, "3-grams of the prompt that occurred before in it"),
    _request("prompt_unigram_entropy", "nats", 0, 20, "entropy of the prompt's token frequencies"),
    *(
        _request(f"scenario_{scenario_word(scenario).replace('-', '_')}", "flag", 0, 1, "the scenario it was sent with")
        for scenario in PRESETS
    ),
)

SIGNAL_FEATURES: tuple[Feature, ...] = (
    *(_signal(f"far_mass_{h}", "share", 0, 1, f"attention beyond {h} tokens, mean of heads") for h in HORIZONS_TOKENS),
    *(_signal(f"far_mass_max_{h}", "share", 0, 1, "the same, largest head") for h in HORIZONS_TOKENS),
    *(_signal(f"far_mass_last_{h}", "share", 0, 1, "the same, last step looked at") for h in HORIZONS_TOKENS),
    *(_signal(f"far_mass_layer_{h}", "share", 0, 1, "the same, largest layer") for h in HORIZONS_TOKENS),
    *(
        _signal(f"far_mass_depth{depth}_{h}", "share", 0, 1, f"the same, layers of quarter {depth}")
        for depth in range(DEPTHS)
        for h in HORIZONS_TOKENS
    ),
    *(
        _signal(f"dropped_votes_{part}", "share", 0, 1, f"recent attention outside the best {100 * share:g} %")
        for part, share in zip(_PERCENT, KEPT_SHARES, strict=True)
    ),
    *(_signal(f"dropped_votes_max_{part}", "share", 0, 1, "the same, largest head") for part in _PERCENT),
    *(
        _signal(f"missed_votes_{part}", "share", 0, 1, f"attention outside what were the best {100 * share:g} %")
        for part, share in zip(_PERCENT, KEPT_SHARES, strict=True)
    ),
    *(_signal(f"missed_votes_max_{part}", "share", 0, 1, "the same, largest head") for part in _PERCENT),
    *(
        _signal(f"missed_votes_depth{depth}_{part}", "share", 0, 1, f"the same, layers of quarter {depth}")
        for depth in range(DEPTHS)
        for part in _PERCENT
    ),
    *(_signal(f"far_votes_{h}", "share", 0, 1, f"recent attention beyond {h} tokens, mean") for h in HORIZONS_TOKENS),
    *(_signal(f"far_votes_max_{h}", "share", 0, 1, "the same, largest head") for h in HORIZONS_TOKENS),
    *(
        _signal(f"far_votes_depth{depth}_{h}", "share", 0, 1, f"the same, layers of quarter {depth}")
        for depth in range(DEPTHS)
        for h in HORIZONS_TOKENS
    ),
    _signal("sink_mass", "share", 0, 1, "attention on the block of the first 4 tokens"),
    _signal("attention_entropy", "share", 0, 1, "entropy of attention over blocks, over its largest value"),
    _signal("next_token_entropy", "nats", 0, 20, "entropy of the next-token distribution, mean"),
    _signal("next_token_entropy_max", "nats", 0, 20, "the same, largest"),
    _signal("top1_probability", "share", 0, 1, "probability of the most likely next token, mean"),
    _signal("surprise", "nats", 0, _INF, "-log p of the tokens that came, mean"),
    _signal("repeat_rate", "share", 0, 1, "last tokens that end a 3-gram seen before"),
    *(_signal(f"repeat_beyond_{h}", "share", 0, 1, f"of these, last seen beyond {h} tokens") for h in HORIZONS_TOKENS),
    _signal("copied_tokens", "tokens", 0, 32, "length of the copy under way"),
    _signal("log2_copied_from", "log2 tokens", 0, 32, "distance it copies from; 0 without one"),
    _signal("current_kept_share", "share", 0, 1, "tokens kept now over tokens so far: what the signals could see"),
    _signal("current_bits", "bits", 0, _RAW_BITS, "bits of an older block's number now, raw counted as 16"),
    _signal("current_bytes_share", "share", 0, _INF, "device bytes now over those of a full cache"),
    _signal("audited_log_divergence", "log nats", -20, 10, "mean of the last audits' under the pipeline now"),
)

CANDIDATE_FEATURES: tuple[Feature, ...] = (
    _candidate("kept_share", "share", 0, 1, "tokens it keeps over tokens so far"),
    _candidate("log2_kept", "log2 tokens", 0, 32, "tokens it keeps"),
    _candidate("log2_dropped", "log2 tokens", 0, 32, "tokens it drops, plus one"),
    _candidate("log2_recent", "log2 tokens", 0, 32, "last tokens that it surely keeps"),
    _candidate("bits", "bits", 0, _RAW_BITS, "bits of an older block's number, raw counted as 16"),
    _candidate("coded_share", "share", 0, 1, "share of kept tokens that are stored in fewer bits than raw"),
    _candidate("host_share", "share", 0, 1, "share of kept tokens that live on the host"),
    _candidate("bytes_share", "share", 0, _INF, "device bytes over those of a full cache"),
    _candidate("recoverable", "flag", 0, 1, "whether a shadow is kept"),
    *(_candidate(f"family_{family.value.replace('+', '_')}", "flag", 0, 1, "its family") for family in Family),
    *(_candidate(f"has_{method}", "flag", 0, 1, "whether it has this stage") for method in METHODS),
    _candidate("mass_beyond", "share", 0, 1, "far mass at the last token that it surely keeps, between horizons"),
    _candidate("mass_beyond_max", "share", 0, 1, "the same, largest head"),
    _candidate("mass_beyond_last", "share", 0, 1, "the same, last step looked at"),
    _candidate("mass_beyond_deep", "share", 0, 1, "the same, upper half of the layers"),
    _candidate("votes_beyond", "share", 0, 1, "far votes at the last token that it surely keeps, between horizons"),
    _candidate("votes_beyond_max", "share", 0, 1, "the same, largest head"),
    _candidate("repeat_beyond", "share", 0, 1, "repeats last seen beyond the last token that it surely keeps"),
    _candidate("copied_beyond", "tokens", 0, 32, "length of the copy under way, if from beyond that token"),
    _candidate("votes_dropped", "share", 0, 1, "dropped votes at its kept share, between shares"),
    _candidate("votes_dropped_max", "share", 0, 1, "the same, largest head"),
    _candidate("votes_missed", "share", 0, 1, "missed votes at its kept share, between shares"),
    _candidate("votes_missed_max", "share", 0, 1, "the same, largest head"),
    _candidate("votes_missed_deep", "share", 0, 1, "the same, upper half of the layers"),
)

FEATURES: tuple[Feature, ...] = (*REQUEST_FEATURES, *SIGNAL_FEATURES, *CANDIDATE_FEATURES)
NAMES: tuple[str, ...] = tuple(feature.name for feature in FEATURES)


def _hash() -> str:
    columns = [asdict(feature) | {"part": feature.part.value} for feature in FEATURES]
    text = json.dumps({"version": SCHEMA_VERSION, "columns": columns}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


SCHEMA_HASH = _hash()
"""Names this schema: version, names, order, units, ranges and meanings as they are worded."""


@dataclass(frozen=True)
class Candidate:
    """What one pipeline does to the caches of R requests: the descriptor behind the candidate features, [R] each."""

    family: Family
    recoverable: bool
    methods: frozenset[str]
    bits: float
    kept_tokens: F64
    recent_tokens: F64
    coded_share: F64
    host_share: F64
    device_bytes: F64
    host_bytes: F64
    shadow_bytes: F64

    @property
    def lower_tier_bytes(self) -> F64:
        """Everything off the device."""
        return self.host_bytes + self.shadow_bytes


class FeatureBuilder:
    """Turns a worker's reports into rows.

    Args:
        catalog: the worker's stages.
        layout: its cache layout.
        horizons_tokens: ``Hello.far_horizons_tokens``.
    """

    def __init__(self, catalog: StageCatalog, layout: CacheLayout, horizons_tokens: Sequence[int]) -> None:
        self._catalog = catalog
        self._layout = layout
        horizons = list(horizons_tokens)
        self._places = [horizons.index(horizon) if horizon in horizons else -1 for horizon in HORIZONS_TOKENS]

    @classmethod
    def of(cls, hello: policy_pb2.Hello, catalog: StageCatalog | None = None) -> FeatureBuilder:
        """From what a worker said of itself.

        Raises:
            ValueError: a dtype whose size is not known.
        """
        layout = CacheLayout.of(hello.layers, hello.kv_heads, hello.head_dim, hello.raw_dtype)
        return cls(catalog or StageCatalog(hello.model.stages), layout, hello.far_horizons_tokens)

    def rows(self, state: policy_pb2.RequestState, pipelines: Sequence[str]) -> F64:
        """One row per pipeline, [pipelines, features].

        Raises:
            PipelineError: a pipeline that the worker does not know.
        """
        rows: F64 = self.matrix(self.state_row(state)[None], np.array([seen_tokens(state)]), pipelines)[0]
        return rows

    def matrix(self, states: F64, seen: I64, pipelines: Sequence[str]) -> F64:
        """The rows of R requests and C pipelines, [R, C, features].

        Args:
            states: [R, request and signal features], see :meth:`state_row`.
            seen: [R] tokens so far of each request.
            pipelines: the candidates, the same for all.

        Raises:
            PipelineError: a pipeline that the worker does not know.
        """
        seen = np.maximum(1, seen)
        return self.fill(states, seen, [self.describe(pipeline, seen) for pipeline in pipelines])

    def fill(self, states: F64, seen: I64, candidates: Sequence[Candidate]) -> F64:
        """:meth:`matrix` of candidates that were described for ``seen`` [R], each 1 or more."""
        rows = np.empty((len(states), len(candidates), len(FEATURES)))
        rows[:, :, : states.shape[1]] = states[:, None]
        rows[:, :, states.shape[1] :] = self.candidate_part(states, seen, candidates)
        return rows

    def candidate_part(self, states: F64, seen: I64, candidates: Sequence[Candidate]) -> F64:
        """What rows of :meth:`fill` hold behind the requests' own features, [R, C, candidate features]."""
        full = estimate_many(_FULL, seen, self._layout)
        assert full is not None
        part = np.empty((len(states), len(candidates), len(FEATURES) - states.shape[1]))
        for place, column in enumerate(_candidate_columns(states, seen, candidates, full.device_bytes)):
            part[:, :, place] = column
        return part

    def describe(self, pipeline: str, seen: I64) -> Candidate:
        """What a pipeline does to caches of ``seen`` [R] tokens.

        Raises:
            PipelineError: a pipeline that the worker does not know.
        """
        return describe(self._catalog.key(pipeline), seen, self._layout)

    def state_row(self, state: policy_pb2.RequestState) -> F64:
        """A request's part of its rows, [request and signal features].

        Raises:
            ValueError: a scenario that is not known, or (PipelineError) a pipeline in force that is not.
        """
        seen = max(1, seen_tokens(state))
        nan = math.nan
        prompt = state.prompt if state.HasField("prompt") else None
        scenario = effective_scenario(state.scenario)
        signals = state.signals
        measured = bool(signals.steps)
        told = bool(signals.repeat_beyond)  # all that is said of repeats is said together
        in_force = self._catalog.key(state.pipeline)
        full_bytes = state.cache.full_cache_bytes
        audits = [
            math.log(max(audit.divergence, AUDIT_FLOOR)) for audit in state.audits if audit.pipeline == state.pipeline
        ]
        return np.array(
            [
                math.log2(seen),
                state.generated_tokens / seen,
                float(prompt.turns) if prompt else nan,
                prompt.distinct_share if prompt else nan,
                prompt.repeated_share if prompt else nan,
                prompt.unigram_entropy if prompt else nan,
                *(float(scenario == known) for known in PRESETS),
                *self._by_horizon(signals.far_mass),
                *self._by_horizon(signals.far_mass_max),
                *self._by_horizon(signals.far_mass_last),
                *self._by_horizon(signals.far_mass_worst_layer),
                *self._by_depth(signals.far_mass_by_depth),
                *_by_share(signals.dropped_votes),
                *_by_share(signals.dropped_votes_max),
                *_by_share(signals.missed_votes),
                *_by_share(signals.missed_votes_max),
                *_by_share(signals.missed_votes_by_depth, DEPTHS),
                *self._by_horizon(signals.far_votes),
                *self._by_horizon(signals.far_votes_max),
                *self._by_depth(signals.far_votes_by_depth),
                signals.sink_mass if measured else nan,
                signals.attention_entropy if measured else nan,
                signals.next_token_entropy if measured else nan,
                signals.next_token_entropy_max if measured else nan,
                signals.top1_probability if measured else nan,
                signals.surprise if measured else nan,
                signals.repeat_rate if told else nan,
                *self._by_horizon(signals.repeat_beyond),
                float(signals.copied_tokens) if told else nan,
                math.log2(max(1, signals.copied_from_tokens)) if told else nan,
                state.kept_tokens / seen if state.kept_tokens else nan,
                nan if family_of(in_force) is Family.OTHER else _bits(in_force),
                state.cache.device_bytes / full_bytes if full_bytes else nan,
                sum(audits) / len(audits) if audits else nan,
            ]
        )

    def _by_horizon(self, values: Sequence[float]) -> list[float]:
        return [values[place] if 0 <= place < len(values) else math.nan for place in self._places]

    def _by_depth(self, values: Sequence[float]) -> list[float]:
        measured = len(values) // DEPTHS
        quarters = [values[depth * measured : (depth + 1) * measured] for depth in range(DEPTHS)]
        return [value for quarter in quarters for value in self._by_horizon(quarter)]


def _candidate_columns(
    states: F64, seen: I64, candidates: Sequence[Candidate], full_bytes: I64
) -> list[F64 | npt.NDArray[np.bool_]]:
    """The candidate features in order: of R requests and C candidates, each [R, C] or [C]."""

    def of(name: str) -> F64:
        return np.stack([getattr(candidate, name) for candidate in candidates], axis=1)

    tokens = seen.astype(np.float64)[:, None]
    kept = of("kept_tokens")
    log_recent = np.log2(np.maximum(1.0, of("recent_tokens")))
    kept_share = np.minimum(1.0, kept / tokens)
    families = [candidate.family for candidate in candidates]
    columns: list[F64 | npt.NDArray[np.bool_]] = [
        kept_share,
        np.log2(np.maximum(1.0, kept)),
        np.log2(1.0 + np.maximum(0.0, tokens - kept)),
        log_recent,
        np.array([candidate.bits for candidate in candidates]),
        of("coded_share"),
        of("host_share"),
        of("device_bytes") / full_bytes[:, None],
        np.array([candidate.recoverable for candidate in candidates]),
        *(np.array([one is family for one in families]) for family in Family),
        *(np.array([method in candidate.methods for candidate in candidates]) for method in METHODS),
    ]
    # Where nothing is dropped nothing is lost by it; what an unknown stage drops is not known.
    otherwise = np.where([family is Family.OTHER for family in families], math.nan, 0.0)
    drops = kept < tokens
    row, column = np.nonzero(drops)
    horizon, share = _segment(_LOG_HORIZONS, log_recent[row, column]), _segment(_KEPT, kept_share[row, column])

    def where_dropped(values: F64) -> F64:
        out = np.broadcast_to(otherwise, drops.shape).copy()
        out[row, column] = values
        return out

    columns += [where_dropped(_between(_mean_of(states, of_horizons), row, horizon)) for of_horizons in _FAR]
    copied = states[row, _COPIED] * (states[row, _COPIED_FROM] > log_recent[row, column])
    columns += [where_dropped(copied)]
    columns += [
        where_dropped(_between(_nothing_at_the_end(_mean_of(states, of_shares)), row, share)) for of_shares in _DROPPED
    ]
    return columns


def seen_tokens(state: policy_pb2.RequestState) -> int:
    """Tokens so far, prompt and generated, kept or not."""
    return int(state.prompt_tokens + state.generated_tokens)


def describe(key: PipelineKey, seen: I64, layout: CacheLayout) -> Candidate:
    """What a pipeline does to caches of ``seen`` [R] tokens; NaN where a stage is not known to the estimate."""
    given = {name: dict(parameters) for name, parameters in key}
    shadows = [parameters["shadow"] is True for parameters in given.values() if "shadow" in parameters]
    recoverable, methods = bool(shadows) and all(shadows), frozenset(METHODS).intersection(given)
    footprint = estimate_many(key, seen, layout)
    if footprint is None:
        unknown = np.full(len(seen), math.nan)
        return Candidate(Family.OTHER, recoverable, methods, math.nan, *[unknown] * 7)
    tokens, kept = seen.astype(np.float64), footprint.kept_tokens.astype(np.float64)
    recent = tokens
    if "window" in given:
        recent = np.minimum(tokens, float(given["window"]["recent"]))
    elif "snapkv" in given:
        recent = np.where(kept < tokens, 2.0 * BLOCK_TOKENS, tokens)
    elif not given.keys().isdisjoint(HEAVY_HITTERS):
        recent = np.where(kept < tokens, kept / 2, tokens)
    elif not given.keys().isdisjoint((*SHARE_EVICTORS, *FIXED_EVICTORS)):
        recent = np.where(kept < tokens, float(BLOCK_TOKENS), tokens)
    return Candidate(
        family=family_of(key),
        recoverable=recoverable,
        methods=methods,
        bits=_bits(key),
        kept_tokens=kept,
        recent_tokens=recent,
        coded_share=footprint.coded_tokens / np.maximum(1.0, kept),
        host_share=footprint.host_tokens / np.maximum(1.0, kept),
        device_bytes=footprint.device_bytes.astype(np.float64),
        host_bytes=footprint.host_bytes.astype(np.float64),
        shadow_bytes=footprint.shadow_bytes.astype(np.float64),
    )


_KINDS = (
    {"window": "window"}
    | dict.fromkeys((*SHARE_EVICTORS, *FIXED_EVICTORS), "scored")
    | dict.fromkeys(CODECS, "quantise")
)
_LOSSLESS = ("full", "host")


def family_of(key: PipelineKey) -> Family:
    """The family of a pipeline, whatever its parameters; ``OTHER`` where it names a stage that is not built in."""
    kinds: list[str] = []
    for name, _ in key:
        if name in _KINDS:
            kinds.append(_KINDS[name])
        elif name not in _LOSSLESS:
            return Family.OTHER
    return Family("+".join(kinds)) if kinds else Family.EXACT


def _bits(key: PipelineKey) -> float:
    """Bits of an older block's number."""
    return float(code_bits(key) or _RAW_BITS)


def _by_share(values: Sequence[float], parts: int = 1) -> list[float]:
    return [values[place] if place < len(values) else math.nan for place in range(parts * len(KEPT_SHARES))]


def _segment(grid: F64, at: F64) -> tuple[I64, I64, F64]:
    """The grid points around each of ``at`` [R], and how far it lies from the first to the second, 0 to 1.

    On a point, and beyond the grid's ends, that point is both: what is known there needs no neighbour.
    """
    right = np.clip(np.searchsorted(grid, at), 1, len(grid) - 1)
    left = right - 1
    weight = np.clip((at - grid[left]) / (grid[right] - grid[left]), 0.0, 1.0)
    return np.where(weight == 1.0, right, left), np.where(weight == 0.0, left, right), weight


def _between(values: F64, row: I64, segment: tuple[I64, I64, F64]) -> F64:
    """Linear interpolation in N :func:`_segment`, each of ``row`` [N] of ``values`` [R, G]."""
    left, right, weight = segment
    return np.asarray(values[row, left] * (1.0 - weight) + values[row, right] * weight)


def _mean_of(states: F64, columns: I64) -> F64:
    """Mean of the P signals that ``columns`` [P, G] names, [R, G]."""
    return states[:, columns[0]] if len(columns) == 1 else np.asarray(states[:, columns].mean(axis=1))


def _nothing_at_the_end(values: F64) -> F64:
    """``values`` [R, G] with a column of zeros behind: who keeps everything drops nothing."""
    return np.hstack([values, np.zeros((len(values), 1))])


def _columns(*names: str) -> list[int]:
    return [NAMES.index(name) for name in names]


_FULL: PipelineKey = (("full", ()),)
_LOG_HORIZONS = np.log2(np.array(HORIZONS_TOKENS, np.float64))
_DEEP = range(DEPTHS // 2, DEPTHS)
_FAR = [
    np.array([_columns(*(f"{signal}_{horizon}" for horizon in HORIZONS_TOKENS)) for signal in signals])
    for signals in (
        ("far_mass",),
        ("far_mass_max",),
        ("far_mass_last",),
        tuple(f"far_mass_depth{depth}" for depth in _DEEP),
        ("far_votes",),
        ("far_votes_max",),
        ("repeat_beyond",),
    )
]
_COPIED, _COPIED_FROM = _columns("copied_tokens", "log2_copied_from")
_KEPT = np.array([*KEPT_SHARES, 1.0])
_DROPPED = [
    np.array([_columns(*(f"{signal}_{part}" for part in _PERCENT)) for signal in signals])
    for signals in (
        ("dropped_votes",),
        ("dropped_votes_max",),
        ("missed_votes",),
        ("missed_votes_max",),
        tuple(f"missed_votes_depth{depth}" for depth in _DEEP),
    )
]

assert set(PRESETS) == set(Scenario.values()) - {Scenario.SCENARIO_UNSPECIFIED}
