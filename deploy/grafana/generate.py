"""Makes the dashboards' JSON: ``python -m deploy.grafana.generate``; ``--check`` only compares.

The JSON is what Grafana imports and what is installed; it is made, because some 90 queries by hand drift from the
metrics' names, from each other's filters, and from what panels of a kind should share.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.grafana import fleet, policy, serving

FOLDER = Path(__file__).resolve().parent
DASHBOARDS = {
    "kvpilot-fleet.json": fleet.dashboard,
    "kvpilot-serving.json": serving.dashboard,
    "kvpilot-policy.json": policy.dashboard,
}


def texts() -> dict[str, str]:
    """What each file is to hold."""
    encoder = JSONEncoder(sort_keys=True, indent=2)
    made = {name: make().build() for name, make in DASHBOARDS.items()}
    for dashboard in made.values():
        for number, panel in enumerate(dashboard.panels or [], start=1):
            panel.id_val = number
    return {name: encoder.encode(dashboard) + "\n" for name, dashboard in made.items()}


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is stale")
    check = parser.parse_args().check
    stale = []
    for name, text in texts().items():
        file = FOLDER / name
        if check and not (file.is_file() and file.read_text(encoding="utf-8") == text):
            stale.append(name)
        elif not check:
            file.write_text(text, encoding="utf-8")
    if stale:
        print(f"stale: {', '.join(stale)}; run `python -m deploy.grafana.generate`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
