"""Help texts exist, are quick, and say what matters; bad command lines exit with 2."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from cli.main import ScenarioName, app
from kvpilot.request import SCENARIOS

COMMANDS = [
    *("up", "generate", "chat", "top", "inspect", "mode", "log-level", "override", "release", "demo", "recipes"),
    "place",
    *("model/fetch", "model/list", "model/profile", "bench/serve", "bench/steer", "bench/kernels"),
    *("models/collect",),
    *("models/train", "models/evaluate", "models/calibrate", "models/list", "models/show", "models/explain"),
    *("models/promote", "models/rollback", "models/shadow", "models/history", "models/decisions"),
]


def run(*words: str, **environment: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(words), env={"COLUMNS": "200", "NO_COLOR": "1", **environment})
    return result.exit_code, result.output


def test_top_help_lists_every_command_and_the_way_in() -> None:
    code, said = run("--help")
    assert code == 0
    for command in COMMANDS:
        assert re.search(rf"\b{command.split('/')[0]}\b", said)
    for promise in ("kvpilot model fetch", "kvpilot up", "KVPILOT_*", "Exit codes"):
        assert promise in said


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    code, said = run(*command.split("/"), "--help")
    assert code == 0
    assert "Usage: " in said
    assert len(said.splitlines()) > 6


def test_scenarios_are_those_of_the_api() -> None:
    assert {word.value for word in ScenarioName} == set(SCENARIOS)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("generate", "Hi", "--scenario", "fast"), "--scenario"),
        (("generate", "Hi", "--logprobs", "3"), "--logprobs"),
        (("generate", "Hi", "--file", "x.txt"), "not both"),
        (("generate", "--file", "no-such-file.txt"), "no-such-file.txt"),
        (("generate", "Hi", "--seed", "-1"), "seed"),
        (("generate", "Hi", "--max-tokens", "99999999999"), "max_tokens"),
        (("up", "--workers", "0"), "workers"),
        (("up", "--model", "no-such-model"), "kvpilot model list"),
        (("model", "fetch", "no-such-model"), "known: smollm2"),
        (("--config", "no-such.toml", "top", "--once"), "no-such.toml"),
        (("mode", "sometimes"), "sometimes"),
        (("recipes", "--context", "0"), "--context"),
        (("recipes", "--dtype", "int3"), "--dtype"),
        (("recipes", "--model", "no-such-model"), "kvpilot model list"),
        (("bench", "kernels", "--formats", "raw,int3"), "int3"),
        (("bench", "kernels", "--backend", "abacus"), "abacus"),
        (("bench", "kernels", "--context", "32"), "64"),
    ],
)
def test_bad_command_lines_exit_with_2_and_name_what_is_wrong(words: tuple[str, ...], named: str) -> None:
    code, said = run(*words)
    assert code == 2
    assert named in said


def test_nothing_listening_is_said_so() -> None:
    code, said = run("top", "--once", "--endpoint", "127.0.0.1:1")
    assert code == 1
    assert "nothing answers at 127.0.0.1:1; start it with `kvpilot up`" in said
