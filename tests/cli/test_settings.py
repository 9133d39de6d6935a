"""Where a setting comes from, and what is said about a bad one."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from cli.errors import describe_validation
from cli.plan import plan_stack
from cli.settings import CliSettings, load_settings, settings_file


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.delenv("KVPILOT_CONFIG", raising=False)
    return tmp_path


def make_model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("")
    return folder


def test_flag_beats_environment_beats_file_beats_default(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().workers == 1
    (home / "kvpilot.toml").write_text('workers = 2\nendpoint = "file:1"\n')
    assert load_settings().workers == 2
    monkeypatch.setenv("KVPILOT_WORKERS", "3")
    assert load_settings().workers == 3
    assert load_settings(workers=4).workers == 4
    assert load_settings(workers=None).endpoint == "file:1"


def test_file_here_beats_the_one_at_home_and_a_named_one_beats_both(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert settings_file() is None
    at_home = home / ".config" / "kvpilot" / "kvpilot.toml"
    at_home.parent.mkdir(parents=True)
    at_home.write_text("workers = 2\n")
    assert load_settings().workers == 2
    (home / "kvpilot.toml").write_text("workers = 3\n")
    assert load_settings().workers == 3
    (home / "other.toml").write_text("workers = 4\n")
    monkeypatch.setenv("KVPILOT_CONFIG", str(home / "other.toml"))
    assert load_settings().workers == 4
    (home / "flag.toml").write_text("workers = 5\n")
    assert load_settings(home / "flag.toml").workers == 5


def test_bad_settings_are_all_named() -> None:
    with pytest.raises(ValidationError) as caught:
        CliSettings(workers=0, threads=-1, nonsense=1)  # type: ignore[call-arg]
    said = describe_validation(caught.value)
    assert "workers: Input should be greater than or equal to 1, not 0" in said
    assert "threads: Input should be greater than or equal to 0, not -1" in said
    assert "nonsense: Extra inputs are not permitted" in said


def test_budgets_and_threads_are_shared_out(home: Path) -> None:
    settings = load_settings(
        model=str(make_model(home / "tiny")), workers=2, device_budget="64MiB", host_budget="128MiB", threads=4
    )
    plan = plan_stack(settings)
    assert [worker["KVPILOT_WORKER_NAME"] for worker in plan.workers] == ["worker-0", "worker-1"]
    for worker in plan.workers:
        assert worker["KVPILOT_WORKER_DEVICE_BUDGET_BYTES"] == str(32 << 20)
        assert worker["KVPILOT_WORKER_HOST_BUDGET_BYTES"] == str(64 << 20)
        assert worker["KVPILOT_WORKER_THREADS"] == "2"
        assert worker["KVPILOT_WORKER_MODEL_NAME"] == "tiny"


def test_process_tables_and_environment_beat_shares_but_not_flags(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = str(make_model(home / "tiny"))
    (home / "kvpilot.toml").write_text(
        '[worker]\ndevice_budget_bytes = "8MiB"\nmax_running = 3\n[controller]\ntick_ms = 50\n'
    )
    plan = plan_stack(load_settings(model=model))
    assert plan.workers[0]["KVPILOT_WORKER_DEVICE_BUDGET_BYTES"] == "8MiB"
    assert plan.workers[0]["KVPILOT_WORKER_MAX_RUNNING"] == "3"
    assert plan.controller["KVPILOT_CONTROLLER_TICK_MS"] == "50"
    monkeypatch.setenv("KVPILOT_WORKER_MAX_RUNNING", "5")
    assert plan_stack(load_settings(model=model)).workers[0]["KVPILOT_WORKER_MAX_RUNNING"] == "5"
    flagged = plan_stack(load_settings(model=model, device_budget="16MiB"))
    assert flagged.workers[0]["KVPILOT_WORKER_DEVICE_BUDGET_BYTES"] == str(16 << 20)


def test_the_planner_is_the_controllers_own_unless_named(home: Path) -> None:
    model = str(make_model(home / "tiny"))
    assert "KVPILOT_CONTROLLER_PLANNER" not in plan_stack(load_settings(model=model)).controller
    named = plan_stack(load_settings(model=model, planner="learned"))
    assert named.controller["KVPILOT_CONTROLLER_PLANNER"] == "learned"


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ("[worker]\nmax_runing = 3\n", "max_runing"),
        ("[worker]\nmax_running = 0\n", "max_running"),
        ("[controller]\ntick_ms = -1\n", "tick_ms"),
    ],
)
def test_bad_process_settings_are_refused_before_anything_starts(home: Path, table: str, named: str) -> None:
    (home / "kvpilot.toml").write_text(table)
    with pytest.raises(ValidationError, match=named):
        plan_stack(load_settings(model=str(make_model(home / "tiny"))))
