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
    static: str
    """The pipeline that one would fix where nothing steers: the survey's choice (arXiv 2603.20397), as far as there are
    stages for it. Shown beside what steering reaches; nothing is planned with it, and evaluation compares with the best
    static pipelines found in hindsight, which are harder to beat."""


PRESETS: Mapping[Scenario, Preset] = MappingProxyType(
    {  # max_divergence, latency_weight, memory_weight, static
        # host offload with recall and 4 bits; blocks are read on the host, none is recalled
        Scenario.SCENARIO_LONG_CONTEXT: Preset(0.03, 0.5, 1.0, "kivi(bits=4) | host(recent=256)"),
        # eviction and light compression: fewer bytes read per step
        Scenario.SCENARIO_HIGH_THROUGHPUT: Preset(0.05, 1.0, 1.0, "snapkv(keep=0.5) | kivi(bits=4)"),
        # heavy quantisation; host memory is short too, so no exact copy
        Scenario.SCENARIO_EDGE: Preset(0.10, 0.25, 2.0, "kivi(bits=2, shadow=false)"),
        # a later turn may ask for anything: drop nothing, round little, park older blocks on the host
        Scenario.SCENARIO_MULTI_TURN: Preset(0.02, 1.0, 0.5, "int8 | host(recent=256)"),
        # exact tiers only
        Scenario.SCENARIO_ACCURACY_CRITICAL: Preset(0.0, 1.0, 0.5, "host(recent=256)"),
        # a window
        Scenario.SCENARIO_STREAMING: Preset(0.10, 2.0, 1.0, "window(sinks=4, recent=512)"),
        # the survey has none and means the learned policy; this one no kind of text rules out
        Scenario.SCENARIO_MIXED: Preset(0.03, 1.0, 1.0, "kivi(bits=4)"),
        # nacl, chosen once at the prompt's end
        Scenario.SCENARIO_PREFILL_HEAVY: Preset(0.03, 2.0, 0.5, "nacl(keep=0.5)"),
        # a plug-in: snapkv or kivi; of these, that which drops nothing
        Scenario.SCENARIO_MINIMAL_MODIFICATION: Preset(0.03, 1.0, 1.0, "kivi(bits=4)"),
        # by the link to the host, where it was measured; where it was not, little and small goes over it
        Scenario.SCENARIO_HARDWARE_SPECIFIC: Preset(0.03, 1.0, 1.0, "kivi(bits=4) | host(recent=1024)"),
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
