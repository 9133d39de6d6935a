"""Scenario presets."""

from __future__ import annotations

import pytest

from kvpilot.v1.common_pb2 import Objective, Scenario
from models.scenarios import PRESETS, effective_scenario, fill_objective, scenario_word


def test_every_scenario_has_a_preset() -> None:
    named = {Scenario.Value(name) for name in Scenario.keys()}  # noqa: SIM118  # an enum wrapper, not a dict
    assert set(PRESETS) == named - {Scenario.SCENARIO_UNSPECIFIED}


def test_only_accuracy_critical_is_exact() -> None:
    exact = [scenario for scenario, preset in PRESETS.items() if preset.max_divergence == 0]
    assert exact == [Scenario.SCENARIO_ACCURACY_CRITICAL]


def test_unspecified_is_mixed() -> None:
    assert effective_scenario(Scenario.SCENARIO_UNSPECIFIED) == Scenario.SCENARIO_MIXED
    assert scenario_word(Scenario.SCENARIO_LONG_CONTEXT) == "long-context"


def test_what_the_request_states_wins_and_zero_is_a_statement() -> None:
    filled = fill_objective(Scenario.SCENARIO_STREAMING, Objective(max_divergence=0.0, latency_weight=5))
    preset = PRESETS[Scenario.SCENARIO_STREAMING]
    assert (filled.max_divergence, filled.latency_weight) == (0.0, 5)
    assert filled.memory_weight == preset.memory_weight


def test_an_unknown_scenario_is_an_error() -> None:
    with pytest.raises(ValueError, match="scenario 99: expected one of SCENARIO_LONG_CONTEXT"):
        effective_scenario(99)
