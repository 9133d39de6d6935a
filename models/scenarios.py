"""Scenario presets: the objective a request gets where it states none.

Controller (planner) and worker (reports, validation) both read this module, so it imports neither torch nor numpy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from kvpilot.v1 import common_pb2
from kvpilot.v1.common_pb2 import Scenario


@dataclass(frozen=True)
class Preset:
    """An objective with nothing left unset. See ``common.proto``'s Objective for the meaning of each part."""

    max_divergence: float
    """Most nats per token to lose over the next 32 tokens; 0 admits exact pipelines only."""
    latency_weight: float
    """Price of latency, relative to memory."""
    memory_weight: float
    """Price of device bytes, relative to latency."""


PRESETS: Mapping[Scenario, Preset] = MappingProxyType(
    {
        Scenario.SCENARIO_LONG_CONTEXT: Preset(max_divergence=0.03, latency_weight=0.5, memory_weight=1.0),
        Scenario.SCENARIO_HIGH_THROUGHPUT: Preset(max_divergence=0.05, latency_weight=1.0, memory_weight=1.0),
        Scenario.SCENARIO_EDGE: Preset(max_divergence=0.10, latency_weight=0.25, memory_weight=2.0),
        Scenario.SCENARIO_MULTI_TURN: Preset(max_divergence=0.02, latency_weight=1.0, memory_weight=0.5),
        Scenario.SCENARIO_ACCURACY_CRITICAL: Preset(max_divergence=0.0, latency_weight=1.0, memory_weight=0.5),
        Scenario.SCENARIO_STREAMING: Preset(max_divergence=0.10, latency_weight=2.0, memory_weight=1.0),
        Scenario.SCENARIO_MIXED: Preset(max_divergence=0.03, latency_weight=1.0, memory_weight=1.0),
        Scenario.SCENARIO_PREFILL_HEAVY: Preset(max_divergence=0.03, latency_weight=2.0, memory_weight=0.5),
        Scenario.SCENARIO_MINIMAL_MODIFICATION: Preset(max_divergence=0.03, latency_weight=1.0, memory_weight=1.0),
        Scenario.SCENARIO_HARDWARE_SPECIFIC: Preset(max_divergence=0.03, latency_weight=1.0, memory_weight=1.0),
    }
)
"""One preset per scenario; SCENARIO_UNSPECIFIED is SCENARIO_MIXED, see :func:`effective_scenario`."""


def effective_scenario(scenario: Scenario) -> Scenario:
    """The scenario that holds: ``SCENARIO_UNSPECIFIED`` means ``SCENARIO_MIXED``.

    Raises:
        ValueError: for a number that is no scenario.
    """
    held = Scenario.SCENARIO_MIXED if scenario == Scenario.SCENARIO_UNSPECIFIED else scenario
    if held not in PRESETS:
        raise ValueError(f"scenario {scenario}: expected one of {', '.join(Scenario.Name(known) for known in PRESETS)}")
    return held


def scenario_word(scenario: Scenario) -> str:
    """A scenario as people write it, e.g. ``long-context``."""
    name: str = Scenario.Name(effective_scenario(scenario))
    return name.removeprefix("SCENARIO_").lower().replace("_", "-")


def fill_objective(scenario: Scenario, given: common_pb2.Objective) -> common_pb2.Objective:
    """The objective with every part set: what the request states, and the scenario's preset for the rest."""
    preset = PRESETS[effective_scenario(scenario)]
    return common_pb2.Objective(
        max_divergence=given.max_divergence if given.HasField("max_divergence") else preset.max_divergence,
        latency_weight=given.latency_weight if given.HasField("latency_weight") else preset.latency_weight,
        memory_weight=given.memory_weight if given.HasField("memory_weight") else preset.memory_weight,
    )
