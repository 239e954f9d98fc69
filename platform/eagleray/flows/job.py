"""What every job file under jobs/ does: read ``--recipe FILE key=value ...``, run the flow, print its summary, exit.

Example:
    >>> sys.exit(run_job(ScoreConfig, run, ["--recipe", "jobs/recipes/score-cpu.yaml", "out=runs/a"]))
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from eagleray.core import edge
from eagleray.core.config import Config, load, parse_assignments
from eagleray.flows.profiles import find_shipped

C = TypeVar("C", bound=Config)


def run_job(kind: type[C], run: Callable[[C], Any], arguments: Sequence[str]) -> int:
    """Runs a flow as a job.

    Args:
        kind: The flow's Config.
        run: The flow.
        arguments: The command line after the script's name.

    Returns:
        The exit code: 0, or that of the error, which has been said on stderr.
    """
    parser = argparse.ArgumentParser(description=f"keys: {', '.join(kind.model_fields)}")
    parser.add_argument("--recipe", help="a YAML file of keys")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a fault")
    parser.add_argument("assignments", nargs="*", metavar="key=value", help="a key of the config")
    options = parser.parse_args(arguments)

    def body() -> None:
        recipe = find_recipe(options.recipe) if options.recipe else None
        config = load(kind, recipe=recipe, overrides=parse_assignments(options.assignments))
        summary = run(config)
        sys.stdout.write(json.dumps(to_json(summary), indent=1, ensure_ascii=False) + "\n")

    return edge.guarded(body, is_debug=options.debug)


def find_recipe(path: str) -> Path:
    """A recipe's file: as given, or where what ships beside the code is found."""
    return Path(path) if Path(path).exists() else find_shipped(path) or Path(path)


def to_json(value: Any) -> Any:
    """A flow's result as JSON values."""
    if hasattr(value, "to_json"):
        return value.to_json()
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
