"""What a planner is: one call per worker and tick, over all of its live requests at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from kvpilot.catalog import StageCatalog
from kvpilot.v1 import common_pb2, policy_pb2
from models.features import F64, Family
from models.footprint import CacheLayout


@dataclass(frozen=True)
class RequestView:
    """A live request as the planner sees it. ``state`` is shared with the controller's state: read only."""

    state: policy_pb2.RequestState
    outstanding: str | None = None
    """Pipeline of a directive sent and not answered yet."""
    overridden: bool = False
    """An operator holds it: plan nothing for it, but count its bytes."""
    refused: frozenset[str] = frozenset()
    """Pipeline texts the worker has refused for this request and that are not to be tried again yet."""

    @property
    def request_id(self) -> str:
        """Job id."""
        return self.state.request_id

    @property
    def seen_tokens(self) -> int:
        """Tokens so far, prompt and generated, kept or not."""
        return self.state.prompt_tokens + self.state.generated_tokens

    @property
    def remaining_tokens(self) -> int:
        """Most tokens that are still to be generated."""
        return max(0, self.state.max_tokens - self.state.generated_tokens)

    @property
    def tokens_since_switch(self) -> int | None:
        """Tokens generated since its last switch, whoever ordered it; None if there was none."""
        if not self.state.HasField("last_switch"):
            return None
        return self.state.generated_tokens - self.state.last_switch.at_token


@dataclass(frozen=True)
class TierView:
    """Use of one tier of a worker."""

    used_bytes: int
    budget_bytes: int

    def share(self, extra_bytes: int = 0) -> float:
        """Use over budget, with ``extra_bytes`` more in use; a tier without budget is full."""
        return (self.used_bytes + extra_bytes) / self.budget_bytes if self.budget_bytes > 0 else 1.0


@dataclass(frozen=True)
class WorkerView:
    """A worker and its live requests, as of the last reports."""

    hello: policy_pb2.Hello
    state: policy_pb2.WorkerState
    requests: tuple[RequestView, ...]
    catalog: StageCatalog

    @cached_property
    def layout(self) -> CacheLayout:
        """The model's cache layout.

        Raises:
            ValueError: Hello names a dtype whose size is not known.
        """
        hello = self.hello
        return CacheLayout.of(hello.layers, hello.kv_heads, hello.head_dim, hello.raw_dtype)

    def tier(self, name: str) -> TierView:
        """Use of a tier, by the last report, or empty by Hello's budget; a tier the worker lacks has no budget."""
        for use in self.state.tiers:
            if use.name == name:
                return TierView(use.used_bytes, use.budget_bytes)
        for tier in self.hello.tiers:
            if tier.name == name:
                return TierView(0, tier.budget_bytes)
        return TierView(0, 0)


@dataclass(frozen=True)
class Forecast:
    """What a predictor said of the pipeline that was chosen."""

    bundle: str
    divergence: float
    """Nats per token over the next horizon."""
    bound: float
    """Nats per token that are exceeded with the bundle's alpha at most."""
    runner_up: str
    """The pipeline that would have been next; empty if there was no other."""
    family: Family
    row: F64 = field(compare=False, repr=False)
    """[features] of the chosen pipeline, as the predictor saw them."""


@dataclass(frozen=True)
class Decision:
    """The pipeline a request should have. The one in force means: leave it."""

    request_id: str
    pipeline: str
    reason: str
    """In words, with the numbers that decided it."""
    forecast: Forecast | None = None
    """None where a rule decided."""
    cause: common_pb2.Cause = common_pb2.CAUSE_UNSPECIFIED
    """What it is for; unspecified where nothing changes."""


class Planner(Protocol):
    """Decides. Called from the event loop: a plan over 256 requests should take a few milliseconds at most."""

    def prepare(self, worker: WorkerView) -> None:
        """Reports came in: whatever can be worked out of them before the next plan. ``worker`` holds their requests."""
        ...

    def plan(self, worker: WorkerView) -> Sequence[Decision]:
        """One decision for each request that is to be steered; requests without one are left alone."""
        ...
