"""This checkout as a command: what `eagleray` means in the benchmarks, whether or not it is installed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = str(ROOT / "platform")
EAGLERAY = (sys.executable, "-m", "eagleray.cli.main")


def environment() -> dict[str, str]:
    """The environment of every contestant: this checkout, no cluster but its own, nothing phones home."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "OMP_", "EAGLERAY_"))}
    path = os.pathsep.join([SOURCES, *filter(None, [kept.get("PYTHONPATH")])])
    return {**kept, "PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0", "DO_NOT_TRACK": "true"}


def make_importable() -> None:
    """Lets this process import eagleray from the checkout."""
    if SOURCES not in sys.path:
        sys.path.insert(0, SOURCES)
