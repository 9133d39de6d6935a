"""``kvpilot demo`` with the real model: what a new user sees first must go well."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli import tether
from cli.demo_jobs import FACT_ANSWER
from models.store import CACHE_VARIABLE, cache_folder

pytestmark = [
    pytest.mark.model,
    pytest.mark.slow,
    pytest.mark.timeout(660),
    pytest.mark.skipif(not tether.SUPPORTED, reason="needs Linux"),
]
MOST_S = 600.0
"""The demo takes less than ten minutes on two cores."""
REQUEST = {
    "name": str,
    "tokens": int,
    "tokens_per_s": float,
    "peak_device_bytes": int,
    "full_cache_bytes": int,
    "fact_found": (bool, type(None)),
    "switches": list,
}
SWITCH = {"at_token": int, "from": str, "to": str, "reason": str, "ordered_by": str}


def _has(document: dict[str, Any], fields: dict[str, Any]) -> bool:
    return all(isinstance(document[name], kind) for name, kind in fields.items())


def test_the_demo_goes_well(smollm2: Path, tmp_path: Path) -> None:
    file = tmp_path / "demo.json"
    done = subprocess.run(
        [sys.executable, "-c", "from cli.main import app; app()", "demo", "--json", str(file)],
        capture_output=True,
        text=True,
        timeout=MOST_S,
        cwd=tmp_path,
        env={**_environment(), CACHE_VARIABLE: str(cache_folder())},
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    document = json.loads(file.read_text())
    assert document["failures"] == []
    requests = {request["name"]: request for request in document["requests"]}
    assert set(requests) == {"document", "chat-1", "chat-2", "chat-3", "stream", "code"}
    for request in requests.values():
        assert _has(request, REQUEST), request
        assert request["tokens"] > 0
        assert request["tokens_per_s"] > 0
        assert request["peak_device_bytes"] > 0
        assert request["full_cache_bytes"] > 0
        assert all(_has(switch, SWITCH) for switch in request["switches"])
        assert all(0 <= switch["at_token"] <= request["tokens"] for switch in request["switches"])

    assert requests["document"]["fact_found"] is True
    assert FACT_ANSWER in requests["document"]["text"]
    assert all(request["fact_found"] is None for name, request in requests.items() if name != "document")
    midway = [
        switch
        for request in requests.values()
        for switch in request["switches"]
        if switch["ordered_by"] == "controller" and 0 < switch["at_token"] < request["tokens"]
    ]
    assert midway
    assert all(switch["reason"] and switch["from"] != switch["to"] for switch in midway)
    for name in requests:  # each is in the table that people read
        assert name in done.stdout


def _environment() -> dict[str, str]:
    """Ours without settings of kvpilot's: the demo is tried with its defaults."""
    return {name: value for name, value in os.environ.items() if not name.startswith("KVPILOT_")}
