"""A real Prometheus for tests: started on a free port with a configuration, asked over its HTTP API."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import free_port

FOUND = shutil.which("prometheus") is not None and shutil.which("promtool") is not None
START_TIMEOUT_S = 30.0

needs_prometheus = pytest.mark.skipif(
    not FOUND and "KVPILOT_TEST_ALL" not in os.environ,
    reason="needs `prometheus` and `promtool`: apt-get install prometheus",
)
"""Skips a test where Prometheus is not installed; with KVPILOT_TEST_ALL set, as in CI, it fails there instead."""


class Prometheus:
    """A running one; errors of its API are :class:`AssertionError` with its words."""

    def __init__(self, address: str) -> None:
        self.address = address

    def get(self, path: str, **parameters: Any) -> Any:
        """The answer's data."""
        asked = urllib.parse.urlencode(parameters, doseq=True)
        try:
            with urllib.request.urlopen(f"http://{self.address}/api/v1/{path}?{asked}", timeout=10) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} {parameters}: {error.read().decode()}") from None

    def now(self, expression: str) -> list[dict[str, Any]]:
        """Series of an instant query, each with ``metric`` and ``value``."""
        data = self.get("query", query=expression)
        assert data["resultType"] == "vector", f"{expression} gives a {data['resultType']}"
        return data["result"]

    def lately(self, expression: str, seconds: float) -> list[dict[str, Any]]:
        """Series of a range query up to now, a value a second, each with ``metric`` and ``values``."""
        end = time.time()
        return self.get("query_range", query=expression, start=end - seconds, end=end, step=1)["result"]


@contextlib.contextmanager
def prometheus(folder: Path, configuration: Mapping[str, Any]) -> Iterator[Prometheus]:
    """Runs one with this configuration for as long as the context lasts."""
    file, log = folder / "prometheus.yml", folder / "prometheus.log"
    file.write_text(yaml.safe_dump(dict(configuration)), encoding="utf-8")
    address = f"127.0.0.1:{free_port()}"
    command = [
        "prometheus",
        f"--config.file={file}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
        "--log.level=warn",
    ]
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            _wait(address, process, log)
            yield Prometheus(address)
        finally:
            process.kill()  # its data is thrown away


def _wait(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        assert process.poll() is None, f"prometheus ended: {log.read_text()}"
        assert time.monotonic() < deadline, f"prometheus is not ready: {log.read_text()}"
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{address}/-/ready", timeout=1):
            return
        time.sleep(0.05)
