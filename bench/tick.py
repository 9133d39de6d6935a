"""How long a planning tick takes: 256 live requests of one worker, all candidates of each, the real planner.

The worker is made of messages and has SmolLM2-135M's cache layout, which the time hardly depends on. Every request has
just reported, under memory pressure: nothing can be taken from an earlier tick. What is worked out when a report
comes (``Planner.prepare``) is spread over the time between two ticks and not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from controller.learned import LearnedPlanner, measure_tick_ms
from controller.planner import RequestView, WorkerView
from kernels.layout import CacheShape
from kvpilot.v1 import common_pb2, generation_pb2, policy_pb2
from models.features import DEPTHS, HORIZONS_TOKENS, KEPT_SHARES, SCHEMA_HASH
from models.footprint import CacheLayout
from models.predictor import Predictor
from models.scenarios import PRESETS
from workers.profile.profile import KINDS
from workers.stages.registry import catalog, describe

REQUESTS = 256
_SHAPE = CacheShape(layers=30, kv_heads=3, query_heads=9, head_dim=64, dtype=torch.float32)
PROFILED = frozenset(KINDS)
"""The worker has found all that stages need to know of its model, so that it knows every candidate."""
_BANDWIDTH = 1e10
"""Bytes per second of both tiers; the time does not depend on it."""


@dataclass(frozen=True)
class _Holder:
    active: Predictor | None


def tick_ms(predictor: Predictor, requests: int = REQUESTS, times: int = 21) -> float:
    """Median CPU milliseconds of a tick on one core."""
    with threadpool_limits(1):
        return measure_tick_ms(LearnedPlanner(_Holder(predictor)), crowded_worker(requests), times)


def crowded_worker(requests: int, seed: int = 0) -> WorkerView:
    """A worker with so many requests of all scenarios and lengths, its device tier nearly full."""
    rng = np.random.default_rng(seed)
    stages = catalog(_SHAPE, PROFILED)
    layout = CacheLayout.of(_SHAPE.layers, _SHAPE.kv_heads, _SHAPE.head_dim, "float32")
    row_bytes = layout.heads * layout.block_bytes(None)
    states = [_request(number, rng, row_bytes) for number in range(requests)]
    used = sum(state.cache.device_bytes for state in states)
    tiers = {"device": int(used / 0.9), "host": 2 * used}
    hello = policy_pb2.Hello(
        worker="made-of-messages",
        model=generation_pb2.Model(name="smollm2-135m-instruct", stages=describe(_SHAPE, PROFILED)),
        layers=_SHAPE.layers,
        kv_heads=_SHAPE.kv_heads,
        query_heads=_SHAPE.query_heads,
        head_dim=_SHAPE.head_dim,
        raw_dtype="float32",
        far_horizons_tokens=HORIZONS_TOKENS,
        feature_schema_hash=SCHEMA_HASH,
        tiers=[
            policy_pb2.Tier(name=name, budget_bytes=budget, bandwidth_bytes_per_s=_BANDWIDTH)
            for name, budget in tiers.items()
        ],
    )
    load = policy_pb2.WorkerState(
        running=requests,
        tiers=[
            policy_pb2.TierUse(name="device", used_bytes=used, budget_bytes=tiers["device"]),
            policy_pb2.TierUse(name="host", used_bytes=0, budget_bytes=tiers["host"]),
        ],
    )
    return WorkerView(hello=hello, state=load, requests=tuple(map(RequestView, states)), catalog=stages)


def _request(number: int, rng: np.random.Generator, row_bytes: int) -> policy_pb2.RequestState:
    """One request, plain numbers in every field."""

    def falling(count: int) -> list[float]:
        return sorted(rng.random(count).tolist(), reverse=True)

    prompt, generated = int(rng.integers(200, 4000)), int(rng.integers(64, 512))
    full_bytes = -(-(prompt + generated) // 32) * row_bytes
    horizons = len(HORIZONS_TOKENS)
    return policy_pb2.RequestState(
        request_id=f"request-{number}",
        scenario=list(PRESETS)[number % len(PRESETS)],
        pipeline="full",
        prompt_tokens=prompt,
        generated_tokens=generated,
        max_tokens=2048,
        kept_tokens=prompt + generated,
        cache=common_pb2.CacheBytes(device_bytes=full_bytes, full_cache_bytes=full_bytes),
        prompt=policy_pb2.PromptStatistics(
            distinct_share=rng.random(), repeated_share=rng.random(), unigram_entropy=5.0, turns=1
        ),
        signals=policy_pb2.Signals(
            steps=4,
            far_mass=falling(horizons),
            far_mass_max=falling(horizons),
            far_mass_last=falling(horizons),
            far_mass_worst_layer=falling(horizons),
            far_mass_by_depth=rng.random(DEPTHS * horizons).tolist(),
            far_votes=falling(horizons),
            far_votes_max=falling(horizons),
            far_votes_by_depth=rng.random(DEPTHS * horizons).tolist(),
            dropped_votes=falling(len(KEPT_SHARES)),
            dropped_votes_max=falling(len(KEPT_SHARES)),
            missed_votes=falling(len(KEPT_SHARES)),
            missed_votes_max=falling(len(KEPT_SHARES)),
            missed_votes_by_depth=rng.random(DEPTHS * len(KEPT_SHARES)).tolist(),
            repeat_beyond=falling(horizons),
            sink_mass=rng.random(),
            attention_entropy=rng.random(),
            next_token_entropy=3 * rng.random(),
            next_token_entropy_max=5 * rng.random(),
            top1_probability=rng.random(),
            surprise=3 * rng.random(),
            repeat_rate=rng.random(),
        ),
    )
